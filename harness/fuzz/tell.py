# SPDX-License-Identifier: GPL-2.0-or-later
"""A case for people: operations and messages by name, with what was answered."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence

from harness.abi import Profile
from harness.abi.reading import read_event_reply, read_request
from harness.fuzz.calls import Call
from harness.fuzz.expect import Sent
from harness.fuzz.messages import Session
from harness.fuzz.wire import Kind, Op, Outcome, Replied, Streamed

__all__ = ["tell"]

_MESSAGES = 60
"""So many messages of a session are told, the last ones."""
_OPERATIONS = 120
_LONG = 100


def tell(profile: Profile, ops: Sequence[Op], outcome: Outcome | None = None) -> str:
    """The operations of a case, one line each, those of a session's messages indented.

    :param outcome: what became of it, if that is known.
    """
    results = {lane: deque(found) for lane, found in outcome.lanes.items()} if outcome else {}
    lines = []
    for number, op in enumerate(ops):
        there = results.get(op.lane)
        result = there.popleft() if there else None
        lines.append(f"{number:4} {'  ' * op.lane}{_operation(op, result)}")
        if isinstance(op.expect, Session):
            came = result.replies if isinstance(result, Streamed) else []
            lines += _session(profile, op.expect, came)
    if len(lines) > _OPERATIONS * 4:
        lines = ["  ...", *lines[-_OPERATIONS * 4 :]]
    return "\n".join(lines)


def _operation(op: Op, result: int | Streamed | None) -> str:
    if isinstance(op.expect, Call):
        call = op.expect
        text = f"ioctl {call.name or 'unknown'} vm {call.vm} {call.arg.name}"
        if call.name == "HOOK":
            text += f" slot {call.slot} padding {call.padding:#x}"
        elif call.name in ("COMMAND", "EVENT"):
            text += f" allow {call.allow} id {call.id}"
        text += " with a failure" if call.may_fail else ""
    elif op.kind is Kind.STREAM:
        text = f"STREAM {op.payload[:8].hex(' ')}"
    else:
        text = f"{op.kind.name} {op.payload[:24].hex(' ')}"
    if isinstance(result, Streamed):
        text += (
            f" -> {len(result.replies)} replies, {result.events} events, {result.answered} "
            f"answered ({result.wrongly} wrongly), {result.written} bytes sent"
            f"{', ended' if result.ended else ''}{', STUCK' if result.stuck else ''}"
        )
    elif result is not None:
        text += f" -> {errno.errorcode.get(result, result) if result else 0}"
    return text


def _session(profile: Profile, session: Session, came: Sequence[Replied]) -> list[str]:
    replies = {reply.seq: reply for reply in came}
    lines = [f"{'':9}session: closes {session.closes.value}, waits for {session.mode.name}"]
    if len(session.sent) > _MESSAGES:
        lines.append(f"{'':9}... {len(session.sent) - _MESSAGES} messages before")
    for one in session.sent[-_MESSAGES:]:
        lines.append(f"{'':9}{_message(profile, one)}{_answer(one, replies.get(one.seq))}")
    if session.tail:
        lines.append(f"{'':9}bytes {session.tail[:48].hex(' ')} ({len(session.tail)} in all)")
    return lines


def _message(profile: Profile, sent: Sent) -> str:
    if sent.id == profile.vcpu_event:
        name, fields = read_event_reply(profile, sent.payload)
        name = f"reply to event {name}"
    else:
        name, fields = read_request(profile, sent.id, sent.payload)
    inside = " ".join(f"{key}={_short(value)}" for key, value in fields.items())
    return f"{sent.seq:#x} {name} ({len(sent.payload)} bytes) {inside}"


def _short(value: object) -> str:
    if isinstance(value, bytes):
        value = value.hex()
    text = f"{value:#x}" if isinstance(value, int) else str(value)
    return text if len(text) <= _LONG else text[:_LONG] + "..."


def _answer(sent: Sent, reply: Replied | None) -> str:
    if not sent.errors:
        return ""
    right = "|".join(str(one) for one in sorted(sent.errors, reverse=True))
    if reply is None:
        return f"  -> no reply [{right}]"
    error = int.from_bytes(reply.head[:4], "little", signed=True)
    return f"  -> {error}, {reply.size} bytes [{right}]"
