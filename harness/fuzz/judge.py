# SPDX-License-Identifier: GPL-2.0-or-later
"""Is what came back what had to come?

Faults are told as text, one line each; no fault, no text. What depends on the order in which
threads get somewhere is not demanded.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Iterator, Sequence

from harness.abi import Profile
from harness.fuzz.calls import Call
from harness.fuzz.expect import Closes, Sent
from harness.fuzz.messages import Session
from harness.fuzz.wire import Arg, Kind, Mode, Op, Outcome, Streamed

__all__ = ["judge"]

_ERROR_CODE = struct.Struct("<iI")
_GONE = {errno.EBADF}
_POINTERS = (Arg.NULL, Arg.UNMAPPED, Arg.KERNEL, Arg.EDGE)


def judge(profile: Profile, ops: Sequence[Op], outcome: Outcome) -> list[str]:
    """The faults in the outcome of a case."""
    if outcome.stuck:
        return [f"something does not come back from the kernel:\n{outcome.stuck}"]
    faults = [f"the last UNHOOK answered {_errno(number)}" for number in outcome.cleaned if number]
    alone = all(op.lane == 0 for op in ops)
    model = _Model(profile)
    results = {lane: deque(found) for lane, found in outcome.lanes.items()}
    for number, op in enumerate(ops):
        there = results.get(op.lane)
        if not there:
            faults.append(f"operation {number} ({op.kind.name}) has no result")
            break
        result = there.popleft()
        faults += [f"operation {number}: {fault}" for fault in _faults(model, op, result, alone)]
    return faults


def _faults(model: _Model, op: Op, result: int | Streamed, alone: bool) -> Iterator[str]:
    """What is wrong with the result of one operation."""
    if isinstance(result, Streamed):
        if isinstance(op.expect, Session):
            yield from _session(op.expect, result)
        elif result.stuck:
            yield "the stream does not move"
        return
    if isinstance(op.expect, Call):
        fault = model.call(op.expect, result, alone=alone)
        if fault:
            yield fault
    elif isinstance(op.expect, set) and result not in op.expect:
        yield f"{op.kind.name} answered {_errno(result)}"
    model.follow(op, result)


def _errno(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "0"


# -- sessions -------------------------------------------------------------------------------------


def _session(session: Session, came: Streamed) -> Iterator[str]:
    """What is wrong with the replies of a session."""
    open_: dict[int, deque[Sent]] = {}
    expected: dict[int, Sent] = {}
    for one in session.sent:
        if one.errors:
            expected[one.seq] = one
            open_.setdefault(one.lane, deque()).append(one)
    for reply in came.replies:
        sent = expected.pop(reply.seq, None)
        if sent is None or sent.id != reply.id:
            what = f"id {reply.id} seq {reply.seq:#x} size {reply.size}"
            if reply.id == 1 and came.wrongly:
                continue  # a refused reply to an event
            yield f"a reply that nothing waits for: {what}"
            continue
        lane = open_[sent.lane]
        if lane[0] is not sent:
            yield f"the reply to seq {sent.seq:#x} came before that to {lane[0].seq:#x}"
            lane.remove(sent)
        else:
            lane.popleft()
        yield from _reply(sent, reply.size, reply.head)
    # Of what came before the end, the receiver answered all; a vCPU what it got to.
    lost = session.lossy and session.closes is not Closes.NEVER
    certain = session.mode is not Mode.NONE and not came.wrongly and not lost
    missing = list(open_.get(-1, ()))
    if session.closes is Closes.NEVER and session.running:
        missing += [one for lane, there in open_.items() if lane >= 0 for one in there]
    if certain and session.closes is Closes.ALWAYS:
        missing = [one for one in missing if one.closes is Closes.NEVER]
    if certain and missing:
        yield f"{len(missing)} commands have no reply, the first is seq {missing[0].seq:#x}"
    yield from _end(session, came)


def _end(session: Session, came: Streamed) -> Iterator[str]:
    """What is wrong with the way a session ended."""
    if came.stuck:
        what = "the end of the session" if session.closes is Closes.ALWAYS else "replies"
        yield f"{what} did not come in time"
    elif session.closes is Closes.ALWAYS and not came.ended:
        yield "the kernel did not end the session"
    elif session.closes is Closes.NEVER and came.ended and not came.wrongly:
        yield "the kernel ended the session"


def _reply(sent: Sent, size: int, head: bytes) -> Iterator[str]:
    error, padding = _ERROR_CODE.unpack_from(head)
    what = f"the reply to seq {sent.seq:#x}"
    if size < _ERROR_CODE.size:
        yield f"{what} has {size} bytes"
    elif error not in sent.errors:
        right = ", ".join(str(one) for one in sorted(sent.errors, reverse=True))
        yield f"{what} has error {error}, not one of {right}"
    elif padding or size != (sent.size if error == 0 else _ERROR_CODE.size):
        yield f"{what} has {size} bytes, padding {padding:#x}, error {error}"


# -- ioctls ---------------------------------------------------------------------------------------


class _Model:
    """What a virtual machine is expected to answer to the ioctls, from what it answered."""

    def __init__(self, profile: Profile) -> None:
        self._on = True
        self._there: dict[int, bool] = {}
        self._hooked: dict[int, bool] = {}
        self._always = {c.id for c in profile.commands.values() if c.always_allowed}
        self._known = {
            "COMMAND": {c.id for c in profile.commands.values()},
            "EVENT": {e.id for e in profile.events.values()},
        }

    def follow(self, op: Op, result: int) -> None:
        """Note what an operation changed."""
        if op.kind is Kind.PARAM:
            self._on = op.payload != b"\0"
        elif op.kind is Kind.VM and not result:
            self._there[op.payload[0]] = True
            self._hooked[op.payload[0]] = False
        elif op.kind is Kind.VMEND:
            self._there[op.payload[0]] = False

    def call(self, call: Call, result: int, *, alone: bool) -> str:
        """What is wrong with the answer to an ioctl, or nothing."""
        right = self._right(call) if alone else self._possible(call)
        if call.may_fail:
            right = right | {0, errno.ENOMEM, errno.EFAULT, errno.EINVAL, errno.EINTR}
        if not result and call.name in ("HOOK", "UNHOOK"):
            self._hooked[call.vm] = call.name == "HOOK"
        if result in right:
            return ""
        wanted = " or ".join(_errno(one) for one in sorted(right))
        return f"{call.name or 'an unknown ioctl'} answered {_errno(result)}, not {wanted}: {call}"

    def _possible(self, call: Call) -> set[int]:
        """What may be answered when other threads change everything meanwhile."""
        return {errno.EPERM, errno.EBADF, *self._arguments(call, hooked=None)}

    def _right(self, call: Call) -> set[int]:
        if not self._there.get(call.vm):
            return _GONE
        if not call.name:
            return self._arguments(call, hooked=None)
        if not self._on:
            return {errno.EPERM}
        return self._arguments(call, hooked=self._hooked[call.vm])

    def _arguments(self, call: Call, *, hooked: bool | None) -> set[int]:
        """Right answers, where the session is (None: who knows)."""
        if not call.name:
            return {errno.ENOTTY}
        if call.name == "UNHOOK":
            return {0}
        if call.name == "PREUNHOOK":
            no, yes = {errno.EFAULT}, {0, errno.ENOENT}
            return no | yes if hooked is None else yes if hooked else no
        if call.arg in _POINTERS:
            return {errno.EFAULT}
        if call.name == "HOOK":
            return self._hook(call, hooked)
        return self._feature(call, hooked)

    def _hook(self, call: Call, hooked: bool | None) -> set[int]:
        if call.padding:
            return {errno.EINVAL}
        if hooked:
            return {errno.EEXIST}
        right = {0, errno.EINVAL}
        if call.arg not in (Arg.OURS, Arg.PEER):
            right = {errno.EINVAL}
        return right | {errno.EEXIST} if hooked is None else right

    def _feature(self, call: Call, hooked: bool | None) -> set[int]:
        if call.allow > 1 or call.id < -1 or call.id > 0xFFFF:
            return {errno.EINVAL} | ({errno.EFAULT} if not hooked else set())
        right = {errno.EFAULT} if not hooked else set()
        if call.id != -1 and call.id not in self._known[call.name]:
            return right | {errno.EINVAL, 0}
        if hooked is False:
            return right | {errno.EINVAL}
        if call.name == "COMMAND" and not call.allow and call.id in self._always:
            return right | {errno.EPERM}
        # The kernel under test may lack it.
        return right | {0} | ({errno.EINVAL} if call.id != -1 else set())
