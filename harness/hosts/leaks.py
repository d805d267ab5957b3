# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that a host's kernel lost, as its own kmemleak finds it (flavour ``debug``)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.hosts.host import Host

__all__ = ["can_find_leaks", "find_leaks", "forget_leaks"]

_FILE = "/sys/kernel/debug/kmemleak"
_AGE_S = 5.5
"""mm/kmemleak.c, MSECS_MIN_AGE: younger objects are not reported, as a pointer to one may be
in a register still."""
_SCAN_TIMEOUT_S = 300.0


def can_find_leaks(host: Host) -> bool:
    """Whether the host's kernel has kmemleak."""
    return host.run(f"[ -e {_FILE} ]", check=False).returncode == 0


def forget_leaks(host: Host) -> None:
    """Have what the kernel lost so far, booting for instance, not reported later."""
    host.run(
        f"[ ! -e {_FILE} ] || {{ echo scan >{_FILE}; echo clear >{_FILE}; }}",
        timeout_s=_SCAN_TIMEOUT_S,
        check=False,
    )


def find_leaks(host: Host) -> str:
    """Look for lost memory; what the kernel reports of it, or nothing.

    Takes some seconds where the kernel has kmemleak, and no time elsewhere. An object counts
    when two scans, between which it cannot have moved, find no pointer to it.
    """
    if not can_find_leaks(host):
        return ""
    time.sleep(_AGE_S)  # what the last test freed by RCU or just allocated settles meanwhile
    found = host.run(
        f"echo scan >{_FILE}; echo scan >{_FILE}; cat {_FILE}",
        timeout_s=_SCAN_TIMEOUT_S,
        check=False,
    )
    return found.text.strip()
