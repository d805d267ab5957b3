# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_GET_REGISTERS and VCPU_SET_REGISTERS."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from causes import CAUSES, RETRYABLE, cause, pair_for, went_on
from checks import continues, enable, next_event_of, silent
from lab import Lab

from harness.abi import Profile
from harness.manager.payloads import DUMP_A, DUMP_B, REGS, SREGS, segment_of
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause

GENERAL = [name for name in REGS if name not in ("rip", "rflags")]
VALUES = {name: 0x1111_0000_0000_0000 * (index % 15 + 1) + 0xABC0 + index
          for index, name in enumerate(GENERAL)}  # fmt: skip
FLAGS = {"setc": 0x1, "setz": 0x40, "sets": 0x80, "seto": 0x800, "setp": 0x4}
# With interrupts enabled (0x200), for the reason that payloads.py gives.
SOME_FLAGS = 0x2 | 0x1 | 0x80 | 0x4 | 0x200
MAX_MSRS = 481
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, PAT, EFER = 0x174, 0x175, 0x176, 0x277, 0xC0000080
STAR, LSTAR, CSTAR, KERNEL_GS_BASE = 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000102
# AMD CPUs keep 32 bits of the SYSENTER registers.
MSRS = {
    SYSENTER_CS: 0x1234, SYSENTER_ESP: 0x1111_0008, SYSENTER_EIP: 0x2222_0010,
    PAT: 0x0007_0106_0007_0106, STAR: 0x0023_0010_0000_0000, LSTAR: 0xFFFF_8000_3333_0018,
    CSTAR: 0xFFFF_8000_4444_0020, KERNEL_GS_BASE: 0xFFFF_8000_5555_0028,
}  # fmt: skip


def _dump(vm: SmallVm, area: int) -> tuple[dict[str, int], dict[str, int]]:
    """Let the payload store its registers once more: (general registers, flags)."""
    limit_s = 5 * vm.manager.host.patience
    for _ in range(2):  # the first round may have begun before its registers were set
        vm.write(area + 0x88, bytes(8))
        answer = vm.manager.link.call(
            "wait_u64", vm=vm.name, gpa=area + 0x88, compare="eq", value=1, timeout_s=limit_s
        )
        assert answer["met"], "the guest does not store its registers"
    data = vm.read(area, 0x90)
    general = dict(zip(GENERAL, struct.unpack_from("<16Q", data), strict=True))
    return general, dict(zip(FLAGS, data[0x80:0x85], strict=True))


def _flags(rflags: int) -> dict[str, int]:
    return {name: int(bool(rflags & bit)) for name, bit in FLAGS.items()}


def _as_dict(record: Any) -> dict[str, int]:
    return {name: getattr(record, name) for name in REGS}


@pytest.mark.clause("GETREGS-OK")
def test_general_registers(lab: Lab) -> None:
    """All general registers come as the running guest has them."""
    vm, session = lab.pair(payload="registers", registers={**VALUES, "rflags": SOME_FLAGS})
    _dump(vm, DUMP_A)
    found = _as_dict(session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.regs)
    start, end = vm.machine.linear("_start"), vm.machine.linear("other")
    assert start <= found.pop("rip") < end
    assert found.pop("rflags") == SOME_FLAGS
    assert found == VALUES == _dump(vm, DUMP_A)[0]


@pytest.mark.clause("GETREGS-OK")
def test_special_registers(lab: Lab) -> None:
    """All special registers come as KVM itself has them, to the bit."""
    vm, session = lab.pair(payload="registers")
    _dump(vm, DUMP_A)
    vm.stop()
    expected = vm.special_registers()
    vm.run()
    reply = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok()
    assert reply.raw[160 : 160 + 312] == expected
    assert reply.fields.sregs.cs.l == 1
    assert reply.fields.sregs.cr3 == 0x3000


@pytest.mark.clause("GETREGS-OK")
def test_of_the_vcpu_asked_for(lab: Lab) -> None:
    """Each vCPU's registers are its own."""
    vm, session = lab.pair(vcpus=3)
    for vcpu in (2, 0, 1):
        vm.progresses(vcpu=vcpu)
        reply = session.command("VCPU_GET_REGISTERS", vcpu=vcpu, nmsrs=0).ok()
        assert reply.fields.regs.r15 == vcpu * 0x200
        assert reply.fields.sregs.tr.selector == 0x48 + 16 * vcpu


