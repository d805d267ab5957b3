# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages to bytes and back, and what is said about bytes that are wrong."""

from __future__ import annotations

import contextlib
import operator
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.abi import Codec, Struct, load_profile
from harness.abi.reading import name_of, read_event_reply, read_request
from harness.errors import ConformanceError, MalformedMessage, UsageError

PROFILE = load_profile("v12")
CODEC = Codec(PROFILE)


def values_of(layout: Struct) -> st.SearchStrategy[dict[str, Any]]:
    """Any values that fit the struct, padding included; flexible arrays of a few elements."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    counters = {f.count for f in layout.fields if f.flexible}
    for one in layout.fields:
        if one.name in counters:
            continue
        if one.struct is not None:
            element: st.SearchStrategy[Any] = values_of(one.struct)
        elif one.type[0] == "u":
            element = st.integers(0, 2 ** int(one.type[1:]) - 1)
        else:
            bits = int(one.type[1:])
            element = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if one.flexible and one.type == "u8":
            element = st.binary(max_size=40)
        elif one.flexible:
            element = st.lists(element, max_size=4).map(tuple)
        elif isinstance(one.count, int) and one.type == "u8":
            element = st.binary(min_size=one.count, max_size=one.count)
        elif isinstance(one.count, int) and one.size > 1000:
            # The XSAVE area: 1024 words of the same value do.
            element = st.builds(operator.mul, st.tuples(element), st.just(one.count))
        elif isinstance(one.count, int):
            element = st.lists(element, min_size=one.count, max_size=one.count).map(tuple)
        fields[one.name] = element
    return st.fixed_dictionaries(fields)


def same(record: Any, values: Any) -> bool:
    """Whether a record has at least these values."""
    if isinstance(values, dict):
        return all(same(record[k], v) for k, v in values.items())
    if isinstance(values, tuple):
        return len(record) == len(values) and all(map(same, record, values))
    return bool(record == values)


@pytest.mark.parametrize("name", PROFILE.structs)
@settings(max_examples=25)
@given(data=st.data())
def test_structs_round_trip(name: str, data: st.DataObject) -> None:
    """What is packed unpacks to the same, for every struct and any values."""
    layout = PROFILE.structs[name]
    values = data.draw(values_of(layout))
    packed = layout.pack(values)
    record = layout.unpack(packed)
    assert same(record, values)
    assert len(packed) == layout.total_size(record)
    assert layout.pack(record) == packed


@pytest.mark.parametrize("name", PROFILE.commands)
@settings(max_examples=25)
@given(data=st.data())
def test_commands_read_back(name: str, data: st.DataObject) -> None:
    """The reading of a request names the command and has the values sent."""
    command = PROFILE.commands[name]
    values = data.draw(values_of(command.request)) if command.request else {}
    vcpu = {"vcpu": data.draw(st.integers(0, 0xFFFF))} if command.is_vcpu else {}
    id, payload = CODEC.encode_command(name, **values, **vcpu)
    read_name, fields = read_request(PROFILE, id, payload)
    assert (id, read_name) == (command.id, name)
    for key, value in {**values, **vcpu}.items():
        if key in fields:
            assert same(fields[key], value)
        else:
            assert key.startswith("pad")
            assert not (any(value) if isinstance(value, bytes) else value)


@given(id=st.integers(0, 0xFFFF), payload=st.binary(max_size=64))
def test_reading_never_fails(id: int, payload: bytes) -> None:
    """Requests and event replies may be wrong on purpose; a transcript shows them."""
    read_request(PROFILE, id, payload)
    read_event_reply(PROFILE, payload)


@given(id=st.integers(0, 1), payload=st.binary(max_size=640))
def test_any_bytes_are_an_event_or_malformed(id: int, payload: bytes) -> None:
    """Whatever the kernel sends, the only error is the one that names message and field."""
    with contextlib.suppress(MalformedMessage):
        CODEC.decode_event(id, payload)


@given(
    id=st.sampled_from([c.id for c in PROFILE.commands.values()] + [77]),
    payload=st.binary(max_size=600),
    request=st.binary(max_size=32),
)
def test_any_bytes_are_a_reply_or_malformed(id: int, payload: bytes, request: bytes) -> None:
    """Likewise for replies."""
    with contextlib.suppress(MalformedMessage):
        CODEC.decode_reply(id, payload, request=request)


def test_command_bytes() -> None:
    """A request to the byte: vCPU header, then the struct, padding zero."""
    assert CODEC.encode_command("VM_READ_PHYSICAL", gpa=0x1000, size=16) == (
        12,
        bytes.fromhex("0010000000000000 1000 0000 00000000"),
    )
    assert CODEC.encode_command("VCPU_CONTROL_EVENTS", vcpu=1, event_id="BREAKPOINT", enable=1) == (
        5,
        bytes.fromhex("0100 0000 00000000 0500 01 00 00000000"),
    )
    assert CODEC.encode_command("GET_VERSION") == (2, b"")


def test_everything_can_be_wrong() -> None:
    """Padding of either header, counters and the length can be set to anything."""
    _, payload = CODEC.encode_command(
        "VCPU_CONTROL_EVENTS", vcpu=3, hdr_padding1=1, hdr_padding2=2, padding1=4, padding2=5
    )
    assert payload == bytes.fromhex("0300 0100 02000000 0000 00 04 05000000")
    _, payload = CODEC.encode_command("VM_WRITE_PHYSICAL", gpa=0, size=100, data=b"abc")
    assert payload[8:10] == b"\x64\0"
    assert len(payload) == 19
    assert CODEC.encode_command("VM_READ_PHYSICAL", gpa=0xAABB, length=1)[1] == b"\xbb"
    assert len(CODEC.encode_command("VM_READ_PHYSICAL", length=8184)[1]) == 8184


def test_counters_are_filled_in() -> None:
    """Sizes and counts follow from the arrays."""
    assert CODEC.encode_command("VM_WRITE_PHYSICAL", gpa=8, data=b"xy")[1][8:10] == b"\x02\0"
    assert CODEC.encode_command("VCPU_GET_REGISTERS", msrs_idx=[0x174])[1][8:] == bytes.fromhex(
        "0100 0000 00000000 74010000"
    )
    _, payload = CODEC.encode_command(
        "VM_SET_PAGE_ACCESS", entries=[{"gpa": 0x2000, "access": "RW"}]
    )
    assert payload == bytes.fromhex("0100 0000 00000000 0020000000000000 03 00000000000000")


def test_all_registers_at_once() -> None:
    """VCPU_SET_REGISTERS takes the registers of an event, and changes on top."""
    regs = PROFILE.structs["kvm_regs"].unpack(bytes(range(144)))
    _, payload = CODEC.encode_command("VCPU_SET_REGISTERS", regs=regs, rip=7)
    assert payload[8:136] == bytes(range(128))
    assert payload[136:144] == (7).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("name", "count"),
    [("GET_VERSION", 0), ("VM_READ_PHYSICAL", 6), ("VCPU_GET_INFO", 6), ("VCPU_GET_XCR", 13)],
)
def test_every_wrong_padding(name: str, count: int) -> None:
    """One variant for each byte of padding, each differing from the good request in that byte."""
    good = CODEC.encode_command(name)[1]
    variants = [CODEC.encode_command(name, **wrong)[1] for wrong in CODEC.wrong_paddings(name)]
    assert len(set(variants)) == len(variants) == count
    assert all(sum(a != b for a, b in zip(v, good, strict=True)) == 1 for v in variants)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gap": 1}, "kvmi_vm_read_physical has no field gap .*it has: gpa, size"),
        ({"size": 65536}, r"kvmi_vm_read_physical\.size: 0x10000 does not fit u16"),
        ({"gpa": -1}, r"kvmi_vm_read_physical\.gpa: -0x1 does not fit u64"),
        ({"gpa": "here"}, "'here' is not a number"),
        ({"vcpu": 1}, "no field vcpu"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], message: str) -> None:
    """A caller's mistake is named, and is no fault of the kernel."""
    with pytest.raises(UsageError, match=message):
        CODEC.encode_command("VM_READ_PHYSICAL", **arguments)


