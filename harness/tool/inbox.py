# SPDX-License-Identifier: GPL-2.0-or-later
"""What a session has received, and the waiting for it.

The reader thread puts in; any thread waits. Replies go to the command with their seq, events to
their handler or into a queue. A message that breaks the interface becomes a problem: an error
that the next wait raises, and :meth:`Inbox.unmet` tells in the end which nobody met.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from harness.abi import Codec, Reply
from harness.errors import (
    ConformanceError,
    HarnessError,
    MalformedMessage,
    SessionClosed,
    SilenceError,
    UsageError,
)
from harness.tool.explain import hex_lines, is_event
from harness.tool.framing import HEADER
from harness.tool.messages import EventMessage, Message
from harness.tool.pending import Pending, Problem
from harness.tool.transcript import Channel

if TYPE_CHECKING:
    from harness.counters import SlotWriter

__all__ = ["TAKEN", "Handler", "Inbox"]

#: What a handler returns that took the event and answers it later, or never.
TAKEN: Literal["TAKEN"] = "TAKEN"

#: A handler runs in the reader thread and must not wait. It returns an action, an action with
#: fields of the reply, TAKEN, or None to leave the event to whoever calls next_event.
Handler = Callable[[EventMessage], "str | tuple[str, Mapping[str, int]] | None"]

T = TypeVar("T")

_LISTED = 20


class Inbox:
    """All that came over one socket. ``answer`` is how handlers' answers are sent."""

    def __init__(
        self,
        codec: Codec,
        *,
        channel: Channel | None,
        slot: SlotWriter | None,
        answer: Callable[..., None],
        on_event: Handler | None,
        log_limit: int,
        patience: float = 1.0,
    ) -> None:
        self.codec = codec
        self.log: deque[Message] = deque(maxlen=log_limit)
        self.received = 0
        self.counts: Counter[str] = Counter()
        self.events: deque[EventMessage] = deque()
        self.handlers: dict[str, Handler] = {}
        self.problems: list[Problem] = []
        self.ended: str | None = None
        self.ended_ns = 0
        self.closed_here = False
        self.reader: threading.Thread | None = None
        self._channel = channel
        self._slot = slot
        self._patience = patience
        self._answer = answer
        self._on_event = on_event
        self._changed = threading.Condition()
        self._waiters = 0
        self._watchers = 0  # of these, the ones that look at every message
        self._pending: dict[int, deque[Pending]] = {}
        self._refusals: dict[int, Problem] = {}

    # -- commands ------------------------------------------------------------------------------

    def expect_reply(self, id: int, seq: int, request: bytes) -> Pending:
        """Register a command that is about to be sent. Several may have the same seq."""
        pending = Pending(self, id, seq, request)
        with self._changed:
            self._pending.setdefault(seq, deque()).append(pending)
        return pending

    def forget(self, pending: Pending) -> None:
        """The command could not be sent."""
        with self._changed:
            waiting = self._pending.get(pending.seq)
            if waiting and pending in waiting:
                waiting.remove(pending)

    def unanswered(self) -> list[Pending]:
        """Commands whose reply has not come."""
        with self._changed:
            return [p for waiting in self._pending.values() for p in waiting]

    # -- in the reader thread ------------------------------------------------------------------

    def take(self, ns: int, id: int, seq: int, payload: bytes) -> None:
        """One message from the kernel."""
        if self._channel is not None:
            self._channel.received(ns, id, seq, payload)
        self.received += 1
        if is_event(self.codec, id, payload):
            news = self._take_event(ns, id, seq, payload)
        else:
            self.log.append(Message(self.codec, ns, id, seq, payload))
            self._take_reply(ns, id, seq, payload)
            news = True
        # Looked at without the lock: whoever waits sets these before looking at what is there, so
        # one of the two sees the other. Who does not care for events that are answered here is
        # not woken by thousands of them, as that would slow down the answers.
        if self._watchers or (news and self._waiters):
            with self._changed:
                self._changed.notify_all()

    def _take_event(self, ns: int, id: int, seq: int, payload: bytes) -> bool:
        """Whether something is left for those who wait: the event, or a problem."""
        try:
            definition, vcpu = self.codec.check_event(id, payload, seq=seq)
        except MalformedMessage as error:
            self.log.append(Message(self.codec, ns, id, seq, payload))
            self.problem(error, payload)
            return True
        event = EventMessage(self.codec, ns, id, seq, payload, definition=definition, vcpu=vcpu)
        self.log.append(event)
        # Counted before it is answered: when the guest goes on, the count is right already.
        self.counts[definition.name] += 1
        if self._slot is not None:
            self._slot.event(definition.id, HEADER.size + len(payload), ns)
        handler = self.handlers.get(definition.name)
        if handler is None and definition.actions:
            handler = self._on_event
        if handler is not None and self._handled(event, handler):
            return False
        with self._changed:
            self.events.append(event)
        return True

    def _handled(self, event: EventMessage, handler: Handler) -> bool:
        """Let the handler have the event; whether it took it."""
        try:
            outcome = handler(event)
            if outcome is None:
                return False
            if outcome != TAKEN:
                action, fields = (outcome, {}) if isinstance(outcome, str) else outcome
                self._answer(event, action, **fields)
        except SessionClosed:
            # The peer went away while its event was handled. The end of the stream says so.
            return True
        except HarnessError as error:
            if not self.closed_here:
                self.problem(error)
            return False
        except Exception as error:
            failure = HarnessError(f"the handler of {event.name} failed: {error!r}")
            failure.__cause__ = error
            self.problem(failure)
            return False
        return True

    def _take_reply(self, ns: int, id: int, seq: int, payload: bytes) -> None:
        with self._changed:
            waiting = self._pending.get(seq)
            pending = waiting.popleft() if waiting else None
            if not waiting:
                self._pending.pop(seq, None)
        if pending is None:
            self._take_stray(id, seq, payload)
            return
        try:
            if id != pending.id:
                raise MalformedMessage(
                    f"reply to {pending}: kvmi_msg_hdr.id is {id}, expected {pending.id}"
                )
            self._check_size(id, seq, payload)
            reply = self.codec.decode_reply(id, payload, request=pending.request, seq=seq)
        except MalformedMessage as error:
            pending.result = self.problem(error, payload)
            return
        latency_ns = ns - pending.sent_ns
        pending.result = replace(reply, received_ns=ns, latency_ns=latency_ns)
        if self._slot is not None:
            size = HEADER.size + len(payload)
            self._slot.reply(size, latency_ns, failed=reply.err != 0, ns=ns)

    def _take_stray(self, id: int, seq: int, payload: bytes) -> None:
        """A reply that no command waits for: a refused event reply, or one too many."""
        command = self.codec.profile.command_by_id.get(id)
        name = command.name if command else f"id {id}"
        error: HarnessError = MalformedMessage(
            f"reply to {name}: kvmi_msg_hdr.seq is {seq}, and no command with it is waiting"
        )
        if id != self.codec.profile.event_reply:
            self.problem(error, payload)
            return
        try:
            reply = self.codec.decode_reply(id, payload, seq=seq)
        except MalformedMessage as malformed:
            self.problem(malformed, payload)
            return
        error = ConformanceError(
            f"the kernel refused the event reply with seq {seq}: {reply.error} ({reply.err})"
        )
        self.problem(error, payload, reply=reply)

    def _check_size(self, id: int, seq: int, payload: bytes) -> None:
        limit = self.codec.profile.max_message_size
        if len(payload) > limit:
            raise MalformedMessage(
                f"message with id {id} (seq {seq}): kvmi_msg_hdr.size is {len(payload)}, "
                f"expected at most {limit}"
            )

    def problem(
        self, error: HarnessError, payload: bytes = b"", *, reply: Reply | None = None
    ) -> Problem:
        """Keep an error for the next wait; ``reply`` is what came for an event reply, if any."""
        if payload and not error.details:
            error.details = hex_lines(payload, limit=1024)
        if self._channel is not None:
            self._channel.note(f"problem: {error.message}")
        if self._slot is not None:
            self._slot.problem()
        problem = Problem(error, reply)
        with self._changed:
            if reply is not None:
                self._refusals[reply.seq] = problem
            self.problems.append(problem)
            self._changed.notify_all()
        return problem

    def end(self, reason: str, incomplete: bytes) -> None:
        """The stream ended; ``incomplete`` are the bytes of a message that had begun."""
        if self._channel is not None:
            self._channel.note(f"end of the session: {reason}")
        if incomplete and not self.closed_here:
            count = len(incomplete)
            self.problem(
                MalformedMessage(f"the stream ended inside a message, after {count} bytes of it"),
                incomplete,
            )
        with self._changed:
            self.ended_ns = time.monotonic_ns()
            self.ended = reason
            self._changed.notify_all()

    # -- waiting -------------------------------------------------------------------------------

    def wait(
        self,
        ready: Callable[[], T | None],
        timeout_s: float,
        what: str | Callable[[], str],
        *,
        every: bool = False,
    ) -> T:
        """What ``ready`` gives (it is called with the lock held), as soon as that is not None.

        :param every: ``ready`` depends on events that have a handler, too.

        :raises SilenceError: not in time. :raises SessionClosed: the stream ended before.
        :raises HarnessError: a problem that nobody met yet.
        """
        before = self.received
        timeout_s *= self._patience

        def found_or_ended() -> T | None:
            found = ready()
            if found is None:
                self._raise_problem()
                if self.ended is not None:
                    text = what if isinstance(what, str) else what()
                    raise SessionClosed(
                        f"the socket ended ({self.ended}) while waiting for: {text}",
                        details=self._arrived(before),
                    )
            return found

        found = self._wait(found_or_ended, timeout_s, every=every)
        if found is None:
            text = what if isinstance(what, str) else what()
            raise SilenceError(
                f"did not come within {timeout_s:g} s: {text}", details=self._arrived(before)
            )
        return found

    def watch(self, came: Callable[[], str | None], within_s: float) -> None:
        """Wait that time, unless ``came`` tells what came that must not.

        :raises ConformanceError: it came. :raises SessionClosed: the stream ended meanwhile.
        :raises HarnessError: a problem that nobody met yet.
        """

        def still_good() -> None:
            found = came()
            if found is not None:
                raise ConformanceError(f"{found} came, and must not")
            self._raise_problem()
            if self.ended is not None:
                raise SessionClosed(f"the socket ended ({self.ended}) during a quiet time")

        self._wait(still_good, within_s, every=True)

    def _wait(self, look: Callable[[], T | None], timeout_s: float, *, every: bool) -> T | None:
        """What ``look`` gives, or None when the time is over."""
        if threading.current_thread() is self.reader:
            raise UsageError("a handler must not wait: it runs in the thread that receives")
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._waiters += 1
            self._watchers += every
            try:
                while True:
                    found = look()
                    left_s = deadline - time.monotonic()
                    if found is not None or left_s <= 0:
                        return found
                    self._changed.wait(left_s)
            finally:
                self._waiters -= 1
                self._watchers -= every

    def refusal(self, seq: int) -> Reply | None:
        """The error code that came instead of nothing for the event reply with that seq."""
        problem = self._refusals.pop(seq, None)
        if problem is not None:
            problem.meet()
        return problem.reply if problem else None

    def _raise_problem(self) -> None:
        for problem in self.problems:
            if not problem.met:
                raise problem.meet()

    def unmet(self) -> list[HarnessError]:
        """Problems that no wait has raised; they count as met from now on."""
        return [p.meet() for p in self.problems if not p.met]

    # -- what came -----------------------------------------------------------------------------

    def since(self, before: int) -> list[Message]:
        """What came from the kernel after the first ``before`` messages, as far as remembered."""
        new = self.received - before
        incoming = (m for m in reversed(list(self.log)) if not m.outgoing)
        return list(itertools.islice(incoming, new))[::-1]

    def _arrived(self, before: int) -> str:
        """For errors: what came while somebody waited, and what is still open."""
        came = self.since(before)
        lines = [f"  {m}" for m in came[-_LISTED:]]
        if len(came) > _LISTED:
            lines.insert(0, f"  ({len(came) - _LISTED} more before)")
        text = ["came meanwhile:", *(lines or ["  nothing"])]
        if self.events:
            text += ["events not taken:", *(f"  {e}" for e in list(self.events)[:_LISTED])]
        commands = [f"  {p}" for waiting in self._pending.values() for p in waiting]
        if commands:
            text += ["commands not answered:", *commands[:_LISTED]]
        return "\n".join(text)
