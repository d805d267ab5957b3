# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether something got slower: two benchmarks compared by a permutation test.

A benchmark measures in rounds. Those of ``inv bench.compare`` measured both kernels in each of
them, in turns: what is compared are the two times of a round, and the test asks how often rounds
that had been told at random which time is whose would differ as much as these do.

Of two benchmarks that were made one after the other, the times are compared relative to a plain
exit of the same round, and the test asks the same of rounds that were dealt at random to the two.
That is the weaker comparison, and it is said: what changed on the machine between them, other
than its speed, counts as a difference.

The tests are our own: they are few lines, and scipy is larger than all else that we depend on.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness.errors import UsageError
from harness.report.charts import time_text
from harness.report.model import MachineRecord

__all__ = [
    "LEVEL",
    "NOTICED",
    "Speed",
    "Speeds",
    "paired_test",
    "permutation_test",
    "speeds_of",
]

LEVEL = 0.01
"""A difference counts when chance alone would make one like it less often than this."""

NOTICED = 1.05
"""And when it is at least this factor: less does not matter to anybody."""

_PERMUTATIONS = 10_000
_BENCH = "bench.json"
_EXIT = "exit"


@dataclass(frozen=True)
class Speed:
    """One kind of event in two runs: its medians, how many times as long it takes, and the
    test's p-value.

    ``in_turns``: the medians are times in ns, else ratios to a plain exit of the same round.
    ``enough``: with so many rounds, a difference can be told from chance at all.
    """

    kind: str
    before: float
    after: float
    factor: float
    p: float
    in_turns: bool = False
    enough: bool = True

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
        was, now = (
            time_text(one) if self.in_turns else f"{one:.2f}" for one in (self.before, self.after)
        )
        return (
            f"{self.kind:<20} {was:>8} -> {now:>8}  x{self.factor:.2f}  p={self.p:.4f}  {verdict}"
        )


class _Hold(msgspec.Struct):
    rounds_ns: list[float]


class _Kind(msgspec.Struct):
    name: str
    hold: _Hold | None = None


class _Bench(msgspec.Struct):
    """The part of a benchmark's record that is compared; see :mod:`harness.bench.result`."""

    kinds: list[_Kind]
    machine: MachineRecord = MachineRecord()
    pair: str = ""


@dataclass(frozen=True)
class Speeds:
    """What two benchmarks have in common, and how far it can be trusted.

    ``caution``: why nothing of it was seen on hardware, empty where it was.
    """

    kinds: tuple[Speed, ...] = ()
    in_turns: bool = False
    caution: str = ""


def speeds_of(before: Path, after: Path) -> Speeds:
    """What both runs measured; nothing unless both hold a benchmark.

    :raises UsageError: a benchmark cannot be read, or they are of different targets.
    """
    if not all((path / _BENCH).is_file() for path in (before, after)):
        return Speeds()
    benches = [_read(before), _read(after)]
    machines = [f"{one.machine.target} {one.machine.virtualisation}" for one in benches]
    if machines[0] != machines[1]:
        raise UsageError(
            f"figures of different machines do not compare: {machines[0]}, and {machines[1]}"
        )
    in_turns = bool(benches[0].pair) and benches[0].pair == benches[1].pair and before != after
    if in_turns:
        a, b = (_times(bench) for bench in benches)
    else:
        a, b = (_ratios(bench, run) for bench, run in zip(benches, (before, after), strict=True))
    compare = _in_turns if in_turns else _one_after_the_other
    found = tuple(compare(kind, a[kind], b[kind]) for kind in a if kind in b)
    return Speeds(found, in_turns, benches[0].machine.caution)


def _in_turns(kind: str, before: list[float], after: list[float]) -> Speed:
    changes = [math.log(b / a) for a, b in zip(before, after, strict=True)]
    return Speed(
        kind,
        statistics.median(before),
        statistics.median(after),
        math.exp(statistics.median(changes)),
        paired_test(changes),
        in_turns=True,
        # The least that the test can answer: all signs alike, either way.
        enough=2 / 2 ** len(changes) < LEVEL,
    )


def _one_after_the_other(kind: str, before: list[float], after: list[float]) -> Speed:
    was, now = statistics.median(before), statistics.median(after)
    return Speed(
        kind,
        was,
        now,
        now / was,
        permutation_test(before, after),
        # The least that the test can answer: all deals but the two extreme ones differ less.
        enough=2 / math.comb(len(before) + len(after), len(before)) < LEVEL,
    )


def _read(run: Path) -> _Bench:
    try:
        return msgspec.json.decode((run / _BENCH).read_bytes(), type=_Bench)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{run / _BENCH} cannot be read: {error}") from error


def _times(bench: _Bench) -> dict[str, list[float]]:
    """For each kind that was measured, the median of each round, in ns."""
    return {one.name: one.hold.rounds_ns for one in bench.kinds if one.hold is not None}


def _ratios(bench: _Bench, run: Path) -> dict[str, list[float]]:
    """For each kind the rounds' ratios to the plain exit."""
    holds = _times(bench)
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


def paired_test(changes: Sequence[float], *, seed: int = 0) -> float:
    """The two-sided p-value for differences within pairs being as often up as down.

    What is compared is the sum of the ranks of the differences' sizes with their signs. All ways
    to give signs are tried, or so many at random if there are more.
    """
    changes = [one for one in changes if one]  # no difference has no sign
    ranks = _ranks([abs(one) for one in changes])
    seen = abs(sum(math.copysign(rank, one) for rank, one in zip(ranks, changes, strict=True)))
    if 2 ** len(ranks) <= _PERMUTATIONS:
        sums = [abs(sum(way)) for way in itertools.product(*((-rank, rank) for rank in ranks))]
        return sum(one >= seen for one in sums) / len(sums)
    chance = random.Random(seed)
    hits = sum(
        abs(sum(chance.choice((-rank, rank)) for rank in ranks)) >= seen
        for _ in range(_PERMUTATIONS)
    )
    return (hits + 1) / (_PERMUTATIONS + 1)


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all; equal ones share the middle of their places."""
    ordered = sorted(values)
    return [
        (bisect.bisect_left(ordered, one) + bisect.bisect_right(ordered, one) + 1) / 2
        for one in values
    ]
