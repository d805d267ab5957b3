# SPDX-License-Identifier: GPL-2.0-or-later
"""Does the suite notice defects? Breaks kernel and QEMU on purpose, one way at a time.

Each mutant is a patch on top of one of the two series, in ``tests/mutants``, with the clauses
that must turn red. It is built incrementally, booted, and held to the tests of these
clauses; it is killed when every one of them has a FAIL. A survivor shows a hole.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import paths
from harness.build.progress import note
from harness.errors import BuildError, ConformanceError, UsageError
from harness.report.store import last_run
from harness.series.parts import PARTS
from harness.variants import chosen, entries_of, failing, passing_place, series_on_top

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["MUTANTS", "Mutant", "load_mutants", "run"]

MUTANTS = paths.ROOT / "tests" / "mutants"
_ROOT = "mutants"


_SUITES = {
    "kernel": PARTS["kernel"].suites,
    # Those whose machines have no operating system: they say more, and take seconds.
    "qemu": tuple(
        f"tests/lifecycle/test_{name}.py"
        for name in (
            "handshake",
            "migration",
            "object",
            "overtaken",
            "permissions",
            "reset",
            "snapshot",
            "stop",
            "variants",
        )
    ),
}
"""The tests that have to notice."""


@dataclass(frozen=True)
class Mutant:
    """One way to break a series, and the clauses that must notice it."""

    name: str
    patch: Path
    red: tuple[str, ...]
    target: str = ""
    """Where it can be noticed; nothing: on the target of the run."""
    of: str = "kernel"
    """Which series it breaks: ``kernel`` or ``qemu``."""


@dataclass(frozen=True)
class _Result:
    mutant: Mutant
    survived: tuple[str, ...]
    """Clauses that should have turned red and did not."""
    report: Path


def load_mutants(directory: Path = MUTANTS) -> list[Mutant]:
    """Read ``mutants.toml`` and check it against the patches beside it and the clauses.

    :raises UsageError: a patch without entry or an entry without patch, an unknown series
        or clause.
    """
    from harness.abi import load_clauses

    source = directory / "mutants.toml"
    entries = entries_of(source)
    mutants = [
        Mutant(
            name,
            directory / f"{name}.patch",
            red=tuple(entry.get("red", ())),
            target=entry.get("target", ""),
            of=entry.get("of", "kernel"),
        )
        for name, entry in sorted(entries.items())
    ]
    faults = [f"{mutant.name}: there is no {mutant.patch}" for mutant in mutants
              if not mutant.patch.is_file()]  # fmt: skip
    faults += [
        f"{path.name} has no entry"
        for path in sorted(directory.glob("*.patch"))
        if path.stem not in entries
    ]
    known = load_clauses()
    for mutant in mutants:
        if mutant.of not in PARTS:
            faults.append(f"{mutant.name} is of {mutant.of!r}, not of {' or '.join(PARTS)}")
        if not mutant.red:
            faults.append(f"{mutant.name} names no clause")
        faults += [f"{mutant.name}: no clause {one}" for one in mutant.red if one not in known]
    if faults:
        raise UsageError(f"{source}: {'; '.join(faults)}")
    return mutants


def run(settings: Settings, *, select: str | None = None) -> int:
    """Break the series in every way that ``tests/mutants`` knows, and see what notices.

    :param select: names of mutants, with wildcards, separated by blanks; all by default.
    :returns: 0 when all were noticed, 1 when one survived.
    :raises UsageError: an unknown name.
    :raises ConformanceError: a clause fails without any mutant.
    :raises BuildError: a mutant does not apply or compile: its patch has to follow the series.
    """
    mutants = load_mutants()
    names = chosen([mutant.name for mutant in mutants], select, what="mutant")
    mutants = [mutant for mutant in mutants if mutant.name in names]
    note("The series itself: what mutants must turn red has to be green without them")
    for of, target in sorted({(mutant.of, mutant.target) for mutant in mutants}):
        here = [mutant for mutant in mutants if (mutant.of, mutant.target) == (of, target)]
        red = sorted({clause for mutant in here for clause in mutant.red})
        if bad := failing(_alone(settings, target), red, suites=_SUITES[of]):
            raise ConformanceError(
                f"the series itself does not keep {', '.join(bad)}",
                hint="mend that first: on these clauses nothing can be learned from mutants",
            )
    results = []
    for result in _each(settings, mutants):
        results.append(result)
        note(f"Mutant {len(results)} of {len(mutants)}, {result.mutant.name}: {_verdict(result)}")
    survivors = [result for result in results if result.survived]
    print(f"\n{len(results) - len(survivors)} of {len(results)} mutants were noticed")
    for result in survivors:
        print(f"  {result.mutant.name} survived: {_verdict(result)}; see {result.report}")
    return 1 if survivors else 0


def _reports(settings: Settings) -> Path:
    """Mutants have reports of their own: the newest run is the newest of a real series."""
    return settings.reports / "mutants"


def _verdict(result: _Result) -> str:
    if result.survived:
        return f"{', '.join(result.survived)} did not turn red"
    return f"noticed by {', '.join(result.mutant.red)}"


def _each(settings: Settings, mutants: Sequence[Mutant]) -> Iterator[_Result]:
    """What became of each mutant. While one is tested the next is built."""
    with (
        passing_place(settings, _ROOT),
        ThreadPoolExecutor(1, thread_name_prefix="mutants") as builder,
    ):
        ahead = builder.submit(_build, settings, mutants[0])
        for mutant, following in itertools.zip_longest(mutants, mutants[1:]):
            mutated = ahead.result()
            if following is not None:
                ahead = builder.submit(_build, settings, following)
            failed = failing(mutated, mutant.red, suites=_SUITES[mutant.of])
            shutil.rmtree(mutated.cache, ignore_errors=True)
            survived = tuple(clause for clause in mutant.red if clause not in failed)
            yield _Result(mutant, survived, last_run(_reports(settings)))


def _alone(settings: Settings, target: str) -> Settings:
    """One worker, and reports that do not become the newest ones of the series itself."""
    return dataclasses.replace(
        settings, reports=_reports(settings), workers=1, target=target or settings.target
    )


def _build(settings: Settings, mutant: Mutant) -> Settings:
    """Build a mutant; answer settings with its series and a cache for what is made of it."""
    part = PARTS[mutant.of]
    original: Path | str = getattr(settings, part.setting)
    root = settings.cache / _ROOT / mutant.name
    added = [(mutant.patch, f"9999-{mutant.name}.patch")]
    what = f"mutant {mutant.name}"
    series = series_on_top(settings, root, original, added, what=what, of=mutant.of)
    alone = dataclasses.replace(_alone(settings, mutant.target), cache=root)
    mutated = dataclasses.replace(alone, **{part.setting: series})  # type: ignore[arg-type]
    try:
        part.build(mutated)
    except BuildError as error:
        raise BuildError(
            f"{what}: {error.message}",
            hint=f"make {mutant.patch} follow the series",
            details=error.details,
        ) from error
    return mutated
