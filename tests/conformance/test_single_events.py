# SPDX-License-Identifier: GPL-2.0-or-later
"""The HYPERCALL and BREAKPOINT events (UNHOOK and PAUSE are with their ioctl and command)."""

from __future__ import annotations

from typing import Any

import pytest
from checks import enable, next_event_of, silent
from lab import Lab

from harness.manager.payloads import ALIAS
from harness.plugin import skip_clause
from harness.plugin.fixtures import ClauseNotes

KVM_ENOSYS = (-1000) & 0xFFFF_FFFF_FFFF_FFFF


@pytest.mark.clause("EV-HYPERCALL-TRIGGER", "EV-HYPERCALL-RET0")
@pytest.mark.parametrize("cpl", [0, 1, 2, 3])
def test_hypercall_from_any_ring(lab: Lab, cpl: int) -> None:
    """Hypercall 34 with 24 and 0 raises the event at every privilege level and returns 0."""
    vm, session = lab.pair(cpl=cpl)
    enable(session, "HYPERCALL")
    vm.call_out(3)
    for number in (1, 2, 3):
        event = next_event_of(session, "HYPERCALL")
        assert event.sregs.ss.dpl == cpl
        assert (event.regs.rax, event.regs.rdi, event.regs.rsi) == (34, 24, 0)
        session.answer(event)
        vm.wait_word("done", number)
    assert (vm.word("result"), vm.word("refused"), vm.word("faults")) == (0, 0, 0)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-HYPERCALL-TRIGGER", "EV-HYPERCALL-RET0")
@pytest.mark.parametrize("mode", ["protected32", "compat32"])
def test_hypercall_of_32_bits(lab: Lab, mode: Any) -> None:
    """In 32-bit code the arguments are in ebx and ecx, and the event is the same."""
    vm, session = lab.pair(mode=mode, payload="calls32")
    enable(session, "HYPERCALL")
    vm.call_out(2)
    for number in (1, 2):
        event = next_event_of(session, "HYPERCALL")
        assert event.mode == 4
        assert (event.regs.rax, event.regs.rbx, event.regs.rcx) == (34, 24, 0)
        session.answer(event)
        vm.wait_word("done", number)
    assert (vm.word("result"), vm.word("refused")) == (0, 0)
    # rdi and rsi mean nothing here: wrong arguments in the right registers are no event.
    vm.set_word("arg_1", 25)
    vm.wait_word("done", vm.call_out(1))
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-HYPERCALL-TRIGGER", "VCPUCTLEVT-ENABLE")
def test_many_hypercalls(lab: Lab) -> None:
    """Each of 300 hypercalls on two vCPUs is one event, neither more nor fewer."""
    vm, session = lab.pair(vcpus=2)
    session.handle("HYPERCALL", lambda event: "CONTINUE")
    for vcpu in (0, 1):
        enable(session, "HYPERCALL", vcpu=vcpu)
        vm.call_out(150, vcpu=vcpu)
    for vcpu in (0, 1):
        vm.wait_word("done", 150, vcpu=vcpu, timeout_s=20)
    silent(session, vcpus=[0, 1])
    assert session.count("HYPERCALL") == 300
    assert [vm.word("refused", vcpu=vcpu) for vcpu in (0, 1)] == [0, 0]


@pytest.mark.clause("EV-HYPERCALL-TRIGGER")
@pytest.mark.parametrize(
    ("number", "first", "second"),
    [(34, 23, 0), (34, 25, 0), (34, 24, 1), (34, 0, 24), (33, 24, 0), (1, 24, 0),
     (34, 24 | 1 << 32, 0), (34, 24, 1 << 32), (34 | 1 << 32, 24, 0)],
)  # fmt: skip
def test_other_hypercalls(lab: Lab, number: int, first: int, second: int) -> None:
    """Any other number or argument raises no event, and the hypercall fails as without a tool."""
    plain, vm = lab.vm(), lab.vm()
    session = lab.hook(vm)
    for guest in (plain, vm):
        guest.run()
        for word, value in (("arg_nr", number), ("arg_1", first), ("arg_2", second)):
            guest.set_word(word, value)
    enable(session, "HYPERCALL")
    for guest in (plain, vm):
        guest.wait_word("done", guest.call_out(2))
    assert vm.word("result") == plain.word("result")
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-HYPERCALL-RET0")
def test_return_value(lab: Lab) -> None:
    """After CONTINUE rax is 0, every other register is as before, and the call is over."""
    vm, session = lab.pair(registers={"rbp": 5, "r8": 6, "r14": 7})
    enable(session, "HYPERCALL")
    vm.set_word("result", 99)
    vm.call_out(1)
    event = next_event_of(session, "HYPERCALL")
    session.command("VM_PAUSE_VCPU", wait=0).ok()
    session.answer(event)
    after = next_event_of(session, "PAUSE")
    assert after.regs.rax == 0
    assert after.regs.rip == vm.machine.linear("call_site") + 3
    for register in ("rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r14", "r15"):
        assert getattr(after.regs, register) == getattr(event.regs, register), register
    session.answer(after)
    vm.wait_word("done", 1)
    assert vm.word("result") == 0


