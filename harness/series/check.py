# SPDX-License-Identifier: GPL-2.0-or-later
"""A series patch by patch: does each apply, build, boot, please the checkers, keep the clauses?

What was found out is kept, a line for each patch, so an interrupted check goes on where it was
and one that is repeated is free::

    <reports>/series/<name>@<digest>-<key>/judged.jsonl   see harness.series.history.Judged
    <reports>/series/<name>@<digest>-<key>/clauses.csv    patches down, clauses across
    <reports>/series/<name>@<digest>-<key>/patches.html   the same to look at
    <reports>/series/<name>@<digest>-<key>/NNNN/          its kernel's series, and its run
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from harness import paths
from harness.abi import load_clauses
from harness.build import cache, checkers
from harness.build.passing import passing_cache
from harness.build.progress import note
from harness.build.series import Patch, Series, load_series
from harness.conform import conform, ended_run, selection
from harness.errors import (
    BuildError,
    CompileError,
    ConfigError,
    ConformanceError,
    DeadlineError,
    HarnessError,
    LostHostError,
    PatchError,
    UsageError,
)
from harness.report.model import Outcome
from harness.report.store import Run
from harness.report.view import RunView, view_of
from harness.series.ahead import building_ahead
from harness.series.description import interface
from harness.series.history import (
    Judged,
    breaks,
    first_change,
    holds_since,
    to_csv,
    untested_before,
)
from harness.series.numbers import defined_numbers, require_numbers
from harness.series.page import FILE_NAME as PAGE
from harness.series.page import write_page
from harness.series.parts import PARTS, Part
from harness.settings import Settings

__all__ = ["Check", "check"]

_FRAGMENTS = sorted(paths.KERNEL_CONFIG.glob("*.config"))
_JOURNAL = "judged.jsonl"
_TABLE = "clauses.csv"
_WIDTH = 160


def check(
    settings: Settings,
    *,
    of: str = "kernel",
    select: str | None = None,
    bisect: str | None = None,
) -> int:
    """Judge each patch of a series, and tell what each does.

    :param of: whose patches: ``kernel``, or ``qemu``; the other's are all applied.
    :param select: only these clauses or tests, as of :func:`harness.conform.conform`.
    :param bisect: find the first patch that changes this clause, without trying all.
    :returns: 0: each patch applies, builds and boots, and none breaks what held before it.
        1: a patch breaks a clause, or its kernel does not boot. 3: one does not apply or build.
    :raises UsageError: a series without patches, or a clause or test that does not exist.
    """
    if (part := PARTS.get(of)) is None:
        raise UsageError(f"there are no patches of {of}", hint=f"choose {' or '.join(PARTS)}")
    series = load_series(getattr(settings, part.setting))
    if not series.patches:
        raise UsageError(f"the series {series.id} has no patches to check")
    if settings.kernel and of == "kernel":
        raise UsageError("a kernel that was built elsewhere has no patches to check")
    if bisect:
        _require_clause(settings, bisect)
    selection(select, part.suites)
    source = part.source(settings)
    one = Check(
        settings,
        series,
        part=part,
        select=bisect or select,
        alone=bool(bisect),
        base=f"{source.name} {source.version} {source.digest}",
    )
    if of == "kernel":
        one.require_own_numbers()
    try:
        if bisect:
            return _bisect(one, bisect)
        return _tell(one, list(_each(one)))
    finally:
        shutil.rmtree(one.passing, ignore_errors=True)


def _require_clause(settings: Settings, clause: str) -> None:
    if clause not in load_clauses(interface(settings).name):
        raise UsageError(
            f"there is no clause {clause} to look for: --bisect takes the id of one",
            hint="--select takes patterns and tests, too",
        )


def _each(one: Check) -> Iterator[Judged]:
    total = len(one.series.patches)
    so_far = []
    for number in range(1, total + 1):
        judged = one.judge(number, ahead=number + 1)
        note(f"{number}/{total} {judged.patch}: {_outcome(judged)}")
        so_far.append(judged)
        write_page(one.series, so_far, one.place / PAGE)
        (one.place / _TABLE).write_text(to_csv(so_far))
        yield judged
        if judged.applies:
            note("the patches after it are not looked at: they are made for it")
            return


class Check:
    """A series that is being checked, with what was found out so far.

    :param select: what is run of the suite.
    :param alone: patches are not judged in their order, so that nothing is known of the one before.
    :param base: the source that the series is for, with its version and digest.
    """

    def __init__(
        self,
        settings: Settings,
        series: Series,
        *,
        select: str | None,
        part: Part = PARTS["kernel"],
        alone: bool = False,
        base: str = "",
    ) -> None:
        self.settings = settings
        self.series = series
        self.select = select
        self.part = part
        self.alone = alone
        # All that a verdict depends on, beside the patches: a journal of other tests is another.
        what = {
            "select": select or "",
            "target": settings.target,
            "flavour": settings.flavour,
            "interface": repr(interface(settings)),
            "base": base,
        }
        for other in PARTS.values():
            if other.name != part.name:
                what[other.name] = load_series(getattr(settings, other.setting)).digest
        digests = {name: cache.digest_of(text) for name, text in what.items()}
        decisive = [*(paths.ROOT / suite for suite in part.suites), *_FRAGMENTS]
        digests |= {place.name: cache.digest_of(place) for place in decisive}
        key = cache.key_of(digests)[:6]
        self.place = settings.reports / "series" / f"{series.id}-{key}"
        self.place.mkdir(parents=True, exist_ok=True)
        self.passing = settings.cache / "check" / self.place.name
        self._journal = self.place / _JOURNAL
        self._journal.touch()
        self._known = {one.digest: one for one in _records(self._journal)}

    @property
    def judged(self) -> list[Judged]:
        """All that is known so far."""
        return list(self._known.values())

    def judge(self, number: int, *, ahead: int | None = None) -> Judged:
        """What there is to say about the series up to its patch ``number``; 0 is the base.

        :param ahead: the number of patches whose kernel is built meanwhile.
        """
        series = self.series.first(number)
        if (known := self._known.get(series.digest)) is not None:
            return known
        start = time.monotonic()
        patch = series.patches[-1] if number else None
        before = self._known.get(self.series.first(number - 1).digest) if number > 1 else None
        if patch and before and before.verdicts and self._only_text(patch):
            found = self._as_before(number, patch, before)
        else:
            found = self._look(number, patch, ahead)
            shutil.rmtree(self.passing / f"{number:04d}", ignore_errors=True)
        found = msgspec.structs.replace(
            found, duration_s=round(time.monotonic() - start, 1), digest=series.digest
        )
        with self._journal.open("ab") as file:
            file.write(msgspec.json.encode(found) + b"\n")
        self._known[found.digest] = found
        return found

    def require_own_numbers(self) -> None:
        """Check that the series speaks what it is held to.

        That is for the first patch to say that defines numbers. One that changes them later
        breaks what held, and is told so.

        :raises UsageError: it does not.
        """
        for number in range(1, len(self.series.patches) + 1):
            if defined_numbers(self.series.first(number)):
                require_numbers(self._settings(number))
                return

    def _as_before(self, number: int, patch: Patch, before: Judged) -> Judged:
        """What there is to say about a patch of text alone."""
        found = Judged(number=number, patch=patch.name, digest="")
        try:
            remarks = self._checkpatch(self._settings(number), patch)
        except PatchError as error:
            return msgspec.structs.replace(found, applies=error.message)
        return msgspec.structs.replace(
            found,
            checkpatch=remarks,
            verdicts=before.verdicts,
            known=before.known,
            same_as=before.same_as or before.number,
        )

    def _held(self, number: int) -> set[str]:
        """The clauses that held when the series was last tested before its patch ``number``."""
        for earlier in range(number - 1, 0, -1):
            one = self._known.get(self.series.first(earlier).digest)
            if one and one.verdicts:
                return {name for name, outcome in one.verdicts.items() if outcome is Outcome.PASS}
        return set()

    def _look(self, number: int, patch: Patch | None, ahead: int | None) -> Judged:
        settings = self._settings(number)
        name = patch.name if patch else "the base"
        found = Judged(number=number, patch=name, digest="")
        try:
            self.part.build(settings)
        except PatchError as error:
            return msgspec.structs.replace(found, applies=error.message)
        except (CompileError, ConfigError) as error:
            return msgspec.structs.replace(found, builds=error.message)
        if patch:
            found = msgspec.structs.replace(
                found,
                checkpatch=self._checkpatch(settings, patch),
                sparse=self._sparse(settings, patch),
            )
        following = None
        if ahead is not None and ahead <= len(self.series.patches):
            following = self._settings(ahead)
        with building_ahead(self.part, following, self._where(number) / "ahead"):
            return self._judge_clauses(number, settings, found)

    def _judge_clauses(self, number: int, settings: Settings, found: Judged) -> Judged:
        """Add what kept the kernel from being tested, or its run and the clauses' verdicts.

        Before a series is whole most tests fail, and a host for each of these would take most
        of the time. So hosts serve on after a failure, and no patch is blamed for one that
        does not come again on a fresh host; nor is the series, after its last patch.
        """
        shutil.rmtree(settings.reports, ignore_errors=True)  # of a check that was interrupted
        last = number == len(self.series.patches)
        trouble, done = self._run(settings, self.select, unfinished=not last)
        if done is None:
            return msgspec.structs.replace(found, boots=trouble or "no test ran")
        view = view_of(done)
        verdicts = _verdicts(view)
        bad = {clause for clause, verdict in verdicts.items() if verdict.bad} - view.known.keys()
        if not last and not self.alone:
            bad &= self._held(number)
        if bad and not trouble:
            note(f"Once more, on fresh hosts: {', '.join(sorted(bad))}")
            tests = {one.test for one in done.verdicts if one.clause in bad and one.verdict.bad}
            trouble, again = self._run(settings, " ".join(sorted(tests)))
            second = _verdicts(view_of(again)) if again else {}
            verdicts |= {clause: second.get(clause, verdicts[clause]) for clause in bad}
        return msgspec.structs.replace(
            found, boots=trouble, run=str(done.path), verdicts=verdicts, known=sorted(view.known)
        )

    def _run(
        self, settings: Settings, select: str | None, *, unfinished: bool = False
    ) -> tuple[str, Run | None]:
        """Run the suite; what was in the way, and the run if there was one.

        :raises InfraError: it was our own side, of which a patch has to say nothing.
        """
        settings.reports.mkdir(parents=True, exist_ok=True)
        trouble = ""
        with (settings.reports / "summary.txt").open("a") as summary:
            try:
                # Ours is the table of all patches; each one's summary is in its directory.
                with contextlib.redirect_stdout(summary):
                    conform(settings, select=select, suites=self.part.suites, unfinished=unfinished)
            # A host that does not come up, or ends while it boots, is the kernel's doing.
            except (ConformanceError, DeadlineError, LostHostError) as error:
                trouble = error.message
        try:
            return trouble, ended_run(settings)
        except HarnessError:
            return trouble, None

    def _checkpatch(self, settings: Settings, patch: Patch) -> list[str]:
        try:
            with self.part.patched_source(settings) as src:
                return checkers.checkpatch(src, patch, *self.part.checkpatch)
        except PatchError:
            raise
        except BuildError as error:
            return [f"not run: {error.message}"]

    def _sparse(self, settings: Settings, patch: Patch) -> list[str]:
        if self.part.name != "kernel":
            return []
        try:
            return checkers.sparse(settings, patch)
        except BuildError as error:
            return [f"not run: {error.message}"]

    def _where(self, number: int) -> Path:
        return self.place / f"{number:04d}"

    def _settings(self, number: int) -> Settings:
        """Settings with the series up to a patch, and a place for its reports."""
        place = self._where(number)
        directory = place / self.series.directory.name
        if not directory.is_dir():
            partial = place / ".series.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for patch in self.series.patches[:number]:
                (partial / patch.name).write_bytes(patch.content)
            partial.rename(directory)
        passing = self.passing / f"{number:04d}"
        settings = dataclasses.replace(
            self.settings,
            cache=passing_cache(self.settings.cache, passing, of=self.part.name),
            reports=place / "reports",
        )
        patches: dict[str, Any] = {self.part.setting: directory}
        return dataclasses.replace(settings, **patches)

    def _only_text(self, patch: Patch) -> bool:
        """Whether the patch changes nothing that is compiled or run."""
        touched = patch.touched() - {"/dev/null"}
        return bool(touched) and all(path.startswith(self.part.untested) for path in touched)


def _verdicts(view: RunView) -> dict[str, Outcome]:
    """The verdict of each clause."""
    return {name: result.verdict for name, result in view.results.items() if name}


def _records(journal: Path) -> Iterator[Judged]:
    """What an earlier check left; a line that was cut is as if it were not there."""
    if not journal.is_file():
        return
    for line in journal.read_bytes().splitlines():
        with contextlib.suppress(msgspec.MsgspecError):
            yield msgspec.json.decode(line, type=Judged)


def _bisect(one: Check, clause: str) -> int:
    def state(number: int) -> Outcome | None:
        judged = one.judge(number)
        outcome = judged.verdicts.get(clause)
        note(f"after {number} patches {clause} is {outcome or judged.problem or 'untested'}")
        return outcome

    found = first_change(len(one.series.patches), state)
    patch = one.series.patches[found.number - 1]
    since = f"since patch {found.number}, {patch.name}"
    if found.untested:
        others = " or ".join(map(str, found.untested))
        since += f" (or {others}: there it cannot be tested)"
    print(f"{clause} is {found.outcome} {since}")
    print(f"its run: {one.judge(found.number).run}")
    if any(judged.applies or judged.builds for judged in one.judged):
        return BuildError.exit_code
    return 0 if found.outcome is Outcome.PASS else ConformanceError.exit_code


def _outcome(one: Judged) -> str:
    if one.problem:
        return one.problem
    counts = [f"{n} {o}" for o in Outcome if (n := list(one.verdicts.values()).count(o))]
    same = f" (as patch {one.same_as}: it changes only text)" if one.same_as else ""
    return (", ".join(counts) or "no clause was tested") + same


def _tell(one: Check, judged: list[Judged]) -> int:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH  # a log is read by those who can scroll
    broken = breaks(judged)
    since = holds_since(judged)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "Patch", "checkpatch", "sparse", *Outcome, "begin to hold", "break"):
        left = heading == "Patch"
        table.add_column(
            heading, justify="left" if left else "right", no_wrap=left, overflow="ellipsis"
        )
    for row in judged:
        values = list(row.verdicts.values())
        counts = [str(values.count(outcome) or "·") for outcome in Outcome]
        begun = sum(number == row.number for number in since.values())
        table.add_row(
            str(row.number),
            row.patch,
            str(len(row.checkpatch) or "·"),
            str(len(row.sparse) or "·"),
            *counts,
            str(begun or "·"),
            str(len(broken.get(row.number, ())) or "·"),
        )
    console.print(table)
    for row in judged:
        if row.problem:
            console.print(f"{row.number} {row.patch} {row.problem}", soft_wrap=True)
    problems = {row.number for row in judged if row.problem}
    for number, clauses in broken.items():
        name = one.series.patches[number - 1].name
        others = untested_before(number, problems)
        told = f" (or {others} does, which cannot be tested)" if others else ""
        console.print(f"{number} {name} breaks {', '.join(clauses)}{told}", soft_wrap=True)
    console.print(f"Patches and clauses: {one.place / _TABLE}", soft_wrap=True)
    console.print(f"Report: {one.place / PAGE}", soft_wrap=True)
    if any(row.applies or row.builds for row in judged):
        return BuildError.exit_code
    return ConformanceError.exit_code if broken or any(row.boots for row in judged) else 0
