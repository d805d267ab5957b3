# SPDX-License-Identifier: GPL-2.0-or-later
"""Events in general, and their replies."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from causes import (
    CAUSES,
    CR4_OSXSAVE,
    CR4_PAE,
    LSTAR,
    RETRYABLE,
    bring,
    can_come,
    cause,
    pair_for,
    select_cr,
    went_on,
)
from checks import (
    RawTool,
    continues,
    enable,
    ends_dead,
    event_size,
    gone,
    next_event_of,
    reply_size,
    silent,
)
from lab import Lab

from harness.abi import Profile
from harness.manager.payloads import FREE, PDPT, PML4, REGS
from harness.manager.smallvm import SmallVm
from harness.tool import Session

NAMES = list(CAUSES)
# One of each form of reply, and of each way out of the guest.
FEW = ("PAUSE", "HYPERCALL", "BREAKPOINT", "CR")
# AMD CPUs keep 32 bits of the SYSENTER registers.
MSR_VALUES = {
    "sysenter_cs": (0x174, 0x1234), "sysenter_esp": (0x175, 0x1111_0008),
    "sysenter_eip": (0x176, 0x2222_0010), "star": (0xC0000081, 0x0023_0010_0000_0000),
    "lstar": (0xC0000082, 0xFFFF_8000_3333_0018), "cstar": (0xC0000083, 0xFFFF_8000_4444_0020),
    "pat": (0x277, 0x0007_0106_0007_0106), "shadow_gs": (0xC0000102, 0xFFFF_8000_5555_0028),
}  # fmt: skip
# Where the guest stands.
SITES = {
    "HYPERCALL": "call_site", "BREAKPOINT": "breakpoint_site", "CR": "set_cr4",
    "XSETBV": "xsetbv_site emulated_xsetbv_site", "DESCRIPTOR": "store_idt", "MSR": "wrmsr_site",
}  # fmt: skip


def _session_over(lab: Lab, vm: SmallVm, session: Session, name: str) -> None:
    """Check that the kernel closed the socket, and the vCPU goes on without a tool."""
    session.expect_close(timeout_s=5)
    ends_dead(lab.manager, vm)
    went_on(vm, name)
    assert vm.preunhook() == gone(vm)


@pytest.mark.clause("EVT-VM-ID")
def test_vm_event_layout(lab: Lab, vm: SmallVm) -> None:
    """The VM event is its header alone: event(u16) = 0 and padding; before v12, the common part."""
    tool = lab.raw(vm)
    assert tool.command("VM_CONTROL_EVENTS", seq=1, event_id="UNHOOK", enable=1) == bytes(8)
    assert vm.preunhook() == "OK"
    event = tool.receive()
    whole = bytes(8) if lab.profile.event_header else struct.pack("<HHB539x", 544, 0, 0)
    assert (event.id, event.payload) == (lab.profile.vm_event, whole)


@pytest.mark.clause("EVT-VCPU-ID")
@pytest.mark.parametrize("name", NAMES)
def test_vcpu_event_layout(lab: Lab, name: str) -> None:
    """A vCPU event has message id 1, event and padding, 544 bytes in common, then its own.

    Before v12 the 544 bytes in common come first, and have the event's id among them.
    """
    number = lab.profile.event(name).id
    vm, session = pair_for(lab, name)
    bring(vm, session, name)
    event = session.next_event(timeout_s=5)
    assert (event.id, len(event.payload)) == (1, event_size(lab.profile, name))
    if lab.profile.event_header:
        assert struct.unpack_from("<4HHH", event.payload) == (number, 0, 0, 0, 544, 0)
    else:
        assert struct.unpack_from("<HHB", event.payload) == (544, 0, number)


@pytest.mark.clause("EVT-VCPU-COMMON")
@pytest.mark.parametrize("name", NAMES)
def test_common_part(lab: Lab, name: str, clauses: Any) -> None:
    """Size, index, mode, all registers and nine MSRs are those of the vCPU at the event."""
    vm = lab.vm(
        payload=CAUSES[name].payload,
        vcpus=2,
        registers={"rbp": 0x1111, "r8": 0x2222, "r14": 0xFFFF_FFFF_0000_3333},
    )
    vm.set_msrs(dict(MSR_VALUES.values()), vcpu=1)
    session = lab.hook(vm)
    vm.run()
    vm.progresses(vcpu=1)
    can_come(lab, vm, session, name)
    vm.stop(1)
    sregs = vm.special_registers(vcpu=1)
    vm.run(1)
    event = cause(vm, session, name, vcpu=1)
    common = event.common
    assert (common.size, common.vcpu, common.arch.mode) == (544, 1, 8)
    assert (event.regs.rbp, event.regs.r8, event.regs.r14) == (0x1111, 0x2222, 0xFFFFFFFF00003333)
    assert event.regs.r15 == 0x200
    if name == "XSETBV":
        sregs = sregs[:248] + struct.pack("<Q", CR4_PAE | CR4_OSXSAVE) + sregs[256:]
    start = lab.profile.event_header.size if lab.profile.event_header else 0
    assert event.payload[start + 8 + 152 :][: len(sregs)] == sregs
    assert event.msrs.efer == 0x500
    for field, (number, value) in MSR_VALUES.items():
        if name != "MSR" or number != LSTAR:
            assert getattr(event.msrs, field) == value, field
    # The event, the command and the instruction at which the guest stands agree.
    reply = session.command("VCPU_GET_REGISTERS", vcpu=1, nmsrs=0).ok()
    for register in REGS:
        assert getattr(event.regs, register) == getattr(reply.fields.regs, register), register
    if sites := SITES.get(name):
        assert event.regs.rip in {vm.machine.linear(site) for site in sites.split()}
    if name == "HYPERCALL":
        assert (event.regs.rax, event.regs.rdi, event.regs.rsi) == (34, 24, 0)
    if event.dirty_padding:
        clauses.note(f"not zero, though nobody promised it: {', '.join(event.dirty_padding)}")
    session.answer(event)


@pytest.mark.clause("EVT-NOTENABLED-NOTSENT")
def test_not_enabled(lab: Lab) -> None:
    """Without being enabled or requested no event is sent, whatever the guest does."""
    vm, session = lab.pair(vcpus=2)
    for vcpu in (0, 1):
        for kind in (0, 1, 2):
            vm.wait_word("done", vm.call_out(5, kind=kind, vcpu=vcpu), vcpu=vcpu)
        assert vm.word("traps", vcpu=vcpu) == 10
    silent(session, vcpus=[0, 1])
    # Other hypercalls and other exceptions are never these events.
    enable(session, "BREAKPOINT")
    vm.wait_word("done", vm.call_out(1))
    enable(session, "BREAKPOINT", on=False)
    enable(session, "HYPERCALL")
    vm.wait_word("done", vm.call_out(1, kind=1))
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("EVT-SEQ")
def test_sequence(lab: Lab) -> None:
    """Events of all kinds and vCPUs carry one seq that grows, apart from that of commands."""
    vm, session = lab.pair(vcpus=2)
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    numbers = []
    for vcpu in (0, 1, 0):
        for name in ("PAUSE", "HYPERCALL", "BREAKPOINT"):
            event = cause(vm, session, name, vcpu=vcpu)
            numbers.append(event.seq)
            continues(session)
            session.answer(event)
            vm.finish(vcpu=vcpu)
        assert vm.preunhook() == "OK"
        numbers.append(session.next_event("UNHOOK", timeout_s=5).seq)
    assert numbers == sorted(set(numbers)), numbers


@pytest.mark.clause("EVT-VCPU-HELD")
@pytest.mark.parametrize("name", NAMES)
def test_held(lab: Lab, name: str) -> None:
    """The vCPU runs no guest code until the reply, and does afterwards."""
    vm, session = pair_for(lab, name)
    event = cause(vm, session, name)
    before = vm.words()
    vm.stands_still(for_s=0.3)
    assert vm.words() == before
    assert vm.running()
    session.answer(event)
    went_on(vm, name)


@pytest.mark.clause("EVT-VCPU-HELD")
def test_held_against_signals(lab: Lab) -> None:
    """A signal to the vCPU's thread does not let guest code run before the reply."""
    vm, session = lab.pair()
    event = cause(vm, session, "HYPERCALL")
    ticks = vm.word("ticks")
    vm.kick()
    vm.stands_still()
    assert vm.word("done") == 0
    session.answer(event)
    # Either the kick or the reply came first; the guest goes on where it was.
    if vm.poll_word("done", 1, compare="ge", timeout_s=1) is None:
        vm.stop()
        vm.run()
    vm.wait_word("done", 1)
    assert vm.word("ticks") >= ticks


