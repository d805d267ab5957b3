# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_CONTROL_CR and the CR event."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pytest
from causes import CR4_DE, CR4_PAE, pair_for, select_cr
from checks import all_fail, continues, enable, next_event_of, silent
from lab import Lab
from userspace import debug, set_special

from harness.manager.payloads import ALIAS, FREE, PAGE_DIRECTORY, PDPT, PML4, SREGS
from harness.manager.smallvm import KVM_SET_REGS, SmallVm
from harness.plugin import skip_clause
from harness.tool import EventMessage, Session

CR0, CR4 = 0x8001_0031, CR4_PAE
CR0_TS, CR0_ET, CR0_WP, CR0_AM = 0x8, 0x10, 0x1_0000, 0x4_0000
CR4_PCIDE, NO_FLUSH = 0x2_0000, 1 << 63
KVM_GET_MP_STATE, INIT = 0x8004_AE98, 0x500
OTHER_TABLES, THIRD_TABLES = FREE, FREE + 0x1000
REGISTERS, R9, RIP = struct.Struct("<18Q"), 9, 16  # struct kvm_regs

# By register: its first value, and what guests do to change it (routine, operand, new value).
# KVM lets the guest own some of these bits as long as nobody wants to know.
CHANGES: Mapping[int, tuple[int, list[tuple[str, int, int]]]] = {
    0: (CR0, [
        ("set_cr0", CR0 | CR0_TS, CR0 | CR0_TS),
        ("clear_ts", 0, CR0),
        ("set_msw", (CR0 | CR0_TS) & 0xF, CR0 | CR0_TS),
        ("set_cr0", CR0, CR0),
        ("set_cr0", CR0 & ~CR0_WP, CR0 & ~CR0_WP),
        ("set_cr0", CR0 | CR0_AM, CR0 | CR0_AM),
    ]),
    3: (PML4, [
        ("set_cr3", OTHER_TABLES, OTHER_TABLES),
        ("set_cr3", THIRD_TABLES, THIRD_TABLES),
        ("set_cr3", PML4 | 0x18, PML4 | 0x18),
        ("set_cr3", PML4, PML4),
    ]),
    4: (CR4, [
        ("set_cr4", CR4 | bit, CR4 | bit)
        for bit in (CR4_DE, 0x4, 0x80, 0x100, 0x200, 0x400, 0x4_0000)
    ]),
}  # fmt: skip
# What changes nothing, for each of them.
SAME = {
    0: [("set_cr0", CR0), ("set_cr0", CR0 & ~CR0_ET), ("clear_ts", 0), ("set_msw", CR0 & 0xF)],
    3: [("set_cr3", PML4)],
    4: [("set_cr4", CR4)],
}


def _vm(lab: Lab, **wanted: Any) -> tuple[SmallVm, Session]:
    """A guest with three sets of page tables; in the second one nothing is at ALIAS."""
    memory = [
        (OTHER_TABLES, struct.pack("<Q", FREE + 0x2000 | 7)),
        (FREE + 0x2000, struct.pack("<Q", PAGE_DIRECTORY | 7)),
        (THIRD_TABLES, struct.pack("<Q", PDPT | 7)),
    ]
    return pair_for(lab, "CR", memory=memory, **wanted)


def _watch(session: Session, cr: int, *, vcpu: int = 0) -> None:
    enable(session, "CR", vcpu=vcpu)
    select_cr(session, cr, vcpu=vcpu)


def _changes(vm: SmallVm, *, but: int | None = None, vcpu: int = 0) -> None:
    """Let the guest change every control register but one, with nobody in its way."""
    calls, values = [], []
    for cr, (first, changes) in CHANGES.items():
        if cr != but:
            routine, operand, value = changes[0]
            calls += [(routine, operand, 0), (f"set_cr{cr}", first, 0)]
            values += [value, first]
    assert [words["result"] for words in vm.perform_all(*calls, vcpu=vcpu)] == values


def _event(session: Session, cr: int, old: int, new: int, *, vcpu: int = 0) -> EventMessage:
    event = next_event_of(session, "CR", vcpu=vcpu)
    found = (event.fields.cr, event.fields.old_value, event.fields.new_value)
    assert found == (cr, old, new), [f"{value:#x}" for value in found]
    return event