def test_names_that_do_not_exist() -> None:
    """Unknown names of values list the known ones."""
    with pytest.raises(UsageError, match=r"no event FLOOD \(it has: UNHOOK, PAUSE"):
        CODEC.encode_command("VM_CHECK_EVENT", id="FLOOD")
    with pytest.raises(UsageError, match="'Q' is not among access: R, W, X"):
        CODEC.encode_command("VM_SET_PAGE_ACCESS", entries=[{"access": "Q"}])
    with pytest.raises(UsageError, match="no action STOP"):
        CODEC.encode_event_reply("PAUSE", "STOP")
    with pytest.raises(UsageError, match="PAUSE has no field new_val"):
        CODEC.encode_event_reply("PAUSE", new_val=1)


def test_replies() -> None:
    """Success with fields, with data, with an array, and errors."""
    version = struct.pack("<iIIIB7x", 0, 0, 1, 8184, 1)
    reply = CODEC.decode_reply("GET_VERSION", version).ok()
    assert (reply.fields.version, reply.fields.max_msg_size) == (1, 8184)
    assert reply.fields.features.singlestep == 1

    request = CODEC.encode_command("VM_READ_PHYSICAL", size=3)[1]
    assert CODEC.decode_reply("VM_READ_PHYSICAL", bytes(8) + b"abc", request=request).data == b"abc"

    registers = bytes(8) + struct.pack("<II456xIIIIQ", 8, 0, 1, 0, 0x174, 0, 99)
    request = CODEC.encode_command("VCPU_GET_REGISTERS", msrs_idx=[0x174])[1]
    fields = CODEC.decode_reply("VCPU_GET_REGISTERS", registers, request=request).fields
    assert fields.mode == 8
    assert [(m.index, m.data) for m in fields.msrs.entries] == [(0x174, 99)]

    refused = CODEC.decode_reply("VM_GET_INFO", struct.pack("<iI", -1, 0), seq=5)
    assert (refused.err, refused.error) == (-1, "KVM_EPERM")
    assert refused.fails("KVM_EPERM") is refused
    with pytest.raises(ConformanceError, match=r"VM_GET_INFO \(seq 5\) answered KVM_EPERM \(-1\)"):
        refused.ok()
    with pytest.raises(ConformanceError, match=r"answered KVM_EPERM .* expected KVM_EINVAL"):
        refused.fails("KVM_EINVAL")
    with pytest.raises(ConformanceError, match="answered success, expected KVM_EINVAL"):
        reply.fails("KVM_EINVAL")


