# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_CONTROL_SINGLESTEP and the event SINGLESTEP."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from checks import continues, enable, ends_dead, next_event_of, requires, silent, trap_of
from lab import Lab

from harness.abi import load_clauses
from harness.manager.payloads import FREE
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.plugin.fixtures import ClauseNotes
from harness.tool import EventMessage, Session

KVM_INTERRUPT, KVM_NMI = 0x4004AE86, 0xAE9A
MANY = 1000
VECTOR = 0x30
APIC_BASE, X2APIC, INTERRUPT_COMMAND = 0x1B, 0xFEE0_0D00, 0x830
ORDER = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 8, 12, 13, 14, 15]
"""The steps of the payload in the order in which they are executed."""


def _supported(session: Session) -> bool:
    requires(session, command="VCPU_CONTROL_SINGLESTEP")
    return bool(session.command("GET_VERSION").ok().fields.features.singlestep)


def _control(session: Session, on: bool, *, vcpu: int = 0) -> None:
    session.command("VCPU_CONTROL_SINGLESTEP", vcpu=vcpu, enable=int(on)).ok()


def _stepping_pair(lab: Lab, *, payload: str = "steps", **wanted: Any) -> tuple[SmallVm, Session]:
    """A running guest to step through; skip where the processor cannot."""
    vm, session = lab.pair(payload=payload, **wanted)
    if not _supported(session):
        skip_clause("this processor cannot single-step (features.singlestep is 0)")
    return vm, session


def _begin(
    vm: SmallVm, session: Session, label: str = "", *, vcpu: int = 0, **registers: int
) -> None:
    """Switch stepping on while the vCPU waits, and let it go on from a label."""
    session.command("VM_PAUSE_VCPU", vcpu=vcpu, wait=1).ok()
    _begin_in_pause(vm, session, label, vcpu=vcpu, **registers)


def _begin_in_pause(
    vm: SmallVm, session: Session, label: str = "", *, vcpu: int = 0, **registers: int
) -> None:
    """The same where the PAUSE was asked for before."""
    pause = next_event_of(session, "PAUSE", vcpu=vcpu)
    if label:
        rip = vm.machine.linear(label)
        session.command(
            "VCPU_SET_REGISTERS", vcpu=vcpu, regs=pause.regs, rip=rip, **registers
        ).ok()  # fmt: skip
    _control(session, True, vcpu=vcpu)
    session.answer(pause)


def _step(session: Session, *, vcpu: int = 0) -> EventMessage:
    """The next event, answered."""
    event = next_event_of(session, "SINGLESTEP", vcpu=vcpu)
    session.answer(event)
    return event


def _runs_free(vm: SmallVm, session: Session, *, vcpu: int = 0) -> None:
    """Check that the guest goes round without any event."""
    vm.progresses(vcpu=vcpu, rounds=50)
    silent(session, vcpus=[vcpu])


# -- the command


@pytest.mark.clause("SSTEP-EOPNOTSUPP", "GETVERSION-FEATURES")
def test_support(lab: Lab, clauses: ClauseNotes) -> None:
    """Without support features.singlestep is 0 and the command answers KVM_EOPNOTSUPP."""
    vm, session = lab.pair()
    requires(session, command="VCPU_CONTROL_SINGLESTEP")
    features = session.command("GET_VERSION").ok().raw[16:24]
    assert features in (bytes(8), b"\1" + bytes(7))
    if features[0]:
        session.handle("SINGLESTEP", lambda _: "CONTINUE")
        _control(session, True)
        _control(session, False)
        clauses.skip("SSTEP-EOPNOTSUPP", "this processor can single-step (features.singlestep)")
    else:
        for enable_it in (1, 0, 1):
            session.command("VCPU_CONTROL_SINGLESTEP", enable=enable_it).fails("KVM_EOPNOTSUPP")
        vm.progresses(rounds=10)
        silent(session, vcpus=[0])
    continues(session)