@pytest.mark.clause("CTLCR-OK", "EV-CR-PAYLOAD")
@pytest.mark.parametrize("cr", CHANGES)
def test_changes_are_reported(lab: Lab, cr: int) -> None:
    """Each change of the selected register, however it is made, is one event with both values."""
    vm, session = _vm(lab)
    _watch(session, cr)
    old, changes = CHANGES[cr]
    for routine, operand, new in changes:
        vm.order(routine, operand)
        event = _event(session, cr, old, new)
        assert getattr(event.sregs, f"cr{cr}") == old
        session.answer(event)
        words = vm.finish()
        assert (words["result"], words["faults"]) == (new, 0)
        old = new
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLCR-OK")
@pytest.mark.parametrize("cr", CHANGES)
def test_other_registers(lab: Lab, cr: int) -> None:
    """Changes of the other registers raise none, nor do those on another vCPU."""
    vm, session = _vm(lab, vcpus=2)
    _watch(session, cr, vcpu=1)
    enable(session, "CR", vcpu=0)
    _changes(vm, but=cr, vcpu=1)
    _changes(vm, vcpu=0)
    silent(session, vcpus=[0, 1])
    first, changes = CHANGES[cr]
    routine, operand, new = changes[0]
    vm.order(routine, operand, vcpu=1)
    session.answer(_event(session, cr, first, new, vcpu=1))
    assert vm.finish(vcpu=1)["result"] == new


@pytest.mark.clause("CTLCR-OK")
def test_several_registers(lab: Lab) -> None:
    """All three can be selected at a time; selecting one twice yields one event for a change."""
    vm, session = _vm(lab)
    for cr in (4, 0, 3, 0):
        _watch(session, cr)
    for cr, (first, changes) in CHANGES.items():
        routine, operand, new = changes[0]
        vm.order(routine, operand)
        session.answer(_event(session, cr, first, new))
        assert vm.finish()["result"] == new
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-CR-PAYLOAD", "EV-CR-NEWVAL")
def test_tables_without_flush(lab: Lab) -> None:
    """The bit that asks to keep translations is no part of CR3: not of the event, nor a change."""
    vm, session = _vm(lab)
    if vm.perform("set_cr4", CR4 | CR4_PCIDE)["faults"]:
        skip_clause("this processor has no PCID")
    _watch(session, 3)
    assert vm.perform("set_cr3", NO_FLUSH | PML4)["result"] == PML4
    silent(session, vcpus=[0])
    vm.order("set_cr3", NO_FLUSH | OTHER_TABLES)
    session.answer(_event(session, 3, PML4, OTHER_TABLES))
    words = vm.finish()
    assert (words["result"], words["faults"]) == (OTHER_TABLES, 0)


@pytest.mark.clause("CTLCR-OK", "VCPUCTLEVT-ENABLE")
@pytest.mark.parametrize("cr", CHANGES)
def test_after_init(lab: Lab, cr: int) -> None:
    """INIT puts the processor back to its beginnings, not what the tool wants to see of it."""
    vm, session = _vm(lab, irqchip=True)
    _watch(session, cr)
    vm.progresses()
    vm.stop()
    vm.enable_apic()
    vm.message_interrupt(INIT)  # that delivery mode, in place of a vector
    assert vm.vcpu_ioctl(KVM_GET_MP_STATE, bytes(4), out=True)[0] == "OK"  # KVM carries it out
    assert REGISTERS.unpack(vm.registers())[RIP] == 0xFFF0
    state = vm.machine.state(0)
    vm.manager.link.call("set_state", vm=vm.name, vcpu=0, state=state)
    vm.run()
    first, changes = CHANGES[cr]
    routine, operand, new = changes[0]
    vm.order(routine, operand)
    session.answer(_event(session, cr, first, new))
    assert vm.finish()["result"] == new


