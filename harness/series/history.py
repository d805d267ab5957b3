# SPDX-License-Identifier: GPL-2.0-or-later
"""What the patches of a series do to clauses: since when one holds, which patch breaks one."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from harness.errors import UsageError
from harness.report.model import Outcome

__all__ = [
    "Change",
    "Judged",
    "breaks",
    "first_change",
    "holds_since",
    "to_csv",
    "untested_before",
]


class Judged(msgspec.Struct, kw_only=True, frozen=True):
    """What was found out about a series up to one of its patches.

    ``digest`` is that of the series so far. ``applies``, ``builds`` and ``boots`` say what is
    wrong, or nothing; a stage that was not reached says nothing either. ``known`` are the clauses
    that fail as a list of known failures says. ``same_as`` is the
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
    known: list[str] = []
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

    The patch that is blamed is the first at which a clause was seen broken, or at which it does
    not apply any more. What could not be judged says nothing, and what is known to fail is told
    by the list of those.
    """
    held: set[str] = set()
    found: dict[int, list[str]] = {}
    for one in judged:
        for clause, outcome in one.verdicts.items():
            if outcome is Outcome.PASS:
                held.add(clause)
            elif outcome in (Outcome.FAIL, Outcome.SKIP) and clause in held:
                held.discard(clause)
                if clause not in one.known:
                    found.setdefault(one.number, []).append(clause)
    return found


def untested_before(number: int, problems: Collection[int]) -> str:
    """Those of the patches that could not be tested that come just before a patch: ``4 or 5``.

    What is seen first at that patch may be their doing.
    """
    others = []
    while (number := number - 1) in problems:
        others.append(number)
    return " or ".join(map(str, reversed(others)))


class Change(NamedTuple):
    """A clause that is otherwise from a patch on."""

    number: int
    outcome: Outcome
    """What it is at the end."""
    untested: tuple[int, ...]
    """Patches just before that one that cannot be tested: it may be one of them as well."""


def first_change(last: int, state: Callable[[int], Outcome | None]) -> Change:
    """The first patch from which on a clause is what it is at the end, without trying all.

    :param last: the number of patches; 0 is the base.
    :param state: the clause's verdict after so many patches, None where it cannot be tested.
    :raises UsageError: it is the same after every patch that was tried, and at the base; or it
        cannot be tested anywhere.

    Patches are tried backwards from the end, in steps that double, until one is found at which
    the clause is otherwise; then the distance is halved. Of several changes one is found, as a
    rule the last. All patches are tried only for a clause that was otherwise for a short while.
    Instead of a patch that cannot be tested its neighbours are tried.
    """
    known: dict[int, Outcome | None] = {}

    def tested(numbers: Iterable[int]) -> int | None:
        """The first of them at which the clause can be tested."""
        for number in numbers:
            if number not in known:
                known[number] = state(number)
            if known[number] is not None:
                return number
        return None

    def holds(number: int | None) -> bool:
        return number is not None and known[number] is Outcome.PASS

    top = tested(range(last, 0, -1))
    if top is None:
        raise UsageError("the clause cannot be tested after any of the patches")
    end = known[top] or Outcome.MISS
    high, step = top, 1
    low = tested(range(top - 1, -1, -1))
    while low and holds(low) is holds(top):
        high, step = low, step * 2
        low = tested(range(max(0, high - step), -1, -1))
    if low is None or holds(low) is holds(top):
        high = top
        for low in range(top - 1, -1, -1):
            if tested([low]) is None:
                continue
            if holds(low) is not holds(top):
                break
            high = low
        else:
            raise UsageError(f"the clause is {end} all the time")
    while True:
        middle = (low + high) // 2
        between = sorted(range(low + 1, high), key=lambda n: abs(n - middle))
        found = tested(between)
        if found is None:
            return Change(high, end, tuple(range(low + 1, high)))
        low, high = (low, found) if holds(found) is holds(high) else (found, high)


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