@pytest.mark.clause("EVT-OTHER-VCPU-RUN")
@pytest.mark.parametrize("name", NAMES)
def test_others_run(lab: Lab, name: str) -> None:
    """While one vCPU waits for a reply the others run, and may wait for replies of their own."""
    vm, session = pair_for(lab, name, vcpus=3)
    first = cause(vm, session, name, vcpu=1)
    vm.progresses(vcpu=0, rounds=20)
    vm.progresses(vcpu=2, rounds=20)
    second = cause(vm, session, name, vcpu=2)
    vm.progresses(vcpu=0, rounds=20)
    vm.stands_still(vcpu=1)
    session.answer(second)
    vm.progresses(vcpu=2)
    vm.stands_still(vcpu=1)
    session.answer(first)
    vm.progresses(vcpu=1)


@pytest.mark.clause("EVT-CONTINUE")
@pytest.mark.parametrize("name", NAMES)
def test_continue(lab: Lab, name: str) -> None:
    """CONTINUE lets KVM go on: the instruction is done, the exception delivered, the vCPU runs."""
    vm, session = pair_for(lab, name)
    session.answer(cause(vm, session, name), "CONTINUE")
    went_on(vm, name)
    assert vm.word("refused") == 0
    silent(session, vcpus=[0])


@pytest.mark.clause("EVT-RETRY", "EV-BP-RETRY")
def test_retry(lab: Lab) -> None:
    """RETRY re-enters the guest without the exception: the same instruction, unless rip moved."""
    vm, session = lab.pair()
    event = cause(vm, session, "BREAKPOINT")
    for _ in range(3):
        session.answer(event, "RETRY")
        again = next_event_of(session, "BREAKPOINT")
        assert again.regs.rip == event.regs.rip
        assert again.seq > event.seq
        event = again
    assert vm.word("traps") == 0
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=event.regs.rip + 1).ok()
    session.answer(event, "RETRY")
    vm.wait_word("done", 1)
    assert vm.word("traps") == 0
    silent(session, vcpus=[0])