@pytest.mark.clause("EV-HYPERCALL-NOTOOL")
def test_without_a_tool(lab: Lab, clauses: ClauseNotes) -> None:
    """The guest cannot tell whether no tool is there or it is not interested.

    By the text absence is not signaled at all, so the call returns 0; the reference code
    answers -KVM_ENOSYS. In both readings all ways of not being there look the same.
    """
    vm = lab.vm()
    vm.run()
    results = set()

    def call() -> None:
        vm.wait_word("done", vm.call_out(1))
        results.add(vm.word("result"))

    call()
    session = lab.hook(vm)
    call()
    enable(session, "HYPERCALL")
    enable(session, "HYPERCALL", on=False)
    call()
    session.close()
    assert vm.unhook() == "OK"
    call()
    assert results in ({0}, {KVM_ENOSYS})
    clauses.seen("EV-HYPERCALL-NOTOOL", "silent" if results == {0} else "enosys")


@pytest.mark.clause("EV-BP-PAYLOAD")
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("alias", [False, True])
def test_breakpoint_payload(lab: Lab, alias: bool, cpl: int) -> None:
    """BREAKPOINT carries the physical address of the instruction, wherever it is mapped, and 1."""
    vm, session = lab.pair(alias=alias, cpl=cpl)
    enable(session, "BREAKPOINT")
    vm.call_out(1, kind=1)
    event = next_event_of(session, "BREAKPOINT")
    assert event.regs.rip == vm.machine.linear("breakpoint_site")
    assert event.fields.gpa == vm.machine.address("breakpoint_site")
    assert (event.regs.rip - event.fields.gpa) == (ALIAS if alias else 0)
    assert event.fields.insn_len == 1
    assert event.payload[-7:] == bytes(7)
    session.answer(event)
    vm.wait_word("traps", 1)


@pytest.mark.clause("EV-BP-PAYLOAD")
@pytest.mark.needs("smap")
def test_breakpoint_of_a_program(lab: Lab) -> None:
    """A program's breakpoint has its address also where the guest's kernel may not read it."""
    if "smap" not in lab.manager.read_file("/proc/cpuinfo").split():
        skip_clause("the host's CPU has no SMAP")
    vm, session = lab.pair(cpl=3, smap=True)
    enable(session, "BREAKPOINT")
    vm.call_out(1, kind=1)
    event = next_event_of(session, "BREAKPOINT")
    assert event.fields.gpa == vm.machine.address("breakpoint_site")
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=event.regs.rip + 1).ok()
    session.answer(event, "RETRY")
    vm.wait_word("done", 1)


@pytest.mark.clause("EV-BP-PAYLOAD")
def test_prefixed_breakpoint(lab: Lab) -> None:
    """The length is that of the whole instruction, with its prefix."""
    vm, session = lab.pair()
    enable(session, "BREAKPOINT")
    vm.call_out(1, kind=2)
    event = next_event_of(session, "BREAKPOINT")
    assert event.regs.rip == vm.machine.linear("prefixed_site")
    assert event.fields.gpa == vm.machine.address("prefixed_site")
    assert event.fields.insn_len == 2
    session.answer(event)
    vm.wait_word("done", 1)
    assert vm.word("trap_ip") == vm.machine.linear("prefixed_site") + 2


@pytest.mark.clause("EVT-NOTENABLED-NOTSENT")
@pytest.mark.parametrize("kind", [3, 4], ids=["0x21", "0x80"])
def test_other_software_interrupts(lab: Lab, kind: int) -> None:
    """INT n is no event, and goes on as ever, also where it is intercepted to see breakpoints."""
    vm, session = lab.pair()
    enable(session, "BREAKPOINT")
    vm.call_out(50, kind=kind)
    vm.wait_word("done", 50)
    assert vm.word("traps") == 50
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-BP-CONTINUE")
@pytest.mark.parametrize("cpl", [0, 3])
def test_breakpoint_continue(lab: Lab, cpl: int) -> None:
    """After CONTINUE the guest gets the exception, once, with the address after int3."""
    vm, session = lab.pair(cpl=cpl)
    enable(session, "BREAKPOINT")
    vm.call_out(4, kind=1)
    for number in range(1, 5):
        event = next_event_of(session, "BREAKPOINT")
        assert vm.word("traps") == number - 1
        session.answer(event, "CONTINUE")
    vm.wait_word("done", 4)
    assert vm.word("traps") == 4
    assert vm.word("trap_ip") == vm.machine.linear("breakpoint_site") + 1
    assert vm.word("faults") == 0
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-BP-CONTINUE", "VCPUCTLEVT-ENABLE")
def test_many_breakpoints(lab: Lab) -> None:
    """Each of 300 breakpoints on two vCPUs is one event and one exception for the guest."""
    vm, session = lab.pair(vcpus=2)
    session.handle("BREAKPOINT", lambda event: "CONTINUE")
    for vcpu in (0, 1):
        enable(session, "BREAKPOINT", vcpu=vcpu)
        vm.call_out(150, kind=1, vcpu=vcpu)
    for vcpu in (0, 1):
        vm.wait_word("done", 150, vcpu=vcpu, timeout_s=20)
    silent(session, vcpus=[0, 1])
    assert session.count("BREAKPOINT") == 300
    assert [vm.word("traps", vcpu=vcpu) for vcpu in (0, 1)] == [150, 150]


@pytest.mark.clause("EV-BP-RETRY")
def test_breakpoint_retry(lab: Lab) -> None:
    """After RETRY with rip moved the guest goes on there and never sees the exception."""
    vm, session = lab.pair(alias=True)
    enable(session, "BREAKPOINT")
    vm.call_out(4, kind=1)
    for _ in range(4):
        event = next_event_of(session, "BREAKPOINT")
        after = event.regs.rip + event.fields.insn_len
        session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=after).ok()
        session.answer(event, "RETRY")
    vm.wait_word("done", 4)
    assert vm.word("traps") == 0
    silent(session, vcpus=[0])
