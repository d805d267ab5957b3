# SPDX-License-Identifier: GPL-2.0-or-later
"""Listener and handshake: every record size, every wrong field, every kind of socket."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
import uuid
from pathlib import Path

import pytest

from harness.errors import (
    ConformanceError,
    DeadlineError,
    InfraError,
    MalformedMessage,
    SessionClosed,
    SilenceError,
    UsageError,
)
from harness.tool import Listener, key_hash, receive_hello, send_answer
from harness.tool.handshake import E820Entry, answer_record, parse_hello

ID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
START = 1_700_000_000


def hello(
    size: int = 104, *, name: bytes = b"guest", padding: int = 0, max_gpa: int = 1 << 32
) -> bytes:
    """A record of QEMU, 96 or 104 bytes."""
    record = struct.pack("<I16sIq64s", size, ID.bytes, padding, START, name)
    return record if size == 96 else record + struct.pack("<Q", max_gpa)


def e820_hello(entries: int, *, count: int | None = None, size: int | None = None) -> bytes:
    """A record with a memory map."""
    record = struct.pack(
        "<I16sB3sq64sB7s",
        size or 104 + 24 * entries,
        ID.bytes,
        1,
        b"",
        START,
        b"guest",
        entries if count is None else count,
        b"",
    )
    for i in range(entries):
        record += struct.pack("<QQII", i << 30, 1 << 30, 1, 0)
    return record


def pair() -> tuple[socket.socket, socket.socket]:
    """Connected sockets, ours and QEMU's."""
    return socket.socketpair()


def test_v12_record() -> None:
    """104 bytes: identity, start time, name, end of RAM."""
    ours, theirs = pair()
    with ours, theirs:
        theirs.sendall(hello())
        kept: list[tuple[bool, bytes]] = []
        got = receive_hello(ours, 5, tap=lambda out, data: kept.append((out, data)))
        assert (got.struct_size, got.uuid, got.start_time) == (104, ID, START)
        assert (got.name, got.max_gpa, got.cpu_type, got.e820) == ("guest", 1 << 32, None, ())
        assert kept == [(False, hello())]


def test_record_without_max_gpa() -> None:
    """96 bytes: the older form."""
    assert parse_hello(hello(96)).max_gpa is None


def test_record_with_memory_map() -> None:
    """104 + 24 n bytes."""
    got = parse_hello(e820_hello(2))
    assert (got.struct_size, got.cpu_type, got.max_gpa) == (152, 1, None)
    assert got.e820[1] == E820Entry(1 << 30, 1 << 30, 1)


@pytest.mark.parametrize("cpu_type", [1, 255])
def test_record_with_an_empty_memory_map(cpu_type: int) -> None:
    """As long as v12's record; the type of the CPU shows that it is none."""
    record = bytearray(e820_hello(0))
    record[20] = cpu_type
    got = parse_hello(bytes(record))
    assert (got.struct_size, got.cpu_type, got.max_gpa, got.e820) == (104, cpu_type, None, ())


def test_name_that_was_cut_within_a_character() -> None:
    """It is a name all the same."""
    assert parse_hello(hello(name=b"caf\xc3")).name == "caf\ufffd"


def test_record_in_pieces() -> None:
    """A stream may bring it byte by byte."""
    ours, theirs = pair()
    with ours, theirs:

        def send() -> None:
            for byte in hello():
                theirs.sendall(bytes([byte]))

        thread = threading.Thread(target=send)
        thread.start()
        assert receive_hello(ours, 5).name == "guest"
        thread.join()


def test_nothing_is_read_beyond_the_record() -> None:
    """What follows belongs to the kernel's session."""
    ours, theirs = pair()
    with ours, theirs:
        theirs.sendall(hello() + b"kernel")
        receive_hello(ours, 5)
        assert ours.recv(100) == b"kernel"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (struct.pack("<I", 3), "struct_size is 3, expected 104"),
        (struct.pack("<I", 95), "struct_size is 95, expected 104"),
        (struct.pack("<I", 1 << 20), "struct_size is 1048576, expected 104"),
        (hello(padding=5), "padding is 0x5, expected zero"),
        (hello(name=b"x" * 64), "name has no terminating zero"),
        (hello(name=b"a\0b"), "name after its terminating zero is 0x62, expected zero"),
        (e820_hello(2, count=3), "struct_size is 152, expected 176 for 3 e820 entries"),
        (e820_hello(1)[:-1] + b"\1", r"e820\[0\]\.padding is 0x1000000, expected zero"),
    ],
)
def test_malformed_record(record: bytes, message: str) -> None:
    """Each error names the field."""
    ours, theirs = pair()
    with ours, theirs:
        theirs.sendall(record)
        with pytest.raises(MalformedMessage, match=message):
            receive_hello(ours, 5)


