# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that ends with its parent, whatever happened to that one."""

from __future__ import annotations

import os
import signal

__all__ = ["die_with_parent"]

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, or end it now if it has.

    The signal is SIGKILL: there is nothing to tidy up that the same rule does not tidy up
    further down (hosts end with the worker), and nothing may delay the end.

    :param parent_pid: the parent that is meant; if it is no longer the parent, it died
        before the kernel was asked.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
