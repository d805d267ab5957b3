# SPDX-License-Identifier: GPL-2.0-or-later
"""A run as its reader sees it: clauses by group, tests, failures, what nobody tested.

The documents (terminal, JUnit, HTML) are made from this, so that they agree.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.abi import Clause, load_clauses
from harness.report import known as known_failures
from harness.report.known import Known, known_for
from harness.report.model import (
    ClauseResult,
    Outcome,
    RunFacts,
    Verdict,
    combine,
    count,
    exit_code,
    results_by_clause,
)
from harness.report.store import Run

__all__ = ["GroupView", "Row", "RunView", "TestView", "rerun_command", "view_of"]

NO_CLAUSE = "Tests that name no clause"

_COMMAND = "inv conform"
_TARGET = re.compile(r" --target \S+")


@dataclass(frozen=True)
class Row:
    """One clause with its result."""

    clause: Clause
    result: ClauseResult

    @property
    def by_target(self) -> dict[str, Outcome]:
        """Its verdict on each target that tested it."""
        seen: dict[str, list[Outcome]] = {}
        for one in self.result.verdicts:
            seen.setdefault(one.target, []).append(one.verdict)
        return {target: combine(outcomes) for target, outcomes in seen.items()}


@dataclass(frozen=True)
class GroupView:
    """A group of clauses, in the interface's order."""

    title: str
    rows: tuple[Row, ...]
    uncovered: tuple[Clause, ...]
    """Clauses of the group that no test of the run names."""

    @property
    def counts(self) -> dict[Outcome, int]:
        """How often each verdict occurs."""
        return count(row.result.verdict for row in self.rows)

    @property
    def verdict(self) -> Outcome:
        """The worst verdict in it."""
        return combine(row.result.verdict for row in self.rows)


@dataclass(frozen=True)
class TestView:
    """One test on one target, with its verdicts on one or several clauses."""

    test: str
    target: str
    verdicts: tuple[Verdict, ...]

    @property
    def first(self) -> Verdict:
        """The verdict that speaks for the test: its worst."""
        return next(v for v in self.verdicts if v.verdict is self.verdict)

    @property
    def verdict(self) -> Outcome:
        """The worst of its verdicts."""
        return combine(v.verdict for v in self.verdicts)

    @property
    def clauses(self) -> list[str]:
        """The clauses it names."""
        return [v.clause for v in self.verdicts if v.clause]

    @property
    def blamed(self) -> list[str]:
        """Of these, the ones that share the test's worst verdict."""
        return [v.clause for v in self.verdicts if v.clause and v.verdict is self.verdict]

    @property
    def name(self) -> str:
        """The test's own name, without its file."""
        return self.test.rpartition("::")[2]


