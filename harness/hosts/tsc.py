# SPDX-License-Identifier: GPL-2.0-or-later
"""The rate of this machine's time-stamp counter, measured.

QEMU's TCG hands the machine's own counter to the emulated CPUs, and the host's kernel
keeps time by it. Left to itself that kernel finds the rate by counting during some
milliseconds of emulated timer, which on a busy machine gives anything: a wrong clock,
and a KVM that refuses to set its guests' counters (kvm_set_tsc_khz() in
arch/x86/kvm/x86.c), so that their timers never fire. So it is told the rate.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable

__all__ = ["tsc_khz"]

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")

_WINDOW_S = 0.25
_TRIES = 50


@functools.cache
def tsc_khz() -> int:
    """Ticks of the counter per millisecond of CLOCK_MONOTONIC; off by some millionths."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=protection)
    code.write(_READ_TSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    ns_before, ticks_before = _sample(read_tsc)
    time.sleep(_WINDOW_S)  # the measurement itself
    ns_after, ticks_after = _sample(read_tsc)
    return round((ticks_after - ticks_before) * 1_000_000 / (ns_after - ns_before))


def _sample(read_tsc: Callable[[], int]) -> tuple[int, int]:
    """Clock and counter at one moment: of some tries the one done in least time."""
    best = (1 << 62, 0, 0)
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        ticks = read_tsc()
        after = time.monotonic_ns()
        best = min(best, (after - before, (after + before) // 2, ticks))
    return best[1:]
