# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host's kernel holds: objects of its slab caches, and which of them grow."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from harness.errors import ConformanceError
from harness.manager.small import SmallManager
from harness.plugin import skip_clause

__all__ = ["ROUNDS", "leaves_nothing"]

ROUNDS = 3
# kfree_rcu() collects for up to five seconds; two of these may have to pass.
_SETTLE_S = 20
# Stacks of threads that ended are given back by the thousand (mm/vmalloc.c, lazy purging).
_LAZY = {"vmap_area"}


def leaves_nothing(manager: SmallManager, live: Callable[[], object], *, lives: int) -> None:
    """Check that what is done again and again does not leave objects in the kernel.

    :param live: does it ``lives`` times; it is called ``ROUNDS`` times, and once before, so
        that what is made once and kept does not count.
    :raises ConformanceError: some cache has grown in every round, by two objects in three
        lives or more, and still has the objects when RCU has freed all that it will.
    """
    if "slabinfo" not in manager.list_dir("/proc"):
        skip_clause("the host's kernel has no /proc/slabinfo to look for leaks in")
    if (
        manager.host.run("zcat /proc/config.gz | grep -q CONFIG_KASAN=y", check=False).returncode
        == 0
    ):
        skip_clause("KASAN keeps what was freed; there kmemleak tells what was not")
    live()
    seen = [_objects(manager)]
    for _ in range(ROUNDS):
        live()
        seen.append(_objects(manager))
    first, grown = seen[0], []
    for cache in first.keys() - _LAZY:
        counts = [one.get(cache, 0) for one in seen]
        # The kernel's own numbers are coarse (whole slabs); a leak shows in every round.
        if min(after - before for before, after in itertools.pairwise(counts)) >= lives * 2 // 3:
            grown.append(cache)
    deadline = time.monotonic() + _SETTLE_S
    while grown:
        for cache in grown:
            # Slabs that a CPU keeps for itself are counted as full; this gives them back.
            manager.write_file(f"/sys/kernel/slab/{cache}/shrink", "1")
        now = _objects(manager)
        grown = [one for one in grown if now[one] - first[one] >= lives * ROUNDS * 2 // 3]
        if time.monotonic() > deadline:
            raise ConformanceError(
                f"{lives * ROUNDS} lives leave objects behind: "
                + "; ".join(f"{name}: {first[name]}, {now[name]}" for name in grown)
            )
        time.sleep(0.5)


def _objects(manager: SmallManager) -> dict[str, int]:
    lines = [line.split() for line in manager.read_file("/proc/slabinfo").splitlines()[2:]]
    return {words[0]: int(words[1]) for words in lines}
