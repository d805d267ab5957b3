# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patches of a series do to clauses: since when one holds, which patch breaks one."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence

import msgspec

from harness.errors import UsageError
from harness.report.model import Outcome

__all__ = ["Judged", "breaks", "first_change", "holds_since", "to_csv"]


class Judged(msgspec.Struct, kw_only=True, frozen=True):
    """What was found out about a series up to one of its patches.

    ``digest`` is that of the series so far. ``applies``, ``builds`` and ``boots`` say what is
    wrong, or nothing; a stage that was not reached says nothing either. ``same_as`` is the
    patch whose verdicts count here, too, since this one changes nothing that could be tested.
    """

    number: int
    patch: str
    digest: str
    applies: str = ""
    builds: str = ""
    boots: str = ""
    checkpatch: list[str] = []
    sparse: list[str] = []
    verdicts: dict[str, Outcome] = {}
    run: str = ""
    same_as: int = 0
    duration_s: float = 0.0

    @property
    def problem(self) -> str:
        """What kept it from being tested; empty if nothing did."""
        for stage, text in (
            ("does not apply", self.applies),
            ("does not build", self.builds),
            ("does not boot", self.boots),
        ):
            if text:
                return f"{stage}: {text}"
        return ""


def holds_since(judged: Sequence[Judged]) -> dict[str, int]:
    """For each clause that holds at the end, the patch from which on it always did."""
    since: dict[str, int] = {}
    for one in judged:
        for clause, outcome in one.verdicts.items():
            if outcome is Outcome.PASS:
                since.setdefault(clause, one.number)
            else:
                since.pop(clause, None)
    return since


def breaks(judged: Sequence[Judged]) -> dict[int, list[str]]:
    """The patches after which clauses do not hold that held before, with these clauses.

    What could not be tested says nothing: the patch that is blamed is the first at which a
    clause was seen broken.
    """
    held: set[str] = set()
    found: dict[int, list[str]] = {}
    for one in judged:
        for clause, outcome in one.verdicts.items():
            if outcome is Outcome.PASS:
                held.add(clause)
            elif outcome.bad and clause in held:
                held.discard(clause)
                found.setdefault(one.number, []).append(clause)
    return found


def first_change(last: int, state: Callable[[int], Outcome | None]) -> tuple[int, Outcome | None]:
    """The first patch from which on a clause is what it is at the end, without trying all.

    :param last: the number of patches; 0 is the base.
    :param state: the clause's verdict after so many patches, None where there is none.
    :returns: the patch, and the clause's verdict at the end.
    :raises UsageError: it is the same after every patch that was tried, and at the base.

    Patches are tried backwards from the end, in steps that double, until one is found at which
    the clause is otherwise; then the distance is halved. Of several changes one is found, as a
    rule the last. All patches are tried only for a clause that was otherwise for a short while.
    """
    end = state(last)
    holds = end is Outcome.PASS
    known: dict[int, bool] = {}

    def alike(number: int) -> bool:
        if number not in known:
            known[number] = (state(number) is Outcome.PASS) is holds
        return known[number]

    high, step = last, 1
    while alike(low := max(0, high - step)):
        if low == 0:
            others = (number for number in range(last, 0, -1) if not alike(number))
            if (low := next(others, -1)) < 0:
                raise UsageError(f"the clause is {end or 'without a verdict'} all the time")
            return low + 1, end
        high, step = low, step * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if alike(middle) else (middle, high)
    return high, end


def to_csv(judged: Sequence[Judged]) -> str:
    """The table: patches down, clauses across."""
    clauses = list(dict.fromkeys(name for one in judged for name in one.verdicts))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "patch", "problem", *clauses])
    for one in judged:
        row: Mapping[str, Outcome] = one.verdicts
        writer.writerow(
            [one.number, one.patch, one.problem, *(row.get(name, "") for name in clauses)]
        )
    return text.getvalue()
