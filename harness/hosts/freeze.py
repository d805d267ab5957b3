# SPDX-License-Identifier: GPL-2.0-or-later
"""One thread of another process held still from outside, by ptrace(2).

A processor of an emulated machine is a thread of its emulator. While that is held, the
processor executes nothing and sees no interrupt, and the others go on: what waits for it
can be seen waiting. If we die meanwhile, the thread goes on by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from harness.errors import UsageError

__all__ = ["frozen_thread"]

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x4000_0000  # threads, too, <linux/wait.h>


@contextlib.contextmanager
def frozen_thread(thread: int) -> Iterator[None]:
    """Hold a thread until the block ends. Only one of our threads may do so at a time.

    :raises UsageError: we may not, as in a container without CAP_SYS_PTRACE.
    """
    _ptrace(_SEIZE, thread)
    try:
        _ptrace(_INTERRUPT, thread)
        os.waitpid(thread, _WALL)
        yield
    finally:
        _ptrace(_DETACH, thread)


def _ptrace(request: int, thread: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    nothing = ctypes.c_void_p(0)
    if library.ptrace(ctypes.c_long(request), ctypes.c_long(thread), nothing, nothing) == -1:
        number = ctypes.get_errno()
        raise UsageError(f"ptrace of thread {thread} is refused: {os.strerror(number)}")
