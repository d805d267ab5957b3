# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_CONTROL_MSR and the MSR event."""

from __future__ import annotations

from typing import Any

import pytest
from causes import LSTAR, pair_for, select_msr
from checks import all_fail, continues, enable, next_event_of, silent
from lab import Lab
from userspace import reject_msr_writes

from harness.manager.smallvm import SmallVm
from harness.tool import EventMessage, Session

SYSENTER_CS, STAR, CSTAR, EFER = 0x174, 0xC0000081, 0xC0000083, 0xC0000080
APIC_BASE, X2APIC = 0x1B, 0xFEE0_0D00
TASK_PRIORITY, INTERRUPT_COMMAND = 0x808, 0x830
# In both ranges: some that KVM usually leaves to the guest, and some that it intercepts
# itself. Three values for each; AMD CPUs keep 32 bits of the SYSENTER registers.
MSRS = {
    SYSENTER_CS: (0x1230, 0x4560, 0x7890),
    0x176: (0x1111_0008, 0x2222_0010, 0x3333_0018),  # SYSENTER_EIP
    0x277: (0x0007_0406_0007_0406, 0x0007_0106_0007_0106, 0x0606_0606_0606_0606),  # PAT
    0x250: (0x0606_0606_0606_0606, 0x0505_0505_0505_0505, 0x0404_0404_0404_0404),  # MTRR
    0xC0000080: (0x501, 0x500, 0x501),  # EFER
    STAR: (0x0023_0010_0000_0000, 0x0033_0020_0000_0000, 0x0043_0030_0000_0000),
    LSTAR: (0xFFFF_8000_3333_0018, 0x7FFF_4444_0020, 0x5555),
    0xC0000100: (0x1000, 0xFFFF_8000_0000_0000, 0x2000),  # FS_BASE
    0xC0000102: (0xFFFF_8000_5555_0028, 0, 7),  # KERNEL_GS_BASE
}  # fmt: skip
EDGES = (0, 0x1FFF, 0xC0000000, 0xC0001FFF)
OUTSIDE = (0x2000, 0x2001, 0x1_0000, 0x4000_0000, 0x4B56_4D01, 0x8000_0000, 0xBFFF_FFFF,
           0xC000_2000, 0xC001_0015, 0xFFFF_FFFF)  # fmt: skip
NO_SUCH_MSR = 0x1FFE


def _watch(session: Session, msr: int, *, vcpu: int = 0) -> None:
    enable(session, "MSR", vcpu=vcpu)
    select_msr(session, msr, vcpu=vcpu)


def _event(session: Session, msr: int, old: int, new: int, *, vcpu: int = 0) -> EventMessage:
    event = next_event_of(session, "MSR", vcpu=vcpu)
    found = (event.fields.msr, event.fields.old_value, event.fields.new_value)
    assert found == (msr, old, new), [f"{value:#x}" for value in found]
    return event


def _write(vm: SmallVm, msr: int, value: int, *, vcpu: int = 0) -> None:
    """Let the guest write an MSR with nobody in its way, and read it back."""
    words = vm.perform("set_msr", msr, value, vcpu=vcpu)
    assert (words["result"], words["faults"]) == (value, 0)


