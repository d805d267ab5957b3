# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_INJECT_EXCEPTION and the TRAP event."""

from __future__ import annotations

import struct
import time

import pytest
from causes import can_come, cause, pair_for
from checks import all_fail, continues, enable, next_event_of, requires, silent, trap_of
from lab import Lab
from pages import Trace, X, access_pair, linear, next_access, restrict

from harness.manager.payloads import FREE, MAILBOX_WORDS, STACK_STEP, STACKS, mailbox
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.tool import EventMessage, Session

DIVIDE, INVALID_OPCODE, PROTECTION, PAGE_FAULT, BREAKPOINT = 0, 6, 13, 14, 3
# The vectors that can come at any time in 64-bit code.
WITHOUT_CODE = (DIVIDE, 1, INVALID_OPCODE, 7, 16, 18, 19)
WITH_CODE = (8, 10, 11, 12, PROTECTION, PAGE_FAULT, 17)
ADDRESS = 0xFFFF_8123_4567_89AB


def _inject(session: Session, nr: int, error_code: int = 0, address: int = 0, *, vcpu: int = 0,
            ) -> None:  # fmt: skip
    session.command(
        "VCPU_INJECT_EXCEPTION", vcpu=vcpu, nr=nr, error_code=error_code, address=address
    ).ok()


def _trap(session: Session, nr: int, error_code: int = 0, *, vcpu: int = 0) -> EventMessage:
    event = next_event_of(session, "TRAP", vcpu=vcpu)
    assert trap_of(event)[:2] == (nr, error_code)
    return event


def _seen(vm: SmallVm, nr: int, *, count: int = 1, vcpu: int = 0) -> tuple[int, ...]:
    """Check that the guest got so many exceptions, the last of which this one.

    Answers what was on the stack then: error code if any, rip, cs, rflags, rsp, ss.
    """
    vm.wait_word("faults", count, vcpu=vcpu)
    vm.progresses(vcpu=vcpu)
    words = vm.words(vcpu=vcpu)
    assert (words["faults"], words["vector"]) == (count, nr)
    bottom = STACKS + (vcpu + 1) * STACK_STEP
    size = bottom - words["fault_sp"]
    assert size in (40, 48), f"{size} bytes on the stack"
    stack = vm.read(mailbox(vcpu) + MAILBOX_WORDS["stack"], size)
    return struct.unpack(f"<{size // 8}Q", stack)


@pytest.mark.clause("INJECT-OK", "INJECT-TRAP", "INJECT-ERRCODE", "EV-TRAP-EFFECTIVE")
@pytest.mark.parametrize("nr", [*WITHOUT_CODE, *WITH_CODE])
def test_inject(lab: Lab, nr: int) -> None:
    """One TRAP event tells what is delivered, and then the guest gets it, once.

    The error code reaches the guest's stack where the vector has one, and is nowhere else.
    """
    vm, session = pair_for(lab, "TRAP")
    vm.progresses()
    code = 0x18 if nr in WITH_CODE else 0
    _inject(session, nr, error_code=0x18)
    event = _trap(session, nr, code)
    vm.stands_still(for_s=0.05)
    assert vm.word("faults") == 0
    session.answer(event)
    stack = _seen(vm, nr)
    if code:
        assert stack[0] == code
        stack = stack[1:]
    rip, cs, _, rsp, ss = stack
    assert (rip, cs, rsp, ss) == (event.regs.rip, 8, STACKS + STACK_STEP, 0x10)
    silent(session, vcpus=[0])
    assert vm.word("faults") == 1


@pytest.mark.clause("INJECT-OK", "INJECT-TRAP")
@pytest.mark.parametrize("name", ["PAUSE", "CR", "MSR", "DESCRIPTOR", "XSETBV"])
def test_inject_in_event(lab: Lab, name: str) -> None:
    """During another event the injection is accepted; it takes effect once that is answered."""
    vm, session = pair_for(lab, "TRAP")
    if name != "PAUSE":
        can_come(lab, vm, session, name)
        event = cause(vm, session, name)
    else:
        session.command("VM_PAUSE_VCPU", wait=1).ok()
        event = next_event_of(session, "PAUSE")
    _inject(session, PROTECTION, 0x28)
    continues(session)
    session.no_event(within_s=0)
    session.answer(event)
    trap = _trap(session, PROTECTION, 0x28)
    assert vm.word("faults") == 0
    session.answer(trap)
    vm.wait_word("faults", 1)
    assert vm.finish()["vector"] == PROTECTION
    silent(session, vcpus=[0])
    assert vm.word("faults") == 1


