# SPDX-License-Identifier: GPL-2.0-or-later
"""A run on many machines: from an inventory and builds to verdicts.

It goes in rounds. In a round, pytest-xdist spreads what has no verdict yet over the machines
that are there, each with a worker of its own behind execnet's gateway over SSH. What a round
leaves (because a machine was lost so late that the others had ended) is done by the next, and
machines that came back to us between two rounds take part again.

What a lost machine ran in that moment is judged here. If its kernel died of it, the promise is
broken. Otherwise another machine gets the test; one that was lost with two machines is MISS.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness import __version__, paths
from harness.build.progress import note
from harness.build.series import load_series, record
from harness.conform import (
    INTERRUPTED,
    account,
    death_of,
    kernel_patches,
    rerun_of,
    run_pytest,
    selection,
    system_here,
    tell,
)
from harness.errors import HarnessError, InfraError
from harness.fleet.machine import Fate, FleetMachine
from harness.fleet.runtime import Runtime, build_site
from harness.fleet.schedule import HERE
from harness.fleet.session import FLEET, Loss, read_losses, settled_tests
from harness.plugin.beat import open_counters
from harness.plugin.inputs import machine_record, save_builds, save_settings
from harness.report.model import (
    MachineRecord,
    Outcome,
    Planned,
    RunFacts,
    Verdict,
    clauses_or_none,
)
from harness.report.store import (
    VerdictFile,
    load_run,
    new_run_dir,
    point_latest,
    utc_now,
    write_atomically,
)

if TYPE_CHECKING:
    from harness.fleet.inventory import Machine
    from harness.settings import Settings

__all__ = ["Rounds", "run_fleet", "together"]

_MACHINES_AT_ONCE = 8
_ROUNDS = 6
_STARTS = 3
"""How often one machine is prepared in a run."""
_HERE_HAS = frozenset({"source"})


def run_fleet(
    settings: Settings,
    inventory: Sequence[Machine],
    *,
    select: str | None = None,
    started_by: str = "",
) -> tuple[int, Path]:
    """Hold the series of the settings to the suite, on the machines of an inventory.

    :param select: as of :func:`harness.conform.conform`.
    :param started_by: the command that starts such a run again.
    :returns: the exit code, as of :func:`harness.conform.conform`, and the run's directory.
    :raises HarnessError: as there, before anything was run.
    :raises InfraError: no machine can be used.

    Afterwards nothing of it runs on any machine that can still be reached.
    """
    from harness.build.bundle import build_bundle
    from harness.build.images import build_images
    from harness.build.kernel import build_kernel
    from harness.build.qemu import build_qemu

    begun = time.monotonic()
    arguments = selection(select)
    kernel = build_kernel(settings)
    qemu = build_qemu(settings)
    images = build_images(settings, kernel=kernel, qemu=qemu)
    build_bundle(settings, images)
    runtime = Runtime(settings, kernel, qemu, images, build_site(settings))
    run_dir = new_run_dir(settings.reports)
    machines = [FleetMachine(machine, run_dir) for machine in inventory]
    try:
        _prepare(machines, runtime)
        facts = RunFacts(
            run=run_dir.name,
            started=utc_now(),
            target="fleet",
            chosen=f"{len(machines)} machines of an inventory",
            series=f"{kernel.series} {qemu.series}",
            abi=settings.abi,
            workers=sum(not machine.lost for machine in machines),
            select=select or "",
            rerun=started_by or rerun_of(settings, "conform"),
            harness=__version__,
            python=platform.python_version(),
            system=system_here(),
            controller=f"{platform.node()}, {len(os.sched_getaffinity(0))} CPUs",
            kernel={
                "release": kernel.release,
                "series": kernel.series,
                "key": kernel.key,
                **kernel_patches(settings, kernel.series),
            },
            qemu={
                "version": qemu.version,
                "series": qemu.series,
                "key": qemu.key,
                **record(load_series(settings.qemu_series), base=f"qemu {qemu.version}"),
            },
            machine=together(machines),
            prepare_s=round(time.monotonic() - begun, 1),
        )
        with VerdictFile(run_dir) as file:
            file.write(facts)
        save_settings(run_dir, settings)
        save_builds(run_dir, kernel=kernel, qemu=qemu, images=images)
        open_counters(run_dir).close()
        point_latest(run_dir)
        code = tell(run_dir, Rounds(run_dir, machines, runtime).run(arguments), arguments)
        # All promises may have held, but somebody has to look after that machine.
        lost = any(machine.lost for machine in machines)
        return code or (InfraError.exit_code if lost else 0), run_dir
    finally:
        for machine in machines:
            machine.sweep()
            machine.close()


def _prepare(machines: Sequence[FleetMachine], runtime: Runtime) -> None:
    """Prepare all at the same time; those that are of no use are lost.

    :raises HarnessError: that of one of them, when all are.
    """
    errors: list[HarnessError] = []

    def prepare(machine: FleetMachine) -> None:
        try:
            machine.prepare(runtime)
        except HarnessError as error:
            machine.give_up(error)
            errors.append(error)

    with ThreadPoolExecutor(_MACHINES_AT_ONCE, "fleet") as pool:
        list(pool.map(prepare, machines))
    if all(machine.lost for machine in machines):
        raise InfraError(
            f"no machine of the fleet can be used; {machines[0].name}: {machines[0].lost}",
            hint=errors[0].hint,
            details="\n".join(f"{one.name}: {one.lost}" for one in machines),
        ) from errors[0]


def together(machines: Sequence[FleetMachine]) -> MachineRecord:
    """The facts of all machines as those of one: emulated if any of them is."""
    known = {one.name: machine_record(one.facts) for one in machines if one.facts is not None}
    records = list(known.values())

    def all_of(name: str) -> str:
        return "; ".join(dict.fromkeys(filter(None, (getattr(one, name) for one in records))))

    extra = {
        f"machine {name}": ", ".join(
            part
            for part in (one.machine, one.cpu_model, one.virtualisation, f"{one.cpus} CPUs")
            if part
        )
        for name, one in known.items()
    }
    extra |= {f"machine {one.name}": f"lost: {one.lost}" for one in machines if one.facts is None}
    first = records[0]
    return msgspec.structs.replace(
        first,
        target="fleet",
        emulated=any(one.emulated for one in records),
        hypervisor=all_of("hypervisor"),
        vendor=all_of("vendor"),
        cpu_model=all_of("cpu_model"),
        virtualisation=all_of("virtualisation"),
        nested_paging=all(one.nested_paging for one in records),
        machine=f"a fleet: {', '.join(one.name for one in machines)}",
        extra=extra,
    )


class Rounds:
    """The rounds of one run; see the module's text."""

    def __init__(self, run_dir: Path, machines: Sequence[FleetMachine], runtime: Runtime) -> None:
        self._run_dir = run_dir
        self._machines = {machine.name: machine for machine in machines}
        self._runtime = runtime
        self._judged = 0
        self._suspects: dict[str, list[str]] = {}
        self._starts = dict.fromkeys(self._machines, 1)

    def run(self, arguments: Sequence[str]) -> int:
        """Run until nothing is owed or nobody can do it; every test has a verdict then.

        :param arguments: for pytest, that choose tests.
        :returns: the exit status of the last pytest.
        """
        code = 0
        try:
            code, reason = self._all_rounds(arguments)
        except KeyboardInterrupt:
            reason = INTERRUPTED
        self._account_for_needs()
        lost = {one.name: one.lost for one in self._machines.values() if one.lost}
        account(self._run_dir, reason or death_of(code), machines=lost)
        return code

    def _all_rounds(self, arguments: Sequence[str]) -> tuple[int, str]:
        code = 0
        for _ in range(_ROUNDS):
            there = [machine for machine in self._machines.values() if not machine.lost]
            if not there:
                break
            code, reason = run_pytest(
                self._run_dir,
                list(arguments),
                paths.ROOT,
                ours=["--kvmi-fleet", *self._workers(there)],
            )
            if reason:
                return code, reason
            losses = self._new_losses()
            for loss in losses:
                self._judge(loss)
            left = self._left()
            if not losses and not self._look_for_lost(code):
                # Nobody was lost; but what one kind of machine skipped last, another may run.
                owed = {one.test for one in self._owed()}
                left = [test for test in left if test not in owed]
            if not left:
                break
            note(f"Another round, for {len(left)} tests")
        return code, ""

    def _workers(self, machines: Sequence[FleetMachine]) -> list[str]:
        """Options that name the workers, after their files are written."""
        config = self._run_dir / "ssh_config"
        write_atomically(config, "\n".join(machine.ssh_config() for machine in machines))
        words = {machine.name: sorted(machine.words) for machine in machines}
        write_atomically(
            self._run_dir / FLEET, msgspec.json.encode(words | {HERE: sorted(_HERE_HAS)})
        )
        specs = [f"popen//chdir={paths.ROOT}//id={HERE}"]
        specs += [machine.spec(config) for machine in machines]
        return [word for spec in specs for word in ("--tx", spec)]

    def _left(self) -> list[str]:
        """The tests to which a machine that is there has something to add."""
        words = {one.name: one.words for one in self._machines.values() if not one.lost}
        settled = settled_tests(self._run_dir, words)
        return [
            one.test
            for one in load_run(self._run_dir).plan
            if one.test not in settled
            and any(set(one.needs) <= has for has in (*words.values(), _HERE_HAS))
        ]

    def _owed(self) -> list[Planned]:
        """What was collected and has no verdict."""
        run = load_run(self._run_dir)
        done = {verdict.test for verdict in run.verdicts}
        return [planned for planned in run.plan if planned.test not in done]

    def _new_losses(self) -> list[Loss]:
        losses = read_losses(self._run_dir)
        new, self._judged = losses[self._judged :], len(losses)
        return new

    def _look_for_lost(self, code: int) -> bool:
        """After a pytest that failed by itself: is a machine missing that it did not tell of?"""
        if code in (0, 1):
            return False
        found = False
        for machine in self._machines.values():
            if not machine.lost and machine.fate() is not Fate.THERE:
                self._bring_back(machine, "it was gone when the run began")
                found = True
        return found

    # -- machines that were lost ----------------------------------------------------------

    def _judge(self, loss: Loss) -> None:
        """Find out what became of a machine, and of the test that it ran."""
        machine = self._machines.get(loss.machine)
        if machine is None:
            self._give_verdict(loss.test, Outcome.MISS, f"the worker here died: {loss.error}")
            return
        fate = machine.fate()
        during = f" during {loss.test}" if loss.test else ""
        note(f"Machine {machine.name} {fate}{during}")
        crash = machine.crash()
        if crash or fate is Fate.RESTARTED:
            how = f"died: {crash}" if crash else "restarted it"
            self._give_verdict(
                loss.test, Outcome.FAIL, f"the kernel of machine {machine.name} {how}", machine
            )
        elif loss.test:
            suspects = self._suspects.setdefault(loss.test, [])
            suspects.append(machine.name)
            if len(suspects) > 1:
                self._give_verdict(
                    loss.test,
                    Outcome.MISS,
                    f"machines {' and '.join(suspects)} were lost during this test",
                )
        if fate is not Fate.GONE:
            self._bring_back(machine, loss.error)
        else:
            machine.give_up(f"{machine.lost}{f'; it ran {loss.test}' if loss.test else ''}")

    def _bring_back(self, machine: FleetMachine, why: str) -> None:
        if machine.lost:
            return
        self._starts[machine.name] += 1
        if self._starts[machine.name] > _STARTS:
            machine.give_up(f"its worker ended {_STARTS} times, the last time with: {why}")
            return
        try:
            machine.prepare(self._runtime)
        except HarnessError as error:
            machine.give_up(error)

    def _give_verdict(
        self, test: str, outcome: Outcome, reason: str, machine: FleetMachine | None = None
    ) -> None:
        """Write what is known of a test whose worker did not live to tell."""
        run = load_run(self._run_dir)
        planned = next((one for one in run.plan if one.test == test), None)
        if planned is None or any(one.test == test for one in run.verdicts):
            return
        evidence = {}
        if machine is not None and machine.kernel_log_path is not None:
            evidence["kernel_log"] = machine.kernel_log_path.relative_to(self._run_dir).as_posix()
        with VerdictFile(self._run_dir) as file:
            for clause in clauses_or_none(planned.clauses):
                file.write(
                    Verdict(
                        clause=clause,
                        verdict=outcome,
                        test=test,
                        target=run.facts.target,
                        series=run.facts.series,
                        duration_s=0.0,
                        reason=reason,
                        description=planned.description,
                        worker=machine.name if machine is not None else "",
                        evidence=evidence,
                    )
                )

    def _account_for_needs(self) -> None:
        """Say of what nobody ran why: no such machine, or it was lost."""
        for planned in self._owed():
            needs = set(planned.needs)
            able = [one for one in self._machines.values() if needs <= one.words]
            unknown = [one for one in self._machines.values() if not one.words]
            if not needs or needs <= _HERE_HAS or any(not one.lost for one in able):
                continue  # it should have run
            if able or unknown:
                names = ", ".join(one.name for one in able or unknown)
                reason = f"it needs {' '.join(sorted(needs))}, and {names} was lost"
                self._give_verdict(planned.test, Outcome.MISS, reason)
            else:
                reason = f"no machine of the fleet has {' '.join(sorted(needs))}"
                self._give_verdict(planned.test, Outcome.SKIP, reason)