@pytest.mark.clause("SSTEP-EPERM")
def test_disallowed(lab: Lab) -> None:
    """While the event SINGLESTEP is disallowed the command answers KVM_EPERM, before all else."""
    vm, session = lab.pair()
    requires(session, command="VCPU_CONTROL_SINGLESTEP")
    assert vm.event("SINGLESTEP", 0) == "OK"
    for fields in ({"enable": 1}, {"enable": 0}, {"enable": 2}, {"enable": 1, "padding": (1,) * 7}):
        session.command("VCPU_CONTROL_SINGLESTEP", **fields).fails("KVM_EPERM")
    assert vm.event("SINGLESTEP", 1) == "OK"
    reply = session.command("VCPU_CONTROL_SINGLESTEP", enable=0)
    assert reply.error in (None, "KVM_EOPNOTSUPP")
    vm.progresses()


@pytest.mark.clause("SSTEP-EINVAL-ENABLE")
@pytest.mark.parametrize("value", [2, 3, 0x80, 0xFF])
def test_enable_is_0_or_1(lab: Lab, value: int) -> None:
    """Another value of enable answers KVM_EINVAL and starts nothing."""
    vm, session = lab.pair()
    requires(session, command="VCPU_CONTROL_SINGLESTEP")
    session.command("VCPU_CONTROL_SINGLESTEP", enable=value).fails("KVM_EINVAL")
    _runs_free(vm, session)


@pytest.mark.clause("SSTEP-EINVAL-PADDING")
def test_padding(lab: Lab) -> None:
    """Each byte of padding, of header and command, answers KVM_EINVAL and starts nothing."""
    vm, session = lab.pair()
    requires(session, command="VCPU_CONTROL_SINGLESTEP")
    for wrong in session.codec.wrong_paddings("VCPU_CONTROL_SINGLESTEP"):
        session.command("VCPU_CONTROL_SINGLESTEP", enable=1, **wrong).fails("KVM_EINVAL")
    _runs_free(vm, session)


@pytest.mark.clause("SSTEP-EAGAIN")
def test_not_ready(lab: Lab) -> None:
    """A vCPU that waits to be started (INIT, SIPI) answers KVM_EAGAIN."""
    vm, session = lab.pair(vcpus=2, irqchip=True)
    requires(session, command="VCPU_CONTROL_SINGLESTEP")
    vm.progresses()
    for _ in range(2):
        session.command("VCPU_CONTROL_SINGLESTEP", vcpu=1, enable=1).fails("KVM_EAGAIN")
    vm.stands_still(vcpu=1, for_s=0.05)
    continues(session)


# -- stepping


@pytest.mark.usefixtures("exact")
@pytest.mark.clause("SSTEP-ON")
def test_each_instruction(lab: Lab) -> None:
    """After each instruction comes exactly one event, with the rip of the next."""
    vm, session = _stepping_pair(lab)
    for _ in range(2):
        _begin(vm, session, "sequence")
        labels = [f"step_{number}" for number in ORDER[1:]]
        expected = [vm.machine.linear(label) for label in [*labels, "_start"]]
        assert [_step(session).regs.rip for _ in expected] == expected
        event = next_event_of(session, "SINGLESTEP")
        _control(session, False)
        session.answer(event)
        _runs_free(vm, session)
    assert vm.words()["done"] == 2
    assert vm.words()["faults"] == 0


@pytest.mark.clause("SSTEP-ON", "EVT-VCPU-HELD")
def test_held_after_each(lab: Lab) -> None:
    """The instruction is done when its event comes, and the next is not before the reply."""
    vm, session = _stepping_pair(lab)
    _begin(vm, session, "step_10")
    event = next_event_of(session, "SINGLESTEP")
    assert event.regs.rip == vm.machine.linear("step_11")
    assert vm.word("done") == 1
    vm.stands_still(for_s=0.05)
    session.answer(event)
    next_event_of(session, "SINGLESTEP")
    assert vm.word("done") == 1


@pytest.mark.usefixtures("exact")
@pytest.mark.clause("SSTEP-ON")
def test_repeated_move(lab: Lab) -> None:
    """A repeated instruction may be stepped round by round; then comes the next one."""
    vm, session = _stepping_pair(lab)
    _begin(vm, session, "string")
    move, end = vm.machine.linear("string_move"), vm.machine.linear("string_end")
    rips = [_step(session).regs.rip for _ in range(3)]
    assert rips[2] == move
    counts = []
    while (event := _step(session)).regs.rip == move:
        counts.append(event.regs.rcx)
    assert counts in ([], [2, 1])
    assert (event.regs.rip, event.regs.rcx) == (end, 0)