@pytest.mark.clause("EV-TRAP-EFFECTIVE", "INJECT-OK", "INJECT-TRAP")
def test_overridden_by_one_that_was_begun(lab: Lab) -> None:
    """An exception whose delivery met a restricted page comes first: TRAP tells that one."""
    vm, session = access_pair(lab)
    requires(session, command="VCPU_INJECT_EXCEPTION")
    enable(session, "BREAKPOINT")
    restrict(session, X, FREE)
    vm.order("breakpoint", linear(vm, FREE) + 0x800)  # with its stack there
    session.answer(next_event_of(session, "BREAKPOINT"))
    event, _ = next_access(session)
    _inject(session, PROTECTION, 0x28)
    Trace(session)
    session.answer(event)
    session.answer(_trap(session, BREAKPOINT))
    vm.finish()
    assert (vm.word("traps"), vm.word("faults")) == (1, 0)
    silent(session, vcpus=[0])


@pytest.mark.clause("INJECT-OK", "EV-TRAP-EFFECTIVE")
def test_inject_breakpoint(lab: Lab) -> None:
    """A breakpoint is delivered also where there is no int3, and leads to the next instruction."""
    vm, session = pair_for(lab, "HYPERCALL")
    enable(session, "HYPERCALL")
    vm.call_out(1)
    event = next_event_of(session, "HYPERCALL")
    _inject(session, BREAKPOINT)
    session.answer(event)
    trap = _trap(session, BREAKPOINT)
    assert vm.word("traps") == 0
    session.answer(trap)
    vm.wait_word("done", 1)
    assert vm.word("traps") == 1
    # How long an instruction is that is none may be anything.
    assert 0 <= vm.word("trap_ip") - trap.regs.rip <= 15
    silent(session, vcpus=[0])


@pytest.mark.clause("INJECT-OK", "INJECT-TRAP")
def test_inject_before_first_entry(lab: Lab) -> None:
    """A vCPU that has not run yet gets the exception before its first instruction."""
    vm, session = pair_for(lab, "TRAP", run=False)
    pending = session.send("VCPU_INJECT_EXCEPTION", nr=INVALID_OPCODE)
    continues(session)
    vm.run()
    pending.reply(5).ok()
    event = _trap(session, INVALID_OPCODE)
    assert event.regs.rip == vm.machine.linear("_start")
    assert vm.word("ticks") == 0
    session.answer(event)
    stack = _seen(vm, INVALID_OPCODE)
    assert stack[0] == vm.machine.linear("_start")


@pytest.mark.clause("INJECT-OK")
def test_inject_into_halted(lab: Lab) -> None:
    """A halted vCPU gets the exception, too, and goes on behind the instruction."""
    vm, session = pair_for(lab, "TRAP", irqchip=True)
    vm.order("halt")
    halted = vm.machine.linear("halt") + 1
    deadline = time.monotonic() + 5
    while session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.regs.rip != halted:
        assert time.monotonic() < deadline, "the guest does not halt"
    _inject(session, PROTECTION, 0x28)
    session.answer(_trap(session, PROTECTION, 0x28))
    vm.wait_word("faults", 1)
    assert vm.finish()["vector"] == PROTECTION
    silent(session, vcpus=[0])


@pytest.mark.clause("INJECT-OK", "INJECT-TRAP")
def test_on_the_vcpu_asked_for(lab: Lab) -> None:
    """Each vCPU gets its own exception and has its own TRAP event; others go on."""
    vm, session = pair_for(lab, "TRAP", vcpus=3)
    _inject(session, DIVIDE, vcpu=1)
    _inject(session, PROTECTION, 0x30, vcpu=2)
    vm.progresses(vcpu=0)
    events = [session.next_event(timeout_s=5) for _ in range(2)]
    found = {(event.name, event.vcpu, *trap_of(event)[:2]) for event in events}
    assert found == {("TRAP", 1, DIVIDE, 0), ("TRAP", 2, PROTECTION, 0x30)}
    for event in events:
        session.answer(event)
    _seen(vm, DIVIDE, vcpu=1)
    _seen(vm, PROTECTION, vcpu=2)
    assert vm.word("faults", vcpu=0) == 0


