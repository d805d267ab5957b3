# SPDX-License-Identifier: GPL-2.0-or-later
"""How a run begins: its facts are written down, and what its workers need is left for them."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness import __version__
from harness.build.series import load_series, record
from harness.build.sources import linux_source
from harness.errors import InfraError
from harness.plugin.beat import open_counters
from harness.plugin.inputs import save_builds, save_settings
from harness.report.known import FILE_NAME as KNOWN
from harness.report.known import load_known
from harness.report.model import RunFacts
from harness.report.store import VerdictFile, point_latest, utc_now
from harness.series import interface
from harness.series.numbers import require_numbers
from harness.settings import Settings, load_settings, with_series

if TYPE_CHECKING:
    from harness.build.builds import Builds
    from harness.report.model import MachineRecord

__all__ = ["begin_run", "check_inputs", "rerun_of", "writing"]

_RERUN = (
    "target", "ssh_host", "kernel_series", "qemu_series", "kernel_base", "qemu_base", "flavour",
    "kernel", "abi", "description",
)  # fmt: skip
"""Settings that the command has which starts a run again."""


def check_inputs(settings: Settings, *, numbers: bool = True) -> None:
    """Find what is wrong with the inputs of a run before the work, not after it.

    :param numbers: whether the kernel has to have the numbers that it is held to.
    :raises UsageError: a wrong list of known failures, or other numbers.
    """
    if settings.known:
        load_known(settings.known)
    if numbers:
        require_numbers(settings)


def begin_run(
    settings: Settings,
    run_dir: Path,
    builds: Builds,
    *,
    machine: MachineRecord,
    release: str,
    under_test: str,
    target: str,
    chosen: str,
    workers: int,
    select: str,
    rerun: str,
    prepare_s: float,
    repeat: int = 1,
    shard: str = "",
    left_out: str = "",
) -> None:
    """Write down what a run is, and leave in its directory what workers need.

    :param release: of the kernel under test. :param under_test: its series.
    :param rerun: the command that starts such a run again.
    :raises InfraError: the directory cannot be written.
    """
    profile = interface(settings)
    kernel, qemu = builds.kernel, builds.qemu
    facts = RunFacts(
        run=run_dir.name,
        started=utc_now(),
        target=target,
        chosen=chosen,
        series=f"{under_test} {qemu.series}",
        abi=profile.name,
        unclaimed=list(profile.unclaimed),
        workers=workers,
        select=select,
        repeat=repeat,
        shard=shard,
        left_out=left_out,
        rerun=rerun,
        harness=__version__,
        python=platform.python_version(),
        system=_system_here(),
        controller=f"{platform.node()}, {len(os.sched_getaffinity(0))} CPUs",
        kernel={
            "release": release,
            "series": under_test,
            "key": kernel.key,
            **_kernel_patches(settings, under_test),
        },
        qemu={
            "version": qemu.version,
            "series": qemu.series,
            "key": qemu.key,
            **record(load_series(settings.qemu_series), base=f"qemu {qemu.version}"),
        },
        machine=machine,
        prepare_s=round(prepare_s, 1),
    )
    with writing(run_dir):
        with VerdictFile(run_dir) as file:
            file.write(facts)
        if settings.known:
            shutil.copyfile(settings.known, run_dir / KNOWN)
        save_settings(run_dir, settings)
        save_builds(run_dir, builds)
        open_counters(run_dir, profile=profile).close()
        point_latest(run_dir)


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Say what is wrong when the run's directory cannot be written.

    :raises InfraError: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise InfraError(
            f"the run's directory {run_dir} cannot be written: {error.strerror}",
            hint="make room there, or set 'reports' to another directory",
        ) from error


def _kernel_patches(settings: Settings, under_test: str) -> dict[str, str]:
    """What is to be said of the kernel's series, if that is what the hosts run."""
    if settings.kernel:
        return {}
    series = load_series(settings.kernel_series)
    source = linux_source(settings)
    found = record(series, base=f"{source.name} {source.version}")
    return found if series.id == under_test else {}


def _system_here() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return platform.platform()


def rerun_of(settings: Settings, task: str) -> str:
    """The command that starts such a run again; ``--select`` can be added to it."""
    command = f"inv {task}"
    if task == "conform" and "TOX_ENV_NAME" in os.environ:
        command = "python3 -m tox run -e conform --"
    usual = with_series(load_settings())
    for name in _RERUN:
        value = getattr(settings, name)
        # That a series is not described is found out again.
        if value != getattr(usual, name) and (value or name != "description"):
            command += f" --{name.replace('_', '-')} {shlex.quote(str(value))}"
    return command
