# SPDX-License-Identifier: GPL-2.0-or-later
"""Two runs compared: what broke, what was mended, what is new, what vanished, what got slower."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import UsageError
from harness.report.model import Outcome
from harness.report.speed import Speed, Speeds, speeds_of
from harness.report.store import VERDICTS, load_run
from harness.report.view import RunView

__all__ = ["Change", "Comparison", "Difference", "compare", "compare_runs", "tell"]


class Change(enum.Enum):
    """What became of a clause; the value is the heading of a list of such."""

    BROKE = "broke"
    MENDED = "mended"
    NEW = "new"
    VANISHED = "vanished"
    OTHERWISE = "still bad, otherwise"


@dataclass(frozen=True)
class Difference:
    """One clause whose verdict is not what it was; None where a run has none."""

    clause: str
    change: Change
    before: Outcome | None
    after: Outcome | None
    reason: str
    known: bool = False

    def __str__(self) -> str:
        states = f"{self.before or '-'} -> {self.after or '-'}"
        known = " (known failure)" if self.known else ""
        return f"{self.clause:<32} {states}{known}{f': {self.reason}' if self.reason else ''}"

    @property
    def worse(self) -> bool:
        """Whether a promise held that does no more, or a new one does not hold."""
        if self.known:
            return False
        if self.change is Change.NEW:
            return self.after is not None and self.after.bad
        if self.change is Change.OTHERWISE:
            # Nobody knows what it was before: a break must not hide behind a night of trouble.
            return self.after is Outcome.FAIL
        return self.change is Change.BROKE or (
            self.change is Change.VANISHED and self.before is Outcome.PASS
        )


@dataclass(frozen=True)
class Comparison:
    """All differences, the worst first, and what was measured in both."""

    differences: tuple[Difference, ...]
    measured: Speeds = field(default_factory=Speeds)

    @property
    def speeds(self) -> tuple[Speed, ...]:
        """What was measured in both, kind by kind."""
        return self.measured.kinds

    def of(self, change: Change) -> list[Difference]:
        """Those of one kind."""
        return [one for one in self.differences if one.change is change]

    @property
    def exit_code(self) -> int:
        """0: nothing is worse. 1: a promise broke, or something got slower. 4: something that
        held could not be judged, or was not tested any more."""
        worse = [one for one in self.differences if one.worse]
        if any(one.after is Outcome.FAIL for one in worse) or any(s.slower for s in self.speeds):
            return 1
        return 4 if worse else 0


def compare(before: RunView, after: RunView) -> Comparison:
    """Compare two runs, clause by clause."""
    names = dict.fromkeys([*after.results, *before.results])
    found = []
    for name in names:
        if not name:  # tests that name no clause
            continue
        old, new = before.results.get(name), after.results.get(name)
        a = old.verdict if old else None
        b = new.verdict if new else None
        change = _change(a, b)
        if change is not None:
            reason = new.reasons[0] if new and b is not Outcome.PASS and new.reasons else ""
            known = name in after.known and b is Outcome.FAIL
            found.append(Difference(name, change, a, b, reason, known))
    order = list(Change)
    return Comparison(tuple(sorted(found, key=lambda one: order.index(one.change))))


def _change(a: Outcome | None, b: Outcome | None) -> Change | None:
    if a is b:
        return None
    # A skip says nothing about the promise: as good as no verdict.
    was = None if a is Outcome.SKIP else a
    now = None if b is Outcome.SKIP else b
    if was is None or now is None:
        return None if was is now else Change.NEW if was is None else Change.VANISHED
    if now.bad:
        return Change.OTHERWISE if was.bad else Change.BROKE
    return Change.MENDED


def compare_runs(before: Path, after: Path) -> Comparison:
    """Compare two stored runs, of the suite or of a benchmark.

    :raises UsageError: no such run, or the two are of different kinds.
    """
    speeds = speeds_of(before, after)
    both = [(path / VERDICTS).is_file() for path in (before, after)]
    if all(both):
        found = compare(RunView(load_run(before)), RunView(load_run(after)))
        return Comparison(found.differences, speeds)
    if any(both) or not speeds.kinds:
        for path in (before, after):
            if not speeds.kinds or not (path / VERDICTS).is_file():
                load_run(path)  # says what is missing there
        raise UsageError(f"{before} and {after} are runs of different kinds")
    return Comparison((), speeds)


def _how_measured(measured: Speeds) -> Iterator[str]:
    if measured.in_turns:
        yield "time that an event holds a vCPU, both kernels measured in turns:"
    else:
        yield "time that an event holds a vCPU, relative to a plain exit of the same round"
        yield "(one run after the other; inv bench.compare measures both kernels in turns):"
    if measured.caution:
        yield f"  {measured.caution}"


def tell(found: Comparison) -> Iterator[str]:
    """The comparison as lines of text."""
    for change in Change:
        if members := found.of(change):
            yield f"{change.value} ({len(members)}):"
            yield from (f"  {one}" for one in members)
    if found.speeds:
        yield from _how_measured(found.measured)
        yield from (f"  {one}" for one in found.speeds)
    worse = sum(one.worse for one in found.differences) + sum(s.slower for s in found.speeds)
    if not found.differences and not found.speeds:
        yield "no clause differs"
    else:
        yield f"{worse} worse, {len(found.of(Change.MENDED))} mended"
