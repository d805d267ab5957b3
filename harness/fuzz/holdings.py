# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host's kernel holds: afterwards it must not be more than before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
_ROUNDS = 2
"""So many more times a loss has to show in these."""
_SETTLED_S = 15.0
"""RCU and the closing of sockets take their time."""


@dataclass(frozen=True)
class Holdings:
    """Counts by name: kernel threads of introspection, virtual machines, descriptors of the
    executor, and objects in slab caches."""

    counts: Mapping[str, int]

    def limits(self, *, sessions: int) -> dict[str, int]:
        """What there may be of each after so many sessions more.

        What each of them loses shows in the caches that everybody uses, once there were
        enough. (The executor may hold some descriptors of its last sequence a little longer.)
        """
        slack = _SLACK + sessions // 8
        return {name: was + (0 if _is_ours(name) else slack) for name, was in self.counts.items()}

    def above(self, limits: Mapping[str, int]) -> list[str]:
        """What there is more of than there may be."""
        return [name for name, most in limits.items() if self.counts.get(name, 0) > most]


def _is_ours(name: str) -> bool:
    """Whether nobody but KVM and its introspection has such things."""
    return "kvm" in name or name in ("threads", "machines")


def look(host: Host, *, pid: int) -> Holdings:
    """Count once.

    :param pid: of the executor.
    """
    lines = host.run(_LOOK.replace("PID", str(pid)), check=False).text.splitlines()
    return Holdings({name: int(count) for name, count in (line.split() for line in lines)})


def wait_until_given_back(
    host: Host, base: Holdings, *, pid: int, sessions: int, again: Callable[[], int]
) -> Holdings:
    """Wait until the host holds no more than in ``base``.

    Counts are a means where there is no better one: where the kernel has kmemleak, which
    knows what is lost, they only make it look. And of the caches that everybody uses the
    kernel may come to keep some objects for itself, once; what sessions lose, they lose again.

    :param sessions: so many there were since ``base``.
    :param again: does the last of these once more, and says how many they were.
    :returns: what to compare with next time: ``base``, or what the kernel holds now.
    :raises ConformanceError: it still holds more after a while; the message says of what.
    """

    def settle(limits: Mapping[str, int]) -> tuple[list[str], Holdings]:
        deadline = time.monotonic() + _SETTLED_S * host.patience
        while (above := (now := look(host, pid=pid)).above(limits)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return above, now

    lost, now = settle(base.limits(sessions=sessions))
    if not lost:
        return base
    host.check()
    leaks = find_leaks(host)
    if not leaks and can_find_leaks(host):
        return base
    counts = {name: [base.counts[name], now.counts[name]] for name in lost}
    rounds = 0 if leaks or any(map(_is_ours, lost)) else _ROUNDS
    for _ in range(rounds):
        share = again() / sessions / 2  # half of it, as the kernel takes whole slabs at a time
        due = {name: seen[-1] + int((seen[1] - seen[0]) * share) for name, seen in counts.items()}
        lost, now = settle(due)
        if not lost:
            return now
        counts = {name: [*counts[name], now.counts[name]] for name in lost}
    raise ConformanceError(
        f"after {sessions} sessions the kernel of host {host.name} holds more than before"
        f"{', and as much more after the last ones again' if rounds else ''}: "
        + "; ".join(f"{name}: {' -> '.join(map(str, seen))}" for name, seen in counts.items()),
        details=leaks,
    )
