# SPDX-License-Identifier: GPL-2.0-or-later
"""What of this machine we may use: cores and memory, also inside a container."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["fitting_workers", "free_cores", "free_memory_mb"]

# Building, and the test processes themselves.
BUILD_MEMORY_MB = 2000

_CGROUPS = Path("/sys/fs/cgroup")


def free_cores(cgroups: Path = _CGROUPS) -> int:
    """The cores that this process may use; a container may have fewer than the machine."""
    cores = len(os.sched_getaffinity(0))
    for place in _own_groups(cgroups):
        # cgroup v2, cpu.max: microseconds in each period, such as "150000 100000".
        found = re.match(r"(\d+) (\d+)", _text(place / "cpu.max"))
        if found:
            cores = min(cores, max(1, math.floor(int(found[1]) / int(found[2]))))
    return cores


def free_memory_mb(cgroups: Path = _CGROUPS) -> int:
    """Memory that is left for us, in MiB, caches that can be dropped included."""
    found = re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = int(found[1]) >> 10 if found else 0
    for place in _own_groups(cgroups):
        limit, used = _text(place / "memory.max"), _text(place / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            free = min(free, max(0, int(limit) - int(used)) >> 20)
    return free


def fitting_workers(host_memory_mb: int) -> int:
    """How many test processes this machine has cores and memory for; at least one.

    Each has a host, whose processors are busy about half of the time; the template that
    hosts are restored from lies in memory once more.
    """
    by_memory = (free_memory_mb() - BUILD_MEMORY_MB) // host_memory_mb - 1
    return max(1, min(free_cores(), by_memory))


def _own_groups(cgroups: Path) -> Iterator[Path]:
    """The control group of this process and those around it."""
    found = re.search(r"^0::/(.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE)
    place = cgroups / found[1] if found else cgroups
    while place.is_relative_to(cgroups):
        yield place
        place = place.parent


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
