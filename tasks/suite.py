# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs of the suite, and of what holds the suite itself to something."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context

from tasks.common import harness_task, ready, settings_in

__all__ = ["conform", "fuzz", "mutants", "nightly", "revisions", "selftests"]


@harness_task()
def conform(
    _context: Context,
    *,
    target: str | None = None,
    ssh_host: str | None = None,
    workers: str | None = None,
    select: str | None = None,
    repeat: int = 1,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    kernel_base: str | None = None,
    qemu_base: str | None = None,
    flavour: str | None = None,
    abi: str | None = None,
    description: str | None = None,
    kernel: str | None = None,
    reports: str | None = None,
    shard: str | None = None,
    known: str | None = None,
    inventory: str | None = None,
) -> int:
    """Hold kernel and QEMU to the suite: build, boot, run, report."""
    from harness.conform import conform as run

    settings = ready(**settings_in(locals()))
    if inventory:
        from harness.fleet.run import conform_fleet

        place = Path(inventory)
        return conform_fleet(settings, place, select=select, repeat=repeat, shard=shard)
    return run(settings, select=select, repeat=repeat, shard=shard)


@harness_task()
def nightly(_context: Context, config: str) -> int:
    """Build, run on the machines of an inventory, compare with the last night, tell."""
    from harness.fleet.nightly import nightly as run

    return run(Path(config), lambda path, reports: ready(path, reports=reports))


@harness_task()
def mutants(_context: Context, select: str | None = None) -> int:
    """Break kernel and QEMU on purpose, one defect at a time; each must turn its clauses red."""
    from harness.mutants import run

    return run(ready(), select=select)


@harness_task()
def revisions(_context: Context, select: str | None = None, reports: str | None = None) -> int:
    """Hold variants of the series that speak older revisions of the interface to the suite."""
    from harness.revisions import run

    return run(ready(reports=reports), select=select)


@harness_task()
def selftests(
    _context: Context,
    *,
    select: str | None = None,
    target: str | None = None,
    workers: str | None = None,
    kernel_series: str | None = None,
    flavour: str | None = None,
    kernel: str | None = None,
    reports: str | None = None,
) -> int:
    """Compare the kernel's own KVM selftests with the series and without it."""
    from harness.selftests import run

    settings = ready(**settings_in(locals()))
    return run(settings, select=select)


@harness_task()
def fuzz(
    _context: Context,
    *,
    seed: str | None = None,
    messages: int | None = None,
    sequences: int | None = None,
    select: str | None = None,
    target: str | None = None,
    ssh_host: str | None = None,
    workers: str | None = None,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    flavour: str | None = None,
    abi: str | None = None,
    description: str | None = None,
    kernel: str | None = None,
    reports: str | None = None,
) -> int:
    """Attack the kernel with wrong, random and badly timed messages and ioctls."""
    from harness.fuzz.run import fuzz as run

    settings = ready(**settings_in(locals()))
    wanted = {"messages": messages, "sequences": sequences}
    numbers = {name: int(value) for name, value in wanted.items() if value is not None}
    return run(settings, seed=seed, select=select, **numbers)
