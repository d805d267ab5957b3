# SPDX-License-Identifier: GPL-2.0-or-later
"""Where in a host's kernel something is stuck."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.hosts.host import Host

__all__ = ["stacks_in_kvm"]

# Documentation/filesystems/proc.rst, /proc/<pid>/stack: the stack of a task that sleeps.
_SCRIPT = r"""
for task in /proc/[0-9]*/task/[0-9]*; do
  stack=$(cat "$task/stack" 2>/dev/null)
  case "$stack" in *kvm*)
    echo "== $(cat "$task/comm"), task ${task##*/}, $(grep State: "$task/status")"
    echo "$stack";;
  esac
done
"""
_TIMEOUT_S = 15.0


def stacks_in_kvm(host: Host) -> str:
    """The stacks of all tasks of a host that are within KVM, for the details of a failure.

    Never raises: what keeps them from being told is told instead.
    """
    try:
        return host.run(_SCRIPT, timeout_s=_TIMEOUT_S * host.patience).text or "no task is in KVM"
    except HarnessError as error:
        return f"the stacks of the host's tasks cannot be told: {error.message}\n{error.details}"
