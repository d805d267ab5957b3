# SPDX-License-Identifier: GPL-2.0-or-later
"""Selftests, run in hosts of each kernel."""

from __future__ import annotations

import dataclasses
import functools
import queue
import re
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build.progress import Step, step
from harness.errors import ConformanceError, DeadlineError, InfraError, UsageError
from harness.hosts.base import Boot
from harness.hosts.console import complaints_in
from harness.selftests.outcome import BASE, OFF, ON, Comparison, Outcome, verdict_of

if TYPE_CHECKING:
    from harness.build.selftests import Selftests
    from harness.hosts import Host, Target
    from harness.settings import Settings

__all__ = ["DEADLINE_S", "compare"]

DEADLINE_S = 120.0
REPEATS = 3
"""How often a test that differs is run again, on either kernel."""
MEMORY_MB = 3072
"""Memory of a host, if it can have so much: some tests map a gigabyte."""
PARAMETER = "kvm.introspection=1"

# Arguments that make long tests short: less memory, fewer rounds.
ARGUMENTS = {
    "demand_paging_test": "-b 128M",
    "dirty_log_perf_test": "-b 64M -i 3",
    "dirty_log_test": "-i 4",
    "kvm_page_table_test": "-b 64M",
    "max_guest_memory_test": "-m 1 -c 2",
    "memslot_modification_stress_test": "-b 64M -i 20",
    "memslot_perf_test": "-s 512 -l 1 -r 1",
    "x86_64/xapic_ipi_test": "-s 3",
}
# Not run where the processor is a program.
TOO_LONG = {
    "hardware_disable_test": "makes and kills 512 virtual machines of 4 vCPUs",
    "rseq_test": "moves a vCPU between processors 100000 times",
}