ONE_MSR = CODEC.encode_command("VCPU_GET_REGISTERS", msrs_idx=[1])[1]
THREE_BYTES = CODEC.encode_command("VM_READ_PHYSICAL", size=3)[1]


@pytest.mark.parametrize(
    ("command", "payload", "request_sent", "message"),
    [
        ("VM_GET_INFO", bytes(5), None, "kvmi_error_code has 5 bytes, expected 8"),
        ("VM_GET_INFO", struct.pack("<iI", 0, 9), None, r"kvmi_error_code\.padding is 0x9"),
        ("VM_GET_INFO", struct.pack("<iI", 22, 0), None, r"kvmi_error_code\.err is 22"),
        (
            "VM_GET_INFO",
            struct.pack("<iI", -22, 0) + bytes(16),
            None,
            r"kvmi_msg_hdr\.size is 24, expected 8 since kvmi_error_code\.err is -22",
        ),
        ("VM_GET_INFO", bytes(20), None, r"VM_GET_INFO \(seq 3\): kvmi_msg_hdr\.size is 20, .* 24"),
        ("VM_GET_INFO", bytes(28), None, r"kvmi_msg_hdr\.size is 28, expected 24"),
        ("VM_GET_INFO", bytes(23) + b"\1", None, r"kvmi_vm_get_info_reply\.padding is .*01"),
        ("GET_VERSION", bytes(23) + b"\1", None, r"kvmi_get_version_reply\.features\.padding"),
        ("VM_CONTROL_EVENTS", bytes(16), None, r"kvmi_msg_hdr\.size is 16, expected 8"),
        ("VM_READ_PHYSICAL", bytes(12), THREE_BYTES, r"kvmi_msg_hdr\.size is 12, expected 11"),
        ("VCPU_GET_REGISTERS", bytes(400), None, r"kvmi_msg_hdr\.size is 400, expected 480"),
        ("VCPU_GET_REGISTERS", bytes(480), ONE_MSR, "nmsrs is 0, expected 1 as in the request"),
        (
            "VCPU_GET_REGISTERS",
            bytes(472) + struct.pack("<II", 2, 0) + bytes(16),
            None,
            r"kvm_msrs\.entries has 16 bytes, but nmsrs = 2 asks for 32",
        ),
        (
            "VCPU_GET_REGISTERS",
            bytes(476) + b"\1\0\0\0",
            None,
            r"kvmi_vcpu_get_registers_reply\.msrs\.pad is 01 00 00 00, expected zero",
        ),
        (77, bytes(8), None, r"id 77 .*kvmi_error_code\.err is 0, and there is no such command"),
    ],
)
def test_malformed_replies(
    command: str | int, payload: bytes, request_sent: bytes | None, message: str
) -> None:
    """Each violation names message, struct and field."""
    with pytest.raises(MalformedMessage, match=message):
        CODEC.decode_reply(command, payload, request=request_sent, seq=3)


def event(name: str = "BREAKPOINT", *, vcpu: int = 2, **changed: int) -> bytes:
    """A good event, with single bytes changed by ``at_OFFSET=value``."""
    definition = PROFILE.events[name]
    size = 552 + (definition.payload.size if definition.payload else 0)
    payload = bytearray(size)
    payload[0] = definition.id
    payload[8:12] = struct.pack("<HH", 544, vcpu)
    for key, value in changed.items():
        payload[int(key.removeprefix("at_"))] = value
    return bytes(payload)