@pytest.mark.clause("GETREGS-OK")
def test_msrs(lab: Lab) -> None:
    """The requested MSRs come with their values, in the order of the request, also twice."""
    vm = lab.vm(vcpus=2)
    vm.set_msrs(MSRS, vcpu=1)
    session = lab.hook(vm)
    vm.run()
    vm.progresses(vcpu=1)
    values = {**MSRS, EFER: 0x500}
    for order in (list(values), list(reversed(values)), [LSTAR, EFER, LSTAR, PAT], [STAR], []):
        reply = session.command("VCPU_GET_REGISTERS", vcpu=1, msrs_idx=order).ok()
        entries = struct.pack("<II", len(order), 0)
        entries += b"".join(struct.pack("<IIQ", msr, 0, values[msr]) for msr in order)
        assert reply.raw[472:] == entries


@pytest.mark.clause("GETREGS-MODE")
@pytest.mark.parametrize(
    ("mode", "payload", "size"),
    [("real16", "spin16", 2), ("protected32", "calls32", 4), ("compat32", "calls32", 4),
     ("long", "calls", 8)],
)  # fmt: skip
def test_mode(lab: Lab, mode: Any, payload: str, size: int) -> None:
    """mode is 2, 4 or 8 for 16-bit, 32-bit (with and without paging) and 64-bit code."""
    vm, session = lab.pair(mode=mode, payload=payload)
    vm.progresses()
    reply = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok()
    assert reply.fields.mode == size
    assert reply.raw[12:16] == bytes(4)
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    assert event.mode == size
    session.answer(event)


@pytest.mark.clause("GETREGS-MODE", "EVT-VCPU-COMMON")
@pytest.mark.parametrize("mode", ["protected32", "compat32"])
def test_mode_of_a_16_bit_segment(lab: Lab, mode: Any) -> None:
    """In protected mode it is the code segment that tells 16 from 32 bits, paging or not."""
    vm, session = lab.pair(mode=mode, payload="calls32", run=False)
    segment = segment_of(selector=8, kind=11, db=0, s=1)
    state = {"sregs": [[SREGS["cs"], segment.hex()]]}
    lab.manager.link.call("set_state", vm=vm.name, vcpu=0, state=state)
    pending = session.send("VCPU_GET_REGISTERS", nmsrs=0)
    session.command("VM_PAUSE_VCPU", wait=0).ok()
    vm.run()  # both come before it executes anything
    assert pending.reply(5).ok().fields.mode == 2
    assert next_event_of(session, "PAUSE").mode == 2


@pytest.mark.clause("GETREGS-EINVAL-MSR")
def test_invalid_msr(lab: Lab) -> None:
    """One MSR that is not there, anywhere in the list, makes the command answer KVM_EINVAL."""
    _, session = lab.pair()
    for wrong in (0xDEAD_BEEF, 0xFFFF_FFFF):
        for order in ([wrong], [EFER, wrong], [wrong, EFER], [EFER, wrong, LSTAR]):
            session.command("VCPU_GET_REGISTERS", msrs_idx=order).fails("KVM_EINVAL")
    session.command("VCPU_GET_REGISTERS", msrs_idx=[EFER, LSTAR]).ok()


@pytest.mark.clause("GETREGS-EINVAL-PADDING")
def test_padding(lab: Lab) -> None:
    """Each byte of padding, of header and command, makes the command answer KVM_EINVAL."""
    _, session = lab.pair()
    for wrong in session.codec.wrong_paddings("VCPU_GET_REGISTERS"):
        session.command("VCPU_GET_REGISTERS", msrs_idx=[EFER], **wrong).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("GETREGS-EINVAL-TOOMANY")
def test_too_many(lab: Lab) -> None:
    """481 MSRs fit into a reply and are answered; one more answers KVM_EINVAL."""
    _, session = lab.pair()
    reply = session.command("VCPU_GET_REGISTERS", msrs_idx=[EFER] * MAX_MSRS).ok()
    assert len(reply.raw) == 480 + 16 * MAX_MSRS
    assert reply.raw[-16:] == struct.pack("<IIQ", EFER, 0, 0x500)
    for count in (MAX_MSRS + 1, 500, 2000):
        session.command("VCPU_GET_REGISTERS", msrs_idx=[EFER] * count).fails("KVM_EINVAL")
    session.command("VCPU_GET_REGISTERS", nmsrs=0xFFFF, msrs_idx=[EFER] * 2042).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("GETREGS-EINVAL-SHORT")
