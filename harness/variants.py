# SPDX-License-Identifier: GPL-2.0-or-later
"""A series with patches on top, held to clauses of which some must fail.

What mutants and revisions have in common: each is built once, in a cache that passes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
import tomllib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.build.cache import lock
from harness.build.passing import passing_cache
from harness.build.series import load_series
from harness.conform import conform, ended_run
from harness.errors import InfraError, UsageError
from harness.report.model import Outcome

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["chosen", "entries_of", "failing", "passing_place", "series_on_top"]

_PATIENCE_S = 10.0


def entries_of(source: Path) -> dict[str, Any]:
    """What a TOML file says of each variant, by name.

    :raises UsageError: it cannot be read.
    """
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{source} cannot be read: {error}") from error


def chosen(names: Sequence[str], select: str | None, *, what: str) -> Collection[str]:
    """Those of the names that are selected.

    :param select: patterns, separated by blanks or commas; all by default.
    :param what: such a variant is called.
    :raises UsageError: a pattern that fits none.
    """
    patterns = (select or "*").replace(",", " ").split()
    if unknown := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
        raise UsageError(
            f"there is no {what} {', '.join(sorted(unknown))}",
            hint=f"there are: {', '.join(names)}",
        )
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


@contextlib.contextmanager
def passing_place(settings: Settings, kind: str) -> Iterator[Path]:
    """A directory of the cache for what passes: empty at first, and gone afterwards.

    :param kind: of variants, which names it.
    :raises DeadlineError: another process is at work there.
    """
    place = settings.cache / kind
    with lock(settings.cache / f"{kind}.lock", what=kind, timeout_s=_PATIENCE_S):
        shutil.rmtree(place, ignore_errors=True)  # left over by a run that was killed
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def series_on_top(
    settings: Settings,
    root: Path,
    base: Path | str,
    added: Iterable[tuple[Path, str]],
    *,
    what: str,
    of: str = "kernel",
) -> Path:
    """A series of the patches of ``base`` and what is added, in a cache of its own.

    :param root: becomes the cache, a directory below the usual one; delete it after use.
    :param added: files, and their names in the series.
    :param what: it is, for messages. :param of: which series: ``kernel`` or ``qemu``.
    :raises InfraError: it cannot be written.
    """
    series = root / "patches"  # no kind of the cache has this name
    try:
        passing_cache(settings.cache, root, of=of)
        series.mkdir()
        for patch in load_series(base).patches:
            shutil.copy(patch.path, series)
        for file, name in added:
            shutil.copy(file, series / name)
    except OSError as error:
        raise InfraError(f"{what}: {error}") from error
    return series


def failing(settings: Settings, clauses: Sequence[str], *, suites: Sequence[str]) -> list[str]:
    """Run the tests of these clauses; answer which of them failed.

    :raises KeyboardInterrupt: the run was interrupted, so that it says nothing.
    """
    conform(settings, select=" ".join(clauses), suites=suites)
    verdicts = ended_run(settings).verdicts
    failed = {verdict.clause for verdict in verdicts if verdict.verdict is Outcome.FAIL}
    return [clause for clause in clauses if clause in failed]
