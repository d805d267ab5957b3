# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host's kernel holds: afterwards it must not be more than before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import ConformanceError
from harness.hosts.leaks import can_find_leaks, find_leaks

if TYPE_CHECKING:
    from harness.hosts import Host

__all__ = ["Holdings", "look", "wait_until_given_back"]

#: Prints `word number` lines. /proc/slabinfo counts what lies in a processor's own slab as
#: used; shrinking a cache first takes everything unused out of there.
_LOOK = r"""
echo threads $(cat /proc/[0-9]*/comm 2>/dev/null | grep -c '^kvmi-[0-9]')
echo machines $(ls /sys/kernel/debug/kvm 2>/dev/null | grep -c '^[0-9]')
echo descriptors $(ls /proc/PID/fd | wc -l)
cd /sys/kernel/slab
for cache in *kvm* kmalloc-* filp sock_inode_cache task_struct; do
  [ -e $cache/shrink ] && echo 1 >$cache/shrink
done
awk '/^[^ ]*kvm|^kmalloc-|^filp |^sock_inode_cache |^task_struct / { print $1, $2 }' /proc/slabinfo
"""

_SLACK = 100
"""Objects of the caches that everybody uses may come and go."""
_SETTLED_S = 15.0
"""RCU and the closing of sockets take their time."""


@dataclass(frozen=True)
class Holdings:
    """Counts by name: kernel threads of introspection, virtual machines, descriptors of the
    executor, and objects in slab caches."""

    counts: Mapping[str, int]

    def excess(self, base: Holdings, *, sessions: int) -> list[str]:
        """What there is more of than in ``base``, in words.

        :param sessions: so many there were since ``base``. What each of them loses shows in
            the caches that everybody uses, once there were enough.
        """
        found = []
        for name, now in self.counts.items():
            was = base.counts.get(name, 0)
            # The executor may hold some descriptors of its last sequence a little longer.
            ours = "kvm" in name or name in ("threads", "machines")
            if now > was + (0 if ours else _SLACK + sessions // 8):
                found.append(f"{name}: {was} -> {now}")
        return found


def look(host: Host, *, pid: int) -> Holdings:
    """Count once.

    :param pid: of the executor.
    """
    lines = host.run(_LOOK.replace("PID", str(pid)), check=False).text.splitlines()
    return Holdings({name: int(count) for name, count in (line.split() for line in lines)})


def wait_until_given_back(host: Host, base: Holdings, *, pid: int, sessions: int) -> None:
    """Wait until the host holds no more than in ``base``.

    Counts are a means where there is no better one: where the kernel has kmemleak, which
    knows what is lost, they only make it look.

    :raises ConformanceError: it still does after a while; the message says of what.
    """
    deadline = time.monotonic() + _SETTLED_S * host.patience
    while excess := look(host, pid=pid).excess(base, sessions=sessions):
        if time.monotonic() > deadline:
            host.check()
            leaks = find_leaks(host)
            if not leaks and can_find_leaks(host):
                return
            raise ConformanceError(
                f"after {sessions} sessions the kernel of host {host.name} holds more than "
                f"before: {'; '.join(excess)}",
                details=leaks,
            )
        time.sleep(0.5)
