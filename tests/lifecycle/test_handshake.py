# SPDX-License-Identifier: GPL-2.0-or-later
"""How QEMU and an introspection tool greet each other.

The machines here have no operating system: only QEMU and the kernel matter.
"""

from __future__ import annotations

import struct
import time
import uuid
from typing import Any

import pytest

from harness.errors import SilenceError
from harness.tool import key_hash

from .stage import RECONNECT_MS, Stage, ended, wait_until

MIB = 1 << 20
GIB = 1 << 30

RECORD = struct.Struct("<I16sIq64sQ")
ANSWER = struct.Struct("<I20s")


def host_time_s(stage: Stage) -> int:
    """The clock that the host's QEMU reads its start time from."""
    return int(stage.host.run("date +%s").stdout)


@pytest.mark.clause("QEMU-HSK-QEMU-CLIENT", "QEMU-HSK-OUT-LAYOUT")
def test_record(stage: Stage) -> None:
    """QEMU connects, speaks first, and sends 104 bytes in which everything is in its place."""
    tool = stage.tool()
    guest = stage.idle(tool, name="a machine", label="idle", uuid=uuid.uuid4(), memory_mb=16)
    sock = tool.connection()
    raw = b""
    while len(raw) < RECORD.size:
        chunk = sock.recv(RECORD.size - len(raw))
        assert chunk, f"QEMU closed after {len(raw)} bytes"
        raw += chunk
    sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    size, found_uuid, padding, start_time, name, max_gpa = RECORD.unpack(raw)
    now = host_time_s(stage)
    sock.close()
    assert size == RECORD.size
    assert found_uuid == guest.uuid.bytes
    assert padding == 0
    assert now - 10 <= start_time <= now, "the start time is seconds since the epoch"
    assert name == b"a machine".ljust(64, b"\0")
    assert max_gpa == 16 * MIB


@pytest.mark.clause("QEMU-HSK-OUT-LAYOUT")
def test_long_name_is_cut(stage: Stage) -> None:
    """A name too long for its field is cut at 63 characters, so that it ends with a zero."""
    tool = stage.tool()
    guest = stage.idle(tool, name="n" * 80, label="idle")
    sock, hello = tool.hello()
    sock.close()
    assert hello.name == "n" * 63
    assert "warning" in guest.program.wait_line("63 bytes").lower(), (
        "the name was cut without a word"
    )


@pytest.mark.clause("QEMU-HSK-OUT-LAYOUT")
def test_long_name_is_cut_between_characters(stage: Stage) -> None:
    """A character of several bytes that does not fit is left out, not cut: the name stays text."""
    tool = stage.tool()
    stage.idle(tool, name="n" * 62 + "\u00e9" * 9, label="idle")
    sock, hello = tool.hello()
    sock.close()
    assert hello.name == "n" * 62


@pytest.mark.clause("QEMU-HSK-MAXGPA")
def test_max_gpa_with_high_memory(stage: Stage) -> None:
    """max_gpa is where the highest memory ends, above the hole below 4 GiB."""
    tool = stage.tool()
    stage.idle(tool, memory_mb=32, extra=("-machine", f"max-ram-below-4g={8 * MIB}"))
    sock, hello = tool.hello()
    sock.close()
    assert hello.max_gpa == 4 * GIB + 24 * MIB


@pytest.mark.clause("QEMU-HSK-E820")
def test_e820(stage: Stage) -> None:
    """With handshake=e820 QEMU tells the type of the CPU and the whole memory map, sorted."""
    tool = stage.tool()
    guest = stage.idle(
        tool, memory_mb=32, handshake="e820", extra=("-machine", f"max-ram-below-4g={8 * MIB}")
    )
    sock, hello = tool.hello()
    sock.close()
    assert hello.uuid == guest.uuid
    assert hello.name == guest.name
    assert hello.max_gpa is None
    assert hello.cpu_type == 1, "x86_64"
    addresses = [entry.address for entry in hello.e820]
    assert addresses == sorted(addresses)
    ram = [(entry.address, entry.length) for entry in hello.e820 if entry.type == 1]
    assert ram == [(0, 8 * MIB), (4 * GIB, 24 * MIB)]
    assert len(hello.e820) > len(ram), "what is reserved belongs into the table"
    tool.hook()


@pytest.mark.clause("QEMU-HSK-IN-LAYOUT", "QEMU-HSK-NOKEY")
def test_any_tool_without_key(stage: Stage) -> None:
    """Without a key QEMU warns, and takes any tool whatever hash it shows."""
    tool = stage.tool()
    guest = stage.idle(tool)
    sock, _ = tool.hello()
    sock.sendall(ANSWER.pack(ANSWER.size, b"\xa5" * 20))
    tool.greeted(sock)
    assert "warning" in guest.program.wait_line("key").lower()


