# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that end with the one that started them, whatever happened to it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

__all__ = ["adopted_orphans", "die_with_parent", "parent_of"]

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, or end it now if it has.

    The signal is SIGKILL: there is nothing to tidy up that the same rule does not tidy up
    further down (hosts end with the worker), and nothing may delay the end.

    :param parent_pid: the parent that is meant; if it is no longer the parent, it died
        before the kernel was asked.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def parent_of(pid: int) -> int | None:
    """A process's parent; None when there is no such process."""
    try:
        # After the command's name, which ends with the last parenthesis: state, parent.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


@contextlib.contextmanager
def adopted_orphans() -> Iterator[None]:
    """While this lasts, orphans below this process become its children; the end ends them.

    A net under :func:`die_with_parent`: whatever a killed worker leaves running is found,
    because the kernel hands it to this process instead of to init.
    """
    before = _children()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        for pid in _children() - before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> set[int]:
    """The children of all threads of this process."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found.update(map(int, (task / "children").read_text().split()))
    return found
