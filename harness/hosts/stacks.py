# SPDX-License-Identifier: GPL-2.0-or-later
"""Where in a host's kernel something is stuck."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.hosts.host import Host

__all__ = ["stacks_in_kvm"]

# Documentation/filesystems/proc.rst, /proc/<pid>/stack: the stack of a task that sleeps, without
# the scheduler's part; /proc/<pid>/stat: the state is in field 3, the processor in field 39.
# A processor whose interrupts are not counted any more is one whose kernel does nothing.
_SCRIPT = r"""
exec 2>/dev/null
for task in /proc/[0-9]*/task/[0-9]*; do
  read -r name <"$task/comm" && read -r numbers <"$task/stat" || continue
  set -- ${numbers##*) }
  what="$name, task ${task##*/}, state $1, processor ${37}"
  stack=$(cat "$task/stack")
  case "$stack" in *kvm*) echo "== $what"; echo "$stack"; continue;; esac
  case "$1" in R|D) echo "== $what";; esac
done
for _ in 1 2; do
  grep -E 'CPU|LOC|RES|CAL' /proc/interrupts
  sleep 1
done
"""
_TIMEOUT_S = 15.0


def stacks_in_kvm(host: Host) -> str:
    """The stacks of all tasks of a host that are within KVM, for the details of a failure.

    With them: which tasks are ready to run or wait for the kernel, whether all processors take
    interrupts, and what these are at, where that can be seen from outside. Never raises: what
    keeps something from being told is told instead.
    """
    try:
        stacks = host.run(_SCRIPT, timeout_s=_TIMEOUT_S * host.patience).text
    except HarnessError as error:
        # Of a host that does not answer it says what its processors are at.
        return f"the stacks of the host's tasks cannot be told: {error.message}\n{error.details}"
    return f"{stacks}\n{host.stuck()}".rstrip()