@pytest.mark.clause("QEMU-HSK-IN-LAYOUT", "QEMU-HSK-COOKIE")
@pytest.mark.parametrize("key", [b"a secret, with a comma", bytes(range(256))], ids=["text", "raw"])
def test_right_key(stage: Stage, key: bytes) -> None:
    """The tool that shows the SHA-1 of the key's bytes is taken."""
    tool = stage.tool(key=key)
    stage.idle(tool)
    sock, _ = tool.hello()
    sock.sendall(ANSWER.pack(ANSWER.size, key_hash(key)))
    tool.greeted(sock)


@pytest.mark.clause("QEMU-HSK-COOKIE")
def test_wrong_key(stage: Stage) -> None:
    """A wrong hash, and no hash, end the connection; QEMU tries again and takes the right one."""
    tool = stage.tool(key=b"right")
    stage.idle(tool)
    nearly = key_hash(b"right")[:19] + b"\0"
    for wrong in (key_hash(b"wrong"), bytes(20), nearly):
        sock, _ = tool.hello()
        sock.sendall(ANSWER.pack(ANSWER.size, wrong))
        assert ended(sock, timeout_s=5), "QEMU kept a tool that does not know the key"
    tool.hook()


@pytest.mark.clause("QEMU-HSK-IN-LARGER-OK")
@pytest.mark.parametrize("size", [25, 32, 104, 4096])
def test_longer_answer(stage: Stage, size: int) -> None:
    """A longer answer is consumed whole: the kernel's first message is the one after it."""
    tool = stage.tool(key=b"right")
    stage.idle(tool)
    sock, _ = tool.hello()
    sock.sendall(ANSWER.pack(size, key_hash(b"right")).ljust(size, b"\xee"))
    tool.greeted(sock)


@pytest.mark.clause("QEMU-HSK-IN-LAYOUT", "QEMU-HSK-IN-LARGER-OK")
def test_answer_in_pieces(stage: Stage) -> None:
    """An answer may arrive a byte at a time: a stream has no message boundaries."""
    tool = stage.tool(key=b"right")
    stage.idle(tool)
    sock, _ = tool.hello()
    for byte in ANSWER.pack(28, key_hash(b"right")) + b"more":
        sock.sendall(bytes([byte]))
        time.sleep(0.01)  # so that they do not share a segment
    tool.greeted(sock)


@pytest.mark.clause("QEMU-HSK-IN-LAYOUT")
def test_answer_with_a_command_behind_it(stage: Stage) -> None:
    """A command sent right behind the answer is the kernel's: QEMU does not read too far."""
    tool = stage.tool()
    stage.idle(tool)
    sock, _ = tool.hello()
    version = stage.profile.commands["GET_VERSION"].id
    sock.sendall(ANSWER.pack(ANSWER.size, bytes(20)) + struct.pack("<HHI", version, 0, 77))
    sock.settimeout(5)
    head = sock.recv(8)
    sock.close()
    assert struct.unpack("<HHI", head) == (version, 24, 77)


@pytest.mark.clause("QEMU-HSK-IN-SHORT")
@pytest.mark.parametrize("size", [0, 3, 4, 8, 23])
def test_short_answer(stage: Stage, size: int) -> None:
    """An answer below 24 bytes ends the connection; QEMU tries again.

    A size that does not even cover itself may be refused at once, or be taken for the
    beginning of an answer that never becomes complete.
    """
    tool = stage.tool()
    # An answer that is complete is refused at once: nothing else ends it in time.
    stage.idle(tool, handshake_timeout_s=2 if size < 4 else 60)
    tool.hello()[0].close()
    sock, _ = tool.hello()
    sock.sendall(ANSWER.pack(size, bytes(20))[: max(size, 4)])
    assert ended(sock, timeout_s=7), f"QEMU took an answer of {size} bytes"
    tool.hook()


