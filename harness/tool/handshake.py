# SPDX-License-Identifier: GPL-2.0-or-later
"""The handshake between device manager and tool, before the socket goes to the kernel.

The device manager speaks first: a record of 104 bytes (v12), 96 (the older form without
max_gpa) or 104 + 24 n (with cpu type and n e820 entries). The tool answers 24 bytes or more: its
size and the SHA-1 of the shared key's raw bytes. Layouts as in QEMU's branches of the interface.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import time
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.errors import MalformedMessage, SilenceError, UsageError
from harness.tool.framing import read_exactly

__all__ = [
    "ANSWER_SIZE",
    "HASH_SIZE",
    "E820Entry",
    "Hello",
    "answer_record",
    "key_hash",
    "parse_hello",
    "receive_hello",
    "send_answer",
]

#: Bytes of the tool's record in its basic form, and of the hash in it.
ANSWER_SIZE = 24
HASH_SIZE = 20

_SIZE = struct.Struct("<I")
_OLD = struct.Struct("<I16sIq64s")
_V12 = struct.Struct("<I16sIq64sQ")
_E820_HEAD = struct.Struct("<I16sB3sq64sB3s4s")
_E820_ENTRY = struct.Struct("<QQII")
_LARGEST = 64 * 1024
_CPU_TYPE_AT = 20
_CPU_TYPES = (1, 255)  # x86_64, unknown


@dataclass(frozen=True)
class E820Entry:
    """One entry of the guest's memory map; address and length in bytes."""

    address: int
    length: int
    type: int


@dataclass(frozen=True)
class Hello:
    """What the device manager says of itself.

    ``start_time`` is in seconds since the epoch and stays the same over migration and snapshots
    of one run of a guest. ``max_gpa`` is the exclusive end of the guest's RAM (0 when unknown),
    None in the forms without it; ``cpu_type`` and ``e820`` are set in the form with a memory map.
    """

    struct_size: int
    uuid: uuids.UUID
    start_time: int
    name: str
    max_gpa: int | None
    cpu_type: int | None
    e820: tuple[E820Entry, ...]
    raw: bytes


#: Called with (sent by the tool?, bytes) for each record, to keep it in a transcript.
Tap = Callable[[bool, bytes], None]


def receive_hello(sock: socket.socket, timeout_s: float = 10, *, tap: Tap | None = None) -> Hello:
    """Read and check the device manager's record.

    :raises SilenceError: not complete in time. :raises SessionClosed: the stream ended.
    :raises MalformedMessage: names the field that is wrong. The socket stays open.
    """
    deadline = time.monotonic() + timeout_s
    start = read_exactly(sock, _SIZE.size, deadline=deadline, what="handshake, struct_size")
    (size,) = _SIZE.unpack(start)
    if not _OLD.size <= size <= _LARGEST:
        if tap:
            tap(False, start)
        raise MalformedMessage(
            f"handshake: struct_size is {size}, expected {_V12.size} (v12), {_OLD.size} or "
            f"{_V12.size} + 24 for each e820 entry"
        )
    raw = start + read_exactly(
        sock, size - _SIZE.size, deadline=deadline, what=f"handshake of {size} bytes"
    )
    if tap:
        tap(False, raw)
    return parse_hello(raw)


