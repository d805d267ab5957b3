# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks that several files of the suite use."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from harness.abi import Codec, Command, Event, Profile
from harness.errors import ConformanceError, SessionClosed
from harness.manager.small import SmallManager
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.tool import EventMessage, Session
from harness.tool.framing import HEADER, frame, read_exactly

__all__ = [
    "ALWAYS_ALLOWED",
    "Message",
    "RawTool",
    "all_fail",
    "allowed_commands",
    "allowed_events",
    "continues",
    "enable",
    "ends_dead",
    "event_size",
    "gone",
    "kernel_threads",
    "known_commands",
    "near_misses",
    "next_event_of",
    "reply_size",
    "requires",
    "silent",
    "supported_commands",
    "supported_events",
    "trap_of",
    "unwanted",
]

ALWAYS_ALLOWED = {"GET_VERSION", "VM_CHECK_COMMAND", "VM_CHECK_EVENT"}
HUP_S = 5.0


class Message(NamedTuple):
    """One message as it came."""

    id: int
    seq: int
    payload: bytes


class RawTool:
    """A tool that writes and reads bytes itself, for tests of the message layer."""

    def __init__(self, sock: socket.socket, *, codec: Codec, patience: float = 1.0) -> None:
        self.socket = sock
        self._codec = codec
        self._patience = patience

    def send(self, id: int, payload: bytes = b"", *, seq: int, size: int | None = None) -> None:
        """Send one message in one go."""
        self.socket.sendall(frame(id, payload, seq, size=size))

    def receive(self, *, timeout_s: float = 5.0) -> Message:
        """Receive one message."""
        deadline = time.monotonic() + timeout_s * self._patience
        header = read_exactly(self.socket, HEADER.size, deadline=deadline, what="message header")
        id, size, seq = HEADER.unpack(header)
        payload = read_exactly(self.socket, size, deadline=deadline, what="message payload")
        return Message(id, seq, payload)

    def ask(self, id: int, payload: bytes = b"", *, seq: int) -> bytes:
        """Send a command and answer the payload of the next message, which must reply to it."""
        self.send(id, payload, seq=seq)
        reply = self.receive()
        if (reply.id, reply.seq) != (id, seq):
            raise ConformanceError(
                f"expected a reply with id {id} and seq {seq}, got id {reply.id} seq {reply.seq}"
            )
        return reply.payload

    def command(self, name: str, *, seq: int, **fields: Any) -> bytes:
        """:meth:`ask` a command that is well formed."""
        return self.ask(*self._codec.encode_command(name, **fields), seq=seq)

    def ended(self, *, timeout_s: float = 5.0) -> None:
        """Check that the kernel closed the socket without another byte."""
        try:
            data = read_exactly(
                self.socket,
                1,
                deadline=time.monotonic() + timeout_s * self._patience,
                what="end of stream",
            )
        except SessionClosed:
            return
        raise ConformanceError(f"expected the end of the stream, got the byte {data.hex()}")

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def reset_connection(self) -> None:
        """Close the socket so that the peer sees an error, not an orderly end (TCP)."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def continues(session: Session) -> None:
    """Check that the session still works, by a command that must always succeed."""
    session.command("GET_VERSION").ok()


def silent(session: Session, *, vcpus: Iterable[int] = ()) -> None:
    """Check that no event is on its way.

    Not by waiting: everything the kernel had to send before it answered GET_VERSION, or a
    command that a vCPU handles itself, is in the stream before that answer.
    """
    pending = [session.send("VCPU_GET_INFO", vcpu=vcpu) for vcpu in vcpus]
    for one in pending:
        one.reply(10).ok()
    continues(session)
    session.no_event(within_s=0)


def all_fail(
    session: Session, command: str, error: str, wrongs: Iterable[Mapping[str, Any]]
) -> None:
    """Check that a command fails like that with each of these fields; sends them in one go."""
    pending = [session.send(command, **wrong) for wrong in wrongs]
    for one in pending:
        one.reply(10).fails(error)


def _errors(
    session: Session, query: str, known: Mapping[str, Command] | Mapping[str, Event]
) -> dict[str, str | None]:
    """By name (v12's): what a query for it answers."""
    pending = {one.common: session.send(query, id=one.id) for one in known.values()}
    return {name: one.reply(10).error for name, one in pending.items()}


def known_commands(session: Session, profile: Profile) -> set[str]:
    """Names of the commands that this kernel does not call unknown when it gets one."""
    asked = {one.common: session.send_raw(one.id) for one in profile.commands.values()}
    errors = {name: session.reply_to(seq).error for name, seq in asked.items()}
    return {name for name, error in errors.items() if error != profile.unknown_command}


def supported_commands(session: Session, profile: Profile) -> set[str]:
    """Names of the commands that this kernel has."""
    errors = _errors(session, "VM_CHECK_COMMAND", profile.commands)
    return {name for name, error in errors.items() if error != profile.unknown_query}


def allowed_commands(session: Session, profile: Profile) -> set[str]:
    """Names of the commands that VM_CHECK_COMMAND calls usable now."""
    errors = _errors(session, "VM_CHECK_COMMAND", profile.commands)
    return {name for name, error in errors.items() if error is None}


def supported_events(session: Session, profile: Profile) -> set[str]:
    """Names of the events that this kernel has."""
    errors = _errors(session, "VM_CHECK_EVENT", profile.events)
    return {name for name, error in errors.items() if error != profile.unknown_query}


def allowed_events(session: Session, profile: Profile) -> set[str]:
    """Names of the events that VM_CHECK_EVENT calls usable now."""
    errors = _errors(session, "VM_CHECK_EVENT", profile.events)
    return {name for name, error in errors.items() if error is None}


def requires(session: Session, *, command: str = "", event: str = "") -> None:
    """Skip the test's clauses if the kernel says that it lacks that command or event."""
    lacks = session.profile.unknown_query
    if command and session.command("VM_CHECK_COMMAND", id=command).error == lacks:
        skip_clause(f"this kernel has no {command} (VM_CHECK_COMMAND answers {lacks})")
    if event and session.command("VM_CHECK_EVENT", id=event).error == lacks:
        skip_clause(f"this kernel has no {event} event (VM_CHECK_EVENT answers {lacks})")


def enable(session: Session, event: str, *, vcpu: int = 0, on: bool = True) -> None:
    """Enable or disable a vCPU event, which has to succeed."""
    session.command("VCPU_CONTROL_EVENTS", vcpu=vcpu, event_id=event, enable=int(on)).ok()


def next_event_of(session: Session, kind: str, *, vcpu: int = 0) -> EventMessage:
    """Wait for the next event, which has to be of that kind and from that vCPU."""
    event = session.next_event(timeout_s=5)
    if event.name != session.profile.event(kind).name or event.vcpu != vcpu:
        raise ConformanceError(
            f"expected a {kind} event of vCPU {vcpu}, got {event.name} of vCPU {event.vcpu}"
        )
    return event


def trap_of(event: EventMessage) -> tuple[int, int, int]:
    """Vector, error code and address of a TRAP event; versions call them differently."""
    vector, error_code, address = (
        value for name, value in event.fields.items() if not name.startswith("padding")
    )
    return vector, error_code, address


def event_size(profile: Profile, name: str) -> int:
    """Bytes of the payload of a message that carries such an event."""
    event, header = profile.event(name), profile.event_header
    size = header.size if header else 0
    if event.is_vcpu or header is None:
        size += profile.event_common.size
    return size + (event.payload.size if event.payload else 0)


def reply_size(profile: Profile, name: str) -> int:
    """Bytes of the payload of a reply to such a command, when it succeeds."""
    reply = profile.command(name).reply
    return 8 + (reply.size if reply else 0)


def near_misses(request: int) -> list[int]:
    """Requests of ioctls that differ from this one in direction or size only."""
    if not request >> 16:
        return [request | 0x4008_0000]
    size = 4 << 16
    return [request & 0xFFFF, request ^ 0xC000_0000, request - size, request + size]


def unwanted(vm: SmallVm) -> str:
    """What PREUNHOOK answers while the tool has not enabled the event."""
    errors = vm.manager.profile.ioctl("PREUNHOOK").errors
    return "ENOENT" if "ENOENT" in errors else "OK"


def gone(vm: SmallVm) -> str:
    """What PREUNHOOK answers when the tool is gone."""
    errors = vm.manager.profile.ioctl("PREUNHOOK").errors
    return "ENOENT" if "ENOENT" in errors else "EFAULT"


def kernel_threads(manager: SmallManager) -> set[str]:
    """Kernel threads by PID and name, without the workers that come and go."""
    return {name for name in manager.threads("", kernel=True) if " kworker" not in name}


def ends_dead(manager: SmallManager, vm: SmallVm) -> None:
    """Check that the device manager sees the end of a session on its socket."""
    if "HUP" not in manager.poll(vm.socket, "HUP", within_s=HUP_S * manager.host.patience):
        raise ConformanceError(f"the hooked socket shows no hang-up after {HUP_S:g} s")
