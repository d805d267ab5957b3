# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host's kernel holds on behalf of guests and their tools."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from harness.errors import ConformanceError
from harness.hosts import Host

__all__ = ["Footprint", "footprint", "wait_for_footprint"]

#: Prints one `word number` per line. /proc/slabinfo counts what lies in a processor's own
#: slab as used; shrinking a cache first takes everything unused out of there. Sockets are
#: those that exist in the kernel at all, TIME_WAIT apart, which is the network's own affair.
_LOOK = r"""
echo threads $(cat /proc/[0-9]*/comm 2>/dev/null | grep -c kvmi)
echo machines $(ls /sys/kernel/debug/kvm 2>/dev/null | grep -c '^[0-9]')
for cache in /sys/kernel/slab/*kvm*; do [ -e $cache/shrink ] && echo 1 >$cache/shrink; done
awk '/^[^ ]*kvm/ { print "slab:" $1, $2 }' /proc/slabinfo
awk '/^TCP:/ { print "sockets", $9 }' /proc/net/sockstat
"""


@dataclass(frozen=True)
class Footprint:
    """Counts; see the fields.

    ``threads``: kernel threads of introspection. ``machines``: virtual machines of KVM.
    ``sockets``: TCP sockets allocated. ``slabs``: objects in use, by slab cache of KVM.
    """

    threads: int
    machines: int
    sockets: int
    slabs: Mapping[str, int]

    def excess(self, base: Footprint) -> list[str]:
        """What there is more of than in ``base``, in words."""
        pairs = [
            ("kernel threads of introspection", base.threads, self.threads),
            ("virtual machines", base.machines, self.machines),
            ("TCP sockets", base.sockets, self.sockets),
        ]
        pairs += [
            (f"objects in slab cache {name}", base.slabs.get(name, 0), count)
            for name, count in self.slabs.items()
        ]
        return [f"{what}: {was} -> {now}" for what, was, now in pairs if now > was]


def footprint(host: Host) -> Footprint:
    """Count once."""
    words = dict(line.split() for line in host.run(_LOOK, check=False).stdout.decode().splitlines())
    return Footprint(
        threads=int(words["threads"]),
        machines=int(words["machines"]),
        sockets=int(words.get("sockets", 0)),
        slabs={
            name.removeprefix("slab:"): int(count)
            for name, count in words.items()
            if name.startswith("slab:")
        },
    )


def wait_for_footprint(host: Host, base: Footprint, *, timeout_s: float = 10.0) -> None:
    """Wait until the host holds no more than in ``base``; RCU and TCP take their time.

    :raises ConformanceError: it still holds more after ``timeout_s``; the message says what.
    """
    deadline = time.monotonic() + timeout_s
    while excess := footprint(host).excess(base):
        if time.monotonic() > deadline:
            host.check()
            raise ConformanceError(
                f"the host's kernel still holds after {timeout_s:g} s: {'; '.join(excess)}"
            )
        time.sleep(0.3)