@pytest.mark.usefixtures("exact")
@pytest.mark.clause("SSTEP-ON")
@pytest.mark.parametrize(("label", "reason"), [("port", "IO"), ("halt", "HLT")])
def test_exits_to_user_space(lab: Lab, label: str, reason: str) -> None:
    """An instruction that the device manager has a part in is stepped like any other."""
    vm, session = _stepping_pair(lab)
    rips: list[int] = []

    def take(event: EventMessage) -> str:
        rips.append(event.regs.rip)
        return "CONTINUE"

    session.handle("SINGLESTEP", take)
    _begin(vm, session, label)
    assert vm.wait_exit().reason == reason
    vm.run()
    session.wait_count("SINGLESTEP", 3)
    assert rips[:2] == [vm.machine.linear(f"{label}_end"), vm.machine.linear("_start")]


@pytest.mark.clause("SSTEP-OFF")
def test_off(lab: Lab) -> None:
    """Switched off, in an event or while it runs, no more events come; and on again, they do."""
    vm, session = _stepping_pair(lab)
    for _ in range(3):
        _begin(vm, session)
        for _ in range(5):
            _step(session)
        event = next_event_of(session, "SINGLESTEP")
        _control(session, False)
        session.answer(event)
        _runs_free(vm, session)
        session.handle("SINGLESTEP", lambda _: "CONTINUE")
        _control(session, True)
        session.wait_count("SINGLESTEP", session.count("SINGLESTEP") + 5)
        _control(session, False)
        session.handle("SINGLESTEP", None)
        _runs_free(vm, session)


@pytest.mark.clause("SSTEP-OFF", "UNHOOK-SINGLESTEP-OFF")
@pytest.mark.parametrize("how", ["command", "close", "unhook", "unhook while it does not run"])
def test_costs_nothing_afterwards(lab: Lab, how: str) -> None:
    """When stepping is over no instruction leaves the guest because of it."""
    vm, session = _stepping_pair(lab, payload="system")
    if vm.count_exits("many_gdt") >= MANY:
        skip_clause("this host intercepts SGDT by itself")
    _begin(vm, session)
    for _ in range(3):
        _step(session)
    event = next_event_of(session, "SINGLESTEP")
    if how == "command":
        _control(session, False)
        session.answer(event)
    elif how == "close":
        session.close()
        ends_dead(lab.manager, vm)
    elif how == "unhook":
        assert vm.unhook() == "OK"
    else:
        session.handle("SINGLESTEP", lambda _: "CONTINUE")
        session.answer(event)
        vm.stop()
        assert vm.unhook() == "OK"
        vm.run()
    assert vm.count_exits("many_gdt") < MANY


@pytest.mark.usefixtures("exact")
@pytest.mark.clause("SSTEP-ON")
def test_shortest_way_through_kvm(lab: Lab) -> None:
    """An instruction that KVM deals with on its fast path has its event, too."""
    vm, session = _stepping_pair(lab, payload="system", irqchip=True)
    assert vm.perform("set_msr", APIC_BASE, X2APIC)["faults"] == 0
    _begin(vm, session, "wrmsr_site", rcx=INTERRUPT_COMMAND, rax=0x31, rdx=0)
    event = next_event_of(session, "SINGLESTEP")
    assert event.regs.rip == vm.machine.linear("get_msr")
    start = vm.machine.linear("_start")
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=start).ok()
    _control(session, False)
    session.answer(event)
    _runs_free(vm, session)


@pytest.mark.clause("SSTEP-ON", "EVT-OTHER-VCPU-RUN")
def test_one_vcpu_alone(lab: Lab) -> None:
    """Only the vCPU that was named is stepped."""
    vm, session = _stepping_pair(lab, vcpus=2)
    _begin(vm, session, vcpu=1)
    for _ in range(5):
        vm.progresses(vcpu=0)
        _step(session, vcpu=1)
    event = next_event_of(session, "SINGLESTEP", vcpu=1)
    _control(session, False, vcpu=1)
    session.answer(event)
    _runs_free(vm, session, vcpu=1)
    _runs_free(vm, session, vcpu=0)