@pytest.mark.clause("CTLMSR-OK", "EV-MSR-PAYLOAD", "EV-MSR-NEWVAL")
@pytest.mark.parametrize("msr", MSRS, ids=hex)
def test_changes_are_reported(lab: Lab, msr: int) -> None:
    """A change is one event with both values; the reply decides what the guest reads back."""
    vm, session = pair_for(lab, "MSR")
    first, second, third = MSRS[msr]
    _write(vm, msr, third)
    _write(vm, msr, second)
    _watch(session, msr)
    for wanted, given in ((first, first), (second, first), (third, second), (first, third)):
        old = vm.perform("get_msr", msr)["result"]
        if old == wanted:
            continue
        vm.order("set_msr", msr, wanted)
        session.answer(_event(session, msr, old, wanted), new_val=given)
        words = vm.finish()
        assert (words["result"], words["faults"]) == (given, 0)
    # What is there already is no change.
    _write(vm, msr, vm.word("result"))
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLMSR-OK", "EV-MSR-PAYLOAD", "EV-MSR-NEWVAL")
@pytest.mark.parametrize("msr", [TASK_PRIORITY, INTERRUPT_COMMAND], ids=hex)
def test_interrupt_controller(lab: Lab, msr: int) -> None:
    """Writes that KVM or the processor handles in shorter ways than others are events as well."""
    vm, session = pair_for(lab, "MSR", irqchip=True)
    _write(vm, APIC_BASE, X2APIC)
    _write(vm, msr, 0x30)  # its APIC is off by software, so nothing gets interrupted
    _watch(session, msr)
    for wanted, given in ((0x40, 0x40), (0x50, 0x60), (0x70, 0x60)):
        old = vm.perform("get_msr", msr)["result"]
        vm.order("set_msr", msr, wanted)
        session.answer(_event(session, msr, old, wanted), new_val=given)
        words = vm.finish()
        assert (words["result"], words["faults"]) == (given, 0)
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLMSR-OK", "EV-MSR-PAYLOAD", "EV-MSR-NEWVAL")
def test_written_by_the_emulator(lab: Lab) -> None:
    """A WRMSR that KVM carries out by its emulator is an event like any other."""
    vm, session = pair_for(lab, "MSR")
    lab.set_parameter("force_emulation_prefix", "1")
    vm.set_word("kind", 1)
    _write(vm, LSTAR, 0x1000)
    _watch(session, LSTAR)
    for wanted, given in ((0x2000, 0x2000), (0x3000, 0x4000), (0x5000, 0x4000)):
        old = vm.perform("get_msr", LSTAR)["result"]
        vm.order("set_msr", LSTAR, wanted)
        event = _event(session, LSTAR, old, wanted)
        assert event.regs.rip == vm.machine.linear("emulated_wrmsr_site")
        session.answer(event, new_val=given)
        words = vm.finish()
        assert (words["result"], words["faults"]) == (given, 0)


@pytest.mark.clause("EV-MSR-PAYLOAD")
def test_bit_that_is_not_written(lab: Lab) -> None:
    """EFER.LMA stays what it is, whatever is written: alone it is no change."""
    vm, session = pair_for(lab, "MSR")
    _watch(session, EFER)
    assert vm.perform("set_msr", EFER, 0x100)["result"] == 0x500
    silent(session, vcpus=[0])
    vm.order("set_msr", EFER, 0x101)
    session.answer(_event(session, EFER, 0x500, 0x501))
    assert vm.finish()["result"] == 0x501


@pytest.mark.clause("CTLMSR-OK")
@pytest.mark.parametrize("msr", [SYSENTER_CS, LSTAR], ids=hex)
def test_other_registers(lab: Lab, msr: int) -> None:
    """Writes of other MSRs raise none, nor do those on another vCPU, nor reads."""
    vm, session = pair_for(lab, "MSR", vcpus=2)
    _watch(session, msr, vcpu=1)
    # On the other vCPU: that of the same place in the other range.
    _watch(session, msr ^ 0xC000_0000, vcpu=0)
    for vcpu in (0, 1):
        others = {other: value for other, (value, *_) in MSRS.items() if vcpu == 0 or other != msr}
        calls = [("set_msr", other, value) for other, value in others.items()]
        done = vm.perform_all(*calls, vcpu=vcpu)
        assert [words["result"] for words in done] == list(others.values())
    old = vm.perform("get_msr", msr, vcpu=1)["result"]
    silent(session, vcpus=[0, 1])
    vm.order("set_msr", msr, MSRS[msr][1], vcpu=1)
    session.answer(_event(session, msr, old, MSRS[msr][1], vcpu=1))
    assert vm.finish(vcpu=1)["result"] == MSRS[msr][1]


