# SPDX-License-Identifier: GPL-2.0-or-later
"""What came of a measurement: one record with all figures and facts, as in ``bench.json``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from harness.bench.kinds import ABOUT, CLOCK, EXIT, EXIT_KERNEL, KINDS, OWN
from harness.bench.program import Block, KindFacts, VcpuSamples
from harness.report.figures import Distribution, Ratio, distribution, ratio
from harness.report.model import MachineRecord

if TYPE_CHECKING:
    from harness.abi import Profile
    from harness.bench.rounds import Rounds

__all__ = ["Kind", "Parts", "Result", "make_result"]


class Parts(msgspec.Struct, kw_only=True):
    """Medians of the parts of a sample, in ns: from the guest to the answering program, in
    that, and back to the guest."""

    out_ns: float
    answer_ns: float
    back_ns: float


class Kind(msgspec.Struct, kw_only=True):
    """One thing that was measured, or why it was not. All figures are None then."""

    name: str
    about: str
    events: list[str]
    """Names of the events of one sample."""
    lacking: str = ""
    """What kernel or CPU lack for it, and how that shows."""
    failed: str = ""
    """Why it could not be measured although the kernel has it."""
    hold: Distribution | None = None
    """How long the vCPU was held, without what taking the time costs."""
    parts: Parts | None = None
    ratio: Ratio | None = None
    """To the plain exit to user space."""
    own: Distribution | None = None
    """The same exchange without a guest: our program, its socket, its wake-ups."""
    own_parts: Parts | None = None
    own_share: Ratio | None = None
    """What part of ``hold`` that is."""


class Result(msgspec.Struct, kw_only=True):
    """Everything."""

    started: str
    emulated: bool
    """The figures are those of an emulated CPU, which compare with each other only."""
    machine: MachineRecord
    kernel: dict[str, str]
    options: dict[str, Any]
    host: dict[str, Any]
    """What the program says about its host."""
    clock_ns: float
    kinds: list[Kind]
    """The plain exits first, then events in the order of :data:`harness.bench.kinds.KINDS`."""
    complaints: list[str]
    """What the host's kernel complained about meanwhile."""
    pair: str = ""
    """The measurement in turns of which this is one side; the two have it in common."""


def make_result(
    rounds: Rounds,
    *,
    profile: Profile,
    started: str,
    options: dict[str, Any],
    kernel: dict[str, str],
    machine: MachineRecord,
    complaints: Sequence[str],
    pair: str = "",
) -> Result:
    """Make figures of all that was measured."""
    facts = rounds.facts
    tick_ns = 1e6 / facts.tsc_khz
    clock_ticks = statistics.median(
        sample for blocks in rounds.blocks for v in blocks[CLOCK].vcpus for sample in v.hold
    )
    figures = _Figures(rounds, profile, tick_ns, clock_ticks, seed=options["seed"])
    wanted = [name for name in KINDS if name in (options["only"] or KINDS)]
    return Result(
        started=started,
        emulated=machine.emulated,
        machine=machine,
        kernel=kernel,
        options=options,
        host={
            name: value for name, value in msgspec.structs.asdict(facts).items() if name != "kinds"
        },
        clock_ns=clock_ticks * tick_ns,
        kinds=[figures.kind(name) for name in (EXIT, EXIT_KERNEL, *wanted)],
        complaints=list(complaints),
        pair=pair,
    )


class _Figures:
    def __init__(
        self, rounds: Rounds, profile: Profile, tick_ns: float, clock_ticks: float, *, seed: int
    ) -> None:
        self._rounds = rounds
        self._profile = profile
        self._tick_ns = tick_ns
        self._clock_ticks = clock_ticks
        self._seed = seed
        exits = self._of(EXIT)
        self._exit = distribution(self._hold(exits)) if exits else None

    def kind(self, name: str) -> Kind:
        known = self._rounds.facts.kinds.get(name)
        made = Kind(
            name=name,
            about=ABOUT[name],
            events=[self._profile.event(one).name for one in known.events] if known else [],
        )
        made.lacking = self._lacking(name, known)
        if made.lacking:
            return made
        made.failed = self._rounds.failed.get(name, "")
        blocks = self._of(name)
        if not made.failed:
            made.failed = self._wrong_number(name, blocks)
        if made.failed or not blocks:
            return made
        made.hold = distribution(self._hold(blocks))
        made.parts = self._parts(blocks)
        if self._exit is not None:
            made.ratio = ratio(made.hold.rounds_ns, self._exit.rounds_ns, seed=self._seed)
        if own := self._of(OWN + name):
            made.own = distribution(self._hold(own, clock_ticks=0))
            made.own_parts = self._parts(own)
            made.own_share = ratio(made.own.rounds_ns, made.hold.rounds_ns, seed=self._seed)
        return made

    def _of(self, name: str) -> list[Block]:
        """Its blocks, if there is one of each round."""
        found = [blocks[name] for blocks in self._rounds.blocks if name in blocks]
        return found if len(found) == len(self._rounds.blocks) else []

    def _lacking(self, name: str, known: KindFacts | None) -> str:
        if known is None:
            return "the program does not know it"
        if not known.missing:
            return self._rounds.without.get(name, "")
        if known.missing_event is not None:
            what = f"VM_CHECK_EVENT {self._profile.event(known.missing_event).name}"
        elif self._profile.error_name(known.error) == "KVM_EOPNOTSUPP":
            return "GET_VERSION says that features.singlestep is 0"
        else:
            what = f"VM_CHECK_COMMAND {self._profile.command(known.missing_command or 0).name}"
        return f"{what} answers {self._profile.error_name(known.error)}"

    @staticmethod
    def _wrong_number(name: str, blocks: Sequence[Block]) -> str:
        """What is wrong if not each sample had its events: its time means something else then."""
        for v in (v for block in blocks for v in block.vcpus):
            # Around the instructions that are stepped through, a few more are.
            fits = v.events >= v.expected if name == "singlestep" else v.events == v.expected
            if not fits:
                return f"{v.events} events came where there should have been {v.expected}"
        return ""

    def _hold(
        self, blocks: Sequence[Block], *, clock_ticks: float | None = None
    ) -> list[list[float]]:
        off = self._clock_ticks if clock_ticks is None else clock_ticks
        return [
            [(ticks - off) * self._tick_ns for v in block.vcpus for ticks in v.hold]
            for block in blocks
        ]

    def _parts(self, blocks: Sequence[Block]) -> Parts | None:
        samples = [v for block in blocks for v in block.vcpus]
        if not self._rounds.facts.tsc_compares or not all(v.out and v.answer for v in samples):
            return None

        def median_ns(ticks: Callable[[VcpuSamples], Sequence[int]]) -> float:
            return statistics.median(one for v in samples for one in ticks(v)) * self._tick_ns

        return Parts(
            out_ns=median_ns(lambda v: v.out),
            answer_ns=median_ns(lambda v: v.answer),
            back_ns=median_ns(
                lambda v: [
                    hold - out - answer
                    for hold, out, answer in zip(v.hold, v.out, v.answer, strict=True)
                ]
            ),
        )
