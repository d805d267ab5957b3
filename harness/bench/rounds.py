# SPDX-License-Identifier: GPL-2.0-or-later
"""Rounds of measurements, on one kernel or on two in turns.

In each round everything is measured once, in a random order. With two kernels each kind is
measured on one and at once on the other, which comes first being random, too: what disturbs the
machine for a while disturbs both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from harness.bench.kinds import CLOCK, EXIT, EXIT_KERNEL, KINDS, OWN
from harness.bench.program import Block, Facts, Program, Stopped
from harness.build.progress import Step, note
from harness.errors import UsageError

__all__ = ["Options", "Rounds", "Side", "measure_rounds", "order_of"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    rounds: int = 12
    samples: int = 200
    """Of each kind in each round."""
    warm: int = 20
    """Samples before these, which do not count."""
    vcpus: int = 1
    """How many raise events at the same time, 1 or 2."""
    apart: bool = False
    """Give the tool a CPU of its own instead of that of the vCPU."""
    seed: int = 0
    """Of the order in each round, and of the intervals."""
    only: tuple[str, ...] = ()
    """Kinds, all if empty."""

    def __post_init__(self) -> None:
        if not (2 <= self.rounds <= 1000 and 1 <= self.samples <= 10_000):
            raise UsageError("--rounds is 2 to 1000, --samples is 1 to 10000")
        if self.vcpus not in (1, 2):
            raise UsageError("--vcpus is 1 or 2")
        if unknown := set(self.only) - set(KINDS):
            raise UsageError(
                f"there is no kind {', '.join(sorted(unknown))}",
                hint=f"there are: {' '.join(KINDS)}",
            )


@dataclass
class Rounds:
    """What was measured: the host's facts and the blocks of each round by kind. And what was not:
    kinds that this target lacks, and kinds that failed, each with the reason."""

    facts: Facts
    without: Mapping[str, str]
    blocks: list[dict[str, Block]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Side:
    """One kernel that is measured.

    :param start: makes a program that can measure.
    :param keep: told all that the program says, at once.
    :param without: kinds that cannot be measured there, and why.
    """

    def __init__(
        self,
        start: Callable[[], Program],
        *,
        keep: Callable[[Facts | Block], None],
        without: Mapping[str, str] = MappingProxyType({}),
        name: str = "",
    ) -> None:
        self.name = name
        self._start = start
        self._keep = keep
        self._program = start()
        self.done = Rounds(self._program.facts, without)
        keep(self._program.facts)

    @property
    def lacking(self) -> set[str]:
        """Kinds that cannot be measured there."""
        facts = self.done.facts
        return {*self.done.without, *(name for name, kind in facts.kinds.items() if kind.missing)}

    def begin_round(self) -> None:
        """What is measured from here on belongs to another round."""
        self.done.blocks.append({})

    def measure(self, kind: str, options: Options) -> None:
        """Measure a kind, if the program did not give up at it before."""
        if kind in self.done.failed:
            return
        # Where the program can take only so many at once, as many as that.
        most = self._program.facts.kinds[kind.removeprefix(OWN)].samples
        samples = min(options.samples, most - options.warm)
        try:
            block = self._program.measure(kind, samples=samples, warm=options.warm)
        except Stopped as error:
            note(f"{kind} cannot be measured{self._where}: {error.message}")
            self.done.failed[kind] = error.message
            self._program.close()
            self._program = self._start()
        else:
            self.done.blocks[-1][kind] = block
            self._keep(block)

    @property
    def _where(self) -> str:
        return f" ({self.name})" if self.name else ""

    def close(self) -> None:
        """End the program. Idempotent."""
        self._program.close()


def order_of(
    facts: Facts, options: Options, *, without: Collection[str] = ()
) -> Iterator[list[str]]:
    """For each round what to measure, in its order, from the seed alone.

    Kinds that the kernel lacks are left out, and those in ``without``; with each kind comes its
    share of our own.
    """
    chance = random.Random(options.seed)
    wanted = [
        kind
        for kind in facts.kinds
        if kind in (options.only or KINDS) and not facts.kinds[kind].missing and kind not in without
    ]
    everything = [CLOCK, EXIT, EXIT_KERNEL, *wanted, *(OWN + kind for kind in wanted)]
    for _ in range(options.rounds):
        chance.shuffle(everything)
        yield list(everything)


def measure_rounds(
    sides: Sequence[Side],
    options: Options,
    *,
    progress: Step,
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Measure all kinds in all rounds; what comes of it is in ``done`` of each side.

    A kind at which the program gives up is not tried again there; the others go on with another
    one. Kinds that one of several sides lacks are left out: there is nothing to compare.
    """
    lacking = set().union(*(side.lacking for side in sides))
    chance = random.Random(options.seed)
    try:
        orders = order_of(sides[0].done.facts, options, without=lacking)
        for number, order in enumerate(orders, 1):
            for side in sides:
                side.begin_round()
            for place, kind in enumerate(order):
                progress.update(
                    done=(number - 1) * len(order) + place,
                    total=options.rounds * len(order),
                    doing=f"round {number}: {kind}",
                )
                for side in chance.sample(sides, len(sides)):
                    side.measure(kind, options)
            after_round()
    finally:
        for side in sides:
            side.close()