def test_events() -> None:
    """The vCPU, its registers and the event's own fields."""
    body = CODEC.decode_event(1, event(at_16=8, at_24=0x55, at_552=0x66, at_560=1))
    assert (body.name, body.vcpu) == ("BREAKPOINT", 2)
    assert body.common is not None
    assert body.common.arch.mode == 8
    assert body.common.arch.regs.rax == 0x55
    assert (body.fields.gpa, body.fields.insn_len) == (0x66, 1)
    assert body.dirty_padding == ()
    unhook = CODEC.decode_event(0, bytes(8))
    assert (unhook.name, unhook.vcpu, unhook.common) == ("UNHOOK", None, None)


def test_padding_that_nobody_promised() -> None:
    """Dirty padding in the common part is reported, and is no error."""
    body = CODEC.decode_event(1, event(at_12=1, at_17=1, at_191=7))
    assert body.dirty_padding == (
        "kvmi_vcpu_event.padding",
        "kvmi_vcpu_event.arch.padding",
        "kvmi_vcpu_event.arch.sregs.cs.padding",
    )


@pytest.mark.parametrize(
    ("id", "payload", "message"),
    [
        (1, b"\1", "kvmi_event_hdr has 1 bytes, expected 8"),
        (1, event(at_0=21), r"kvmi_event_hdr\.event is 21, which v12 does not know"),
        (1, event(at_3=1), r"event BREAKPOINT \(seq 4\): kvmi_event_hdr\.padding is 00 01 .*"),
        (0, event(), r"kvmi_msg_hdr\.id is 0, expected 1"),
        (1, bytes(8), r"event UNHOOK \(seq 4\): kvmi_msg_hdr\.id is 1, expected 0"),
        (1, event()[:-1], r"kvmi_msg_hdr\.size is 567, expected 568"),
        (1, event() + b"x", r"kvmi_msg_hdr\.size is 569, expected 568"),
        (1, event(at_8=0x18), r"kvmi_vcpu_event\.size is 536, expected 544"),
        (1, event(at_567=1), r"kvmi_vcpu_event_breakpoint\.padding is .* 01, expected zero"),
    ],
)
def test_malformed_events(id: int, payload: bytes, message: str) -> None:
    """Each violation names event, struct and field."""
    with pytest.raises(MalformedMessage, match=message):
        CODEC.decode_event(id, payload, seq=4)


def test_event_replies() -> None:
    """To the byte, right and wrong, and read back."""
    assert CODEC.encode_event_reply("PAUSE", vcpu=1) == bytes.fromhex(
        "0100 0000 00000000 00 01 0000 00000000"
    )
    reply = CODEC.encode_event_reply("CR", "CONTINUE", new_val=0x80000011, padding1=1)
    assert reply == bytes.fromhex("0000 0000 00000000 00 07 0100 00000000 1100008000000000")
    assert read_event_reply(PROFILE, reply) == (
        "CR",
        {"vcpu": 0, "action": "CONTINUE", "padding1": 1, "new_val": 0x80000011},
    )
    assert len(CODEC.encode_event_reply("PAUSE", 7, event_id=99, length=20)) == 20
    assert read_event_reply(PROFILE, b"\1\0")[1]["length"] == 2


def test_ioctl_arguments() -> None:
    """Request value and argument to the byte."""
    assert CODEC.encode_ioctl("HOOK", fd=5, uuid=bytes(range(16))) == (
        0x4018AEC8,
        bytes.fromhex("05000000 00000000") + bytes(range(16)),
    )
    assert CODEC.encode_ioctl("COMMAND", allow=1, id=-1) == (
        0x4008AECA,
        bytes.fromhex("01000000 ffffffff"),
    )
    assert CODEC.encode_ioctl("UNHOOK") == (0xAEC9, b"")
    with pytest.raises(UsageError, match="PREUNHOOK takes no argument"):
        CODEC.encode_ioctl("PREUNHOOK", x=1)


def test_names_of_values() -> None:
    """Ids, actions and access bits have names for people."""
    structs = PROFILE.structs
    assert name_of(PROFILE, structs["kvmi_vm_check_command"].field("id"), 12) == "VM_READ_PHYSICAL"
    assert name_of(PROFILE, structs["kvmi_vm_check_event"].field("id"), 3) == "HYPERCALL"
    assert name_of(PROFILE, structs["kvmi_vcpu_event_pf"].field("access"), 6) == "-wx"
    assert name_of(PROFILE, structs["kvmi_vcpu_event_descriptor"].field("descriptor"), 2) == "GDTR"
    assert name_of(PROFILE, structs["kvmi_vcpu_event_descriptor"].field("write"), 1) is None
