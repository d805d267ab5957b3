# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether something got slower: two benchmarks compared by a permutation test.

A benchmark measures in rounds, in each of which every kind of event and a plain exit to user
space are measured, in a random order. What disturbs the machine for a while disturbs both, so
the figure of a round is their ratio. The test asks how often figures that were dealt at random
to the two runs would differ as much as these do.
"""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness.errors import UsageError

__all__ = ["LEVEL", "NOTICED", "Speed", "permutation_test", "speeds_of"]

LEVEL = 0.01
"""A difference counts when chance alone would make one like it less often than this."""

NOTICED = 1.05
"""And when it is at least this factor: less does not matter to anybody."""

_PERMUTATIONS = 10_000
_BENCH = "bench.json"
_EXIT = "exit"


@dataclass(frozen=True)
class Speed:
    """One kind of event in two runs: medians of the rounds' ratios, and the test's p-value.

    ``enough``: with so many rounds, a difference can be told from chance at all.
    """

    kind: str
    before: float
    after: float
    p: float
    enough: bool = True

    @property
    def factor(self) -> float:
        """How many times as long it takes."""
        return self.after / self.before

    @property
    def slower(self) -> bool:
        """Whether it is certain, and matters, that it takes longer."""
        return self.p < LEVEL and self.factor >= NOTICED

    @property
    def faster(self) -> bool:
        """Whether it is certain, and matters, that it takes less time."""
        return self.p < LEVEL and self.factor <= 1 / NOTICED

    def __str__(self) -> str:
        verdict = "SLOWER" if self.slower else "faster" if self.faster else "same"
        verdict = verdict if self.enough else "too few rounds to tell"
        return (
            f"{self.kind:<20} {self.before:8.2f} -> {self.after:8.2f}  "
            f"x{self.factor:.2f}  p={self.p:.4f}  {verdict}"
        )


class _Hold(msgspec.Struct):
    rounds_ns: list[float]


class _Kind(msgspec.Struct):
    name: str
    hold: _Hold | None = None


class _Machine(msgspec.Struct, frozen=True):
    target: str = ""
    virtualisation: str = ""


class _Bench(msgspec.Struct):
    """The part of a benchmark's record that is compared; see :mod:`harness.bench.result`."""

    kinds: list[_Kind]
    machine: _Machine = _Machine()


def speeds_of(before: Path, after: Path) -> list[Speed]:
    """What both runs measured; nothing unless both hold a benchmark.

    :raises UsageError: a benchmark cannot be read, or they are of different targets.
    """
    if not all((path / _BENCH).is_file() for path in (before, after)):
        return []
    benches = [_read(before), _read(after)]
    machines = [" ".join(msgspec.structs.astuple(one.machine)) for one in benches]
    if machines[0] != machines[1]:
        raise UsageError(
            f"figures of different machines do not compare: {machines[0]}, and {machines[1]}"
        )
    a, b = (_ratios(bench, path) for bench, path in zip(benches, (before, after), strict=True))
    return [
        Speed(
            kind,
            statistics.median(a[kind]),
            statistics.median(b[kind]),
            permutation_test(a[kind], b[kind]),
            # The least that the test can answer: all deals but the two extreme ones differ less.
            2 / math.comb(len(a[kind]) + len(b[kind]), len(a[kind])) < LEVEL,
        )
        for kind in a
        if kind in b
    ]


def _read(run: Path) -> _Bench:
    try:
        return msgspec.json.decode((run / _BENCH).read_bytes(), type=_Bench)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{run / _BENCH} cannot be read: {error}") from error


def _ratios(bench: _Bench, run: Path) -> dict[str, list[float]]:
    """For each kind the rounds' ratios to the plain exit."""
    holds = {one.name: one.hold.rounds_ns for one in bench.kinds if one.hold is not None}
    exits = holds.pop(_EXIT, None)
    if exits is None:
        raise UsageError(f"{run / _BENCH} has no plain exits to compare with")
    return {
        kind: [hold / least for hold, least in zip(rounds, exits, strict=True)]
        for kind, rounds in holds.items()
        if len(rounds) == len(exits)
    }


def permutation_test(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> float:
    """The two-sided p-value for the two samples being alike.

    What is compared is the sum of ranks, which a single round that went wrong cannot decide.
    The same samples give the same value: chance is seeded.
    """
    ranks = _ranks([*a, *b])
    due = statistics.mean(ranks) * len(a)
    seen = abs(sum(ranks[: len(a)]) - due)
    chance = random.Random(seed)
    # Ranks are multiples of a half: sums of them are exact.
    hits = sum(abs(sum(chance.sample(ranks, len(a))) - due) >= seen for _ in range(_PERMUTATIONS))
    # With the deal that was seen among them: no p-value of 0 from a finite number of deals.
    return (hits + 1) / (_PERMUTATIONS + 1)


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all; equal ones share the middle of their places."""
    ordered = sorted(values)
    return [
        (bisect.bisect_left(ordered, one) + bisect.bisect_right(ordered, one) + 1) / 2
        for one in values
    ]