@pytest.mark.clause("CTLMSR-OK")
def test_several_registers(lab: Lab) -> None:
    """Many can be selected at a time; selecting one twice yields one event for a change."""
    vm, session = pair_for(lab, "MSR")
    vm.perform_all(*(("set_msr", msr, value) for msr, (_, value, _) in MSRS.items()))
    for msr in (*MSRS, *EDGES, LSTAR):
        _watch(session, msr)
    for msr, (value, old, _) in MSRS.items():
        vm.order("set_msr", msr, value)
        session.answer(_event(session, msr, old, value))
        assert vm.finish()["result"] == value
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLMSR-OFF")
@pytest.mark.parametrize("msr", [SYSENTER_CS, 0x277, STAR], ids=hex)
def test_deselect(lab: Lab, msr: int) -> None:
    """After deselecting there are no more events of that MSR; others keep theirs."""
    vm, session = pair_for(lab, "MSR", vcpus=2)
    first, second, third = MSRS[msr]
    for vcpu in (0, 1):
        _write(vm, msr, first, vcpu=vcpu)
        _write(vm, CSTAR, 0x10, vcpu=vcpu)
        _watch(session, msr, vcpu=vcpu)
        _watch(session, CSTAR, vcpu=vcpu)
    for _ in range(2):
        select_msr(session, msr, on=False)
    _write(vm, msr, second)
    silent(session, vcpus=[0, 1])
    for vcpu, other, old, new in ((0, CSTAR, 0x10, 0x20), (1, msr, first, third)):
        vm.order("set_msr", other, new, vcpu=vcpu)
        session.answer(_event(session, other, old, new, vcpu=vcpu))
        vm.finish(vcpu=vcpu)
    select_msr(session, msr)
    vm.order("set_msr", msr, third)
    session.answer(_event(session, msr, second, third))
    assert vm.finish()["result"] == third


@pytest.mark.clause("CTLMSR-NEEDS-EVENT")
def test_needs_event(lab: Lab) -> None:
    """Selecting MSRs without enabling MSR events, or while they are disabled, sends none."""
    vm, session = pair_for(lab, "MSR")
    select_msr(session, LSTAR)
    select_msr(session, SYSENTER_CS)
    for value in (0x100, 0x200):
        _write(vm, LSTAR, value)
        _write(vm, SYSENTER_CS, value)
    silent(session, vcpus=[0])
    enable(session, "MSR")
    vm.order("set_msr", LSTAR, 0x300)
    session.answer(_event(session, LSTAR, 0x200, 0x300))
    vm.finish()
    enable(session, "MSR", on=False)
    _write(vm, LSTAR, 0x400)
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLMSR-EINVAL-RANGE")
def test_range(lab: Lab) -> None:
    """The first and last MSR of both ranges are accepted; others answer KVM_EINVAL."""
    vm, session = pair_for(lab, "MSR")
    enable(session, "MSR")
    for on in (1, 0):
        for msr in EDGES:
            session.command("VCPU_CONTROL_MSR", msr=msr, enable=on).ok()
        wrongs = [{"msr": msr, "enable": on} for msr in OUTSIDE]
        all_fail(session, "VCPU_CONTROL_MSR", "KVM_EINVAL", wrongs)
    _write(vm, LSTAR, 5)
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLMSR-EINVAL-ENABLE", "CTLMSR-EINVAL-PADDING")
def test_wrong_arguments(lab: Lab) -> None:
    """enable above 1 and any byte of padding answer KVM_EINVAL, and neither select nor deselect."""
    vm, session = pair_for(lab, "MSR")
    enable(session, "MSR")
    values: list[dict[str, Any]] = [{"msr": LSTAR, "enable": on} for on in (2, 3, 0x80, 0xFF)]
    for enabling in (1, 0):
        values += [{"msr": LSTAR, "enable": enabling, **wrong}
                   for wrong in session.codec.wrong_paddings("VCPU_CONTROL_MSR")]  # fmt: skip
    all_fail(session, "VCPU_CONTROL_MSR", "KVM_EINVAL", values)
    _write(vm, LSTAR, 5)
    silent(session, vcpus=[0])
    select_msr(session, LSTAR)
    all_fail(session, "VCPU_CONTROL_MSR", "KVM_EINVAL", values)
    vm.order("set_msr", LSTAR, 6)
    session.answer(_event(session, LSTAR, 5, 6))
    vm.finish()