@pytest.mark.clause("EVT-CRASH")
@pytest.mark.parametrize("name", NAMES)
def test_crash(lab: Lab, name: str) -> None:
    """CRASH ends KVM_RUN of that vCPU with the shutdown exit; the session goes on."""
    vm, session = pair_for(lab, name, vcpus=2)
    event = cause(vm, session, name, vcpu=1)
    before = vm.words(vcpu=1)
    session.answer(event, "CRASH")
    assert vm.wait_exit(1).reason == "SHUTDOWN"
    assert vm.words(vcpu=1) == before
    continues(session)
    vm.progresses(vcpu=0)


@pytest.mark.clause("EVT-BADACTION-CLOSE")
@pytest.mark.parametrize(
    ("name", "action"),
    [
        *((name, 1) for name in NAMES if name not in RETRYABLE),
        *((name, 3) for name in NAMES),
        *((name, 255) for name in FEW),
    ],
)
def test_bad_action(lab: Lab, name: str, action: int) -> None:
    """An action that the event does not have closes the socket, and the vCPU goes on."""
    vm, session = pair_for(lab, name)
    session.answer(cause(vm, session, name), action)
    _session_over(lab, vm, session, name)


@pytest.mark.clause("EVRPL-LAYOUT")
def test_reply_layout(lab: Lab) -> None:
    """A reply is the vCPU header, then action(u8), event(u8), padding1(u16), padding2(u32)."""
    vm = lab.vm(vcpus=2)
    tool: RawTool = lab.raw(vm)
    vm.run()
    wanted = {"vcpu": 1, "event_id": "BREAKPOINT", "enable": 1}
    assert tool.command("VCPU_CONTROL_EVENTS", seq=1, **wanted) == bytes(8)
    id, number = lab.profile.event_reply, lab.profile.event("BREAKPOINT").id
    vm.call_out(1, kind=1, vcpu=1)
    event = tool.receive()
    # RETRY is the action that only the right byte can mean: the breakpoint comes again.
    retry = struct.pack("<HHI", 1, 0, 0) + struct.pack("<BBHI", 1, number, 0, 0)
    tool.send(id, retry, seq=event.seq)
    again = tool.receive()
    assert again.payload[:8] == event.payload[:8]
    assert vm.word("traps", vcpu=1) == 0
    proceed = struct.pack("<HHI", 1, 0, 0) + struct.pack("<BBHI", 0, number, 0, 0)
    tool.send(id, proceed, seq=again.seq)
    vm.wait_word("traps", 1, vcpu=1)
    assert len(tool.ask(2, seq=2)) == reply_size(lab.profile, "GET_VERSION")


