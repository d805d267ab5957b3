# SPDX-License-Identifier: GPL-2.0-or-later
"""Does a series leave KVM as it was? The kernel's own selftests, with it and without.

Every selftest is run in hosts with three kernels:

=========  =========================================================================
``base``   the kernel without the series
``off``    the kernel with it, introspection switched off
``on``     the kernel with it, ``kvm.introspection=1``, and nobody introspects
=========  =========================================================================

What a test gives with the series is compared with what it gives without: its verdict, the
place of the failed assertion, each of its sub-tests, and the complaints of the kernel. A
test that fails the same way everywhere is no difference: an emulated processor lacks much.
What differs is run again, on both, before it is called a difference.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build.progress import Step, step
from harness.errors import ConformanceError, DeadlineError, InfraError, UsageError
from harness.hosts.base import Boot
from harness.hosts.console import complaints_in

if TYPE_CHECKING:
    from harness.build.selftests import Selftests
    from harness.hosts import Host, MachineFacts, Target
    from harness.settings import Settings

__all__ = ["Comparison", "Outcome", "compare", "run", "summary", "verdict_of"]

DEADLINE_S = 120.0
REPEATS = 3
"""How often a test that differs is run again, on either kernel."""
MEMORY_MB = 3072
"""Memory of a host: some tests map a gigabyte."""
PARAMETER = "kvm.introspection=1"

BASE, OFF, ON = "base", "off", "on"
TITLES = {
    BASE: "without the series",
    OFF: "with it, introspection off",
    ON: "with it, introspection on and unused",
}

_LONGEST = 300
_SKIPPED = 4  # kselftest's exit status; tools/testing/selftests/kselftest.h

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


@dataclass(frozen=True)
class Outcome:
    """What one run of a test gave; two that are equal gave the same."""

    verdict: str
    """``pass``, ``skip``, ``fail``, ``signal``, ``timeout`` or ``lost`` (the host died)."""
    detail: str = ""
    """Where it failed, why it was skipped, and what its sub-tests gave."""
    complaints: tuple[str, ...] = ()
    """What the host's kernel complained about meanwhile, without times and addresses."""
    output: str = field(default="", compare=False)
    duration_s: float = field(default=0.0, compare=False)

    def words(self) -> str:
        """For people, in a line."""
        said = f"{self.verdict}: {self.detail}" if self.detail else self.verdict
        return said + "".join(f"; kernel: {one}" for one in self.complaints)


_FAILED = re.compile(r"^==== Test Assertion Failure ====\s*\n\s*(\S+:\d+): (.*)$", re.MULTILINE)
_TAP = re.compile(r"^(?:# )?((?:not )?ok) \d+ (.*)$", re.MULTILINE)


def verdict_of(status: int, output: str) -> tuple[str, str]:
    """Verdict and detail of a test that ended with ``status`` and printed ``output``."""
    parts = [f"{word} {name.strip()}" for word, name in _TAP.findall(output)]
    if status == 0:
        return "pass", "; ".join(parts)
    if status == _SKIPPED:
        lines = [line for line in output.splitlines() if line.strip()]
        reason = next((line for line in lines if "SKIP" in line), lines[-1] if lines else "")
        return "skip", re.sub(r"^.*# SKIP[\s-]*", "", reason).strip()
    if found := _FAILED.search(output):
        parts.insert(0, f"{found[1]}: {found[2].strip()}")
    if status < 0:
        return "signal", "; ".join(parts)
    return "fail", "; ".join(parts) or f"exit status {status}"


