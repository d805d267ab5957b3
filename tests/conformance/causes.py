# SPDX-License-Identifier: GPL-2.0-or-later
"""How a running guest is brought into each kind of event, and what shows that it got over it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checks import enable, next_event_of, requires
from lab import Lab

from harness.manager.payloads import FREE, IDT, MAILBOX_WORDS, mailbox
from harness.manager.smallvm import SmallVm
from harness.tool import EventMessage, Session

__all__ = [
    "CAUSES",
    "CR4_DE",
    "CR4_OSXSAVE",
    "CR4_PAE",
    "LSTAR",
    "RETRYABLE",
    "bring",
    "can_come",
    "cause",
    "pair_for",
    "select_cr",
    "select_msr",
    "shows_xsetbv",
    "went_on",
]

CR4_DE, CR4_PAE, CR4_OSXSAVE = 0x8, 0x20, 0x40000
LSTAR = 0xC0000082
INVALID_OPCODE = 6
WRITTEN = 0x1234_5678

Words = dict[str, int]


@dataclass(frozen=True)
class Cause:
    """One kind of event.

    :ivar payload: what the guest has to run. :ivar bring: makes the event come, once per
        call, on that vCPU. :ivar over: checks the mailbox of a guest that got over it as if
        nobody had been asked; gets the VM too.
    """

    payload: str
    bring: Callable[[SmallVm, Session, int], None]
    over: Callable[[SmallVm, Words, int], None]


def select_cr(session: Session, cr: int, *, vcpu: int = 0, on: bool = True) -> None:
    """Select or deselect a control register, which has to succeed."""
    session.command("VCPU_CONTROL_CR", vcpu=vcpu, cr=cr, enable=int(on)).ok()


def select_msr(session: Session, msr: int, *, vcpu: int = 0, on: bool = True) -> None:
    """Select or deselect an MSR, which has to succeed."""
    session.command("VCPU_CONTROL_MSR", vcpu=vcpu, msr=msr, enable=int(on)).ok()


def _pause(_vm: SmallVm, session: Session, vcpu: int) -> None:
    session.command("VM_PAUSE_VCPU", vcpu=vcpu, wait=1).ok()


def _hypercall(vm: SmallVm, session: Session, vcpu: int) -> None:
    enable(session, "HYPERCALL", vcpu=vcpu)
    vm.call_out(1, kind=0, vcpu=vcpu)


def _breakpoint(vm: SmallVm, session: Session, vcpu: int) -> None:
    enable(session, "BREAKPOINT", vcpu=vcpu)
    vm.call_out(1, kind=1, vcpu=vcpu)


def _cr(vm: SmallVm, session: Session, vcpu: int) -> None:
    enable(session, "CR", vcpu=vcpu, on=False)
    vm.perform("set_cr4", CR4_PAE, vcpu=vcpu)
    select_cr(session, 4, vcpu=vcpu)
    enable(session, "CR", vcpu=vcpu)
    vm.order("set_cr4", CR4_PAE | CR4_DE, vcpu=vcpu)


def _trap(_vm: SmallVm, session: Session, vcpu: int) -> None:
    session.command("VCPU_INJECT_EXCEPTION", vcpu=vcpu, nr=INVALID_OPCODE).ok()


def _xsetbv(vm: SmallVm, session: Session, vcpu: int) -> None:
    enable(session, "XSETBV", vcpu=vcpu, on=False)
    vm.perform("set_cr4", CR4_PAE | CR4_OSXSAVE, vcpu=vcpu)
    vm.perform("set_xcr", 0, 1, vcpu=vcpu)
    enable(session, "XSETBV", vcpu=vcpu)
    vm.order("set_xcr", 0, 3, vcpu=vcpu)


def _descriptor(vm: SmallVm, session: Session, vcpu: int) -> None:
    enable(session, "DESCRIPTOR", vcpu=vcpu)
    vm.order("store_idt", vcpu=vcpu)


def _msr(vm: SmallVm, session: Session, vcpu: int) -> None:
    enable(session, "MSR", vcpu=vcpu, on=False)
    vm.perform("set_msr", LSTAR, 0x1000, vcpu=vcpu)
    select_msr(session, LSTAR, vcpu=vcpu)
    enable(session, "MSR", vcpu=vcpu)
    vm.order("set_msr", LSTAR, 0x2000, vcpu=vcpu)


def _pf(vm: SmallVm, session: Session, vcpu: int) -> None:
    entries = [{"gpa": FREE, "access": "RX"}]
    session.command("VM_SET_PAGE_ACCESS", entries=entries).ok()
    enable(session, "PF", vcpu=vcpu)
    vm.order("write", FREE, WRITTEN, vcpu=vcpu)


def _called(traps: int) -> Callable[[SmallVm, Words, int], None]:
    def over(_vm: SmallVm, words: Words, _vcpu: int) -> None:
        assert words["done"] == words["want"]
        assert (words["traps"], words["faults"]) == (traps, 0)

    return over


def _result(value: int) -> Callable[[SmallVm, Words, int], None]:
    def over(_vm: SmallVm, words: Words, _vcpu: int) -> None:
        assert (words["result"], words["faults"]) == (value, 0)

    return over


def _stored(vm: SmallVm, words: Words, vcpu: int) -> None:
    area = vm.read(mailbox(vcpu) + MAILBOX_WORDS["area"], 10)
    assert struct.unpack("<HQ", area) == (0xFFF, IDT)
    assert words["faults"] == 0


def _written(vm: SmallVm, words: Words, _vcpu: int) -> None:
    assert vm.read(FREE, 8) == struct.pack("<Q", WRITTEN)
    assert words["faults"] == 0


def _delivered(vm: SmallVm, _words: Words, vcpu: int) -> None:
    vm.wait_word("faults", 1, vcpu=vcpu)
    words = vm.words(vcpu=vcpu)
    assert (words["faults"], words["vector"]) == (1, INVALID_OPCODE)


CAUSES = {
    "PAUSE": Cause("calls", _pause, _called(0)),
    "HYPERCALL": Cause("calls", _hypercall, _called(0)),
    "BREAKPOINT": Cause("calls", _breakpoint, _called(1)),
    "CR": Cause("system", _cr, _result(CR4_PAE | CR4_DE)),
    "TRAP": Cause("system", _trap, _delivered),
    "XSETBV": Cause("system", _xsetbv, _result(3)),
    "DESCRIPTOR": Cause("system", _descriptor, _stored),
    "MSR": Cause("system", _msr, _result(0x2000)),
    "PF": Cause("access", _pf, _written),
}
"""By the event's name."""

