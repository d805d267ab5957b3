# SPDX-License-Identifier: GPL-2.0-or-later
"""The whole way: choose the target, build, run the suite, report."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import paths
from harness.build.builds import build_all
from harness.build.progress import note
from harness.conform.begin import begin_run, check_inputs, rerun_of, writing
from harness.conform.outcome import account, death_of, tell
from harness.conform.selection import SUITES, selection, suites_for
from harness.conform.watch import run_pytest
from harness.hosts import target_for
from harness.hosts.choice import settled
from harness.plugin.inputs import machine_record, save_machine
from harness.plugin.shard import part_of
from harness.report.store import new_run_dir
from harness.settings import Settings

__all__ = ["conform", "prepare_run", "run_suite"]

FULL_BYTES = 1 << 20
"""With less than this left, a disk counts as full."""


def conform(
    settings: Settings,
    *,
    select: str | None = None,
    repeat: int = 1,
    shard: str | None = None,
    suites: Sequence[str] = SUITES,
    unfinished: bool = False,
) -> int:
    """Hold the series of the settings to the suite.

    :param select: clauses (``HOOK-OK``, ``EVT-*``), tests (a file or pytest's node id), or
        an expression for pytest's ``-k``; several of the first two, separated by blanks.
    :param repeat: run each test so many times, and stop at the first that is not good.
    :param shard: run only this part, ``2/3``, of what would run; see
        :func:`harness.report.merge.merge` for what to do with the parts.
    :param suites: directories of tests that ``select`` chooses from.
    :param unfinished: the series is not whole. What the kernel says it lacks is not tested; hosts
        serve on after failures that left no trace, of which there are many; and it may have
        other numbers than it is held to: then nothing holds. Without this each failure costs a
        new host, so that none can lead to another.
    :returns: the exit code: 0 all held, 1 a promise was broken, 2 usage, 4 our own side or
        the machine.
    :raises UsageError: ``select`` names nothing.
    :raises BuildError: something could not be built; nothing was run.
    :raises ConformanceError: the kernel under test does not even boot; nothing was run.
    :raises InfraError: nothing could be run.

    Afterwards the run's directory holds verdicts and documents, also if this ends with an
    exception after the first test began.
    """
    suites, left_out = suites_for(settings, suites)
    if left_out:
        note(f"Not tested: {left_out}")
    arguments = selection(select, suites)
    if shard:
        part_of(shard)
        arguments.append(f"--kvmi-shard={shard}")
    settings, run_dir = prepare_run(
        settings,
        task="conform",
        select=select or "",
        repeat=repeat,
        shard=shard or "",
        left_out=left_out,
        numbers=not unfinished,
    )
    workers = settings.workers
    note(f"Run the suite with {workers} worker{'s' if workers > 1 else ''}: {run_dir}")
    if unfinished:
        arguments.append("--kvmi-unfinished")
    if repeat > 1:
        arguments += [f"--kvmi-repeat={repeat}", "-x"]
    return run_suite(run_dir, [f"-n{workers}", *arguments])


def prepare_run(
    settings: Settings,
    *,
    task: str,
    options: str = "",
    select: str = "",
    repeat: int = 1,
    shard: str = "",
    left_out: str = "",
    numbers: bool = True,
) -> tuple[Settings, Path]:
    """Choose the target, build, and make the target and the directory of a run ready.

    :param task: of ``inv``, whose run it is. :param options: that start such a run again.
    :returns: the settings with the target in them, and the directory, for :func:`run_suite`.
    :raises HarnessError: as :func:`conform`, before anything was run.
    """
    check_inputs(settings, numbers=numbers)
    run_dir = new_run_dir(settings.reports)
    rerun = rerun_of(settings, task) + options
    settings, choice = settled(settings)
    note(f"Target {choice.target}: {choice.reason}")
    start = time.monotonic()
    target = target_for(settings)
    builds = build_all(settings)
    target.prepare(builds.kernel, builds.images)
    machine = target.facts()
    begin_run(
        settings,
        run_dir,
        builds,
        machine=machine_record(machine),
        # Of the hosts; one that we did not boot may have another.
        release=machine.kernel_release,
        under_test=machine.kernel_series,
        target=settings.target,
        chosen=choice.reason,
        workers=settings.workers,
        select=select,
        repeat=repeat,
        shard=shard,
        left_out=left_out,
        rerun=rerun,
        prepare_s=time.monotonic() - start,
    )
    with writing(run_dir):
        save_machine(run_dir, machine)
    return settings, run_dir


def run_suite(run_dir: Path, arguments: list[str], *, root: Path = paths.ROOT) -> int:
    """Run pytest for a prepared run, see to it that nothing is lost, and make the documents.

    :param run_dir: holds the run's facts, and what workers need to get hosts.
    :param arguments: for pytest.
    :param root: where the tests are, with the ``pyproject.toml`` that configures pytest.
    :returns: the exit code, as of :func:`conform`.
    """
    code, reason = run_pytest(run_dir, arguments, root)
    if shutil.disk_usage(run_dir).free < FULL_BYTES:
        reason = f"no space left on the disk of {run_dir}"
        print(f"error: {reason}; the verdicts so far are kept", file=sys.stderr)
    account(run_dir, reason or death_of(code))
    return tell(run_dir, code, arguments)