@pytest.mark.clause("INJECT-PF-ADDR", "INJECT-ERRCODE")
@pytest.mark.parametrize("code", [0, 2, 6, 16])
def test_page_fault(lab: Lab, code: int) -> None:
    """With vector 14 the guest finds address in CR2 and error_code on its stack."""
    vm, session = pair_for(lab, "TRAP")
    _inject(session, PAGE_FAULT, code, ADDRESS)
    event = _trap(session, PAGE_FAULT, code)
    assert trap_of(event)[2] == ADDRESS
    session.answer(event)
    assert _seen(vm, PAGE_FAULT)[0] == code
    assert vm.word("fault_cr2") == ADDRESS


@pytest.mark.clause("INJECT-PF-ADDR")
def test_address_of_others(lab: Lab) -> None:
    """Any other vector leaves CR2 alone."""
    vm, session = pair_for(lab, "TRAP")
    _inject(session, PAGE_FAULT, 0, ADDRESS)
    session.answer(_trap(session, PAGE_FAULT))
    _seen(vm, PAGE_FAULT)
    for count, nr in enumerate((PROTECTION, INVALID_OPCODE), 2):
        _inject(session, nr, 0, 0x1234)
        session.answer(_trap(session, nr))
        _seen(vm, nr, count=count)
        assert vm.word("fault_cr2") == ADDRESS


@pytest.mark.clause("INJECT-TRAP")
def test_many(lab: Lab) -> None:
    """Each of 100 injections, one after another, is one TRAP event and one exception."""
    vm, session = pair_for(lab, "TRAP")
    for number in range(100):
        nr = (PROTECTION, DIVIDE, PAGE_FAULT, INVALID_OPCODE)[number % 4]
        _inject(session, nr)
        session.answer(_trap(session, nr))
        # The guest's handler cannot be interrupted by itself.
        _seen(vm, nr, count=number + 1)
    silent(session, vcpus=[0])
    assert session.count("TRAP") == 100
    assert vm.word("faults") == 100


@pytest.mark.clause("EV-TRAP-EFFECTIVE", "INJECT-OK", "INJECT-TRAP")
def test_overridden(lab: Lab) -> None:
    """Where the guest is about to get another exception, TRAP tells that one, and it gets that."""
    vm, session = pair_for(lab, "TRAP")
    enable(session, "BREAKPOINT")
    vm.order("breakpoint")
    event = next_event_of(session, "BREAKPOINT")
    _inject(session, PROTECTION, 0x28)
    session.answer(event, "CONTINUE")
    trap = _trap(session, BREAKPOINT)
    assert vm.word("faults") == 0
    session.answer(trap)
    vm.wait_word("faults", 1)
    words = vm.finish()
    assert (words["faults"], words["vector"]) == (1, BREAKPOINT)
    silent(session, vcpus=[0])
    assert vm.word("faults") == 1
    # Nothing of it is left for later.
    _inject(session, PROTECTION, 0x28)
    session.answer(_trap(session, PROTECTION, 0x28))
    _seen(vm, PROTECTION, count=2)


@pytest.mark.clause("EV-TRAP-EFFECTIVE", "INJECT-OK")
def test_instead_of_another(lab: Lab) -> None:
    """Where RETRY drops what the guest was about to get, TRAP tells the injected exception."""
    vm, session = pair_for(lab, "TRAP")
    enable(session, "BREAKPOINT")
    vm.order("breakpoint")
    event = next_event_of(session, "BREAKPOINT")
    _inject(session, PROTECTION, 0x28)
    session.answer(event, "RETRY")
    trap = _trap(session, PROTECTION, 0x28)
    assert trap.regs.rip == event.regs.rip
    session.answer(trap)
    vm.wait_word("faults", 1)
    assert vm.finish()["vector"] == PROTECTION
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-TRAP-HIGHPRIO")
def test_before_pause(lab: Lab) -> None:
    """TRAP comes before PAUSE events that were asked for earlier."""
    vm, session = pair_for(lab, "TRAP")
    for _ in range(3):
        session.command("VM_PAUSE_VCPU", wait=0).ok()
    first = next_event_of(session, "PAUSE")
    _inject(session, INVALID_OPCODE)
    session.answer(first)
    session.answer(_trap(session, INVALID_OPCODE))
    for _ in range(2):
        session.answer(next_event_of(session, "PAUSE"))
    _seen(vm, INVALID_OPCODE)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-TRAP-HIGHPRIO")
