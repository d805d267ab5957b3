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
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from harness.build import cache, checkers
from harness.build.kernel import build_kernel, patched_source
from harness.build.passing import passing_cache
from harness.build.progress import note
from harness.build.series import Patch, Series, load_series
from harness.conform import KERNEL_SUITES, conform, ended_run, selection
from harness.errors import (
    BuildError,
    ConformanceError,
    HarnessError,
    InfraError,
    PatchError,
    UsageError,
)
from harness.report.model import Outcome
from harness.report.store import Run
from harness.report.view import view_of
from harness.series.ahead import building_ahead
from harness.series.history import Judged, breaks, first_change, holds_since, to_csv
from harness.series.page import FILE_NAME as PAGE
from harness.series.page import write_page
from harness.settings import Settings

__all__ = ["Check", "check"]

_UNTESTED = ("Documentation/", "MAINTAINERS", "CREDITS", ".mailmap")
_JOURNAL = "judged.jsonl"
_TABLE = "clauses.csv"
_WIDTH = 160


def check(settings: Settings, *, select: str | None = None, bisect: str | None = None) -> int:
    """Judge each patch of the kernel's series, and tell what each does.

    :param select: only these clauses or tests, as of :func:`harness.conform.conform`.
    :param bisect: find the first patch that changes this clause, without trying all.
    :returns: 0: each patch applies, builds and boots, and none breaks what held before it.
        1: a patch breaks a clause, or its kernel does not boot. 3: one does not apply or build.
    :raises UsageError: a series without patches, or a clause or test that does not exist.
    """
    series = load_series(settings.kernel_series)
    if not series.patches:
        raise UsageError(f"the series {series.id} has no patches to check")
    if settings.kernel:
        raise UsageError("a kernel that was built elsewhere has no patches to check")
    selection(bisect or select, KERNEL_SUITES)
    one = Check(settings, series, select=bisect or select)
    try:
        if bisect:
            return _bisect(one, bisect)
        return _tell(one, list(_each(one)))
    finally:
        shutil.rmtree(one.passing, ignore_errors=True)


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
    """

    def __init__(self, settings: Settings, series: Series, *, select: str | None) -> None:
        self.settings = settings
        self.series = series
        self.select = select
        what = {
            "select": select or "",
            "target": settings.target,
            "flavour": settings.flavour,
            "abi": settings.abi,
            "description": settings.description,
            "qemu": load_series(settings.qemu_series).digest,
        }
        key = cache.key_of({"check": json.dumps(what)})[:6]
        self.place = settings.reports / "series" / f"{series.id}-{key}"
        self.place.mkdir(parents=True, exist_ok=True)
        self.passing = settings.cache / "check" / self.place.name
        self._journal = self.place / _JOURNAL
        self._journal.touch()
        self._known = {one.digest: one for one in _records(self._journal)}

    def judge(self, number: int, *, ahead: int | None = None) -> Judged:
        """What there is to say about the series up to its patch ``number``; 0 is the base.

        :param ahead: the number of patches whose kernel is built meanwhile.
        """
        series = self.series.first(number)
        if (known := self._known.get(series.digest)) is not None:
            return known
        start = time.monotonic()
        patch = series.patches[-1] if number else None
        before = self._before(number)
        if patch and before and before.verdicts and _only_text(patch):
            found = Judged(
                number=number,
                patch=patch.name,
                digest=series.digest,
                checkpatch=self._checkpatch(self._settings(number), patch),
                verdicts=before.verdicts,
                same_as=before.same_as or before.number,
            )
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

    def _before(self, number: int) -> Judged | None:
        """What was found out about the series without its patch ``number``."""
        return self._known.get(self.series.first(number - 1).digest) if number > 1 else None

    def _look(self, number: int, patch: Patch | None, ahead: int | None) -> Judged:
        settings = self._settings(number)
        name = patch.name if patch else "the base"
        found = Judged(number=number, patch=name, digest="")
        try:
            build_kernel(settings)
        except PatchError as error:
            return msgspec.structs.replace(found, applies=error.message)
        except BuildError as error:
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
        with building_ahead(following, self._where(number) / "ahead"):
            boots, run, verdicts = self._judge_clauses(number, settings)
        return msgspec.structs.replace(found, boots=boots, run=run, verdicts=verdicts)

    def _judge_clauses(
        self, number: int, settings: Settings
    ) -> tuple[str, str, dict[str, Outcome]]:
        """What kept the kernel from being tested; the run's directory; the clauses' verdicts.

        Before a series is whole most tests fail, and a host for each of these would take most
        of the time. So hosts serve on after a failure, and no patch is blamed for one that
        does not come again on a fresh host; nor is the series, after its last patch.
        """
        shutil.rmtree(settings.reports, ignore_errors=True)  # of a check that was interrupted
        trouble, done = self._run(settings, self.select, keep_hosts=True)
        if done is None:
            return trouble or "no test ran", "", {}
        verdicts = _verdicts(done)
        bad = {clause for clause, verdict in verdicts.items() if verdict.bad}
        if number < len(self.series.patches):
            before = self._before(number)
            held = before.verdicts if before else {}
            bad = {clause for clause in bad if held.get(clause) is Outcome.PASS}
        if bad and not trouble:
            note(f"Once more, on fresh hosts: {', '.join(sorted(bad))}")
            tests = {one.test for one in done.verdicts if one.clause in bad and one.verdict.bad}
            trouble, again = self._run(settings, " ".join(sorted(tests)))
            second = _verdicts(again) if again else {}
            verdicts |= {clause: second.get(clause, verdicts[clause]) for clause in bad}
        return trouble, str(done.path), verdicts

    def _run(
        self, settings: Settings, select: str | None, *, keep_hosts: bool = False
    ) -> tuple[str, Run | None]:
        """Run the suite; what was in the way, and the run if there was one."""
        settings.reports.mkdir(parents=True, exist_ok=True)
        trouble = ""
        with (settings.reports / "summary.txt").open("a") as summary:
            try:
                # Ours is the table of all patches; each one's summary is in its directory.
                with contextlib.redirect_stdout(summary):
                    conform(settings, select=select, suites=KERNEL_SUITES, keep_hosts=keep_hosts)
            except (ConformanceError, InfraError) as error:
                trouble = error.message
        try:
            return trouble, ended_run(settings)
        except HarnessError:
            return trouble, None

    def _checkpatch(self, settings: Settings, patch: Patch) -> list[str]:
        try:
            with patched_source(settings) as src:
                return checkers.checkpatch(src, patch)
        except BuildError as error:
            return [f"not run: {error.message}"]

    def _sparse(self, settings: Settings, patch: Patch) -> list[str]:
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
        return dataclasses.replace(
            self.settings,
            cache=passing_cache(self.settings.cache, self.passing / f"{number:04d}"),
            kernel_series=directory,
            reports=place / "reports",
        )


def _verdicts(done: Run) -> dict[str, Outcome]:
    """The verdict of each clause."""
    return {name: result.verdict for name, result in view_of(done).results.items() if name}


def _records(journal: Path) -> Iterator[Judged]:
    """What an earlier check left; a line that was cut is as if it were not there."""
    if not journal.is_file():
        return
    for line in journal.read_bytes().splitlines():
        with contextlib.suppress(msgspec.MsgspecError):
            yield msgspec.json.decode(line, type=Judged)


def _only_text(patch: Patch) -> bool:
    """Whether the patch changes nothing that is compiled or run."""
    touched = patch.touched() - {"/dev/null"}
    return bool(touched) and all(path.startswith(_UNTESTED) for path in touched)


def _bisect(one: Check, clause: str) -> int:
    def state(number: int) -> Outcome | None:
        judged = one.judge(number)
        outcome = judged.verdicts.get(clause)
        note(f"after {number} patches {clause} is {outcome or judged.problem or 'untested'}")
        return outcome

    number, outcome = first_change(len(one.series.patches), state)
    patch = one.series.patches[number - 1]
    print(f"{clause} is {outcome or 'without a verdict'} since patch {number}, {patch.name}")
    judged = one.judge(number)
    print(judged.problem or f"its run: {judged.run}")
    return 0 if outcome is Outcome.PASS else 1


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
    for number, clauses in broken.items():
        name = one.series.patches[number - 1].name
        console.print(f"{number} {name} breaks {', '.join(clauses)}", soft_wrap=True)
    console.print(f"Patches and clauses: {one.place / _TABLE}", soft_wrap=True)
    console.print(f"Report: {one.place / PAGE}", soft_wrap=True)
    if any(row.applies or row.builds for row in judged):
        return BuildError.exit_code
    return ConformanceError.exit_code if broken or any(row.boots for row in judged) else 0
