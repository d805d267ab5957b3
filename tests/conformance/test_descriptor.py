# SPDX-License-Identifier: GPL-2.0-or-later
"""The DESCRIPTOR event."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from causes import pair_for
from checks import enable, next_event_of, requires, silent
from lab import Lab
from pages import PAGE, RWX, R, Trace, W, X, restrict

from harness.manager.payloads import FREE, GDT, IDT, MAILBOX_WORDS, TSS, mailbox
from harness.manager.smallvm import SmallVm
from harness.tool import EventMessage, Session

LAST_TSS = 0x48 + 16 * 3  # the descriptor of a vCPU that these guests do not have
UNTOUCHED = b"\xee" * 16


@dataclass(frozen=True)
class Access:
    """An instruction, what its event says, and what it does."""

    routine: str
    descriptor: int
    write: int
    operand: bytes = UNTOUCHED
    selector: int = 0
    stores: bytes = b""
    register: str = ""
    loads: dict[str, int] | None = None


LOADS = {
    "idt": {"limit": 0xFEF, "base": IDT},
    "gdt": {"limit": 0x97, "base": GDT},
    "ldt": {"selector": LAST_TSS, "base": FREE, "limit": 0x67},
    "tr": {"selector": LAST_TSS, "base": TSS + 0x180, "limit": 0x67},
}
ACCESSES = (
    Access("store_idt", 1, 0, stores=struct.pack("<HQ", 0xFFF, IDT)),
    Access("load_idt", 1, 1, struct.pack("<HQ", 0xFEF, IDT), register="idt"),
    Access("store_gdt", 2, 0, stores=struct.pack("<HQ", 0x87, GDT)),
    Access("load_gdt", 2, 1, struct.pack("<HQ", 0x97, GDT), register="gdt"),
    Access("store_ldt", 3, 0, stores=struct.pack("<H", 0)),
    Access("load_ldt", 3, 1, selector=LAST_TSS, register="ldt"),
    Access("store_tr", 4, 0, stores=struct.pack("<H", 0x48)),
    Access("load_tr", 4, 1, selector=LAST_TSS, register="tr"),
)
each = pytest.mark.parametrize("access", ACCESSES, ids=lambda access: access.routine)


def _area(vcpu: int = 0) -> int:
    return mailbox(vcpu) + MAILBOX_WORDS["area"]


def _order(vm: SmallVm, access: Access, *, vcpu: int = 0) -> None:
    vm.write(_area(vcpu), access.operand.ljust(16, b"\xee"))
    if access.register in ("ldt", "tr"):
        kind, base = (0x82, FREE) if access.register == "ldt" else (0x89, TSS + 0x180)
        descriptor = 0x67 | base << 16 | kind << 40
        vm.write(GDT + LAST_TSS, struct.pack("<QQ", descriptor, 0))
    vm.order(access.routine, access.selector, vcpu=vcpu)


def _event(session: Session, access: Access, *, vcpu: int = 0) -> EventMessage:
    event = next_event_of(session, "DESCRIPTOR", vcpu=vcpu)
    assert (event.fields.descriptor, event.fields.write) == (access.descriptor, access.write)
    return event


def _done(vm: SmallVm, session: Session, access: Access, *, vcpu: int = 0) -> None:
    """Check that the guest has done what it wanted to."""
    assert vm.finish(vcpu=vcpu)["faults"] == 0
    if access.stores:
        expected = access.stores.ljust(16, b"\xee")
        assert vm.read(_area(vcpu), 16) == expected
    else:
        sregs = session.command("VCPU_GET_REGISTERS", vcpu=vcpu, nmsrs=0).ok().fields.sregs
        found = getattr(sregs, access.register)
        wanted = LOADS[access.register]
        assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.clause("EV-DESC-PAYLOAD")
@each
def test_payload(lab: Lab, access: Access) -> None:
    """DESCRIPTOR tells which register and whether it is a load; CONTINUE lets it happen, once."""
    vm, session = pair_for(lab, "DESCRIPTOR")
    enable(session, "DESCRIPTOR")
    _order(vm, access)
    event = _event(session, access)
    assert event.regs.rip == vm.machine.linear(access.routine)
    if access.stores:
        assert vm.read(_area(), 16) == UNTOUCHED
    session.answer(event)
    _done(vm, session, access)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-DESC-PAYLOAD")
def test_only_where_enabled(lab: Lab) -> None:
    """Without the event, before and after, and on another vCPU, the accesses just happen."""
    vm, session = pair_for(lab, "DESCRIPTOR", vcpus=2)
    enable(session, "DESCRIPTOR", vcpu=1)
    for access in ACCESSES[:2] + ACCESSES[-2:]:
        _order(vm, access)
        _done(vm, session, access)
    silent(session, vcpus=[0, 1])
    store = ACCESSES[0]
    _order(vm, store, vcpu=1)
    session.answer(_event(session, store, vcpu=1))
    _done(vm, session, store, vcpu=1)
    enable(session, "DESCRIPTOR", vcpu=1, on=False)
    for access in ACCESSES[1:3]:
        _order(vm, access, vcpu=1)
        _done(vm, session, access, vcpu=1)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("EV-DESC-PAYLOAD")
def test_from_a_program(lab: Lab) -> None:
    """A program that looks at the tables raises the events too."""
    vm, session = pair_for(lab, "DESCRIPTOR", cpl=3)
    enable(session, "DESCRIPTOR")
    for access in ACCESSES:
        if access.stores:
            _order(vm, access)
            event = _event(session, access)
            assert event.sregs.ss.dpl == 3
            session.answer(event)
            _done(vm, session, access)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-DESC-RETRY")
@each
def test_retry(lab: Lab, access: Access) -> None:
    """RETRY goes back without the access: to the same instruction, or where rip was moved."""
    vm, session = pair_for(lab, "DESCRIPTOR")
    enable(session, "DESCRIPTOR")
    before = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.sregs
    _order(vm, access)
    event = _event(session, access)
    for _ in range(2):
        session.answer(event, "RETRY")
        again = _event(session, access)
        assert again.regs.rip == event.regs.rip
        event = again
    # Every routine of this kind ends with a ret: the last byte before the next one.
    length = vm.machine.payload.code.index(b"\xc3", vm.machine.payload.symbols[access.routine])
    after = vm.machine.linear("_start") + length
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=after).ok()
    session.answer(event, "RETRY")
    assert vm.finish()["faults"] == 0
    assert vm.read(_area(), 16) == access.operand.ljust(16, b"\xee")
    sregs = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.sregs
    for register in ("gdt", "idt", "ldt", "tr"):
        assert getattr(sregs, register) == getattr(before, register)
    silent(session, vcpus=[0])


def _let_pass(lab: Lab) -> tuple[SmallVm, Session, Trace]:
    """A guest with both events enabled, each of which lets the access pass."""
    vm, session = pair_for(lab, "DESCRIPTOR")
    requires(session, command="VM_SET_PAGE_ACCESS", event="PF")
    session.handle("DESCRIPTOR", lambda _: "CONTINUE")
    trace = Trace(session)
    enable(session, "DESCRIPTOR")
    enable(session, "PF")
    return vm, session, trace


@pytest.mark.clause("SETPAGE-OK")
def test_from_a_restricted_page(lab: Lab) -> None:
    """What KVM reads in place of such an instruction respects a restriction."""
    vm, session, trace = _let_pass(lab)
    load = ACCESSES[1]
    restrict(session, W | X, _area() & -PAGE)
    _order(vm, load)
    vm.finish()
    restrict(session, RWX, _area() & -PAGE)
    _done(vm, session, load)
    assert (R, _area()) in {seen.where for seen in trace.take()}


@pytest.mark.clause("SETPAGE-OK")
def test_to_a_restricted_page(lab: Lab) -> None:
    """What KVM stores in place of such an instruction respects a restriction."""
    vm, session, trace = _let_pass(lab)
    restrict(session, R | X, _area() & -PAGE)
    vm.perform("store_idt")
    restrict(session, RWX, _area() & -PAGE)
    assert struct.unpack("<HQ", vm.read(_area(), 10)) == (0xFFF, IDT)
    assert (W, _area()) in {seen.where for seen in trace.take()}