@pytest.mark.clause("EV-SSTEP-PAYLOAD")
def test_payload(lab: Lab, clauses: ClauseNotes) -> None:
    """The event has failed = 0 for a step that succeeded, in its own part, and zero padding."""
    vm, session = _stepping_pair(lab)
    _begin(vm, session)
    for _ in range(5):
        event = _step(session)
        assert len(event.payload) == 560
        assert struct.unpack_from("<4H", event.payload) == (19, 0, 0, 0)
        assert event.payload[552:] == bytes(8)
    assert "event" in load_clauses()["EV-SSTEP-PAYLOAD"].readings
    clauses.seen("EV-SSTEP-PAYLOAD", "event")


@pytest.mark.clause("SSTEP-ON", "EVT-CRASH")
def test_crash(lab: Lab) -> None:
    """CRASH ends KVM_RUN with the shutdown exit."""
    vm, session = _stepping_pair(lab)
    _begin(vm, session)
    session.answer(next_event_of(session, "SINGLESTEP"), "CRASH")
    assert vm.wait_exit().reason == "SHUTDOWN"
    continues(session)


@pytest.mark.clause("EVT-BADACTION-CLOSE", "UNHOOK-SINGLESTEP-OFF")
@pytest.mark.parametrize("action", ["RETRY", 3])
def test_bad_action(lab: Lab, action: str | int) -> None:
    """An action that SINGLESTEP does not have closes the socket, and the vCPU runs on."""
    vm, session = _stepping_pair(lab)
    _begin(vm, session)
    session.answer(next_event_of(session, "SINGLESTEP"), action)
    session.expect_close(timeout_s=5)
    vm.progresses(rounds=50)


@pytest.mark.clause("VCPUCTLEVT-IMPLICIT")
def test_not_controlled_by_control_events(lab: Lab) -> None:
    """Disabling the event by VCPU_CONTROL_EVENTS succeeds and stops nothing."""
    vm, session = _stepping_pair(lab)
    enable(session, "SINGLESTEP", on=False)
    _begin(vm, session)
    _step(session)
    event = next_event_of(session, "SINGLESTEP")
    enable(session, "SINGLESTEP", on=False)
    session.answer(event)
    _step(session)
    next_event_of(session, "SINGLESTEP")


@pytest.mark.clause("UNHOOK-SINGLESTEP-OFF")
@pytest.mark.parametrize("how", ["close", "unhook", "unhook in an event"])
def test_off_at_the_end(lab: Lab, how: str) -> None:
    """When the session ends the vCPU runs freely, and in the next session too."""
    vm, session = _stepping_pair(lab)
    _begin(vm, session)
    for _ in range(3):
        _step(session)
    if how == "unhook":
        event = next_event_of(session, "SINGLESTEP")
        session.handle("SINGLESTEP", lambda _: "CONTINUE")
        session.answer(event)
        session.wait_count("SINGLESTEP", 10)
        session.handle("SINGLESTEP", None)
        next_event_of(session, "SINGLESTEP")
    else:
        next_event_of(session, "SINGLESTEP")
    if how == "close":
        session.close()
        vm.progresses(rounds=50)
    assert vm.unhook() == "OK"
    vm.progresses(rounds=50)
    _runs_free(vm, lab.hook(vm))
    assert vm.word("faults") == 0


def _steps_undisturbed(vm: SmallVm, session: Session) -> None:
    """Step from the guest's start with an interrupt that waits; then switch stepping off."""
    start, end = vm.machine.linear("_start"), vm.machine.linear("sequence")
    for _ in range(12):
        assert start <= _step(session).regs.rip < end
    event = next_event_of(session, "SINGLESTEP")
    assert vm.word("faults") == 0
    _control(session, False)
    session.answer(event)


