# SPDX-License-Identifier: GPL-2.0-or-later
"""Does the suite run on other revisions of the interface than this project's series speaks?

``tests/revisions`` holds variants of that series: a directory each, with patches that come after
those of the series, and the ``series.toml`` that describes what comes of it. A variant has to
keep all that it claims; but where ``revisions.toml`` lists clauses, each of these has to fail:
it is the kernel of one revision, held to another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import paths
from harness.build.progress import note
from harness.build.series import load_series
from harness.conform import KERNEL_SUITES, conform, ended_run
from harness.errors import UsageError
from harness.report.store import last_run
from harness.series.description import FILE_NAME, found_beside, load_description
from harness.variants import chosen, entries_of, failing, passing_place, series_on_top

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["REVISIONS", "Revision", "load_revisions", "run"]

REVISIONS = paths.ROOT / "tests" / "revisions"
_ROOT = "revisions"


@dataclass(frozen=True)
class Revision:
    """A variant of the series. ``red``: the clauses that have to fail, none as a rule."""

    name: str
    place: Path
    red: tuple[str, ...]


def load_revisions(directory: Path = REVISIONS) -> list[Revision]:
    """The variants in a directory, checked.

    :raises UsageError: one without a description, an unknown clause, an entry without directory.
    """
    from harness.abi import load_clauses

    source = directory / "revisions.toml"
    entries = entries_of(source)
    found = [
        Revision(place.name, place, tuple(entries.pop(place.name, {}).get("red", ())))
        for place in sorted(directory.iterdir())
        if place.is_dir()
    ]
    faults = [f"there is no directory {name}" for name in entries]
    for one in found:
        known = load_clauses(load_description(str(one.place / FILE_NAME)).revision)
        faults += [f"{one.name}: no clause {clause}" for clause in one.red if clause not in known]
    if faults:
        raise UsageError(f"{source}: {'; '.join(faults)}")
    return found


def run(settings: Settings, *, select: str | None = None) -> int:
    """Hold each variant to the conformance tests.

    :param select: names of variants, with wildcards, separated by blanks; all by default.
    :returns: 0 when each turned out as it has to.
    :raises UsageError: an unknown name.
    :raises BuildError: a variant does not apply or compile: its patches have to follow the series.
    """
    revisions = load_revisions()
    names = chosen([one.name for one in revisions], select, what="revision")
    bad = []
    for one in revisions:
        if one.name in names:
            note(f"Revision {one.name}: {len(load_series(one.place).patches)} patches")
            wrong = _judge(settings, one)
            note(f"Revision {one.name}: {wrong or 'as it has to be'}")
            bad += [f"{one.name}: {wrong}"] if wrong else []
    for text in bad:
        print(text)
    return 1 if bad else 0


def _judge(settings: Settings, one: Revision) -> str:
    """What is wrong with a variant, or nothing."""
    with passing_place(settings, _ROOT) as root:
        variant = _variant(settings, one, root / one.name)
        if not one.red:
            code = conform(variant, suites=KERNEL_SUITES)
            ended_run(variant)  # or an interrupt would end this variant alone
            return "" if code == 0 else f"not all held; see {last_run(variant.reports)}"
        failed = failing(variant, one.red, suites=KERNEL_SUITES)
        green = [clause for clause in one.red if clause not in failed]
        return f"{', '.join(green)} did not turn red" if green else ""


def _variant(settings: Settings, one: Revision, root: Path) -> Settings:
    """Settings with the variant's series, and a cache for what is made of it."""
    added = [(patch.path, f"9{patch.name}") for patch in load_series(one.place).patches]
    added.append((one.place / FILE_NAME, FILE_NAME))
    series = series_on_top(
        settings, root, settings.kernel_series, added, what=f"revision {one.name}"
    )
    description = found_beside(series)
    return dataclasses.replace(
        settings,
        cache=root,
        reports=settings.reports / _ROOT / one.name,
        workers=1,
        kernel_series=series,
        description=description,
        abi=load_description(description).revision,
    )