@pytest.mark.clause("QEMU-HSK-TIMEOUT")
@pytest.mark.parametrize(
    "part",
    [b"", ANSWER.pack(24, b"")[:3], ANSWER.pack(24, b"")[:23], ANSWER.pack(25, b"")],
    ids=["nothing", "half-a-size", "a-byte-missing", "a-byte-of-more-missing"],
)
def test_handshake_timeout(stage: Stage, part: bytes) -> None:
    """A tool that does not complete its answer is dropped after handshake_timeout; QEMU retries."""
    tool = stage.tool()
    stage.idle(tool, handshake_timeout_s=2)
    # Nobody knows when QEMU sent its first record: it may have waited for us since.
    first, _ = tool.hello()
    left = time.monotonic()
    first.close()
    sock, _ = tool.hello()
    sock.sendall(part)
    assert ended(sock, timeout_s=6), "QEMU still waits for an answer"
    # It came back after its reconnect time and waited from then on, however late we saw that.
    waited_s = time.monotonic() - left - RECONNECT_MS / 1000
    assert waited_s > 1.9, f"QEMU waited only {waited_s:.2f} s"
    tool.hook()


@pytest.mark.clause("QEMU-HSK-TIMEOUT")
def test_handshake_timeout_by_default(stage: Stage) -> None:
    """The default of handshake_timeout is 10 seconds, that of unhook_timeout 60."""
    tool = stage.tool()
    guest = stage.idle(tool)
    path = "/objects/introspection0"
    assert guest.qmp("qom-get", path=path, property="handshake_timeout") == 10
    assert guest.qmp("qom-get", path=path, property="unhook_timeout") == 60
    assert guest.qmp("qom-get", path=path, property="async_unhook") is True


@pytest.mark.clause("QEMU-DISC-UNHOOK", "HOOK-REHOOK", "HOOK-DEFAULT-DENY")
def test_tool_leaves_and_returns(stage: Stage) -> None:
    """When the tool closes QEMU unhooks, reconnects, and hooks again; nothing is inherited."""
    tool = stage.tool()
    guest = stage.idle(tool)
    for _ in range(3):
        hello, session = tool.hook()
        assert hello.uuid == guest.uuid
        # Enabled in each session, never in force in the next: see below.
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
        session.close()
    _, session = tool.hook()
    guest.qmp("stop")
    session.expect_close(timeout_s=5)
    assert session.count("UNHOOK") == 0


@pytest.mark.clause("QEMU-DISC-UNHOOK")
def test_tool_away_for_long(stage: Stage) -> None:
    """QEMU keeps trying while nobody listens, and the machine runs meanwhile."""
    tool = stage.tool()
    guest = stage.idle(tool)
    _, session = tool.hook()
    port = tool.listener.port
    tool.close()
    session.close()
    wait_until(
        "QEMU notices that its tool is gone",
        lambda: guest.qmp("qom-get", path="/chardevs/tool", property="connected") is False,
        timeout_s=5,
    )
    assert guest.status() == "running"
    stage.tool("returned", port=port).hook()


@pytest.mark.clause("QEMU-HSK-QEMU-CLIENT")
def test_hook_while_vcpus_are_stopped(stage: Stage) -> None:
    """A machine that was started with its vCPUs stopped (-S) can be introspected all the same."""
    tool = stage.tool()
    guest = stage.idle(tool, paused=True)
    _, session = tool.hook()
    assert guest.status() == "prelaunch"
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == 1
    guest.qmp("cont")
    assert session.command("GET_VERSION").ok()


@pytest.mark.clause("QEMU-CHARDEV-FD")
def test_chardev_fd(stage: Stage) -> None:
    """A socket chardev tells its descriptor, -1 without a connection, and cannot be told one."""
    tool = stage.tool()
    guest = stage.idle(tool)
    where: dict[str, Any] = {"path": "/chardevs/tool", "property": "fd"}
    tool.hook()
    assert guest.qmp("qom-get", **where) >= 0
    assert guest.refusal("qom-set", **where, value=7)
    guest.qmp("stop")
    wait_until("fd is -1", lambda: guest.qmp("qom-get", **where) == -1, timeout_s=5)
    with pytest.raises(SilenceError):
        tool.hello(timeout_s=1)


@pytest.mark.clause("QEMU-CHARDEV-FD", "QEMU-STOP-NORECONNECT", "QEMU-CONT-RECONNECT")
def test_chardev_reconnecting(stage: Stage) -> None:
    """A socket chardev tells whether it reconnects, which a stop changes and cont restores."""
    tool = stage.tool()
    guest = stage.idle(tool)
    where: dict[str, Any] = {"path": "/chardevs/tool", "property": "reconnecting"}
    tool.hook()
    assert guest.qmp("qom-get", **where) is True
    assert guest.refusal("qom-set", **where, value=False)
    guest.qmp("stop")
    assert guest.qmp("qom-get", **where) is False
    guest.qmp("cont")
    assert guest.qmp("qom-get", **where) is True
    tool.hook()
