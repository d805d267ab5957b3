# SPDX-License-Identifier: GPL-2.0-or-later
"""A benchmark of one kernel, or of two against each other, and what comes of it.

::

    reports/bench/latest -> 20250131T101500Z-3f9c
    reports/bench/20250131T101500Z-3f9c/
        samples.jsonl   what the program said: its host's facts, then a line per block
        bench.json      figures and facts; see harness.bench.result
        bench.html      the same to look at
        counters        the program's shared-memory counters, as of the last round
        hosts/bench/    console of the host

Of two kernels there are two such directories in that of the run, ``before`` and ``after``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.bench.kinds import CLOCK, EXIT, not_there
from harness.bench.program import Block, Facts, Program, Stopped, build
from harness.bench.result import Result, make_result
from harness.bench.rounds import Options, Side, measure_rounds
from harness.build.progress import step
from harness.counters import attach, create
from harness.errors import UsageError
from harness.plugin.inputs import machine_record
from harness.report.store import new_run_dir, point_latest, utc_now, write_atomically
from harness.series import interface

if TYPE_CHECKING:
    from harness.build.kernel import KernelBuild
    from harness.hosts import Host, Target
    from harness.settings import Settings

__all__ = ["bench_compare", "bench_events", "kernel_named"]

LIMIT_S = 60
"""After so long without an end the program gives a block up. Emulated hosts are slow."""


def bench_events(settings: Settings, options: Options) -> int:
    """Measure on a fresh host of the target, and leave a report.

    :returns: 0; 1 if a kind that the kernel has could not be measured, or its log complains.
    :raises BuildError: something could not be built; nothing was measured.
    :raises ConformanceError: introspection cannot be had on that kernel, or it crashed.
    :raises InfraError: target or program failed.

    Should it end early, ``samples.jsonl`` has what was measured until then.
    """
    run_dir = new_run_dir(settings.reports / "bench")
    (result,) = _measure({run_dir: settings}, options)
    point_latest(run_dir)
    return _report(result, run_dir)


def bench_compare(before: Settings, after: Settings, options: Options) -> int:
    """Measure two kernels in turns, each on a host of its own, and tell what got slower.

    :param before: with the one kernel, its series or image; the rest is as in ``after``.
    :returns: as :func:`bench_events`; 1 also if something got slower.
    :raises UsageError: a target that has one machine only.
    :raises HarnessError: as :func:`bench_events`.
    """
    from harness.report.compare import compare_runs, tell

    if after.target == "ssh":
        raise UsageError(
            "two kernels in turns take two hosts, and target ssh has one machine",
            hint="use --target tcg, or inv bench.events on each kernel and inv report.compare",
        )
    run_dir = new_run_dir(after.reports / "bench")
    places = {run_dir / "before": before, run_dir / "after": after}
    results = _measure(places, options, pair=run_dir.name)
    point_latest(run_dir)
    codes = [_report(result, place) for result, place in zip(results, places, strict=True)]
    found = compare_runs(*places)
    print("\n".join(tell(found)))
    print(f"Compare again: inv report.compare {' '.join(map(str, places))}")
    return max(*codes, found.exit_code)


def kernel_named(text: str) -> dict[str, str]:
    """The setting that a person means by a kernel: a bzImage, or else a series in any form."""
    path = Path(text)
    if path.is_file():
        with path.open("rb") as file:
            # Documentation/arch/x86/boot.rst: the setup header's magic number.
            if file.read(0x206)[0x202:] == b"HdrS":
                return {"kernel": text}
    return {"kernel_series": text}


@dataclass(frozen=True)
class _Ready:
    """What is built for one kernel."""

    settings: Settings
    program: Path
    kernel: KernelBuild
    target: Target


def _prepare(settings: Settings) -> _Ready:
    from harness.build.builds import build_all
    from harness.hosts import target_for

    program = build(settings.cache, interface(settings))
    target = target_for(settings)
    builds = build_all(settings)
    target.prepare(builds.kernel, builds.images)
    return _Ready(settings, program, builds.kernel, target)


def _measure(places: Mapping[Path, Settings], options: Options, *, pair: str = "") -> list[Result]:
    """Measure in turns what is to go into each of these directories."""
    ready = {place: _prepare(settings) for place, settings in places.items()}
    started = utc_now()
    with contextlib.ExitStack() as stack:
        hosts = {
            place: stack.enter_context(_host(one, place, name=place.name if pair else ""))
            for place, one in ready.items()
        }
        marks = {place: host.console.mark() for place, host in hosts.items()}
        sides = {
            place: stack.enter_context(_side(ready[place], host, place, options, bool(pair)))
            for place, host in hosts.items()
        }

        def show_counters() -> None:
            for place, host in hosts.items():
                with attach(place / "counters") as counters:
                    counters.copy(Program.counters(host))

        with step("Measure") as progress:
            measure_rounds(
                list(sides.values()), options, progress=progress, after_round=show_counters
            )
        complaints = {p: host.console.complaints(marks[p]) for p, host in hosts.items()}
    for side in sides.values():
        for basis in (CLOCK, EXIT):
            if basis in side.done.failed:
                raise Stopped(f"nothing to compare with: {side.done.failed[basis]}")
    return [
        make_result(
            sides[place].done,
            profile=interface(one.settings),
            started=started,
            options=vars(options),
            kernel={
                "release": one.kernel.release, "series": one.kernel.series, "key": one.kernel.key
            },
            machine=machine_record(one.target.facts()),
            complaints=complaints[place],
            pair=pair,
        )
        for place, one in ready.items()
    ]  # fmt: skip


@contextlib.contextmanager
def _host(one: _Ready, place: Path, *, name: str) -> Iterator[Host]:
    """A host with the program in it."""
    place.mkdir(parents=True)
    create(place / "counters", slots=2).close()
    evidence = place / "hosts" / "bench"
    with one.target.start(name=f"bench-{name}" if name else "bench", evidence=evidence) as host:
        Program.install(host, one.program, counters=(place / "counters").read_bytes())
        yield host


@contextlib.contextmanager
def _side(one: _Ready, host: Host, place: Path, options: Options, named: bool) -> Iterator[Side]:
    with (place / "samples.jsonl").open("wb") as samples:

        def keep(said: Facts | Block) -> None:
            samples.write(msgspec.json.encode(said) + b"\n")
            samples.flush()

        def start() -> Program:
            return Program.start(host, limit_s=LIMIT_S, vcpus=options.vcpus, apart=options.apart)

        without = not_there(one.target.facts())
        side = Side(start, keep=keep, without=without, name=place.name if named else "")
        try:
            yield side
        finally:
            side.close()


def _report(result: Result, run_dir: Path) -> int:
    from harness.bench.show import print_result, write_page

    write_atomically(run_dir / "bench.json", msgspec.json.format(msgspec.json.encode(result)))
    write_page(result, run_dir / "bench.html")
    print_result(result)
    print(f"Report: {run_dir / 'bench.html'}")
    return int(bool(result.complaints) or any(one.failed for one in result.kinds))