RETRYABLE = {"BREAKPOINT", "DESCRIPTOR", "PF"}
"""Those of them that RETRY is an action of."""


def pair_for(lab: Lab, name: str, **wanted: Any) -> tuple[SmallVm, Session]:
    """A running guest that can have such events, hooked; skip if the kernel has none of them."""
    vm, session = lab.pair(payload=CAUSES[name].payload, **wanted)
    can_come(lab, vm, session, name)
    return vm, session


def can_come(lab: Lab, vm: SmallVm, session: Session, name: str) -> None:
    """Skip if this kernel has no such events; see to it that KVM learns of their cause."""
    requires(session, event=name)
    if name == "XSETBV" and vm.running():
        shows_xsetbv(lab, vm)


def shows_xsetbv(lab: Lab, vm: SmallVm) -> None:
    """Make a running guest's routine set_xcr one that KVM learns of; leaves XCR0 at 1.

    XSETBV always leaves the guest, but QEMU's TCG executes it there. Then KVM's emulator has
    to, which it does for instructions behind a prefix of its own (kvm.force_emulation_prefix).
    """
    vm.perform("set_cr4", CR4_PAE | CR4_OSXSAVE)
    if vm.count_exits("many_xcr", 3, 1) < 1000:
        lab.set_parameter("force_emulation_prefix", "1")
        for vcpu in range(vm.machine.vcpus):
            vm.set_word("kind", 1, vcpu=vcpu)


def bring(vm: SmallVm, session: Session, name: str, *, vcpu: int = 0) -> None:
    """Do what makes a running vCPU have such an event."""
    CAUSES[name].bring(vm, session, vcpu)


def cause(vm: SmallVm, session: Session, name: str, *, vcpu: int = 0) -> EventMessage:
    """Bring a running vCPU into an event of that kind; answer it."""
    bring(vm, session, name, vcpu=vcpu)
    return next_event_of(session, name, vcpu=vcpu)


def went_on(vm: SmallVm, name: str, *, vcpu: int = 0) -> None:
    """Check that the vCPU got over one event as if the guest had been let do what it wanted."""
    CAUSES[name].over(vm, vm.finish(vcpu=vcpu), vcpu)
    vm.progresses(vcpu=vcpu)