@pytest.mark.clause("CTLCR-OFF")
@pytest.mark.parametrize("cr", CHANGES)
def test_deselected_is_as_before(lab: Lab, cr: int) -> None:
    """Of a register that was deselected nothing is held back, whichever instruction changes it."""
    vm, session = _vm(lab)
    _watch(session, cr)
    select_cr(session, cr, on=False)
    changes = CHANGES[cr][1]
    done = vm.perform_all(*((routine, operand, 0) for routine, operand, _ in changes))
    assert [words["result"] for words in done] == [new for *_, new in changes]
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLCR-OFF")
@pytest.mark.parametrize("cr", CHANGES)
def test_deselect(lab: Lab, cr: int) -> None:
    """After deselecting there are no more events of that register; others keep theirs."""
    vm, session = _vm(lab, vcpus=2)
    for register in CHANGES:
        _watch(session, register)
    _watch(session, cr, vcpu=1)
    for _ in range(2):
        select_cr(session, cr, on=False)
    first, changes = CHANGES[cr]
    routine, operand, new = changes[0]
    assert vm.perform(routine, operand)["result"] == new
    silent(session, vcpus=[0, 1])
    other = next(register for register in CHANGES if register != cr)
    other_first, other_changes = CHANGES[other]
    for vcpu, register, old, change in (
        (0, other, other_first, other_changes[0]),
        (1, cr, first, changes[0]),
    ):
        vm.order(change[0], change[1], vcpu=vcpu)
        session.answer(_event(session, register, old, change[2], vcpu=vcpu))
        vm.finish(vcpu=vcpu)
    select_cr(session, cr)
    vm.order(f"set_cr{cr}", first)
    session.answer(_event(session, cr, new, first))
    assert vm.finish()["result"] == first


@pytest.mark.clause("CTLCR-OFF")
def test_deselect_during_event(lab: Lab) -> None:
    """A register may be deselected while its event waits: that one is still answered."""
    vm, session = _vm(lab)
    _watch(session, 3)
    vm.order("set_cr3", OTHER_TABLES)
    event = _event(session, 3, PML4, OTHER_TABLES)
    select_cr(session, 3, on=False)
    session.answer(event, new_val=THIRD_TABLES)
    assert vm.finish()["result"] == THIRD_TABLES
    assert vm.perform("set_cr3", PML4)["result"] == PML4
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLCR-NEEDS-EVENT")
def test_needs_event(lab: Lab) -> None:
    """Selecting registers without enabling CR events, or while they are disabled, sends none."""
    vm, session = _vm(lab)
    for cr in CHANGES:
        select_cr(session, cr)
    _changes(vm)
    silent(session, vcpus=[0])
    enable(session, "CR")
    vm.order("set_cr3", OTHER_TABLES)
    session.answer(_event(session, 3, PML4, OTHER_TABLES))
    vm.finish()
    enable(session, "CR", on=False)
    assert vm.perform("set_cr3", PML4)["result"] == PML4
    _changes(vm)
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLCR-EINVAL-CR")
def test_wrong_register(lab: Lab) -> None:
    """A register other than 0, 3 and 4 answers KVM_EINVAL, for selecting and deselecting."""
    vm, session = _vm(lab)
    enable(session, "CR")
    wrongs = [{"cr": cr, "enable": on} for on in (1, 0)
              for cr in (1, 2, 5, 6, 7, 8, 9, 16, 32 + 3, 64, 128 + 4, 255)]  # fmt: skip
    all_fail(session, "VCPU_CONTROL_CR", "KVM_EINVAL", wrongs)
    _changes(vm)
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLCR-EINVAL-ENABLE", "CTLCR-EINVAL-PADDING")
def test_wrong_arguments(lab: Lab) -> None:
    """enable above 1 and any byte of padding answer KVM_EINVAL, and neither select nor deselect."""
    vm, session = _vm(lab)
    enable(session, "CR")
    values: list[dict[str, Any]] = [{"cr": 3, "enable": value} for value in (2, 3, 0x80, 0xFF)]
    for enabling in (1, 0):
        values += [{"cr": 3, "enable": enabling, **wrong}
                   for wrong in session.codec.wrong_paddings("VCPU_CONTROL_CR")]  # fmt: skip
    all_fail(session, "VCPU_CONTROL_CR", "KVM_EINVAL", values)
    assert vm.perform("set_cr3", OTHER_TABLES)["result"] == OTHER_TABLES
    silent(session, vcpus=[0])
    select_cr(session, 3)
    all_fail(session, "VCPU_CONTROL_CR", "KVM_EINVAL", values)
    vm.order("set_cr3", PML4)
    session.answer(_event(session, 3, OTHER_TABLES, PML4))
    vm.finish()