@pytest.mark.clause("EVRPL-SHORT-OK")
@pytest.mark.parametrize(
    ("length", "expected"), [(16, 0), (17, 0x77), (20, 0x5566_7777), (23, 0x44_5566_7777)]
)
def test_short_reply_to_msr(lab: Lab, length: int, expected: int) -> None:
    """A reply without all of its specific part is accepted, the rest taken as zero."""
    vm, session = pair_for(lab, "MSR")
    event = cause(vm, session, "MSR")
    session.answer(event, new_val=0x1100_0044_5566_7777, length=length)
    assert vm.finish()["result"] == expected
    continues(session)


@pytest.mark.clause("EVRPL-SHORT-OK")
@pytest.mark.parametrize(("length", "expected"), [(16, 0), (20, FREE)])
def test_short_reply_to_cr(lab: Lab, length: int, expected: int) -> None:
    """The same for CR: what is missing of new_val is zero in CR3, and the guest runs with it."""
    vm, session = pair_for(lab, "CR", vcpus=2, run=False)
    tables = vm.read(PML4, 0x1000)
    vm.write(FREE, tables)
    # The first mailbox word, of a vCPU that does not run, is the root table at address 0.
    vm.write(0, struct.pack("<Q", PDPT | 7))
    vm.run(1)
    select_cr(session, 3, vcpu=1)
    enable(session, "CR", vcpu=1)
    vm.order("set_cr3", FREE + 0x1000, vcpu=1)
    event = next_event_of(session, "CR", vcpu=1)
    session.answer(event, new_val=0x1_0000_0000 + FREE, length=length)
    words = vm.finish(vcpu=1)
    assert (words["result"], words["faults"]) == (expected, 0)
    vm.progresses(vcpu=1)
    continues(session)


@pytest.mark.clause("EVRPL-SHORT-OK")
@pytest.mark.parametrize(("length", "expected"), [(16, 0), (20, 0x5566_7788)])
def test_short_reply_after_a_whole_one(lab: Lab, length: int, expected: int) -> None:
    """What a reply leaves out is zero, not what an earlier one had there."""
    vm, session = pair_for(lab, "MSR")
    session.answer(cause(vm, session, "MSR"), new_val=0x7711_2233_4455)
    assert vm.finish()["result"] == 0x7711_2233_4455
    session.answer(cause(vm, session, "MSR"), new_val=0x1122_5566_7788, length=length)
    assert vm.finish()["result"] == expected
    continues(session)


@pytest.mark.clause("EVRPL-LONG-CLOSE")
@pytest.mark.parametrize("excess", [1, 8, 84])
@pytest.mark.parametrize("name", FEW)
def test_long_reply(lab: Lab, name: str, excess: int) -> None:
    """A reply with a longer specific part than the event has closes the socket."""
    vm, session = pair_for(lab, name)
    event = cause(vm, session, name)
    length = 16 + excess + (8 if event.definition.reply else 0)
    session.answer(event, length=length)
    _session_over(lab, vm, session, name)


@pytest.mark.clause("EVRPL-SEQ-CLOSE")
@pytest.mark.parametrize("difference", [1, -1, 0x8000_0000])
def test_wrong_seq(lab: Lab, difference: int) -> None:
    """A reply with another seq than the event's closes the socket."""
    vm, session = lab.pair()
    event = cause(vm, session, "HYPERCALL")
    session.answer(event, seq=(event.seq + difference) & 0xFFFF_FFFF)
    _session_over(lab, vm, session, "HYPERCALL")


@pytest.mark.clause("EVRPL-SEQ-CLOSE")
def test_seq_of_another_vcpu(lab: Lab) -> None:
    """Two waiting vCPUs cannot be answered with each other's seq."""
    vm, session = lab.pair(vcpus=2)
    first = cause(vm, session, "HYPERCALL", vcpu=0)
    second = cause(vm, session, "HYPERCALL", vcpu=1)
    session.answer(first, seq=second.seq)
    session.expect_close(timeout_s=5)
    vm.progresses(vcpu=0)
    vm.progresses(vcpu=1)