@pytest.mark.clause("EV-MSR-PAYLOAD")
def test_user_space_writes(lab: Lab) -> None:
    """KVM_SET_MSRS is not the guest: no event; the guest's next change starts from there."""
    vm, session = pair_for(lab, "MSR")
    _watch(session, LSTAR)
    _watch(session, SYSENTER_CS)
    vm.progresses()
    vm.stop()
    vm.set_msrs({LSTAR: 0x1111, SYSENTER_CS: 0x2222})
    vm.run()
    vm.progresses()
    silent(session, vcpus=[0])
    for msr, old in ((LSTAR, 0x1111), (SYSENTER_CS, 0x2222)):
        vm.order("set_msr", msr, 0x3333)
        session.answer(_event(session, msr, old, 0x3333))
        assert vm.finish()["result"] == 0x3333


@pytest.mark.clause("EV-MSR-PAYLOAD")
def test_no_such_msr(lab: Lab) -> None:
    """Writing an MSR that is not there changes nothing: no event, and the guest gets its #GP."""
    vm, session = pair_for(lab, "MSR")
    _watch(session, NO_SUCH_MSR)
    words = vm.perform("set_msr", NO_SUCH_MSR, 5)
    assert (words["faults"], words["vector"]) == (1, 13)
    silent(session, vcpus=[0])


@pytest.mark.clause("CTLMSR-EPERM-FILTER")
@pytest.mark.parametrize("msr", [SYSENTER_CS, LSTAR], ids=hex)
def test_filtered(lab: Lab, msr: int) -> None:
    """Selecting an MSR whose writes user space rejects answers KVM_EPERM; others are free."""
    vm, session = pair_for(lab, "MSR", vcpus=2)
    reject_msr_writes(vm, msr, STAR)
    for vcpu in (0, 1):
        enable(session, "MSR", vcpu=vcpu)
        for wrong in (msr, STAR):
            session.command("VCPU_CONTROL_MSR", vcpu=vcpu, msr=wrong, enable=1).fails("KVM_EPERM")
            select_msr(session, wrong, vcpu=vcpu, on=False)
        select_msr(session, CSTAR, vcpu=vcpu)
    # The filter works as it does without a tool.
    words = vm.perform("set_msr", msr, 0x10)
    assert (words["faults"], words["vector"]) == (1, 13)
    vm.order("set_msr", CSTAR, 0x20)
    session.answer(_event(session, CSTAR, 0, 0x20))
    vm.finish()
    reject_msr_writes(vm)
    select_msr(session, msr)
    vm.order("set_msr", msr, 0x30)
    session.answer(_event(session, msr, 0, 0x30))
    assert vm.finish()["result"] == 0x30


@pytest.mark.clause("CTLMSR-EPERM-FILTER")
@pytest.mark.parametrize("msr", [SYSENTER_CS, LSTAR], ids=hex)
def test_filtered_later(lab: Lab, msr: int) -> None:
    """A filter that is set after an MSR was selected works; without it, events go on."""
    vm, session = pair_for(lab, "MSR")
    _watch(session, msr)
    reject_msr_writes(vm, msr)
    words = vm.perform("set_msr", msr, 0x10)
    assert (words["faults"], words["vector"]) == (1, 13)
    assert vm.perform("get_msr", msr)["result"] == 0
    silent(session, vcpus=[0])
    reject_msr_writes(vm)
    vm.order("set_msr", msr, 0x20)
    session.answer(_event(session, msr, 0, 0x20))
    assert vm.finish()["result"] == 0x20
    # Nor does deselecting take away what user space wants.
    reject_msr_writes(vm, msr)
    select_msr(session, msr, on=False)
    assert vm.perform("set_msr", msr, 0x30)["faults"] == 2
    assert vm.perform("get_msr", msr)["result"] == 0x20
    continues(session)