@pytest.mark.clause("EV-CR-PAYLOAD")
@pytest.mark.parametrize("cr", CHANGES)
def test_no_change(lab: Lab, cr: int) -> None:
    """Writing the value that the register has is no event, by whichever instruction."""
    vm, session = _vm(lab)
    _watch(session, cr)
    first, changes = CHANGES[cr]
    for routine, operand in SAME[cr]:
        assert vm.perform(routine, operand)["result"] == first
    silent(session, vcpus=[0])
    routine, operand, new = changes[0]
    vm.order(routine, operand)
    session.answer(_event(session, cr, first, new))
    vm.finish()
    assert vm.perform(f"set_cr{cr}", new)["result"] == new
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-CR-PAYLOAD")
def test_refused_by_the_cpu(lab: Lab) -> None:
    """A value that the CPU refuses changes nothing; the guest gets its #GP, as without a tool."""
    vm, session = _vm(lab)
    session.handle("CR", lambda event: "CONTINUE")
    for cr in CHANGES:
        _watch(session, cr)
    for number, (routine, value) in enumerate(
        [("set_cr0", CR0 & ~1), ("set_cr4", 1 << 31 | CR4), ("set_cr4", 0),
         ("set_cr3", 1 << 62 | PML4), ("set_cr0", 1 << 32 | CR0), ("set_cr4", 1 << 32 | CR4)], 1,
    ):  # fmt: skip
        words = vm.perform(routine, value)
        assert (words["faults"], words["vector"]) == (number, 13), f"{routine} {value:#x}"
    sregs = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.sregs
    assert (sregs.cr0, sregs.cr3, sregs.cr4) == (CR0, PML4, CR4)


@pytest.mark.clause("EV-CR-NEWVAL")
@pytest.mark.parametrize(
    ("cr", "wanted", "given"),
    [(0, CR0 | CR0_TS, CR0 | CR0_AM), (0, CR0 | CR0_AM, CR0 & ~CR0_WP),
     (4, CR4 | CR4_DE, CR4 | 0x200), (4, CR4 | 0x80, CR4 | CR4_DE)],
)  # fmt: skip
def test_new_value(lab: Lab, cr: int, wanted: int, given: int) -> None:
    """The value of the reply is what the guest reads back; the old one blocks the change."""
    vm, session = _vm(lab)
    _watch(session, cr)
    first = CHANGES[cr][0]
    for answer in (first, given, first):
        old = getattr(session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.sregs, f"cr{cr}")
        vm.order(f"set_cr{cr}", wanted)
        session.answer(_event(session, cr, old, wanted), new_val=answer)
        words = vm.finish()
        assert (words["result"], words["faults"]) == (answer, 0)
    vm.stop()
    at = SREGS[f"cr{cr}"]
    assert int.from_bytes(vm.special_registers()[at : at + 8], "little") == first
    silent(session)