def test_record_that_does_not_come() -> None:
    """A deadline for the whole record, and the bytes that came."""
    ours, theirs = pair()
    with ours, theirs:
        theirs.sendall(hello()[:50])
        with pytest.raises(SilenceError, match="handshake of 104 bytes: 46 of 100 bytes came"):
            receive_hello(ours, 0.05)
        theirs.close()
        with pytest.raises(SessionClosed, match="struct_size: the stream ended after 0 of 4 bytes"):
            receive_hello(ours, 5)


def test_answer_with_key() -> None:
    """24 bytes: the size, and the SHA-1 of the key's raw bytes."""
    ours, theirs = pair()
    with ours, theirs:
        sent = send_answer(ours, key=b"secret")
        assert theirs.recv(100) == sent == struct.pack("<I", 24) + hashlib.sha1(b"secret").digest()
        assert key_hash(b"secret") == sent[4:]


def test_other_answers() -> None:
    """Without key, longer, shorter, and lying ones."""
    assert answer_record() == struct.pack("<I20x", 24)
    assert answer_record(cookie_hash=b"h" * 20)[4:] == b"h" * 20
    longer = answer_record(key=b"k", size=40, filler=0xAA)
    assert (longer[:4], len(longer), longer[24:]) == (struct.pack("<I", 40), 40, b"\xaa" * 16)
    assert answer_record(size=10) == struct.pack("<I6x", 10)
    assert answer_record(size=24, struct_size=3)[:4] == struct.pack("<I", 3)
    assert answer_record(size=3, struct_size=24) == b"\x18\0\0"
    with pytest.raises(UsageError, match="a key or a hash"):
        answer_record(key=b"a", cookie_hash=b"b" * 20)
    with pytest.raises(UsageError, match="20 bytes, not 3"):
        answer_record(cookie_hash=b"abc")


def test_answer_that_nobody_takes() -> None:
    """Sending has a deadline."""
    ours, theirs = pair()
    with ours, theirs, pytest.raises(SilenceError, match=r"not taken within 0\.1 s"):
        send_answer(ours, size=16 << 20, timeout_s=0.1)


# -- the listener --------------------------------------------------------------------------------


def test_tcp() -> None:
    """Any free port; connections without delay of small messages."""
    with Listener() as listener:
        assert listener.address == f"127.0.0.1:{listener.port}"
        client = socket.create_connection(("127.0.0.1", listener.port))
        with client, listener.accept(5) as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            client.sendall(b"x")
            assert connection.recv(1) == b"x"


def test_unix(tmp_path: Path) -> None:
    """The socket's file goes away with the listener."""
    path = tmp_path / "tool.sock"
    with Listener.unix(path) as listener:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        listener.accept(5).close()
        client.close()
    assert not path.exists()


def test_vsock() -> None:
    """A port of one's own on AF_VSOCK, where the machine has it."""
    try:
        listener = Listener.vsock()
    except (InfraError, OSError) as error:
        pytest.skip(f"no vsock here: {error}")
    with listener:
        assert listener.port > 0


def test_nobody_connects() -> None:
    """A fault of the device manager, unless the caller says that it is ours."""
    with Listener() as listener:
        with pytest.raises(
            SilenceError, match=r"nobody connected to 127\.0\.0\.1:\d+ within 0\.05"
        ):
            listener.accept(0.05)
        with pytest.raises(DeadlineError):
            listener.accept(0.01, error=DeadlineError)
        listener.no_connection(0.02)


def test_somebody_connects_who_must_not() -> None:
    """No connection is due while a guest is stopped."""
    with Listener() as listener:
        client = socket.create_connection(("127.0.0.1", listener.port))
        with client, pytest.raises(ConformanceError, match="none was due"):
            listener.no_connection(5)


def test_port_in_use() -> None:
    """One clear message with what to do."""
    with Listener() as first, pytest.raises(InfraError, match=r"in use .*port 0 .*ss -ltnp"):
        Listener(port=first.port)


def test_reconnecting() -> None:
    """Several connections one after the other."""
    with Listener() as listener:
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", listener.port))
            listener.accept(5).close()
            client.close()
        started = time.monotonic()
        with pytest.raises(SilenceError):
            listener.accept(0.05)
        assert time.monotonic() - started < 3