def test_incomplete_list(lab: Lab) -> None:
    """A list with fewer indices than nmsrs says, even by one byte, answers KVM_EINVAL."""
    _, session = lab.pair()
    for nmsrs, carried in ((1, 0), (2, 1), (4, 3), (MAX_MSRS, 5)):
        session.command("VCPU_GET_REGISTERS", nmsrs=nmsrs, msrs_idx=[EFER] * carried).fails(
            "KVM_EINVAL"
        )
    session.command("VCPU_GET_REGISTERS", msrs_idx=[EFER], length=19).fails("KVM_EINVAL")
    session.command("VCPU_GET_REGISTERS", msrs_idx=[EFER], length=20).ok()


@pytest.mark.clause("GETREGS-ENOMEM")
def test_no_memory() -> None:
    """VCPU_GET_REGISTERS answers KVM_ENOMEM when the reply cannot be allocated."""
    skip_clause("user space cannot make just this allocation fail; it needs fault injection")


@pytest.mark.clause("SETREGS-OK")
def test_set(lab: Lab) -> None:
    """Registers set during a PAUSE event are in force, all of them, once it is answered."""
    vm, session = lab.pair(payload="registers")
    assert _dump(vm, DUMP_A)[0]["rax"] == 0
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    wanted = {**VALUES, "rip": vm.machine.linear("other"), "rflags": SOME_FLAGS}
    session.command("VCPU_SET_REGISTERS", regs=wanted).ok()
    session.answer(event)
    general, flags = _dump(vm, DUMP_B)
    assert general == VALUES
    assert flags == _flags(SOME_FLAGS)
    found = _as_dict(session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.regs)
    assert {name: found[name] for name in (*GENERAL, "rflags")} == {**VALUES, "rflags": SOME_FLAGS}


@pytest.mark.clause("SETREGS-OK")
def test_last_set_wins(lab: Lab) -> None:
    """Of two sets during one event the last is in force; the next event starts without any."""
    vm, session = lab.pair(payload="registers")
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rbx=1, rcx=2).ok()
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rcx=3).ok()
    session.answer(event)
    general, _ = _dump(vm, DUMP_A)
    assert (general["rbx"], general["rcx"]) == (0, 3)
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    assert event.regs.rcx == 3
    session.answer(event)
    assert _dump(vm, DUMP_A)[0] == general


@pytest.mark.clause("SETREGS-DELAYED")
def test_delayed(lab: Lab) -> None:
    """Until the event is answered VCPU_GET_REGISTERS still shows the old values."""
    vm, session = lab.pair(payload="registers", registers={"rbx": 7})
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rbx=8).ok()
    for _ in range(2):
        reply = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok()
        assert _as_dict(reply.fields.regs) == _as_dict(event.regs)
    session.answer(event)
    assert _dump(vm, DUMP_A)[0]["rbx"] == 8


@pytest.mark.clause("SETREGS-EOPNOTSUPP")
def test_outside_of_events(lab: Lab) -> None:
    """Outside of an event of that very vCPU the command answers KVM_EOPNOTSUPP, without effect."""
    vm, session = lab.pair(vcpus=2)
    enable(session, "HYPERCALL", vcpu=1)
    session.command("VCPU_SET_REGISTERS", vcpu=0).fails("KVM_EOPNOTSUPP")
    vm.call_out(1, vcpu=1)
    event = next_event_of(session, "HYPERCALL", vcpu=1)
    session.command("VCPU_SET_REGISTERS", vcpu=0, regs=event.regs).fails("KVM_EOPNOTSUPP")
    session.command("VCPU_SET_REGISTERS", vcpu=1, regs=event.regs).ok()
    session.answer(event)
    vm.wait_word("done", 1, vcpu=1)
    session.command("VCPU_SET_REGISTERS", vcpu=1, regs=event.regs).fails("KVM_EOPNOTSUPP")
    for vcpu in (0, 1):
        vm.progresses(vcpu=vcpu)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("SETREGS-OK", "SETREGS-EOPNOTSUPP", "MSG-INTERLEAVE-CMD")