@pytest.mark.clause("EV-CR-NEWVAL")
def test_new_page_tables(lab: Lab) -> None:
    """With CR3 the guest runs on the page tables of the reply, whatever it asked for."""
    vm, session = _vm(lab)
    _watch(session, 3)
    assert vm.perform("read", ALIAS + PML4)["faults"] == 0
    current = PML4
    for wanted, given, mapped in (
        (THIRD_TABLES, OTHER_TABLES, False),
        (PML4, OTHER_TABLES, False),
        (PML4, THIRD_TABLES, True),
        (OTHER_TABLES, THIRD_TABLES, True),
    ):
        vm.order("set_cr3", wanted)
        session.answer(_event(session, 3, current, wanted), new_val=given)
        assert vm.finish()["result"] == given
        before = vm.word("faults")
        words = vm.perform("read", ALIAS + PML4)
        assert (words["faults"] == before) == mapped
        current = given
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLCR-OK", "EV-CR-PAYLOAD")
def test_user_space_changes_them(lab: Lab) -> None:
    """KVM_SET_SREGS is not the guest: no event; the guest's next change starts from there."""
    vm, session = _vm(lab)
    for cr in CHANGES:
        _watch(session, cr)
    vm.progresses()
    vm.stop()
    set_special(vm, cr0=CR0 | CR0_AM, cr3=THIRD_TABLES, cr4=CR4 | CR4_DE)
    vm.run()
    vm.progresses()
    silent(session, vcpus=[0])
    for cr, old, new in (
        (0, CR0 | CR0_AM, CR0), (3, THIRD_TABLES, PML4), (4, CR4 | CR4_DE, CR4),
    ):  # fmt: skip
        vm.order(f"set_cr{cr}", new)
        session.answer(_event(session, cr, old, new))
        assert vm.finish()["result"] == new


@pytest.mark.clause("CTLCR-OK", "EVT-CONTINUE")
def test_user_space_steps(lab: Lab) -> None:
    """User space that single-steps the guest over such an instruction stops behind it."""
    vm, session = _vm(lab)
    _watch(session, 3)
    vm.order("set_cr3", OTHER_TABLES)
    event = _event(session, 3, PML4, OTHER_TABLES)
    vm.kick()
    session.answer(event)
    vm.wait_exit()
    vm.run()
    vm.finish()
    vm.stop()
    assert debug(vm, at=vm.machine.linear("set_cr3")) == "OK"
    vm.run()
    vm.order("set_cr3", PML4)
    assert vm.wait_exit().reason == "DEBUG"
    silent(session)
    assert debug(vm, step=True) == "OK"
    vm.run()
    session.answer(_event(session, 3, OTHER_TABLES, PML4))
    assert vm.wait_exit().reason == "DEBUG"
    rip = int.from_bytes(vm.registers()[128:136], "little")
    assert rip == vm.machine.linear("set_cr3") + 3
    at = SREGS["cr3"]
    assert int.from_bytes(vm.special_registers()[at : at + 8], "little") == PML4
    continues(session)


@pytest.mark.clause("SETREGS-OK", "EVT-CONTINUE")
def test_user_space_finds_the_registers(lab: Lab) -> None:
    """Registers that the tool sets are there when KVM_RUN returns, and are user space's then."""
    vm, session = _vm(lab)
    _watch(session, 3)
    vm.order("set_cr3", OTHER_TABLES)
    event = _event(session, 3, PML4, OTHER_TABLES)
    session.command("VCPU_SET_REGISTERS", regs=event.regs, r9=0x1234).ok()
    vm.kick()
    session.answer(event)
    vm.wait_exit()
    registers = list(REGISTERS.unpack(vm.registers()))
    assert registers[R9] == 0x1234
    assert registers[RIP] == event.regs.rip + 3
    registers[R9] = 5
    result, _ = vm.vcpu_ioctl(KVM_SET_REGS, REGISTERS.pack(*registers))
    assert result == "OK"
    vm.run()
    vm.finish()
    vm.stop()
    assert REGISTERS.unpack(vm.registers())[R9] == 5


@pytest.mark.clause("EVT-CRASH")
def test_crash_that_user_space_interrupts(lab: Lab) -> None:
    """The guest crashes once, whatever makes KVM_RUN return; what the tool asks then is done."""
    vm, session = _vm(lab)
    _watch(session, 3)
    old, new = PML4, OTHER_TABLES
    for kicked in (True, False, False, False):
        vm.order("set_cr3", new)
        event = _event(session, 3, old, new)
        if kicked:
            vm.kick()
        session.answer(event, "CRASH")
        pending = session.send("VCPU_GET_REGISTERS", vcpu=0, nmsrs=0)
        assert vm.wait_exit().reason == "SHUTDOWN"
        vm.run()
        pending.reply(10).ok()
        vm.finish()
