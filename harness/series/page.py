# SPDX-License-Identifier: GPL-2.0-or-later
"""What :func:`harness.series.check.check` found out, as a page: patches down, clauses across.

It opens from a file and links to the reports of the patches' runs, which lie below it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.abi import Clause, all_clauses
from harness.build.series import Series
from harness.errors import HarnessError
from harness.report.html import page_environment
from harness.report.model import MachineRecord, Outcome, count
from harness.report.store import load_run, write_atomically
from harness.series.history import Judged, breaks, holds_since

__all__ = ["FILE_NAME", "render_page", "write_page"]

FILE_NAME = "patches.html"


@dataclass(frozen=True)
class PatchRow:
    """A patch with what it does. ``report``: that of its run, empty without one."""

    judged: Judged
    subject: str
    begin: list[str]
    broken: list[str]
    report: str

    @property
    def counts(self) -> dict[Outcome, int]:
        """Clauses by verdict, after this patch."""
        return count(self.judged.verdicts.values())


@dataclass(frozen=True)
class Cell:
    """A group of clauses after one patch: how many hold, and of how many that were tested."""

    held: int
    tested: int
    broken: list[str]

    @property
    def state(self) -> str:
        """For its colour."""
        if self.broken:
            return "broke"
        if not self.tested:
            return "untested"
        return "all" if self.held == self.tested else "some" if self.held else "none"


@dataclass(frozen=True)
class Span:
    """Patches after which a clause has the same verdict, in percent of all; None: no verdict."""

    outcome: Outcome | None
    start: float
    width: float
    first: int
    last: int


@dataclass(frozen=True)
class ClauseRow:
    """A clause from the first patch to the last. ``story``: what happened, and at which patch."""

    clause: Clause
    outcome: Outcome
    story: list[tuple[str, int]]
    spans: list[Span]


@dataclass(frozen=True)
class Group:
    """A group of clauses: a column of the table of patches."""

    title: str
    rows: list[ClauseRow]
    cells: dict[int, Cell]

    @property
    def counts(self) -> dict[Outcome, int]:
        """Clauses by verdict, after the last patch."""
        return count(row.outcome for row in self.rows)

    @property
    def broken(self) -> bool:
        """Whether any patch breaks a clause of it."""
        return any(cell.broken for cell in self.cells.values())


def write_page(series: Series, judged: Sequence[Judged], path: Path) -> None:
    """Write the page of a series of which these patches are judged.

    :raises OSError: it cannot be written; an older page is left as it was.
    """
    write_atomically(path, render_page(series, judged, path.parent))


def render_page(series: Series, judged: Sequence[Judged], place: Path) -> str:
    """The page as text. :param place: its directory, for its links."""
    broken = breaks(judged)
    since = holds_since(judged)
    reports = {one.number: _report(one, place) for one in judged}
    rows = [
        PatchRow(
            judged=one,
            subject=series.patches[one.number - 1].subject,
            begin=[clause for clause, number in since.items() if number == one.number],
            broken=broken.get(one.number, []),
            report=reports.get(one.same_as or one.number, ""),
        )
        for one in judged
    ]
    groups = _groups(judged, broken)
    template = page_environment("harness.series").get_template("patches.html.j2")
    return template.render(
        series=series,
        headline=_headline(series, judged, broken, since),
        state=_state(series, judged, broken),
        rows=rows,
        groups=groups,
        at_end={row.outcome for group in groups for row in group.rows},
        reports=reports,
        machine=_machine(judged),
    )


def _headline(
    series: Series,
    judged: Sequence[Judged],
    broken: Mapping[int, list[str]],
    since: Mapping[str, int],
) -> str:
    bad = [f"patch {one.number} {one.problem.partition(':')[0]}" for one in judged if one.problem]
    bad += [
        f"patch {number} breaks {clauses[0] if len(clauses) == 1 else f'{len(clauses)} clauses'}"
        for number, clauses in broken.items()
    ]
    if bad:
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        text = ", ".join(bad[:3]) + more
        return text[0].upper() + text[1:]
    if len(judged) < len(series.patches):
        return f"{len(judged)} of {len(series.patches)} patches looked at, none breaks a clause"
    tested = {clause for one in judged for clause in one.verdicts}
    return f"No patch breaks a clause; {len(since)} of {len(tested)} hold at the end"


def _state(
    series: Series, judged: Sequence[Judged], broken: Mapping[int, list[str]]
) -> Literal["pass", "fail", ""]:
    """What can be said of the whole series: nothing before all of it was looked at."""
    at_end = judged[-1].verdicts.values() if judged else ()
    complete = len(judged) == len(series.patches)
    if broken or any(one.problem for one in judged):
        return "fail"
    if complete and any(outcome.bad for outcome in at_end):
        return "fail"
    return "pass" if complete else ""


def _report(one: Judged, place: Path) -> str:
    """The report of a patch's run, from the page's directory; empty if it is not there."""
    report = Path(one.run) / "report.html" if one.run else None
    return os.path.relpath(report, place) if report and report.is_file() else ""


def _machine(judged: Sequence[Judged]) -> MachineRecord | None:
    """What the newest run that can be read ran on."""
    for one in reversed(judged):
        with contextlib.suppress(HarnessError):
            if one.run:
                return load_run(Path(one.run)).facts.machine
    return None


def _groups(judged: Sequence[Judged], broken: Mapping[int, list[str]]) -> list[Group]:
    """All groups of which a clause was tested, in the interface's order."""
    seen = dict.fromkeys(clause for one in judged for clause in one.verdicts)
    known = all_clauses()
    tested = [clause for clause in known.values() if clause.id in seen]
    tested += [_foreign(name) for name in seen if name not in known]
    found = []
    for title, members in itertools.groupby(tested, lambda clause: clause.group):
        rows = [_clause(clause, judged) for clause in members]
        names = {row.clause.id for row in rows}
        cells = {}
        for one in judged:
            verdicts = [one.verdicts[name] for name in names if name in one.verdicts]
            cells[one.number] = Cell(
                held=verdicts.count(Outcome.PASS),
                tested=sum(verdict is not Outcome.SKIP for verdict in verdicts),
                broken=[name for name in broken.get(one.number, ()) if name in names],
            )
        found.append(Group(title, rows, cells))
    return found


def _foreign(name: str) -> Clause:
    """A stand-in for a clause that is told elsewhere, such as that of another version."""
    return Clause(
        id=name, group="Other clauses", basis="test", text="", documents=(), side="kernel"
    )


def _clause(clause: Clause, judged: Sequence[Judged]) -> ClauseRow:
    story: list[tuple[str, int]] = []
    holds = False
    last = Outcome.MISS
    for one in judged:
        outcome = one.verdicts.get(clause.id)
        if outcome is None:
            continue
        last = outcome
        if outcome is Outcome.PASS and not holds:
            story.append(("holds again since" if story else "holds since", one.number))
            holds = True
        elif outcome.bad and holds:
            story.append(("broken by", one.number))
            holds = False
    return ClauseRow(clause, last, story, _spans(clause.id, judged))


def _spans(clause: str, judged: Sequence[Judged]) -> list[Span]:
    spans = []
    at = 0
    for outcome, members in itertools.groupby(judged, lambda one: one.verdicts.get(clause)):
        numbers = [one.number for one in members]
        spans.append(
            Span(
                outcome=outcome,
                start=round(100 * at / len(judged), 3),
                width=round(100 * len(numbers) / len(judged), 3),
                first=numbers[0],
                last=numbers[-1],
            )
        )
        at += len(numbers)
    return spans
