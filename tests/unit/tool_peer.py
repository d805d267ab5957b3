# SPDX-License-Identifier: GPL-2.0-or-later
"""The other end of a session's socket, played by a test: sends what it is told, right or wrong.

It is there to try the tool's error reports, and knows nothing of introspection.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import Any

from harness.abi import Codec, load_profile
from harness.errors import HarnessError
from harness.tool import Session
from harness.tool.framing import frame, read_exactly

PROFILE = load_profile("v12")
CODEC = Codec(PROFILE)


def error_code(err: int = 0, padding: int = 0) -> bytes:
    """A kvmi_error_code."""
    return struct.pack("<iI", err, padding)


def event_payload(
    name: str = "HYPERCALL", *, vcpu: int = 0, own: bytes = b"", rip: int = 0
) -> bytes:
    """A good event, its own part from ``own`` or zero."""
    definition = PROFILE.events[name]
    if not definition.is_vcpu:
        return bytes(8)
    arch = {"mode": 8, "regs": {"rip": rip}}
    common = CODEC.pack("kvmi_vcpu_event", size=544, vcpu=vcpu, arch=arch)
    size = definition.payload.size if definition.payload else 0
    return CODEC.pack("kvmi_event_hdr", event=definition.id) + common + own.ljust(size, b"\0")


class Peer:
    """One end of a socket pair, the other end of which is a session's."""

    def __init__(self, **options: Any) -> None:
        ours, theirs = socket.socketpair()
        self.sock = ours
        self.sock.settimeout(10)
        self.session = Session(theirs, **options)

    def send(self, id: int, payload: bytes, seq: int) -> None:
        """Any message."""
        self.sock.sendall(frame(id, payload, seq))

    def event(self, name: str = "HYPERCALL", *, seq: int = 1, **fields: Any) -> None:
        """A good event."""
        id = 1 if PROFILE.events[name].is_vcpu else 0
        self.send(id, event_payload(name, **fields), seq)

    def read(self) -> tuple[int, int, bytes]:
        """The next message of the tool: id, seq, payload."""
        deadline = time.monotonic() + 10
        id, size, seq = struct.unpack(
            "<HHI", read_exactly(self.sock, 8, deadline=deadline, what="header")
        )
        return id, seq, read_exactly(self.sock, size, deadline=deadline, what="payload")

    def close(self) -> None:
        """Close both ends, whatever the session has met."""
        self.sock.close()
        with contextlib.suppress(HarnessError):
            self.session.close()
