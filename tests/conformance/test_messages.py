# SPDX-License-Identifier: GPL-2.0-or-later
"""Transport and message level."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from checks import (
    ALWAYS_ALLOWED,
    allowed_commands,
    continues,
    enable,
    ends_dead,
    event_size,
    gone,
    next_event_of,
    reply_size,
    requires,
    silent,
    supported_commands,
)
from lab import Lab

from harness.abi import Profile
from harness.manager.payloads import FREE
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.tool import Session

GET_VERSION = 2  # in all versions
# Longer than anybody would have a tool take by mistake; the usual such limits are 5 and 10 s.
LONG_S = 11.0
OK = bytes(8)

# Arguments with which each command succeeds (the padding is then what makes it fail).
GOOD: dict[str, dict[str, Any]] = {
    "VM_CHECK_COMMAND": {"id": "GET_VERSION"},
    "VM_CHECK_EVENT": {"id": "UNHOOK"},
    "VM_CONTROL_EVENTS": {"event_id": "UNHOOK", "enable": 0},
    "VM_READ_PHYSICAL": {"gpa": FREE, "size": 8},
    "VM_WRITE_PHYSICAL": {"gpa": FREE, "data": b"written"},
    "VM_PAUSE_VCPU": {"vcpu": 0, "wait": 1},
    "VCPU_GET_INFO": {"vcpu": 0},
    "VCPU_CONTROL_EVENTS": {"vcpu": 0, "event_id": "HYPERCALL", "enable": 0},
    "VCPU_GET_REGISTERS": {"vcpu": 0, "msrs_idx": [0xC0000080]},
    "VM_CONTROL_CLEANUP": {"enable": 1},
    "VCPU_GET_CPUID": {"function": 0, "index": 0},
    "VCPU_CONTROL_CR": {"cr": 3, "enable": 0},
    "VCPU_INJECT_EXCEPTION": {"nr": 6},
    "VCPU_GET_XCR": {"xcr": 0},
    "VCPU_GET_XSAVE": {},
    "VCPU_SET_XSAVE": {},
    "VCPU_GET_MTRR_TYPE": {"gpa": FREE},
    "VCPU_CONTROL_MSR": {"msr": 0xC0000082, "enable": 0},
    "VCPU_TRANSLATE_GVA": {"gva": FREE},
}
# The event that success of a command brings.
BRINGS = {"VM_PAUSE_VCPU": "PAUSE", "VCPU_INJECT_EXCEPTION": "TRAP"}


def _unknown(lab: Lab) -> int:
    """The err that an id meets that is no command."""
    return -lab.profile.errno[lab.profile.unknown_command]


def _error(payload: bytes) -> int:
    """The err of a reply that has nothing but its error code."""
    assert len(payload) == 8, f"an error reply has {len(payload)} bytes: {payload.hex()}"
    err, padding = struct.unpack("<iI", payload)
    assert padding == 0
    return int(err)


@pytest.mark.clause("MSG-ONE-SOCKET")
def test_one_socket_for_each_vm(lab: Lab) -> None:
    """Two hooked VMs have a socket each, and what is said on one concerns that VM alone."""
    first, one = lab.pair(vcpus=1)
    second, two = lab.pair(vcpus=2)
    first.write(FREE, b"first")
    second.write(FREE, b"other")
    assert one.command("VM_GET_INFO").ok().fields.vcpu_count == 1
    assert two.command("VM_GET_INFO").ok().fields.vcpu_count == 2
    assert one.command("VM_READ_PHYSICAL", gpa=FREE, size=5).ok().data == b"first"
    assert two.command("VM_READ_PHYSICAL", gpa=FREE, size=5).ok().data == b"other"
    enable(one, "HYPERCALL")
    enable(two, "HYPERCALL", vcpu=1)
    second.call_out(1, vcpu=1)
    event = next_event_of(two, "HYPERCALL", vcpu=1)
    silent(one, vcpus=[0])
    two.answer(event)
    one.close()
    ends_dead(lab.manager, first)
    continues(two)


@pytest.mark.clause("MSG-HDR")
def test_header(lab: Lab, vm: SmallVm) -> None:
    """A message is id(u16), size(u16) and seq(u32), and size counts what follows them."""
    tool = lab.raw(vm)
    tool.socket.sendall(struct.pack("<HHI", GET_VERSION, 0, 0x01020304))
    reply = tool.receive()
    size = reply_size(lab.profile, "GET_VERSION")
    assert (reply.id, reply.seq, len(reply.payload)) == (GET_VERSION, 0x01020304, size)
    # Two messages in one go, and one in single bytes: the sizes alone tell them apart.
    checked = lab.profile.command("VM_CHECK_COMMAND").id
    check = struct.pack("<HHIHHI", checked, 8, 7, lab.profile.command("VM_GET_INFO").id, 0, 0)
    tool.socket.sendall(check + struct.pack("<HHI", GET_VERSION, 0, 8))
    assert tool.receive() == (checked, 7, OK)
    assert tool.receive()[:2] == (GET_VERSION, 8)
    for byte in check:
        tool.socket.sendall(bytes([byte]))
    assert tool.receive() == (checked, 7, OK)


@pytest.mark.clause("MSG-NATIVE")
def test_byte_order_and_alignment(lab: Lab, vm: SmallVm) -> None:
    """Numbers are little endian, as on the host, and lie at their natural alignment."""
    tool = lab.raw(vm)
    (version,) = struct.unpack_from("<I", tool.ask(GET_VERSION, seq=1), 8)
    assert version == lab.profile.version
    vm.write(FREE + 0x123, bytes(range(1, 21)))
    # What follows gpa is 16 bits of size and padding, or 64 bits of size.
    request = struct.pack("<QQ", FREE + 0x123, 20)
    read = lab.profile.command("VM_READ_PHYSICAL").id
    assert tool.ask(read, request, seq=2) == OK + bytes(range(1, 21))


@pytest.mark.clause("MSG-ONESEND")
def test_one_send(lab: Lab, vm: SmallVm) -> None:
    """Header and data of a reply, and of an event, leave the kernel together, as one segment."""
    name, fd = lab.manager.socketpair(kind="tcp")
    vm.socket = name
    assert vm.hook(fd) == "OK"
    assert vm.command(-1) == "OK"
    assert vm.event(-1) == "OK"
    codec, peer = lab.codec, name + ".peer"
    version = reply_size(lab.profile, "GET_VERSION")
    unhook = 8 + event_size(lab.profile, "UNHOOK")
    commands: list[tuple[str, dict[str, Any], int]] = [
        ("GET_VERSION", {}, version),
        ("VM_READ_PHYSICAL", {"gpa": FREE, "size": 900}, 908),
        ("VM_CONTROL_EVENTS", {"enable": 1}, 8),
    ]
    requests: list[dict[str, Any]] = []
    for seq, (command, fields, size) in enumerate(commands):
        message = codec.frame(*codec.encode_command(command, **fields), seq)
        requests += [
            {"op": "send", "name": peer, "hex": message.hex()},
            {"op": "receive", "name": peer, "size": 8 + size, "limit_s": 5},
        ]
    preunhook, _ = codec.encode_ioctl("PREUNHOOK")
    requests += [
        {"op": "ioctl", "on": f"vm:{vm.name}", "request": preunhook},
        {"op": "receive", "name": peer, "size": unhook, "limit_s": 5},
    ]
    captured = lab.manager.link.call("capture", name=name, requests=requests, timeout_s=30)
    messages = [answer["hex"] for answer in captured["answers"][1::2]]
    assert [len(message) // 2 for message in messages] == [8 + version, 916, 16, unhook]
    assert captured["sent"] == messages


@pytest.mark.clause("MSG-REPLY-ID-SEQ")
def test_replies_repeat_id_and_seq(lab: Lab, vm: SmallVm) -> None:
    """Replies, of success and of error, repeat id and seq, whatever order the seqs have."""
    tool = lab.raw(vm)
    numbers = [5, 0, 0xFFFF_FFFF, 4, 4, 1, 0x8000_0000]
    for seq in numbers:
        tool.ask(GET_VERSION, seq=seq)
        assert _error(tool.command("VM_CHECK_COMMAND", seq=seq, id=2, padding1=1)) == -22
        assert _error(tool.ask(0x7777, seq=seq)) == _unknown(lab)
        tool.command("VM_GET_INFO", seq=seq)
    vm.run()
    for seq in numbers:
        assert len(tool.command("VCPU_GET_INFO", seq=seq)) == 16


@pytest.mark.clause("MSG-REPLY-ERRCODE")
def test_error_code(lab: Lab, vm: SmallVm) -> None:
    """A reply begins with err and a zero padding: 0 on success, a negative number on failure."""
    tool = lab.raw(vm)
    absent = -lab.profile.errno[lab.profile.unknown_query]
    assert tool.ask(GET_VERSION, seq=1)[:8] == OK
    assert tool.command("VM_GET_INFO", seq=2)[:8] == OK
    assert tool.command("VM_CHECK_COMMAND", seq=3, id=2) == OK
    assert _error(tool.command("VM_CHECK_COMMAND", seq=4, id=2, padding2=1)) == -22
    assert _error(tool.command("VM_CHECK_COMMAND", seq=5, id=0x7776)) == absent
    if lab.profile.has("VM_READ_PHYSICAL"):
        assert _error(tool.command("VM_READ_PHYSICAL", seq=6, gpa=1 << 40, size=8)) == -2


@pytest.mark.clause("MSG-REPLY-ERR-NODATA")
def test_errors_carry_no_data(lab: Lab, vm: SmallVm) -> None:
    """A command that fails answers just 8 bytes, also where success would bring data."""
    tool = lab.raw(vm)
    vm.run()
    failing: list[tuple[str, dict[str, Any]]] = [
        ("VM_READ_PHYSICAL", {"gpa": FREE, "size": 0}),
        ("VCPU_GET_INFO", {"hdr_padding1": 1}),
        ("VCPU_GET_REGISTERS", {"hdr_padding1": 1}),
        ("VCPU_CONTROL_EVENTS", {"hdr_padding1": 1}),
        ("VCPU_GET_REGISTERS", {"msrs_idx": [0xDEAD_BEEF]}),
    ]
    for seq, (name, fields) in enumerate(failing):
        if lab.profile.has(name):
            assert _error(tool.command(name, seq=seq, **fields)) == -22
    assert vm.command(-1, 0) == "OK"
    assert _error(tool.command("VM_GET_INFO", seq=100)) == -1
    assert _error(tool.command("VCPU_GET_INFO", seq=101)) == -1
    assert _error(tool.ask(0x7776, seq=102)) == _unknown(lab)


@pytest.mark.clause("MSG-REPLY-ALWAYS")
def test_each_command_is_answered_once(lab: Lab) -> None:
    """Of 300 commands of all kinds sent without a pause each gets exactly one reply."""
    vm, session = lab.pair(vcpus=2)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("GET_VERSION", {}),
        ("VM_CHECK_EVENT", {"id": 7777}),
        ("VCPU_GET_INFO", {"vcpu": 1}),
        ("VM_READ_PHYSICAL", {"gpa": FREE, "size": 700}),
        ("VCPU_GET_REGISTERS", {"vcpu": 0, "nmsrs": 0}),
        ("VCPU_GET_INFO", {"vcpu": 9}),
    ]
    sent = [session.send(name, **fields) for _ in range(50) for name, fields in kinds]
    errors = [pending.reply(10).error for pending in sent]
    lacks = lab.profile.unknown_query
    assert errors == [None, lacks, None, None, None, "KVM_EINVAL"] * 50
    # A second reply to any of them would be found by the session as one to nothing.
    silent(session, vcpus=[0, 1])
    assert len(session.received) == len(sent) + 3
    vm.progresses()


@pytest.mark.clause("MSG-ENOSYS-UNKNOWN")
def test_unknown_ids(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """Ids that are no command answer KVM_ENOSYS, allowed or not; the session continues."""
    tool = lab.raw(vm)
    known = {id for id in profile.command_by_id}
    unknown = [id for id in range(2, 120) if id not in known]
    unknown += [0x00FF, 0x0102, 0x7FFE, 0x7FFF, 0x8000, 0x8002, 0xFFFE, 0xFFFF]
    for allow in (1, 0):
        assert vm.command(-1, allow) == "OK"
        for id in unknown:
            assert _error(tool.ask(id, seq=id)) == _unknown(lab), f"id {id}"
        for id in (unknown[0], 0xFFFF):
            assert _error(tool.ask(id, b"\xff" * 40, seq=id)) == _unknown(lab), f"id {id}"
    tool.ask(GET_VERSION, seq=1)


@pytest.mark.clause("MSG-ENOSYS-UNKNOWN")
def test_commands_that_are_not_there(session: Session, profile: Profile) -> None:
    """A command that VM_CHECK_COMMAND calls unknown answers KVM_ENOSYS."""
    claimed = {command.common for command in profile.commands.values()}
    for name in sorted(claimed - supported_commands(session, profile)):
        session.command(name).fails("KVM_ENOSYS")
    continues(session)


@pytest.mark.clause("MSG-ENOSYS-VMEVENT")
def test_vm_event_id(lab: Lab, vm: SmallVm) -> None:
    """A message with id 0 from the tool answers KVM_ENOSYS, whatever it carries."""
    tool = lab.raw(vm)
    for payload in (b"", bytes(8), bytes(16), b"\xff" * 24):
        assert _error(tool.ask(0, payload, seq=len(payload))) == -1000
    assert len(tool.ask(GET_VERSION, seq=1)) == 24


@pytest.mark.clause("MSG-EPERM-DISALLOWED")
def test_disallowed(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """A command that is not allowed answers KVM_EPERM, right arguments or wrong; no effect."""
    session = lab.hook(vm, allow=False)
    vm.run()
    for name in sorted(supported_commands(session, profile) - ALWAYS_ALLOWED):
        session.command(name, **GOOD.get(name, {})).fails("KVM_EPERM")
        for wrong in list(session.codec.wrong_paddings(name))[:1]:
            session.command(name, **GOOD.get(name, {}), **wrong).fails("KVM_EPERM")
    assert vm.read(FREE, 7) == bytes(7)
    assert vm.event(-1) == "OK"
    assert vm.command("VCPU_GET_INFO") == "OK"
    silent(session, vcpus=[0])
    vm.progresses()


@pytest.mark.clause("MSG-EINVAL-PADDING")
@pytest.mark.parametrize(
    "name", [name for name in GOOD if name.startswith("VM_") or name == "VCPU_GET_REGISTERS"]
)
def test_padding(lab: Lab, name: str) -> None:
    """Any byte of padding that is set makes the command answer KVM_EINVAL, without effect.

    Here are the VM commands; test_vcpu_header.py has the others.
    """
    vm, session = lab.pair()
    requires(session, command=name)
    count = 0
    for wrong in session.codec.wrong_paddings(name):
        session.command(name, **GOOD[name], **wrong).fails("KVM_EINVAL")
        count += 1
    if not count:
        skip_clause(f"{name} of {session.profile.name} has no padding")
    assert vm.read(FREE, 7) == bytes(7)
    silent(session, vcpus=[0])
    session.command(name, **GOOD[name]).ok()
    if name in BRINGS:
        session.answer(next_event_of(session, BRINGS[name]))
    silent(session, vcpus=[0])


# What is left out reads as zero; that is a success for these.
SHORT: list[tuple[str, dict[str, Any], int]] = [
    ("VM_CHECK_COMMAND", {"id": "GET_VERSION"}, 2),
    ("VM_CHECK_EVENT", {"id": "HYPERCALL"}, 2),
    ("VM_CHECK_EVENT", {}, 0),
    ("VM_CONTROL_EVENTS", {"event_id": "UNHOOK", "enable": 1}, 3),
    ("VM_CONTROL_EVENTS", {"event_id": "UNHOOK", "enable": 0}, 0),
    ("VM_READ_PHYSICAL", {"gpa": FREE, "size": 9}, 10),
    ("VM_PAUSE_VCPU", {"vcpu": 0, "wait": 1}, 3),
    ("VM_PAUSE_VCPU", {"vcpu": 0, "wait": 0}, 0),
    ("VCPU_GET_INFO", {"vcpu": 0}, 2),
    ("VCPU_GET_INFO", {"vcpu": 0}, 0),
    ("VCPU_CONTROL_EVENTS", {"event_id": "HYPERCALL", "enable": 1}, 11),
    ("VCPU_CONTROL_EVENTS", {"event_id": "HYPERCALL", "enable": 0}, 10),
    ("VCPU_GET_REGISTERS", {"nmsrs": 0}, 8),
    ("VCPU_GET_REGISTERS", {"nmsrs": 0}, 0),
    ("VM_CONTROL_CLEANUP", {"enable": 1}, 1),
    ("VM_CONTROL_CLEANUP", {"enable": 0}, 0),
    ("VCPU_GET_CPUID", {"function": 1}, 10),
    ("VCPU_CONTROL_CR", {"cr": 3, "enable": 1}, 10),
    ("VCPU_CONTROL_CR", {"cr": 0, "enable": 0}, 8),
    ("VCPU_INJECT_EXCEPTION", {"nr": 6}, 9),
    ("VCPU_GET_XCR", {"xcr": 0}, 8),
    ("VCPU_GET_XSAVE", {}, 0),
    ("VCPU_GET_MTRR_TYPE", {"gpa": FREE}, 11),
    ("VCPU_CONTROL_MSR", {"msr": 0, "enable": 1}, 9),
    ("VCPU_TRANSLATE_GVA", {"gva": FREE}, 11),
]


@pytest.mark.clause("MSG-SHORT-OK")
@pytest.mark.parametrize(("name", "fields", "length"), SHORT)
def test_short(lab: Lab, name: str, fields: dict[str, Any], length: int) -> None:
    """A command that is shorter than its struct succeeds, the rest taken as zero."""
    vm, session = lab.pair()
    requires(session, command=name)
    vm.write(FREE, b"nine byte")
    reply = session.command(name, **fields, length=length).ok()
    if name == "VM_READ_PHYSICAL":
        assert reply.data == b"nine byte"
    elif name == "VCPU_TRANSLATE_GVA":
        assert reply.fields.gpa == FREE
    elif name in BRINGS:
        session.answer(next_event_of(session, BRINGS[name]))
    elif name in ("VCPU_GET_CPUID", "VCPU_GET_MTRR_TYPE"):
        assert reply.raw == session.command(name, **fields).ok().raw
    silent(session, vcpus=[0])


@pytest.mark.clause("MSG-SHORT-OK")
def test_short_reads_as_zero(session: Session) -> None:
    """What a short command leaves out is zero, not what an earlier one had there."""
    session.command("VM_CHECK_COMMAND", id="GET_VERSION").ok()
    session.command("VM_CHECK_COMMAND", id="GET_VERSION", length=0).fails("KVM_ENOENT")
    session.command("VM_CHECK_COMMAND", id=0x0102).fails("KVM_ENOENT")
    session.command("VM_CHECK_COMMAND", id="GET_VERSION", length=1).ok()
    session.command("VM_READ_PHYSICAL", gpa=FREE, size=16).ok()
    session.command("VM_READ_PHYSICAL", gpa=FREE, size=16, length=8).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("MSG-SHORT-OK")
def test_short_vcpu_command_reads_as_zero(lab: Lab) -> None:
    """The same for commands that wait for their vCPU: not what others left in that memory."""
    vm, session = lab.pair(run=False)
    for _ in range(3):
        others = [
            session.send("VCPU_GET_CPUID", function=0xFFFF_FFFF, index=0xFFFF_FFFF)
            for _ in range(200)
        ]
        vm.run()
        for one in others:
            one.reply(10).fails("KVM_ENOENT")
        vm.stop()
        short = [session.send("VCPU_GET_REGISTERS", nmsrs=0, length=8) for _ in range(200)]
        vm.run()
        for one in short:
            one.reply(10).ok()
        vm.stop()


@pytest.mark.clause("MSG-LONG-OK")
@pytest.mark.parametrize("name", ["GET_VERSION", "VM_GET_INFO", *GOOD])
def test_long(lab: Lab, name: str) -> None:
    """A command that is longer than its struct succeeds, the excess is not looked at."""
    vm, session = lab.pair()
    fields = dict(GOOD.get(name, {}))
    requires(session, command=name, event=fields.get("event_id", ""))
    id, payload = session.codec.encode_command(name, **fields)
    for excess in (b"\xff", b"\xff" * 33, b"\xff" * 4000):
        session.reply_to(session.send_raw(id, payload + excess)).ok()
        if name in BRINGS:
            session.answer(next_event_of(session, BRINGS[name]))
    if name == "VM_WRITE_PHYSICAL":
        assert vm.read(FREE, 4096) == b"written".ljust(4096, b"\0")
    silent(session, vcpus=[0])


@pytest.mark.clause("MSG-MAXSIZE-OK", "GETVERSION-MAXSIZE")
def test_largest_size(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """A message of max_msg_size bytes, which GET_VERSION calls 8184, is accepted."""
    tool = lab.raw(vm)
    largest = struct.unpack_from("<I", tool.ask(GET_VERSION, seq=1), 12)[0]
    assert largest == profile.max_message_size == 8184
    for seq in range(3):
        assert len(tool.ask(GET_VERSION, b"\xff" * largest, seq=seq)) == 24
    check, payload = lab.codec.encode_command("VM_CHECK_COMMAND", id=2)
    assert tool.ask(check, payload.ljust(largest), seq=9) == OK


@pytest.mark.clause("MSG-TOOBIG-CLOSE")
@pytest.mark.parametrize("size", [8185, 8192, 0x8000, 0xFFFF])
def test_too_big(lab: Lab, vm: SmallVm, size: int) -> None:
    """A header that announces more than 8184 bytes closes the socket, without a reply."""
    tool = lab.raw(vm)
    tool.ask(GET_VERSION, seq=1)
    tool.send(GET_VERSION, seq=2, size=size)
    tool.ended()
    ends_dead(lab.manager, vm)
    assert vm.preunhook() == gone(vm)


@pytest.mark.clause("MSG-PARTIAL-CLOSE")
@pytest.mark.parametrize(
    "part",
    [b"\x02", struct.pack("<HHI", GET_VERSION, 0, 5)[:7], struct.pack("<HHIH", 4, 8, 5, 2)],
    ids=["one byte", "half a header", "half a payload"],
)
def test_partial(lab: Lab, vm: SmallVm, part: bytes) -> None:
    """A message cut short by the end of the stream ends the session, without a reply."""
    tool = lab.raw(vm)
    tool.socket.sendall(part)
    assert lab.manager.poll(vm.socket, "HUP", within_s=0.1) == []
    tool.socket.shutdown(1)  # SHUT_WR: what the kernel says can still be read
    tool.ended()
    ends_dead(lab.manager, vm)
    assert vm.preunhook() == gone(vm)


@pytest.mark.clause("MSG-SOCKERR-CLOSE")
def test_connection_reset(lab: Lab, vm: SmallVm, session: Session) -> None:
    """A connection that is reset in the middle of an event ends the session; the guest goes on."""
    vm.run()
    enable(session, "HYPERCALL")
    vm.call_out(1)
    next_event_of(session, "HYPERCALL")
    session.abort()
    ends_dead(lab.manager, vm)
    vm.wait_word("done", 1)
    assert vm.preunhook() == gone(vm)
    vm.wait_word("done", vm.call_out(1))


@pytest.mark.clause("MSG-SOCKERR-CLOSE")
def test_local_peer_gone(lab: Lab, vm: SmallVm) -> None:
    """A UNIX socket whose other end was closed with unread data in it ends the session."""
    name, fd = lab.manager.socketpair()
    vm.socket = name
    assert vm.hook(fd) == "OK"
    lab.manager.link.call("send", name=name + ".peer", hex=struct.pack("<HHI", 2, 0, 1).hex())
    assert "IN" in lab.manager.poll(name + ".peer", "IN", within_s=5)
    lab.manager.close_fd(name + ".peer")
    ends_dead(lab.manager, vm)
    assert vm.preunhook() == gone(vm)
    if lab.profile.has("ioctl UNHOOK"):
        assert vm.unhook() == "OK"


@pytest.mark.clause("MSG-SOCKERR-CLOSE")
def test_peer_does_not_read(lab: Lab, vm: SmallVm) -> None:
    """An event that cannot be sent, since the other end of a UNIX socket was shut down for reading,
    ends the session: a tool that misses one must not believe that all is well."""
    name, fd = lab.manager.socketpair()
    vm.socket, peer = name, name + ".peer"
    assert vm.hook_and_allow(fd) == ["OK", "OK", "OK"]
    asked = lab.codec.encode_command("VCPU_CONTROL_EVENTS", vcpu=0, event_id="HYPERCALL", enable=1)
    lab.manager.link.call("send", name=peer, hex=lab.codec.frame(*asked, 1).hex())
    vm.run()
    assert "IN" in lab.manager.poll(peer, "IN", within_s=5), "no reply"
    assert lab.manager.shutdown(peer, socket.SHUT_RD) == "OK"
    vm.call_out(1)
    ends_dead(lab.manager, vm)
    vm.wait_word("done", 1)
    assert vm.preunhook() == gone(vm)


@pytest.mark.clause("MSG-INTERLEAVE-EV")
def test_event_while_command_waits(lab: Lab) -> None:
    """An event of one vCPU arrives while the reply of another, not running yet, is awaited."""
    vm, session = lab.pair(vcpus=2, run=False)
    vm.run(0)
    enable(session, "HYPERCALL", vcpu=0)
    waiting = session.send("VCPU_GET_INFO", vcpu=1)
    vm.call_out(1, vcpu=0)
    event = next_event_of(session, "HYPERCALL", vcpu=0)
    session.answer(event)
    vm.wait_word("done", 1, vcpu=0)
    vm.run(1)
    waiting.reply(5).ok()


@pytest.mark.clause("MSG-INTERLEAVE-CMD", "VCPUHDR-INEVENT-OK")
def test_commands_while_event_waits(lab: Lab) -> None:
    """While an event waits for its reply, VM and vCPU commands are answered, for this vCPU too."""
    vm, session = lab.pair(vcpus=2)
    enable(session, "HYPERCALL")
    vm.call_out(1)
    event = next_event_of(session, "HYPERCALL")
    for _ in range(3):
        session.command("VM_GET_INFO").ok()
        session.command("VM_READ_PHYSICAL", gpa=FREE, size=64).ok()
        for vcpu in (0, 1):
            session.command("VCPU_GET_INFO", vcpu=vcpu).ok()
            session.command("VCPU_GET_REGISTERS", vcpu=vcpu, nmsrs=0).ok()
    vm.stands_still()
    session.answer(event)
    vm.wait_word("done", 1)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("MSG-BLOCKING")
def test_waits_for_the_tool(lab: Lab) -> None:
    """Events wait for their replies for as long as the tool takes, and are then gone on from."""
    vm, session = lab.pair(vcpus=3)
    enable(session, "HYPERCALL", vcpu=0)
    vm.call_out(1, vcpu=0)
    events = [next_event_of(session, "HYPERCALL", vcpu=0)]
    enable(session, "BREAKPOINT", vcpu=1)
    vm.call_out(1, kind=1, vcpu=1)
    events.append(next_event_of(session, "BREAKPOINT", vcpu=1))
    session.command("VM_PAUSE_VCPU", vcpu=2, wait=1).ok()
    events.append(next_event_of(session, "PAUSE", vcpu=2))
    before = [vm.words(vcpu=vcpu) for vcpu in range(3)]
    vm.stands_still(for_s=LONG_S)
    assert [vm.words(vcpu=vcpu) for vcpu in range(3)] == before
    silent(session, vcpus=range(3))
    for event in events:
        session.answer(event)
    vm.wait_word("done", 1, vcpu=0)
    vm.wait_word("done", 1, vcpu=1)
    assert (vm.word("result"), vm.word("traps", vcpu=1)) == (0, 1)
    vm.progresses(vcpu=2)


@pytest.mark.clause("MSG-BLOCKING", "EVT-DISCONNECT-CONTINUE")
def test_waits_until_disconnect(lab: Lab) -> None:
    """All vCPUs that wait for a reply go on when the tool disconnects."""
    vm, session = lab.pair(vcpus=3)
    for vcpu in range(3):
        enable(session, "HYPERCALL", vcpu=vcpu)
        vm.call_out(1, vcpu=vcpu)
        next_event_of(session, "HYPERCALL", vcpu=vcpu)
    vm.stands_still(for_s=0.5)
    session.close()
    for vcpu in range(3):
        vm.wait_word("done", 1, vcpu=vcpu)
        vm.progresses(vcpu=vcpu)


@pytest.mark.clause("MSG-CLEANUP")
def test_cleanup(lab: Lab, profile: Profile) -> None:
    """After disconnect and unhook the guest is as if it had never been introspected."""
    plain = lab.vm()
    plain.run()
    plain.wait_word("done", plain.call_out(1))
    vm, session = lab.pair()
    for event in ("HYPERCALL", "BREAKPOINT"):
        enable(session, event)
    for _ in range(3):
        session.command("VM_PAUSE_VCPU", wait=0).ok()
    next_event_of(session, "PAUSE")
    session.close()
    ends_dead(lab.manager, vm)
    assert vm.unhook() == "OK"
    vm.wait_word("done", vm.call_out(2))
    assert vm.word("result") == plain.word("result")
    vm.wait_word("done", vm.call_out(2, kind=1))
    assert vm.word("traps") == 2
    again = lab.hook(vm, allow=False)
    assert allowed_commands(again, profile) == ALWAYS_ALLOWED
    assert vm.command(-1) == "OK"
    silent(again, vcpus=[0])