class RunView:
    """Everything that documents show of a run."""

    def __init__(self, run: Run, known: Iterable[Known] | None = None) -> None:
        self.run = run
        self.verdicts = run.all_verdicts()
        self.results = results_by_clause(self.verdicts)
        if known is None:
            kept = run.path / known_failures.FILE_NAME
            known = known_failures.load_known(kept) if kept.is_file() else ()
        self._listed = known_for(known, filter(None, self.results), run.facts)

    @property
    def known(self) -> dict[str, Known]:
        """Clauses that failed as a list of known failures says, with the entry."""
        return {
            clause: one
            for clause, one in self._listed.items()
            if self.results[clause].verdict is Outcome.FAIL
        }

    @property
    def passes_again(self) -> dict[str, Known]:
        """Clauses that held although they are listed as known failures."""
        return {
            clause: one
            for clause, one in self._listed.items()
            if self.results[clause].verdict is Outcome.PASS
        }

    @property
    def facts(self) -> RunFacts:
        """The facts of the run."""
        return self.run.facts

    @property
    def clauses(self) -> Mapping[str, Clause]:
        """The clauses of the version of the interface that the series was held to."""
        return load_clauses(self.facts.abi or "v12")

    @functools.cached_property
    def counts(self) -> dict[Outcome, int]:
        """Clauses by verdict."""
        return count(r.verdict for name, r in self.results.items() if name)

    @functools.cached_property
    def groups(self) -> list[GroupView]:
        """All groups of which at least one clause has a verdict, in the interface's order."""
        grouped: dict[str, tuple[list[Row], list[Clause]]] = {}
        for clause in self.clauses.values():
            rows, uncovered = grouped.setdefault(clause.group, ([], []))
            result = self.results.get(clause.id)
            if result is None:
                uncovered.append(clause)
            else:
                rows.append(Row(clause, result))
        foreign = [
            Row(_foreign(name), result)
            for name, result in self.results.items()
            if name not in self.clauses
        ]
        groups = [
            GroupView(title, tuple(rows), tuple(uncovered))
            for title, (rows, uncovered) in grouped.items()
            if rows
        ]
        return groups + ([GroupView(NO_CLAUSE, tuple(foreign), ())] if foreign else [])

    @functools.cached_property
    def untested_groups(self) -> dict[str, int]:
        """Groups of which no clause has a verdict, with the number of their clauses."""
        totals: dict[str, int] = {}
        for clause in self.clauses.values():
            totals[clause.group] = totals.get(clause.group, 0) + 1
        for group in self.groups:
            totals.pop(group.title, None)
        return totals

    @functools.cached_property
    def tests(self) -> list[TestView]:
        """Each test once for each target, in the order in which they came to their end."""
        members: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in self.verdicts:
            members.setdefault((verdict.test, verdict.target), []).append(verdict)
        return [TestView(*key, tuple(verdicts)) for key, verdicts in members.items()]

    @functools.cached_property
    def targets(self) -> list[str]:
        """The targets of its verdicts: several in a run that was merged."""
        return list(dict.fromkeys(v.target for v in self.verdicts if v.target))

    @property
    def bad_tests(self) -> list[TestView]:
        """Tests that are not PASS or SKIP, the worst kind first."""
        kinds = (Outcome.FAIL, Outcome.ERROR, Outcome.MISS)
        bad = [test for test in self.tests if test.verdict.bad]
        return sorted(bad, key=lambda test: kinds.index(test.verdict))

    @property
    def sequences(self) -> list[TestView]:
        """Tests that took steps, which are shown as timelines."""
        return [test for test in self.tests if "timeline" in test.first.evidence]

    @property
    def exit_code(self) -> int:
        """The exit code that the verdicts ask for; known failures do not count."""
        known = self.known
        return exit_code(
            v for v in self.verdicts if v.verdict is not Outcome.FAIL or v.clause not in known
        )

    @property
    def headline(self) -> str:
        """The run in one sentence."""
        total = sum(self.counts.values())
        counts = self.counts
        if not total:
            return self._without_clauses()
        if counts[Outcome.FAIL]:
            one = counts[Outcome.FAIL] == 1
            known = f", {len(self.known)} of them as is known" if self.known else ""
            return (
                f"{counts[Outcome.FAIL]} of {total} promises {'was' if one else 'were'} "
                f"broken{known}"
            )
        undecided = counts[Outcome.ERROR] + counts[Outcome.MISS]
        if undecided:
            return f"No promise was broken, {undecided} of {total} could not be judged"
        if not counts[Outcome.PASS]:
            return f"Nothing was tested: all {total} were skipped"
        skipped = f", {counts[Outcome.SKIP]} do not apply here" if counts[Outcome.SKIP] else ""
        held = counts[Outcome.PASS]
        return (f"All {held} promises held" if held > 1 else "The promise held") + skipped

    def _without_clauses(self) -> str:
        """The same of tests that name no clause, such as the fuzzer's."""
        if not self.tests:
            return "Nothing was tested"
        bad = len(self.bad_tests)
        return f"{bad or 'None'} of {len(self.tests)} tests failed; they name no clause"

    def path(self, relative: str) -> Path:
        """A piece of evidence on disk."""
        return self.run.path / relative

    def rerun(self, tests: Iterable[str], *, target: str = "") -> str:
        """The command that runs these tests again.

        :param target: where, if the run has several.
        """
        command = self.facts.rerun
        if target and len(self.targets) > 1:
            command = f"{_TARGET.sub('', command or _COMMAND)} --target {shlex.quote(target)}"
        return rerun_command(command, list(tests))


def _foreign(name: str) -> Clause:
    """A stand-in for a clause that this version does not know, or for no clause."""
    return Clause(
        id=name or "-",
        group=NO_CLAUSE,
        basis="test",
        text="not a clause of this version" if name else "tests that name no clause",
        documents=(),
        side="kernel",
    )


def rerun_command(command: str, tests: Sequence[str]) -> str:
    """The command to type to run these tests again, and no others."""
    return f"{command or _COMMAND} --select {shlex.quote(' '.join(tests))}"


def view_of(run: Run, known: Iterable[Known] | None = None) -> RunView:
    """The reader's view of a run.

    :param known: known failures; the list that the run was started with if None.
    :raises UsageError: that list is wrong.
    """
    return RunView(run, known)
