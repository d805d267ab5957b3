# SPDX-License-Identifier: GPL-2.0-or-later
"""Rounds of measurements on one host, and what comes of them.

::

    reports/bench/latest -> 20250131T101500Z-3f9c
    reports/bench/20250131T101500Z-3f9c/
        samples.jsonl   what the program said: its host's facts, then a line per block
        bench.json      figures and facts; see harness.bench.result
        bench.html      the same to look at
        counters        the program's shared-memory counters, as of the last round
        hosts/bench/    console of the host
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from harness.abi import load_profile
from harness.bench.kinds import CLOCK, EXIT, EXIT_KERNEL, KINDS, OWN, not_there
from harness.bench.program import Block, Facts, Program, Stopped, build
from harness.bench.result import Result, make_result
from harness.build.progress import Step, note, step
from harness.counters import attach, create
from harness.errors import UsageError
from harness.plugin.inputs import machine_record
from harness.report.store import new_run_dir, point_latest, utc_now, write_atomically

if TYPE_CHECKING:
    from harness.hosts import Host
    from harness.settings import Settings

__all__ = ["Options", "Rounds", "bench_events", "measure_rounds", "order_of"]

LIMIT_S = 60
"""After so long without an end the program gives a block up. Emulated hosts are slow."""


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


def bench_events(settings: Settings, options: Options) -> int:
    """Measure on a fresh host of the target, and leave a report.

    :returns: 0; 1 if a kind that the kernel has could not be measured, or its log complains.
    :raises BuildError: something could not be built; nothing was measured.
    :raises ConformanceError: introspection cannot be had on that kernel, or it crashed.
    :raises InfraError: target or program failed.

    Should it end early, ``samples.jsonl`` has what was measured until then.
    """
    from harness.build.images import build_images
    from harness.build.kernel import build_kernel
    from harness.build.qemu import build_qemu
    from harness.hosts import target_for

    profile = load_profile(settings.abi)
    program = build(settings.cache, profile)
    target = target_for(settings)
    kernel = build_kernel(settings)
    target.prepare(kernel, build_images(settings, kernel=kernel, qemu=build_qemu(settings)))
    run_dir = new_run_dir(settings.reports / "bench")
    run_dir.mkdir(parents=True)
    started = utc_now()
    create(run_dir / "counters", slots=2).close()
    with target.start(name="bench", evidence=run_dir / "hosts" / "bench") as host:
        Program.install(host, program, counters=(run_dir / "counters").read_bytes())
        mark = host.console.mark()
        with step("Measure") as progress, (run_dir / "samples.jsonl").open("wb") as samples:

            def keep(one: Facts | Block) -> None:
                samples.write(msgspec.json.encode(one) + b"\n")
                samples.flush()

            rounds = measure_rounds(
                lambda: Program.start(
                    host, limit_s=LIMIT_S, vcpus=options.vcpus, apart=options.apart
                ),
                options,
                without=not_there(target.facts()),
                keep=keep,
                progress=progress,
                after_round=lambda: _show_counters(host, run_dir),
            )
        _show_counters(host, run_dir)
        complaints = host.console.complaints(mark)
    for basis in (CLOCK, EXIT):
        if basis in rounds.failed:
            raise Stopped(f"nothing to compare with: {rounds.failed[basis]}")
    result = make_result(
        rounds,
        profile=profile,
        started=started,
        options=vars(options),
        kernel={"release": kernel.release, "series": kernel.series, "key": kernel.key},
        machine=machine_record(target.facts()),
        complaints=complaints,
    )
    return _report(result, run_dir)


def _show_counters(host: Host, run_dir: Path) -> None:
    with attach(run_dir / "counters") as counters:
        counters.copy(Program.counters(host))


def _report(result: Result, run_dir: Path) -> int:
    from harness.bench.show import print_result, write_page

    write_atomically(run_dir / "bench.json", msgspec.json.format(msgspec.json.encode(result)))
    write_page(result, run_dir / "bench.html")
    point_latest(run_dir)
    print_result(result)
    print(f"Report: {run_dir / 'bench.html'}")
    return int(bool(result.complaints) or any(one.failed for one in result.kinds))


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
    start: Callable[[], Program],
    options: Options,
    *,
    keep: Callable[[Facts | Block], None],
    progress: Step,
    without: Mapping[str, str] = MappingProxyType({}),
    after_round: Callable[[], None] = lambda: None,
) -> Rounds:
    """Measure all kinds in all rounds.

    A kind at which the program gives up is not tried again; the others go on with another one.

    :param start: makes a program that can measure.
    :param keep: told all that the program says, at once.
    :param without: kinds that cannot be measured here, and why.
    """
    program = start()
    done = Rounds(program.facts, without)
    keep(program.facts)
    orders = order_of(program.facts, options, without=without)
    try:
        for number, order in enumerate(orders, 1):
            blocks: dict[str, Block] = {}
            for place, kind in enumerate(order):
                if kind in done.failed:
                    continue
                progress.update(
                    done=(number - 1) * len(order) + place,
                    total=options.rounds * len(order),
                    doing=f"round {number}: {kind}",
                )
                try:
                    blocks[kind] = _measure(program, kind, options)
                except Stopped as error:
                    note(f"{kind} cannot be measured: {error.message}")
                    done.failed[kind] = error.message
                    program.close()
                    program = start()
                else:
                    keep(blocks[kind])
            done.blocks.append(blocks)
            after_round()
    finally:
        program.close()
    return done


def _measure(program: Program, kind: str, options: Options) -> Block:
    # Where the program can take only so many at once, as many as that.
    most = program.facts.kinds[kind.removeprefix(OWN)].samples
    return program.measure(
        kind, samples=min(options.samples, most - options.warm), warm=options.warm
    )
