# SPDX-License-Identifier: GPL-2.0-or-later
"""The older versions of the interface: their tables, and messages to bytes and back."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_abi_codec import same, values_of

from harness.abi import Codec, load_profile, profile_names
from harness.abi.reading import read_event_reply, read_request
from harness.errors import AbsentError, MalformedMessage, UsageError

NAMES = ("v6", "v7")
CODECS = {name: Codec(load_profile(name)) for name in NAMES}

# Command, by v12's name where that has it: (id, bytes of a request without its flexible array,
# bytes of a reply likewise), written down independently of the data files, which have no such sums.
SAME_COMMANDS = {
    "VM_CHECK_COMMAND": (3, 8, 8),
    "VM_CHECK_EVENT": (4, 8, 8),
    "VM_GET_INFO": (5, 0, 24),
    "VCPU_GET_INFO": (6, 8, 16),
    "VM_PAUSE_VCPU": (7, 16, 8),
    "VM_CONTROL_EVENTS": (8, 8, 8),
    "VCPU_CONTROL_EVENTS": (9, 16, 8),
    "VCPU_CONTROL_CR": (10, 16, 8),
    "VCPU_CONTROL_MSR": (11, 16, 8),
    "VCPU_GET_REGISTERS": (13, 16, 480),
    "VCPU_SET_REGISTERS": (14, 152, 8),
    "VCPU_GET_CPUID": (15, 16, 24),
    "VCPU_GET_XSAVE": (16, 8, 4104),
    "VM_READ_PHYSICAL": (17, 16, 8),
    "VM_WRITE_PHYSICAL": (18, 16, 8),
    "VCPU_INJECT_EXCEPTION": (19, 24, 8),
    "VM_SET_PAGE_ACCESS": (21, 8, 8),
    "VM_GET_MAP_TOKEN": (22, 0, 40),
    "VCPU_GET_MTRR_TYPE": (23, 16, 16),
    "VM_CONTROL_SPP": (24, 8, 8),
    "VM_SET_PAGE_WRITE_BITMAP": (26, 8, 8),
    "VM_CONTROL_CMD_RESPONSE": (27, 8, 8),
    "VM_GET_MAX_GFN": (29, 0, 16),
}
COMMANDS: dict[str, dict[str, tuple[int, int, int]]] = {
    "v7": SAME_COMMANDS
    | {
        "GET_VERSION": (2, 0, 24),
        "VCPU_SET_VE_INFO": (28, 24, 8),
        "VM_SET_PAGE_SVE": (30, 16, 8),
        "VCPU_SET_EPT_VIEW": (32, 16, 8),
        "VCPU_DISABLE_VE": (33, 8, 8),
        "VCPU_GET_EPT_VIEW": (34, 8, 16),
        "VCPU_TRANSLATE_GVA": (35, 16, 16),
        "VCPU_CONTROL_EPT_VIEW": (36, 16, 8),
        "VCPU_GET_XCR": (37, 16, 16),
        "VCPU_SET_XSAVE": (38, 4104, 8),
        "VCPU_CHANGE_GFN": (60, 24, 8),
        "VCPU_CONTROL_SINGLESTEP": (63, 16, 8),
    },
    "v6": SAME_COMMANDS
    | {
        "GET_VERSION": (2, 0, 16),
        "GET_PAGE_ACCESS": (20, 8, 8),
        "GET_PAGE_WRITE_BITMAP": (25, 8, 8),
    },
}

# Event, likewise: (id, bytes of the message's payload, bytes of its reply, 0 where there is none).
SAME_EVENTS = {
    "UNHOOK": (0, 544, 0),
    "CR": (1, 568, 24),
    "MSR": (2, 568, 24),
    "XSETBV": (3, 544, 16),
    "BREAKPOINT": (4, 560, 16),
    "HYPERCALL": (5, 544, 16),
    "PF": (6, 568, 288),
    "DESCRIPTOR": (8, 552, 16),
    "CREATE_VCPU": (9, 544, 16),
    "PAUSE": (10, 544, 16),
}
EVENTS: dict[str, dict[str, tuple[int, int, int]]] = {
    "v7": SAME_EVENTS
    | {
        "TRAP": (7, 560, 16),
        "SINGLESTEP": (11, 552, 16),
        "CMD_ERROR": (12, 560, 0),
        "CPUID": (13, 560, 16),
    },
    "v6": SAME_EVENTS | {"TRAP": (7, 568, 16), "SINGLESTEP": (11, 544, 16)},
}

# What v12's ioctls are here: own name, request.
IOCTLS = {
    "v7": {
        "HOOK": ("HOOK", 0x4018AEFF),
        "UNHOOK": ("UNHOOK", 0xAEFB),
        "COMMAND": ("COMMAND", 0x4008AEFD),
        "EVENT": ("EVENT", 0x4008AEFC),
        "PREUNHOOK": ("PREUNHOOK", 0xAEFE),
    },
    "v6": {
        "HOOK": ("HOOK", 0x4018AEFF),
        "COMMAND": ("COMMAND", 0x4008AEFD),
        "EVENT": ("EVENT", 0x4008AEFC),
        "PREUNHOOK": ("UNHOOK", 0xAEFE),
    },
}

ALL_COMMANDS = [(name, command) for name in NAMES for command in COMMANDS[name]]
ALL_EVENTS = [(name, event) for name in NAMES for event in EVENTS[name]]


def event_bytes(codec: Codec, name: str, *, vcpu: int = 3) -> bytes:
    """A good event whose own part is zero."""
    event = codec.profile.event(name)
    common = codec.pack("kvmi_event", size=544, vcpu=vcpu, event=event.id)
    return common + bytes(event.payload.size if event.payload else 0)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_shipped(name: str) -> None:
    assert set(profile_names()) >= {"v6", "v7", "v12"}
    profile = CODECS[name].profile
    assert (profile.name, profile.version, profile.max_message_size) == (name, 1, 8184)
    assert {one.common for one in profile.commands.values()} == set(COMMANDS[name])
    assert {one.common for one in profile.events.values()} == set(EVENTS[name])


@pytest.mark.parametrize(("name", "command"), ALL_COMMANDS)
def test_command_figures(name: str, command: str) -> None:
    known = CODECS[name].profile.command(command)
    header = 8 if known.is_vcpu else 0
    request = known.request.size if known.request else 0
    reply = known.reply.size if known.reply else 0
    assert (known.id, header + request, 8 + reply) == COMMANDS[name][command]


@pytest.mark.parametrize(("name", "event"), ALL_EVENTS)
def test_event_figures(name: str, event: str) -> None:
    codec = CODECS[name]
    known = codec.profile.event(event)
    id, size, reply = EVENTS[name][event]
    payload = event_bytes(codec, event)
    assert (known.id, len(payload)) == (id, size)
    assert known.is_vcpu is bool(reply)
    body = codec.decode_event(1, payload)
    assert (body.name, body.vcpu) == (known.name, 3 if reply else None)
    if reply:
        assert len(codec.encode_event_reply(event, vcpu=3)) == reply


@pytest.mark.parametrize(("name", "command"), ALL_COMMANDS)
@settings(max_examples=10)
@given(data=st.data())
def test_commands_read_back(name: str, command: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    known = codec.profile.command(command)
    values: dict[str, Any] = data.draw(values_of(known.request)) if known.request else {}
    vcpu = {"vcpu": 7} if known.is_vcpu else {}
    id, payload = codec.encode_command(command, **values, **vcpu)
    read_name, fields = read_request(codec.profile, id, payload)
    assert (id, read_name) == (known.id, known.name)
    for key, value in {**values, **vcpu}.items():
        assert key in fields or key.startswith("pad")
        if key in fields:
            assert same(fields[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_the_ioctls_of_the_first_series(name: str) -> None:
    """Other numbers than in v12, and v6 has none that ends a session."""
    codec = CODECS[name]
    found = {one.common: (one.name, one.request) for one in codec.profile.ioctls.values()}
    assert found == IOCTLS[name]
    argument = codec.encode_ioctl("HOOK", fd=5, uuid=bytes(range(16)))[1]
    assert argument == struct.pack("<iI", 5, 0) + bytes(range(16))
    assert codec.encode_ioctl("COMMAND", allow=1, id=-1)[1] == b"\1\0\0\0\xff\xff\xff\xff"
    for which in set(load_profile("v12").ioctls) - set(IOCTLS[name]):
        with pytest.raises(AbsentError, match=f"{name} has no ioctl {which}"):
            codec.encode_ioctl(which)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_v12_that_are_not_there(name: str) -> None:
    profile = CODECS[name].profile
    with pytest.raises(AbsentError, match=f"{name} has no command VM_CONTROL_CLEANUP"):
        profile.command("VM_CONTROL_CLEANUP")
    with pytest.raises(UsageError, match="no command VM_FLY") as caught:
        profile.command("VM_FLY")
    assert not isinstance(caught.value, AbsentError)
    assert profile.has("event PAUSE")
    assert not profile.has("VM_CONTROL_CLEANUP")


def test_an_unsupported_command_is_answered_differently() -> None:
    assert [CODECS[name].profile.unknown_command for name in NAMES] == [
        "KVM_EOPNOTSUPP",
        "KVM_ENOSYS",
    ]
    assert "KVM_EOPNOTSUPP" in CODECS["v6"].profile.command("GET_VERSION").errors
    assert "KVM_ENOSYS" not in CODECS["v6"].profile.command("GET_VERSION").errors
    assert CODECS["v7"].profile.command("GET_VERSION").errors == ("KVM_ENOSYS",)
    assert CODECS["v7"].profile.command("VM_GET_INFO").errors == ("KVM_ENOSYS", "KVM_EPERM")


def test_replies_whose_length_a_counter_tells() -> None:
    codec = CODECS["v6"]
    _, request = codec.encode_command("GET_PAGE_WRITE_BITMAP", gpa=[0x1000, 0x2000])
    reply = codec.decode_reply("GET_PAGE_WRITE_BITMAP", bytes(8) + bytes(8), request=request)
    assert reply.data == bytes(8)
    with pytest.raises(MalformedMessage, match="size is 10, expected 16"):
        codec.decode_reply("GET_PAGE_WRITE_BITMAP", bytes(8) + bytes(2), request=request)
    _, request = codec.encode_command("GET_PAGE_ACCESS", gpa=[0x1000, 0x2000])
    assert codec.decode_reply("GET_PAGE_ACCESS", bytes(10), request=request).data == bytes(2)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_events_are_malformed(name: str) -> None:
    codec = CODECS[name]
    good = event_bytes(codec, "CR")
    cases = [
        (0, good, r"event CR \(seq 0\): kvmi_msg_hdr.id is 0, expected 1"),
        (1, good[:-1], "size is 567, expected 568"),
        (1, good[:100], "kvmi_event has 100 bytes, expected 544"),
        (1, good[:4] + b"\x63" + good[5:], f"kvmi_event.event is 99, which {name}"),
        (1, b"\0\1" + good[2:], "kvmi_event.size is 256, expected 544"),
        (1, good[:546] + b"\1" + good[547:], "padding is 01 00 .*expected zero"),
    ]
    for id, payload, message in cases:
        with pytest.raises(MalformedMessage, match=message):
            codec.decode_event(id, payload)


@pytest.mark.parametrize("name", NAMES)
def test_event_replies_read_back(name: str) -> None:
    codec = CODECS[name]
    payload = codec.encode_event_reply("PF", "RETRY", vcpu=2, rep_complete=1)
    event, fields = read_event_reply(codec.profile, payload)
    assert (event, fields["action"], fields["vcpu"]) == ("PF", "RETRY", 2)
    assert fields["rep_complete"] == 1
    assert codec.profile.event_reply == 0