def _anonymous(line: str) -> str:
    """A complaint without what differs from run to run."""
    line = re.sub(r"^\[[^\]]*\](\[[^\]]*\])?\s*", "", line)
    return re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\b(PID|pid|CPU)[:#]? ?\d+", "…", line)


@dataclass
class Comparison:
    """All that was run. ``outcomes[test][kernel]`` holds each run's outcome, in order."""

    outcomes: dict[str, dict[str, list[Outcome]]]
    left_out: dict[str, str]
    """Tests that were not run, with the reason."""
    source: str
    """The kernel source that the tests are from."""
    base: MachineFacts
    series: MachineFacts

    def differences(self, kernel: str) -> list[str]:
        """Tests that gave with this kernel what they never gave without the series.

        Once may be an accident: it counts when it came twice, or always.
        """
        found = []
        for name, by_kernel in self.outcomes.items():
            usual = set(by_kernel.get(BASE, ()))
            new = [one for one in by_kernel.get(kernel, ()) if one not in usual]
            if new and (len(new) > 1 or len(new) == len(by_kernel[kernel])):
                found.append(name)
        return found

    def flaky(self) -> list[str]:
        """Tests that did not always give the same, though the series makes no difference."""
        different = {*self.differences(OFF), *self.differences(ON)}
        return [name for name in self.unequal() if name not in different]

    def unequal(self) -> list[str]:
        """Tests that did not give the same in all their runs."""
        return [
            name
            for name, by_kernel in self.outcomes.items()
            if len({one for runs in by_kernel.values() for one in runs}) > 1
        ]

    def count(self, kernel: str) -> dict[str, int]:
        """How many tests gave which verdict in their first run."""
        counts: dict[str, int] = {}
        for by_kernel in self.outcomes.values():
            if runs := by_kernel.get(kernel):
                counts[runs[0].verdict] = counts.get(runs[0].verdict, 0) + 1
        return counts


# -- running --------------------------------------------------------------------------------


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

    settings = dataclasses.replace(settings, host_memory_mb=max(settings.host_memory_mb, MEMORY_MB))
    if not target_for(settings).boots:
        raise UsageError(
            f"target {settings.target} has one kernel, and this compares two",
            hint="choose another: --target tcg",
        )
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
    from harness.build.images import build_images
    from harness.build.kernel import build_kernel
    from harness.build.qemu import build_qemu
    from harness.hosts import target_for

    target = target_for(settings)
    kernel = build_kernel(settings)
    images = build_images(settings, kernel=kernel, qemu=build_qemu(settings))
    target.prepare(kernel, images)
    return target


# -- telling --------------------------------------------------------------------------------


def run(settings: Settings, *, select: str | None = None) -> int:
    """Compare, print what came of it, and leave it in a directory of the reports.

    :param select: names of tests, separated by blanks; all by default.
    :returns: 0 if the series changes nothing, 1 if a test gives something else with it.
    :raises HarnessError: as of :func:`compare`.
    """
    from harness.report.store import new_run_dir

    place = new_run_dir(settings.reports / "selftests")
    comparison = compare(settings, tests=(select or "").split(), place=place)
    text = summary(comparison)
    _save(comparison, text, place)
    print(text)
    print(f"Report: {place}")
    return 1 if any(comparison.differences(kernel) for kernel in (OFF, ON)) else 0


def _save(comparison: Comparison, text: str, place: Path) -> None:
    (place / "comparison.txt").write_text(text + "\n")
    record = {
        "source": comparison.source,
        "base": comparison.base.as_dict(),
        "series": comparison.series.as_dict(),
        "left_out": comparison.left_out,
        "differences": {kernel: comparison.differences(kernel) for kernel in (OFF, ON)},
        "flaky": comparison.flaky(),
        "outcomes": {
            name: {kernel: [dataclasses.asdict(one) for one in runs] for kernel, runs in by.items()}
            for name, by in comparison.outcomes.items()
        },
    }
    (place / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")


def summary(comparison: Comparison) -> str:
    """The comparison as text: differences first, then what each verdict rests on."""
    from harness.plugin.inputs import machine_record

    facts = comparison.series
    lines = [
        f"KVM selftests of {comparison.source}",
        f"  without: {comparison.base.kernel_release}",
        f"  with:    {facts.kernel_release} ({facts.kernel_series})",
        f"  on:      {facts.virtualisation}",
        *filter(None, [machine_record(facts).caution]),
        "",
    ]
    verdicts = sorted({name for kernel in TITLES for name in comparison.count(kernel)})
    for kernel, title in TITLES.items():
        counts = comparison.count(kernel)
        lines.append(
            f"  {title:38}" + ", ".join(f"{counts[one]} {one}" for one in verdicts if one in counts)
        )
    for kernel in (OFF, ON):
        names = comparison.differences(kernel)
        lines += ["", f"Differences {TITLES[kernel]}: {len(names) or 'none'}"]
        for name in names:
            lines.append(f"  {name}")
            for one in (BASE, kernel):
                runs = comparison.outcomes[name].get(one, [])
                lines += [f"    {TITLES[one]}: {words}" for words in _counted(runs)]
    lines += _section("Not always the same, on any kernel", comparison.flaky(), comparison)
    usual = {
        name: runs[0] for name, by in comparison.outcomes.items() if (runs := by.get(BASE, []))
    }
    for verdict, title in (
        ("fail", "Failing without the series too"),
        ("signal", "Ended by a signal without the series too"),
        ("timeout", f"Not done in {DEADLINE_S:.0f} s without the series either"),
        ("lost", "Ending the host without the series too"),
        ("skip", "Skipped by themselves"),
    ):
        names = [name for name, one in usual.items() if one.verdict == verdict]
        lines += _section(title, names, comparison)
    if comparison.left_out:
        lines += ["", f"Left out where the processor is emulated: {len(comparison.left_out)}"]
        lines += [f"  {name}: {why}" for name, why in comparison.left_out.items()]
    return "\n".join(lines)


def _section(title: str, names: Sequence[str], comparison: Comparison) -> list[str]:
    if not names:
        return []
    lines = ["", f"{title}: {len(names)}"]
    for name in names:
        runs = [one for by in comparison.outcomes[name].values() for one in by]
        lines += [f"  {name}: {words}" for words in _counted(runs)]
    return lines


def _counted(runs: Sequence[Outcome]) -> list[str]:
    """Each different outcome in words, with how often it came if there are several."""
    counts = Counter(runs)
    return [
        (f"{count} of {len(runs)}: " if len(counts) > 1 else "") + one.words()[:_LONGEST]
        for one, count in counts.items()
    ]
