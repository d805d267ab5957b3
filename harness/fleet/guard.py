# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a worker on a machine, and leaves nothing of it there.

This file is copied to machines and executed there, so it is complete in itself and uses the
standard library alone. The worker ends when its connection does; whatever it started then
becomes a child of this process, which ends it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SUBREAPER = 36
"""include/uapi/linux/prctl.h: PR_SET_CHILD_SUBREAPER."""
PATIENCE_S = 20.0


def children(pid: int) -> Iterator[int]:
    """The children of all threads of a process, and theirs."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for word in file.read_text().split():
                yield int(word)
                yield from children(int(word))


def end_all() -> None:
    """End what is left below this process; what the kernel holds is left to it."""
    deadline = time.monotonic() + PATIENCE_S
    while left := list(children(os.getpid())):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)


def main(arguments: list[str]) -> int:
    """Run Python with these arguments; gives its exit status."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    worker = subprocess.Popen([sys.executable, "-u", *arguments])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: worker.kill())
    try:
        return worker.wait()
    finally:
        end_all()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
