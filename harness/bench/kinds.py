# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured, in words; the program knows how."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.hosts import MachineFacts

__all__ = ["ABOUT", "CLOCK", "EXIT", "EXIT_KERNEL", "KINDS", "OWN", "not_there"]

CLOCK, EXIT, EXIT_KERNEL = "clock", "exit", "exit-kernel"

OWN = "own:"
"""Before the name of a kind: the same exchange of messages without a guest."""

KINDS = {
    "hypercall": "HYPERCALL; the guest executes VMCALL or VMMCALL",
    "breakpoint": "BREAKPOINT, answered by CONTINUE: until the guest's handler of #BP runs",
    "cr3": "CR; the guest writes another value into CR3",
    "msr": "MSR; the guest writes another value into LSTAR",
    "xsetbv": "XSETBV; the guest writes another value into XCR0",
    "sgdt": "DESCRIPTOR; the guest executes SGDT",
    "lidt": "DESCRIPTOR; the guest executes LIDT",
    "pf-read": "PF of a read, answered by CONTINUE; the page stays restricted",
    "pf-write": "PF of a write, answered by CONTINUE; the page stays restricted",
    "pf-fetch": "PF of a fetch, answered by CONTINUE; the page stays restricted",
    "pf-retry": "PF of a write: the tool lifts the restriction, then answers by RETRY",
    "singlestep": "SINGLESTEP; one instruction of many that are stepped through",
    "pause": "PAUSE of a vCPU that runs in the guest, from the last moment in which it ran",
    "trap": "HYPERCALL in which the tool injects #UD, then TRAP: until the guest's handler runs",
}
"""Kinds of events by the program's name. CONTINUE is the answer unless told otherwise."""

ABOUT = {
    CLOCK: "taking the time twice; taken off all that the guest measures",
    EXIT: "plain exit to user space: OUT, which this program takes note of and nothing more",
    EXIT_KERNEL: "exit that KVM handles by itself: CPUID",
} | KINDS

_XSETBV = "in QEMU's TCG no XSETBV leaves the guest, so KVM never sees it"
_STEPS = "Bochs 2 does not look for the monitor trap flag after every VM entry, as Bochs 3 does"


def not_there(machine: MachineFacts) -> dict[str, str]:
    """What a processor lacks, so that no kernel could do it there: kinds with the reason."""
    if machine.target == "tcg":
        return {"xsetbv": _XSETBV}
    if "Bochs 2." in machine.virtualisation:
        # CONTINUE lets one instruction through, and that takes the flag as well.
        return dict.fromkeys(("singlestep", "pf-read", "pf-write", "pf-fetch"), _STEPS)
    return {}