def parse_hello(raw: bytes) -> Hello:
    """The record in ``raw``, checked. :raises MalformedMessage: names the field."""
    (size,) = _SIZE.unpack_from(raw)
    if size != len(raw):
        raise MalformedMessage(f"handshake: struct_size is {size}, the record has {len(raw)} bytes")
    if size == _OLD.size:
        return _hello(raw, *_OLD.unpack(raw)[1:], max_gpa=None)
    # Without entries the form with a memory map has the size of v12's. The type of the CPU,
    # where v12 has zeros, tells them apart; of 0 (i386) both say the same: no memory known.
    if size == _V12.size and raw[_CPU_TYPE_AT] not in _CPU_TYPES:
        *fields, max_gpa = _V12.unpack(raw)
        return _hello(raw, *fields[1:], max_gpa=max_gpa)
    _, uuid, cpu_type, pad1, start_time, name, count, pad2, gap = _E820_HEAD.unpack_from(raw)
    expected = _E820_HEAD.size + count * _E820_ENTRY.size
    if size != expected:
        raise MalformedMessage(
            f"handshake: struct_size is {size}, expected {expected} for {count} e820 entries"
        )
    entries = []
    for i in range(count):
        address, length, kind, pad = _E820_ENTRY.unpack_from(
            raw, _E820_HEAD.size + i * _E820_ENTRY.size
        )
        _zero(f"e820[{i}].padding", pad)
        entries.append(E820Entry(address, length, kind))
    for label, rest in (("padding", pad1), ("padding after e820_count", pad2), ("gap", gap)):
        _zero(label, int.from_bytes(rest, "little"))
    plain = _hello(raw, uuid, 0, start_time, name, max_gpa=None)
    return replace(plain, cpu_type=cpu_type, e820=tuple(entries))


def _hello(
    raw: bytes, uuid: bytes, padding: int, start_time: int, name: bytes, *, max_gpa: int | None
) -> Hello:
    _zero("padding", padding)
    text, end, rest = name.partition(b"\0")
    if not end:
        raise MalformedMessage("handshake: name has no terminating zero", details=name.hex(" "))
    _zero("name after its terminating zero", int.from_bytes(rest, "little"))
    # Some QEMUs cut a long name within a character.
    decoded = text.decode(errors="replace")
    return Hello(len(raw), uuids.UUID(bytes=uuid), start_time, decoded, max_gpa, None, (), raw)


def _zero(label: str, value: int) -> None:
    if value:
        raise MalformedMessage(f"handshake: {label} is {value:#x}, expected zero")


def key_hash(key: bytes) -> bytes:
    """SHA-1 of the shared key's raw bytes: the cookie hash that the device manager compares."""
    return hashlib.sha1(key, usedforsecurity=False).digest()


def answer_record(
    *,
    key: bytes | None = None,
    cookie_hash: bytes | None = None,
    size: int = ANSWER_SIZE,
    struct_size: int | None = None,
    filler: int = 0,
) -> bytes:
    """The tool's record.

    :param key: the shared key; its hash goes into the record. Without key and cookie_hash: zeros.
    :param cookie_hash: 20 bytes instead, right or wrong.
    :param size: bytes of the record: more than 24 are filled with ``filler``, fewer cut it.
    :param struct_size: what the record says its size is, ``size`` when None.
    :raises UsageError: both key and hash, or a hash that has not 20 bytes.
    """
    if key is not None and cookie_hash is not None:
        raise UsageError("a handshake answer takes a key or a hash, not both")
    hashed = key_hash(key) if key is not None else cookie_hash or bytes(HASH_SIZE)
    if len(hashed) != HASH_SIZE:
        raise UsageError(f"a cookie hash has {HASH_SIZE} bytes, not {len(hashed)}")
    record = _SIZE.pack(size if struct_size is None else struct_size) + hashed
    return record[:size] + bytes([filler]) * (size - len(record))


def send_answer(
    sock: socket.socket,
    *,
    key: bytes | None = None,
    cookie_hash: bytes | None = None,
    size: int = ANSWER_SIZE,
    struct_size: int | None = None,
    filler: int = 0,
    timeout_s: float = 10,
    tap: Tap | None = None,
) -> bytes:
    """Send the record of :func:`answer_record`, which see; returns it.

    :raises SilenceError: the peer does not take it in time.
    """
    record = answer_record(
        key=key, cookie_hash=cookie_hash, size=size, struct_size=struct_size, filler=filler
    )
    if tap:
        tap(True, record)
    before = sock.gettimeout()
    sock.settimeout(timeout_s)
    try:
        sock.sendall(record)
    except TimeoutError:
        raise SilenceError(f"the handshake answer was not taken within {timeout_s:g} s") from None
    finally:
        sock.settimeout(before)
    return record
