# SPDX-License-Identifier: GPL-2.0-or-later
"""A run on many machines: from an inventory and builds to verdicts."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.conform import begin_run, check_inputs, rerun_of, selection, suites_for, tell
from harness.errors import HarnessError, InfraError, UsageError
from harness.fleet.inventory import load_inventory
from harness.fleet.machine import FleetMachine
from harness.fleet.rounds import Rounds
from harness.fleet.runtime import Runtime, build_site
from harness.plugin.inputs import machine_record
from harness.report.store import new_run_dir

if TYPE_CHECKING:
    from harness.fleet.inventory import Machine
    from harness.report.model import MachineRecord
    from harness.settings import Settings

__all__ = ["conform_fleet", "run_fleet", "together"]

_MACHINES_AT_ONCE = 8


def conform_fleet(
    settings: Settings,
    inventory: Path,
    *,
    select: str | None = None,
    repeat: int = 1,
    shard: str | None = None,
) -> int:
    """As :func:`harness.conform.conform`, on the machines of an inventory.

    :raises UsageError: the inventory is wrong, or something is asked for that a fleet cannot do.
    """
    if repeat > 1 or shard:
        raise UsageError("a fleet runs all that is selected, once", hint="leave out --inventory")
    started_by = f"{rerun_of(settings, 'conform')} --inventory {shlex.quote(str(inventory))}"
    machines = load_inventory(inventory)
    return run_fleet(settings, machines, select=select, started_by=started_by)[0]


def run_fleet(
    settings: Settings,
    inventory: Sequence[Machine],
    *,
    select: str | None = None,
    started_by: str,
) -> tuple[int, Path]:
    """Hold the series of the settings to the suite, on the machines of an inventory.

    :param select: as of :func:`harness.conform.conform`.
    :param started_by: the command that starts such a run again.
    :returns: the exit code, as of :func:`harness.conform.conform`, and the run's directory.
    :raises HarnessError: as there, before anything was run.
    :raises InfraError: no machine can be used.

    Afterwards nothing of it runs on any machine that can still be reached.
    """
    from harness.build.builds import build_all
    from harness.build.bundle import build_bundle

    begun = time.monotonic()
    suites, left_out = suites_for(settings)
    arguments = selection(select, suites)
    check_inputs(settings)
    if shutil.which("ssh") is None:
        raise UsageError("ssh is not installed", hint="apt-get install openssh-client")
    builds = build_all(settings)
    build_bundle(settings, builds.images)
    runtime = Runtime(settings, builds, build_site(settings))
    run_dir = new_run_dir(settings.reports)
    machines = [FleetMachine(machine, run_dir) for machine in inventory]
    try:
        _prepare(machines, runtime)
        begin_run(
            settings,
            run_dir,
            builds,
            machine=together(machines),
            release=builds.kernel.release,
            under_test=builds.kernel.series,
            target="fleet",
            chosen=f"{len(machines)} machines of an inventory",
            workers=sum(not machine.lost for machine in machines),
            select=select or "",
            left_out=left_out,
            rerun=started_by,
            prepare_s=time.monotonic() - begun,
        )
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
