# SPDX-License-Identifier: GPL-2.0-or-later
"""Layout of the counters' file: a header that describes itself, then slots of equal size.

Header: magic (8 bytes), then as little-endian u32: version, bytes of the header, bytes of a slot,
number of slots; as u64: time of creation since the epoch (ns), the same on CLOCK_MONOTONIC; as
u32: bytes of the JSON text that follows. The text has ``fields`` (name, offset in the slot, number
of u64), ``texts`` (name, offset, bytes, zero-terminated UTF-8) and ``events`` (names of the event
ids that index the field ``events``). A program that reads the JSON needs no other knowledge.

Slot: the first u64 is the sequence counter, odd while the writer changes something.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from harness.errors import UsageError

__all__ = [
    "EVENT_IDS",
    "FIELDS",
    "HEADER_SIZE",
    "LATENCY_BUCKETS",
    "SLOT_SIZE",
    "TEXTS",
    "WORD",
    "Header",
    "c_header",
    "pack_header",
    "unpack_header",
]

MAGIC = b"KVMICNTR"
VERSION = 1
HEADER_SIZE = 4096
SLOT_SIZE = 2048

#: Event ids that can be counted: below this.
EVENT_IDS = 32
#: Bucket n counts latencies from 2**n to 2**(n+1)-1 ns; the last one all above.
LATENCY_BUCKETS = 40

#: Fields of a slot in order, with their numbers of u64.
FIELDS = {
    "sequence": 1,
    "pid": 1,  # of the writer; 0: never used
    "generation": 1,  # how many writers the slot has had
    "started_ns": 1,  # when the writer took it (CLOCK_MONOTONIC, as all times)
    "heartbeat_ns": 1,  # last sign of life
    "commands": 1,
    "replies": 1,
    "failed_replies": 1,  # of these, the ones with an error
    "event_replies": 1,
    "problems": 1,  # messages that break the interface
    "bytes_in": 1,
    "bytes_out": 1,
    "events": EVENT_IDS,  # received, by event id
    "command_latency": LATENCY_BUCKETS,  # command sent to reply received
    "event_latency": LATENCY_BUCKETS,  # event received to answer sent
}

#: Texts of a slot, with their sizes in bytes.
TEXTS = {"phase": 64, "test": 256}

#: Index of the first u64 of each field.
WORD = dict(zip(FIELDS, (sum(list(FIELDS.values())[:i]) for i in range(len(FIELDS))), strict=True))
_TEXT_START = sum(FIELDS.values()) * 8
_FIXED = struct.Struct("<8sIIIIQQI")

assert _TEXT_START + sum(TEXTS.values()) <= SLOT_SIZE


@dataclass(frozen=True)
class Header:
    """What the header says; times in ns."""

    slots: int
    created_ns: int
    created_monotonic_ns: int
    events: Mapping[int, str]


def text_offsets() -> dict[str, tuple[int, int]]:
    """Offset in the slot, and bytes, of each text."""
    out, at = {}, _TEXT_START
    for name, size in TEXTS.items():
        out[name] = (at, size)
        at += size
    return out


def pack_header(header: Header) -> bytes:
    """The header's bytes, :data:`HEADER_SIZE` of them."""
    described = {
        "fields": [[name, WORD[name] * 8, count] for name, count in FIELDS.items()],
        "texts": [[name, *place] for name, place in text_offsets().items()],
        "events": {str(id): name for id, name in header.events.items()},
    }
    text = json.dumps(described).encode()
    fixed = _FIXED.pack(
        MAGIC, VERSION, HEADER_SIZE, SLOT_SIZE, header.slots,
        header.created_ns, header.created_monotonic_ns, len(text),
    )  # fmt: skip
    return (fixed + text).ljust(HEADER_SIZE, b"\0")


def c_header() -> str:
    """The layout as a C header: sizes, and per field its index (in u64) or its offset."""
    numbers = {
        "MAGIC": int.from_bytes(MAGIC, "little"),
        "VERSION": VERSION,
        "HEADER_SIZE": HEADER_SIZE,
        "SLOT_SIZE": SLOT_SIZE,
        "EVENT_IDS": EVENT_IDS,
        "LATENCY_BUCKETS": LATENCY_BUCKETS,
    }
    numbers |= {f"WORD_{name.upper()}": index for name, index in WORD.items()}
    for name, (offset, size) in text_offsets().items():
        numbers |= {f"OFFSET_{name.upper()}": offset, f"SIZE_{name.upper()}": size}
    lines = [f"#define COUNTERS_{name} {value:#x}" for name, value in numbers.items()]
    return "\n".join(["/* Made from harness/counters/layout.py. */", "#pragma once", *lines]) + "\n"


def unpack_header(data: bytes, where: str) -> Header:
    """:raises UsageError: it is no counters' file, or one of another version."""
    if len(data) < HEADER_SIZE or data[: len(MAGIC)] != MAGIC:
        raise UsageError(f"{where} is no file of counters")
    _, version, header_size, slot_size, slots, created, monotonic, length = _FIXED.unpack_from(data)
    if (version, header_size, slot_size) != (VERSION, HEADER_SIZE, SLOT_SIZE):
        raise UsageError(
            f"{where} has counters of version {version}, and this program reads {VERSION}",
            hint="read it with the program that wrote it",
        )
    described = json.loads(data[_FIXED.size : _FIXED.size + length])
    return Header(slots, created, monotonic, {int(k): v for k, v in described["events"].items()})