def test_commands_around_the_reply(lab: Lab) -> None:
    """What is sent before the reply to an event belongs to the event, what comes after does not."""
    vm = lab.vm(payload="registers", registers={"rbx": 7})
    tool = lab.raw(vm)
    tool.send(*lab.codec.encode_command("VM_PAUSE_VCPU", wait=0), seq=1)
    assert tool.receive().payload == bytes(8)
    vm.run()
    event = tool.receive()
    common = lab.codec.decode_event(event.id, event.payload).common
    assert common is not None
    regs = common.arch.regs

    def command(name: str, seq: int, **fields: Any) -> bytes:
        return lab.codec.frame(*lab.codec.encode_command(name, **fields), seq)

    answer = lab.codec.encode_event_reply("PAUSE")
    tool.socket.sendall(
        b"".join(command("VCPU_GET_XSAVE", seq) for seq in range(10, 18))  # these take a while
        + command("VCPU_SET_REGISTERS", 20, regs=regs, rbx=8)
        + lab.codec.frame(lab.profile.event_reply, answer, event.seq)
        + command("VCPU_SET_REGISTERS", 21, regs=regs, rbx=9)
    )
    replies = [tool.receive() for _ in range(10)]
    assert [one.seq for one in replies] == [*range(10, 18), 20, 21]
    assert replies[-2].payload == bytes(8)
    late = lab.profile.errno["KVM_EOPNOTSUPP"]
    assert replies[-1].payload == struct.pack("<iI", -late, 0)
    assert _dump(vm, DUMP_A)[0]["rbx"] == 8


@pytest.mark.clause("SETREGS-EINVAL-SHORT")
@pytest.mark.parametrize("length", [0, 4, 8, 9, 16, 144, 151])
def test_incomplete_registers(lab: Lab, length: int) -> None:
    """A payload without all registers answers KVM_EINVAL, in an event too, and sets nothing."""
    vm, session = lab.pair(payload="registers", registers={"rbx": 7})
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    session.command("VCPU_SET_REGISTERS", rbx=8, length=length).fails("KVM_EINVAL")
    session.answer(event)
    assert _dump(vm, DUMP_A)[0]["rbx"] == 7
    session.command("VCPU_SET_REGISTERS", length=length).fails("KVM_EINVAL")


@pytest.mark.clause("SETREGS-EINVAL-PADDING", "SETREGS-EINVAL-VCPU")
def test_header(lab: Lab, profile: Profile) -> None:
    """Padding in the header or a bad index answer KVM_EINVAL in an event, and set nothing."""
    vm, session = lab.pair(payload="registers", registers={"rbx": 7})
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    event = next_event_of(session, "PAUSE")
    for wrong in session.codec.wrong_paddings("VCPU_SET_REGISTERS"):
        session.command("VCPU_SET_REGISTERS", regs=event.regs, rbx=8, **wrong).fails("KVM_EINVAL")
    for vcpu in (1, 0xFFFF):
        session.command("VCPU_SET_REGISTERS", regs=event.regs, rbx=8, vcpu=vcpu).fails("KVM_EINVAL")
    session.answer(event)
    assert _dump(vm, DUMP_A)[0]["rbx"] == 7


@pytest.mark.clause("SETREGS-OK")
@pytest.mark.parametrize("name", CAUSES)
def test_set_in_event(lab: Lab, name: str) -> None:
    """Registers set during an event of any kind are in force after it, whatever KVM still does."""
    vm, session = pair_for(lab, name, registers={"r12": 0x11, "r13": 0x22})
    event = cause(vm, session, name)
    session.command("VCPU_SET_REGISTERS", regs=event.regs, r12=0x1212).ok()
    session.answer(event)
    went_on(vm, name)
    found = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.regs
    assert (found.r12, found.r13) == (0x1212, 0x22)


@pytest.mark.clause("SETREGS-OK")
@pytest.mark.parametrize("name", [name for name in CAUSES if name not in ("PAUSE", "TRAP")])
def test_set_rip_in_event(lab: Lab, name: str) -> None:
    """Where rip was set the vCPU goes on, whether or not the instruction it stood at was done."""
    vm, session = pair_for(lab, name)
    event = cause(vm, session, name)
    start = vm.machine.linear("_start")
    assert event.regs.rip != start
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=start).ok()
    session.command("VM_PAUSE_VCPU", wait=0).ok()
    session.answer(event, "RETRY" if name in RETRYABLE else "CONTINUE")
    after = next_event_of(session, "PAUSE")
    assert after.regs.rip == start
    session.answer(after)
