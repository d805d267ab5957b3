# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest, run under watch: it is shown, ended when it is stuck, and never outlives us."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from harness.build.progress import note
from harness.conform.outcome import INTERRUPTED
from harness.plugin.controller import PARENT_VARIABLE
from harness.plugin.processes import adopted_orphans
from harness.report.live import LiveView

__all__ = ["run_pytest", "signals_as_interrupts"]

LOOK_EVERY_S = 0.5

INTERRUPT_GRACE_S = 60.0
"""How long pytest may take to end its workers after Ctrl-C."""

STALLED_S = 900.0
"""When nothing at all moved for so long, pytest itself is stuck: limits of tests are shorter."""


def run_pytest(
    run_dir: Path, arguments: list[str], root: Path, *, ours: Sequence[str] = ()
) -> tuple[int, str]:
    """Run pytest under watch; gives its exit status, and why it was ended if it was.

    :param ours: further options, for workers on other machines: these are told the command
        line, so that it has none of our paths then.
    """
    own = [
        # What this run is, wherever it is started from.
        f"--rootdir={root}",
        f"--config-file={root / 'pyproject.toml'}",
        f"--kvmi-run={run_dir}",
        # Tests take from a tenth of a second to a minute: hand them out one by one.
        "--dist=load",
        "--maxschedchunk=1",
        *ours,
    ]
    argv = [
        sys.executable,
        "-m",
        "pytest",
        *([] if ours else own),
        # Nothing of a run stays in the repository.
        "-pno:cacheprovider",
        "--color=no",
        *arguments,
    ]
    environment = os.environ | {
        PARENT_VARIABLE: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if ours:
        environment["PYTEST_ADDOPTS"] = shlex.join(own)
    with adopted_orphans(), signals_as_interrupts(), (run_dir / "pytest.log").open("ab") as log:
        process = subprocess.Popen(
            argv,
            # pytest-xdist refuses to name files to other machines that it finds here.
            cwd=run_dir if ours else root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own: Ctrl-C reaches this process only, which passes it on once.
            process_group=0,
        )
        try:
            reason = _watch(process, run_dir)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode, reason


def _watch(process: subprocess.Popen[bytes], run_dir: Path) -> str:
    """Show the run until pytest ends; gives the reason if it had to be ended."""
    with LiveView(run_dir) as live:
        state: object = None
        moved = time.monotonic()
        while True:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY_S)
                    live.update()
                    return ""
                now = live.update()
            except KeyboardInterrupt:
                note("Interrupted: ending the workers; once more to end them at once")
                return _interrupt(process)
            if now != state:
                state, moved = now, time.monotonic()
            elif time.monotonic() - moved > STALLED_S:
                return f"nothing moved for {STALLED_S:.0f} s, so pytest was ended"


def _interrupt(process: subprocess.Popen[bytes]) -> str:
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        process.wait(INTERRUPT_GRACE_S)
    return INTERRUPTED


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Let signals end what runs as Ctrl-C does: with a report."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    # SIGINT, too: a shell lets jobs in the background ignore it, and pytest would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not in the main thread: leave them alone
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