@pytest.mark.clause("SSTEP-NOINJECT")
def test_no_interrupt_while_stepping(lab: Lab) -> None:
    """An interrupt that waits in the local APIC is delivered when stepping ends, not before."""
    vm, session = _stepping_pair(lab, irqchip=True, interrupts=True)
    vm.stop()
    vm.enable_apic()
    vm.run()
    _begin(vm, session, "_start")
    vm.message_interrupt(VECTOR)
    _steps_undisturbed(vm, session)
    vm.wait_word("faults", 1)
    _runs_free(vm, session)
    assert vm.word("faults") == 1


@pytest.mark.clause("SSTEP-NOINJECT")
def test_no_interrupt_window_while_stepping(lab: Lab) -> None:
    """User space that has an interrupt to inject is asked for it when stepping ends."""
    vm, session = _stepping_pair(lab, interrupts=True)
    vm.stop()
    session.command("VM_PAUSE_VCPU", wait=0).ok()
    vm.run(0, interrupt_window=True)
    _begin_in_pause(vm, session, "_start")
    _steps_undisturbed(vm, session)
    assert vm.wait_exit().reason == "IRQ_WINDOW_OPEN"
    assert vm.vcpu_ioctl(KVM_INTERRUPT, struct.pack("<I", VECTOR))[0] == "OK"
    vm.run()
    vm.wait_word("faults", 1)
    _runs_free(vm, session)
    assert vm.word("faults") == 1


@pytest.mark.clause("SSTEP-NOINJECT")
def test_no_nmi_while_stepping(lab: Lab) -> None:
    """Nor does one come that the guest cannot mask: it is delivered when stepping ends."""
    vm, session = _stepping_pair(lab)
    vm.stop()
    session.command("VM_PAUSE_VCPU", wait=0).ok()
    assert vm.vcpu_ioctl(KVM_NMI)[0] == "OK"
    vm.run(0)
    _begin_in_pause(vm, session, "_start")
    _steps_undisturbed(vm, session)
    vm.wait_word("faults", 1)
    _runs_free(vm, session)
    assert vm.word("faults") == 1


@pytest.mark.clause("INJECT-EBUSY-STEP", "SSTEP-NOINJECT")
def test_no_exception_while_stepping(lab: Lab) -> None:
    """VCPU_INJECT_EXCEPTION answers KVM_EBUSY while stepping, and works again afterwards."""
    vm, session = _stepping_pair(lab)
    requires(session, command="VCPU_INJECT_EXCEPTION")
    _begin(vm, session)
    for _ in range(3):
        event = next_event_of(session, "SINGLESTEP")
        session.command("VCPU_INJECT_EXCEPTION", nr=6).fails("KVM_EBUSY")
        session.answer(event)
    event = next_event_of(session, "SINGLESTEP")
    _control(session, False)
    session.command("VCPU_INJECT_EXCEPTION", nr=6).ok()
    session.answer(event)
    trap = next_event_of(session, "TRAP")
    assert trap_of(trap)[0] == 6
    session.answer(trap)
    vm.wait_word("faults", 1)
    _runs_free(vm, session)


@pytest.mark.usefixtures("exact")
@pytest.mark.clause("SSTEP-ON", "EV-PF-CONTINUE")
def test_restricted_page_while_stepping(lab: Lab) -> None:
    """A step on a restricted page has its PF event, and after that its own."""
    vm, session = _stepping_pair(lab)
    requires(session, command="VM_SET_PAGE_ACCESS", event="PF")
    session.command("VM_SET_PAGE_ACCESS", entries=[{"gpa": FREE, "access": "RX"}]).ok()
    enable(session, "PF")
    for number in (1, 2):
        _begin(vm, session, "store", rdi=FREE, rax=number)
        fault = next_event_of(session, "PF")
        assert (fault.fields.access, fault.fields.gpa) == (2, FREE)
        assert vm.read(FREE, 1) == bytes([number - 1])
        session.answer(fault)
        after = next_event_of(session, "SINGLESTEP")
        assert after.regs.rip == vm.machine.linear("store_end")
        assert after.fields.failed == 0
        assert vm.read(FREE, 1) == bytes([number])
        _control(session, False)
        session.answer(after)
        _runs_free(vm, session)