@pytest.mark.clause("EVRPL-UNSOLICITED-CLOSE")
@pytest.mark.parametrize("seq", [0, 1, 5])
def test_unsolicited(lab: Lab, seq: int) -> None:
    """A reply for a vCPU that waits for none closes the socket."""
    vm, session = lab.pair()
    vm.progresses()
    number = lab.profile.event("HYPERCALL").id
    reply = struct.pack("<HHIBBHI", 0, 0, 0, 0, number, 0, 0)
    session.send_raw(lab.profile.event_reply, reply, seq=seq)
    session.expect_close(timeout_s=5)
    ends_dead(lab.manager, vm)
    vm.progresses()


@pytest.mark.clause("EVRPL-UNSOLICITED-CLOSE")
def test_answered_twice(lab: Lab) -> None:
    """A second reply to the same event closes the socket; the first one counts."""
    vm, session = lab.pair()
    event = cause(vm, session, "BREAKPOINT")
    session.answer(event)
    vm.wait_word("traps", 1)
    session.answer(event)
    session.expect_close(timeout_s=5)
    vm.progresses()
    assert vm.word("traps") == 1


@pytest.mark.clause("EVRPL-UNSOLICITED-CLOSE")
def test_answered_twice_at_once(lab: Lab) -> None:
    """The same when both are there before the vCPU looks; it gets over its event all the same."""
    for _ in range(4):
        vm, session = lab.pair()
        event = cause(vm, session, "HYPERCALL")
        payload = session.codec.encode_event_reply(event.definition, "CONTINUE", vcpu=0)
        reply = session.codec.frame(session.profile.event_reply, payload, event.seq)
        session.send_bytes(reply * 2)
        session.expect_close(timeout_s=5)
        went_on(vm, "HYPERCALL")


@pytest.mark.clause("EVRPL-UNSOLICITED-CLOSE")
def test_reply_for_other_vcpu(lab: Lab) -> None:
    """A reply that names another vCPU than the one that waits closes the socket."""
    vm, session = lab.pair(vcpus=2)
    event = cause(vm, session, "HYPERCALL", vcpu=1)
    session.answer(event, vcpu=0)
    session.expect_close(timeout_s=5)
    vm.wait_word("done", 1, vcpu=1)


@pytest.mark.clause("EVRPL-TRUNCATED-CLOSE")
@pytest.mark.parametrize("length", [8, 9, 12, 15])
def test_truncated_reply(lab: Lab, length: int) -> None:
    """A reply of less than 16 bytes closes the socket."""
    vm, session = lab.pair()
    session.answer(cause(vm, session, "BREAKPOINT"), length=length)
    _session_over(lab, vm, session, "BREAKPOINT")


@pytest.mark.clause("EVRPL-PADDING-CLOSE")
@pytest.mark.parametrize(
    "padding",
    [{"padding1": 1}, {"padding1": 0x100}, {"padding2": 1}, {"padding2": 0x8000_0000}],
    ids=str,
)
@pytest.mark.parametrize("name", FEW)
def test_reply_padding(lab: Lab, name: str, padding: dict[str, int]) -> None:
    """Padding that is set in the reply struct closes the socket."""
    vm, session = pair_for(lab, name)
    session.answer(cause(vm, session, name), **padding)
    _session_over(lab, vm, session, name)


@pytest.mark.clause("EVT-DISCONNECT-CONTINUE")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "close") for name in NAMES),
        *((name, how) for name in FEW for how in ("unhook", "shutdown")),
    ],
)
def test_disconnect(lab: Lab, name: str, how: str, profile: Profile) -> None:
    """When the session ends, however, the waiting vCPU goes on with unchanged guest values.

    They are not those of a command either, which would count with the reply.
    """
    vm, session = pair_for(lab, name, registers={"r12": 0x77})
    event = cause(vm, session, name)
    session.command("VCPU_SET_REGISTERS", regs=event.regs, r12=0x1212, rbp=0x99).ok()
    lab.end(vm, session, how)
    went_on(vm, name)
    vm.stop()
    registers = dict(zip(REGS, struct.unpack("<18Q", vm.registers()), strict=True))
    for register in ("r8", "r12", "r15", "rbp"):
        assert registers[register] == getattr(event.regs, register)