def test_before_what_the_guest_does(lab: Lab) -> None:
    """TRAP comes before the event of the instruction at which the guest stands."""
    vm, session = pair_for(lab, "TRAP")
    enable(session, "BREAKPOINT")
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    _inject(session, PROTECTION, 0x28)
    breakpoint = vm.machine.linear("breakpoint")
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=breakpoint).ok()
    session.answer(event)
    trap = _trap(session, PROTECTION, 0x28)
    assert trap.regs.rip == breakpoint
    session.answer(trap)
    event = next_event_of(session, "BREAKPOINT")
    words = vm.words()
    assert (words["faults"], words["vector"]) == (1, PROTECTION)
    start = vm.machine.linear("_start")
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=start).ok()
    session.answer(event, "RETRY")
    vm.progresses()
    silent(session, vcpus=[0])


@pytest.mark.clause("INJECT-EBUSY-PENDING")
def test_pending(lab: Lab) -> None:
    """Until the TRAP event of an injection was answered another one answers KVM_EBUSY."""
    vm, session = pair_for(lab, "TRAP", vcpus=2)
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    _inject(session, INVALID_OPCODE)
    session.command("VCPU_INJECT_EXCEPTION", nr=PROTECTION).fails("KVM_EBUSY")
    session.command("VCPU_INJECT_EXCEPTION", nr=INVALID_OPCODE).fails("KVM_EBUSY")
    session.answer(event)
    trap = _trap(session, INVALID_OPCODE)
    session.command("VCPU_INJECT_EXCEPTION", nr=PROTECTION).fails("KVM_EBUSY")
    # Of this vCPU only.
    _inject(session, DIVIDE, vcpu=1)
    session.answer(_trap(session, DIVIDE, vcpu=1))
    session.answer(trap)
    _seen(vm, INVALID_OPCODE)
    _seen(vm, DIVIDE, vcpu=1)
    _inject(session, PROTECTION, 0x20)
    session.answer(_trap(session, PROTECTION, 0x20))
    _seen(vm, PROTECTION, count=2)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("INJECT-EBUSY-STEP")
def test_while_stepping(lab: Lab) -> None:
    """While the vCPU is single-stepped an injection answers KVM_EBUSY, and has no effect."""
    vm, session = pair_for(lab, "TRAP")
    requires(session, command="VCPU_CONTROL_SINGLESTEP")
    if not session.command("GET_VERSION").ok().fields.features.singlestep:
        skip_clause("this CPU cannot single-step for a tool (features.singlestep is 0)")
    session.command("VCPU_CONTROL_SINGLESTEP", enable=1).ok()
    event = next_event_of(session, "SINGLESTEP")
    session.command("VCPU_INJECT_EXCEPTION", nr=PROTECTION).fails("KVM_EBUSY")
    session.command("VCPU_CONTROL_SINGLESTEP", enable=0).ok()
    session.answer(event)
    vm.progresses()
    silent(session, vcpus=[0])
    assert vm.word("faults") == 0
    _inject(session, PROTECTION)
    session.answer(_trap(session, PROTECTION))
    _seen(vm, PROTECTION)


@pytest.mark.clause("INJECT-EPERM")
def test_disallowed(lab: Lab) -> None:
    """While TRAP is disallowed the command answers KVM_EPERM, also with padding; no effect."""
    vm, session = pair_for(lab, "TRAP")
    assert vm.event("TRAP", 0) == "OK"
    session.command("VCPU_INJECT_EXCEPTION", nr=INVALID_OPCODE).fails("KVM_EPERM")
    session.command("VCPU_INJECT_EXCEPTION", nr=INVALID_OPCODE, padding1=1).fails("KVM_EPERM")
    vm.progresses()
    silent(session, vcpus=[0])
    assert vm.word("faults") == 0
    assert vm.event("TRAP", 1) == "OK"
    _inject(session, INVALID_OPCODE)
    session.answer(_trap(session, INVALID_OPCODE))
    _seen(vm, INVALID_OPCODE)


@pytest.mark.clause("INJECT-EINVAL-PADDING")
def test_padding(lab: Lab) -> None:
    """Each byte of padding, of header and command, answers KVM_EINVAL and injects nothing."""
    vm, session = pair_for(lab, "TRAP")
    wrongs = [{"nr": INVALID_OPCODE, **wrong}
              for wrong in session.codec.wrong_paddings("VCPU_INJECT_EXCEPTION")]  # fmt: skip
    all_fail(session, "VCPU_INJECT_EXCEPTION", "KVM_EINVAL", wrongs)
    vm.progresses()
    silent(session, vcpus=[0])
    assert vm.word("faults") == 0