def _anonymous(line: str) -> str:
    """A complaint without what differs from run to run."""
    line = re.sub(r"^\[[^\]]*\](\[[^\]]*\])?\s*", "", line)
    return re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\b(PID|pid|CPU)[:#]? ?\d+", "…", line)


@dataclass(frozen=True)
class _Kernel:
    """One of the kernels, ready to boot."""

    name: str
    target: Target
    without: tuple[str, ...] = ()
    """Kernel options that its hosts are booted without."""


class _Runner:
    """One thread's host, replaced when it is another kernel's turn or it has had enough."""

    def __init__(self, number: int, *, selftests: Selftests, evidence: Path) -> None:
        self._number = number
        self._selftests = selftests
        self._evidence = evidence
        self._host: Host | None = None
        self._kernel = ""
        self._started = 0

    def run(self, kernel: _Kernel, test: str) -> Outcome:
        """Run one test on that kernel."""
        host = self._ready(kernel)
        mark = host.console.mark()
        began = time.monotonic()
        verdict, detail, output, fit = "", "", "", True
        try:
            program = (self._selftests.directory / test).read_bytes()
            done = host.run(
                "mkdir -p /root/test && cd /root/test && rm -rf ./* && cat >test && "
                f"chmod 755 test && exec ./test {ARGUMENTS.get(test, '')} 2>&1",
                input=program,
                timeout_s=DEADLINE_S,
                check=False,
            )
            output = done.text
            verdict, detail = verdict_of(done.returncode, output)
        except DeadlineError:
            verdict, detail, fit = "timeout", f"not done in {DEADLINE_S:.0f} s", False
        except (ConformanceError, InfraError) as error:
            # Its message has the host's name in it; what the kernel said is a complaint.
            verdict, detail, output, fit = "lost", type(error).__name__, str(error), False
        complaints = tuple(
            dict.fromkeys(_anonymous(one.line) for one in complaints_in(host.console.since(mark)))
        )
        if complaints or not fit:
            self.close()  # what comes next would suffer from it
        return Outcome(
            verdict, detail, complaints, output, duration_s=round(time.monotonic() - began, 1)
        )

    def _ready(self, kernel: _Kernel) -> Host:
        if self._kernel != kernel.name:
            self.close()
        if self._host is None:
            self._started += 1
            name = f"{kernel.name}-{self._number}-{self._started}"
            start = functools.partial(
                kernel.target.start,
                name=name,
                evidence=self._evidence / name,
                boot=Boot(without=kernel.without),
            )
            try:
                self._host = start()
            except DeadlineError:
                self._host = start()  # a machine that was busy for a while
            self._kernel = kernel.name
        return self._host

    def close(self) -> None:
        """End the host."""
        if self._host is not None:
            self._host.close()
            self._host = None


def _run_all(
    jobs: Iterable[tuple[_Kernel, str]],
    *,
    workers: int,
    selftests: Selftests,
    evidence: Path,
    into: Comparison,
    progress: Step,
) -> None:
    """Run all jobs, on a host for each worker."""
    waiting: queue.SimpleQueue[tuple[_Kernel, str]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    stop = threading.Event()

    def work(number: int) -> None:
        runner = _Runner(number, selftests=selftests, evidence=evidence)
        try:
            while not stop.is_set():
                try:
                    kernel, test = waiting.get_nowait()
                except queue.Empty:
                    return
                progress.update(doing=f"{kernel.name}: {test}")
                outcome = runner.run(kernel, test)
                into.outcomes[test].setdefault(kernel.name, []).append(outcome)
                progress.advance()
        except BaseException:
            stop.set()
            raise
        finally:
            runner.close()

    with ThreadPoolExecutor(workers, thread_name_prefix="selftests") as pool:
        futures = [pool.submit(work, number) for number in range(workers)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise


def compare(settings: Settings, *, tests: Sequence[str] = (), place: Path) -> Comparison:
    """Build what is missing, run the selftests on all kernels, and again what differs.

    :param tests: only these; all by default.
    :param place: a directory for the logs of the hosts.
    :raises UsageError: an unknown test, or a target that cannot boot other kernels.
    :raises BuildError: something could not be built.
    :raises InfraError: no host could be had.
    """
    from harness.build.selftests import build_selftests
    from harness.hosts import target_for

    target = target_for(settings)
    if not target.boots:
        raise UsageError(
            f"target {settings.target} has one kernel, and this compares two",
            hint="choose another: --target tcg",
        )
    memory_mb = min(MEMORY_MB, target.most_memory_mb or MEMORY_MB)
    settings = dataclasses.replace(settings, host_memory_mb=max(settings.host_memory_mb, memory_mb))
    # In this order the source tree is switched to the series no sooner than needed.
    nothing = place / "none"
    nothing.mkdir(parents=True, exist_ok=True)
    without = _target(dataclasses.replace(settings, kernel=None, kernel_series=nothing))
    selftests = build_selftests(settings)
    known = selftests.names()
    if unknown := set(tests) - set(known):
        raise UsageError(
            f"there is no selftest {', '.join(sorted(unknown))}",
            hint=f"there are: {' '.join(known)}",
        )
    series = _target(settings)
    facts = series.facts()
    left_out = {name: why for name, why in TOO_LONG.items() if facts.emulated and name in known}
    chosen = [name for name in (tests or known) if name not in left_out]
    comparison = Comparison(
        outcomes={name: {} for name in chosen},
        left_out=left_out,
        source=selftests.source,
        base=without.facts(),
        series=facts,
    )
    kernels = [_Kernel(BASE, without), _Kernel(OFF, series, (PARAMETER,)), _Kernel(ON, series)]

    def run_all(title: str, names: Sequence[str], times: int) -> None:
        jobs = [(kernel, name) for kernel in kernels for name in names for _ in range(times)]
        with step(title, total=len(jobs)) as progress:
            _run_all(
                jobs,
                workers=settings.workers,
                selftests=selftests,
                evidence=place / "hosts",
                into=comparison,
                progress=progress,
            )

    run_all("Run the kernel's selftests", chosen, 1)
    if again := comparison.unequal():
        run_all("Run those again that differ", again, REPEATS)
    return comparison


def _target(settings: Settings) -> Target:
    """What provides hosts with the kernel of the settings, ready to start them."""
    from harness.build.builds import build_all
    from harness.hosts import target_for

    target = target_for(settings)
    builds = build_all(settings)
    target.prepare(builds.kernel, builds.images)
    return target
