# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts, and the targets that provide them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.errors import UsageError
from harness.hosts.base import Boot, Completed, MachineFacts, Target
from harness.hosts.console import Complaint, Console
from harness.hosts.host import Host
from harness.hosts.ssh import GuestShell, RemoteOutput, RemoteProcess, Shell

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = [
    "Boot",
    "Complaint",
    "Completed",
    "Console",
    "GuestShell",
    "Host",
    "MachineFacts",
    "RemoteOutput",
    "RemoteProcess",
    "Shell",
    "Target",
    "target_for",
]


def target_for(settings: Settings) -> Target:
    """The target that the settings name, not prepared yet.

    :raises UsageError: there is none of that name.
    """
    from harness.hosts.bochs import BochsTarget
    from harness.hosts.choice import choose
    from harness.hosts.here import HereTarget
    from harness.hosts.kvm import KvmTarget
    from harness.hosts.remote import SshTarget
    from harness.hosts.tcg import TcgTarget

    targets: dict[str, Callable[[Settings], Target]] = {
        "bochs": BochsTarget,
        "here": HereTarget,
        "kvm": KvmTarget,
        "tcg": TcgTarget,
        "ssh": SshTarget,
    }
    name = choose(settings).target
    if name not in targets:
        raise UsageError(
            f"there is no target {name!r}", hint=f"known are: auto, {', '.join(targets)}"
        )
    return targets[name](settings)
