# SPDX-License-Identifier: GPL-2.0-or-later
"""The session: the tool's end of one introspection socket, after the handshake.

A reader thread takes in what the kernel sends, checks it, answers events that have a handler,
and keeps the rest for whoever waits. Every wait has a deadline; its error names what was waited
for, and its details list what came instead. A message that breaks the interface is an error that
reaches the one who waits for it, or the next one who waits for anything; what nobody met is
raised by :meth:`Session.close`.
"""

from __future__ import annotations

import enum
import socket
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from harness.abi import Codec, Profile, Reply, load_profile
from harness.errors import HarnessError, UsageError
from harness.tool.framing import HEADER, frame
from harness.tool.inbox import Handler, Inbox
from harness.tool.messages import EventMessage, Message
from harness.tool.pending import Pending
from harness.tool.transcript import Channel, Transcript
from harness.tool.wire import Wire

if TYPE_CHECKING:
    from harness.counters import SlotWriter

__all__ = ["Session", "State"]

_SHUTDOWN = {"read": socket.SHUT_RD, "write": socket.SHUT_WR, "both": socket.SHUT_RDWR}


class State(enum.Enum):
    """Where a session stands. It only moves down this list."""

    OPEN = "open"
    UNHOOK_ANNOUNCED = "unhook announced"  # the UNHOOK event came; the tool should close
    ENDED = "ended by the peer"
    CLOSED = "closed here"


class Session:
    """One session. Thread-safe; handlers run in the reader thread.

    :param sock: a connected stream socket, after the handshake. The session owns it from now on.
    :param transcript: keeps all messages of the session, in a channel of its own.
    :param counters_slot: the worker's slot in shared memory, counts what passes.
    :param on_event: handler of the events that have none of their own, and can be answered.
    :param log_limit: how many messages :attr:`log` remembers.
    :param first_seq: seq of the first command; well above the kernel's event seqs by default, so
        that a kernel that mixes them up is noticed.
    :param send_timeout_s: how long the peer may take to read what is sent.
    :param patience: how many times longer than said the peer may take; see
        :class:`harness.hosts.base.Target`.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        profile: Profile | None = None,
        transcript: Transcript | Channel | None = None,
        counters_slot: SlotWriter | None = None,
        on_event: Handler | None = None,
        name: str = "",
        log_limit: int = 20_000,
        first_seq: int = 1_000_000,
        send_timeout_s: float = 10,
        patience: float = 1.0,
    ) -> None:
        self.profile = profile or load_profile()
        self.codec = Codec(self.profile)
        self.name = name
        self._channel = (
            transcript.channel(name) if isinstance(transcript, Transcript) else transcript
        )
        self._slot = counters_slot
        self._seq_lock = threading.Lock()
        self._next_seq = first_seq
        self._raw: dict[int, Pending] = {}
        self._inbox = Inbox(
            self.codec,
            channel=self._channel,
            slot=counters_slot,
            answer=self.answer,
            on_event=on_event,
            log_limit=log_limit,
            patience=patience,
        )
        self._wire = Wire(
            sock,
            name=name,
            on_message=self._inbox.take,
            on_end=self._inbox.end,
            on_send=self._sending,
            on_problem=self._inbox.problem,
            send_timeout_s=send_timeout_s * patience,
        )
        self._inbox.reader = self._wire.reader
        self._wire.start()

    # -- commands ------------------------------------------------------------------------------

    def command(self, name: str, *, timeout_s: float = 10, **fields: Any) -> Reply:
        """Send a command and wait for its reply, success or error (see :meth:`Reply.ok`).

        Fields as in :meth:`harness.abi.Codec.encode_command`; raises as :meth:`Pending.reply`.
        """
        return self.send(name, **fields).reply(timeout_s)

    def send(self, name: str, *, seq: int | None = None, **fields: Any) -> Pending:
        """Send a command, without waiting for its reply. Allowed in handlers."""
        id, payload = self.codec.encode_command(name, **fields)
        return self._send_command(id, payload, seq, None)

    def send_raw(
        self, id: int, payload: bytes = b"", *, seq: int | None = None, size: int | None = None
    ) -> int:
        """Send any message and return its seq, for :meth:`reply_to`.

        An event reply (message id 1 in v12) has no reply; see :meth:`refusal` for it.

        :param seq: instead of the next one. :param size: what the header says instead of the
            truth; the kernel will then wait for bytes, or take these for the next message.
        """
        if id == self.profile.event_reply:
            seq = self._take_seq() if seq is None else seq
            self._wire.send(frame(id, payload, seq, size=size))
            return seq
        pending = self._send_command(id, payload, seq, size)
        self._raw[pending.seq] = pending
        return pending.seq

    def send_bytes(self, data: bytes, *, timeout_s: float | None = None) -> None:
        """Send bytes that are no message, or a part of one.

        :raises SilenceError: the kernel did not read them in time; nothing can be sent any more.
        """
        self._wire.send(data, timeout_s=timeout_s)

    def reply_to(self, seq: int, timeout_s: float = 10) -> Reply:
        """Wait for the reply to what :meth:`send_raw` sent."""
        return self._raw_pending(seq).reply(timeout_s)

    def no_reply_to(self, seq: int, within_s: float) -> None:
        """Watch that what :meth:`send_raw` sent stays unanswered for a while."""
        self._raw_pending(seq).unanswered(within_s)

    def _raw_pending(self, seq: int) -> Pending:
        if seq not in self._raw:
            raise UsageError(f"no command was sent by send_raw with seq {seq}")
        return self._raw[seq]

    def _take_seq(self) -> int:
        with self._seq_lock:
            seq = self._next_seq
            self._next_seq = (seq + 1) & 0xFFFFFFFF
        return seq

    def _send_command(self, id: int, payload: bytes, seq: int | None, size: int | None) -> Pending:
        seq = self._take_seq() if seq is None else seq
        pending = self._inbox.expect_reply(id, seq, payload)
        try:
            self._wire.send(frame(id, payload, seq, size=size))
        except HarnessError:
            self._inbox.forget(pending)
            raise
        if self._slot is not None:
            self._slot.command(HEADER.size + len(payload))
        return pending

    # -- events --------------------------------------------------------------------------------

    def handle(self, kind: str, function: Handler | None) -> None:
        """Let ``function`` answer the events of that kind from now on; None: nobody any more.

        It runs in the reader thread: it may send and answer, but must not wait. An exception in
        it leaves the event unanswered, in the queue, and is raised by the next wait, or close.
        """
        name = self.profile.event(kind).name
        if function is None:
            self._inbox.handlers.pop(name, None)
        else:
            self._inbox.handlers[name] = function

    def next_event(
        self, kind: str | None = None, *, vcpu: int | None = None, timeout_s: float = 10
    ) -> EventMessage:
        """Take the oldest event without handler, of that kind and vCPU if given.

        :raises SilenceError: none in time. :raises SessionClosed: the socket ended before.
        """
        name = None if kind is None else self.profile.event(kind).name
        events = self._inbox.events

        def ready() -> EventMessage | None:
            for event in events:
                if _matches(event, name, vcpu):
                    events.remove(event)
                    return event
            return None

        what = f"event {name or 'of any kind'}" + ("" if vcpu is None else f" of vCPU {vcpu}")
        return self._inbox.wait(ready, timeout_s, what)

    def count(self, kind: str | None = None) -> int:
        """How many events came so far, of that kind or of all, with and without handler."""
        counts = self._inbox.counts
        return counts.total() if kind is None else counts[self.profile.event(kind).name]

    def wait_count(self, kind: str, count: int, *, timeout_s: float = 10) -> int:
        """Wait until at least that many events of the kind came in all; returns how many."""
        name = self.profile.event(kind).name
        counts = self._inbox.counts
        return self._inbox.wait(
            lambda: counts[name] if counts[name] >= count else None,
            timeout_s,
            lambda: f"{count} events {name} in all, of which {counts[name]} came",
            every=True,
        )

    def answer(
        self,
        event: EventMessage,
        action: str | int = "CONTINUE",
        *,
        id: int | None = None,
        seq: int | None = None,
        size: int | None = None,
        **fields: Any,
    ) -> None:
        """Answer an event.

        ``new_val`` of CR and MSR is the guest's new value unless given. For wrong answers,
        everything can be overridden: message ``id``, ``seq``, header ``size``, and what
        :meth:`harness.abi.Codec.encode_event_reply` takes (vcpu, event_id, padding, length).

        :raises UsageError: the event has no answer (UNHOOK), or no such field.
        """
        if not event.definition.actions:
            raise UsageError(f"the event {event.name} has no answer: close the session instead")
        if event.definition.reply is not None and event.definition.reply.has("new_val"):
            fields.setdefault("new_val", event.fields.new_value)
        fields.setdefault("vcpu", event.vcpu)
        payload = self.codec.encode_event_reply(event.definition, action, **fields)
        id = self.profile.event_reply if id is None else id
        self._wire.send(frame(id, payload, event.seq if seq is None else seq, size=size))
        event.answered = True
        if self._slot is not None:
            self._slot.event_reply(HEADER.size + len(payload), time.monotonic_ns() - event.ns)

    def refusal(self, seq: int, timeout_s: float = 10) -> Reply:
        """Wait for the error code with which the kernel refuses an event reply of that seq.

        Some kernels do that when the vCPU header of the reply is wrong. A refusal that nobody
        asks for is an error in the next wait.
        """
        what = f"refusal of the event reply with seq {seq}"
        return self._inbox.wait(lambda: self._inbox.refusal(seq), timeout_s, what)

    # -- waiting for nothing, or for the end ---------------------------------------------------

    def no_event(
        self, kind: str | None = None, *, vcpu: int | None = None, within_s: float
    ) -> None:
        """Watch for a while that no such event comes, nor is waiting in the queue.

        :raises ConformanceError: it came. :raises SessionClosed: the socket ended meanwhile.
        """
        name = None if kind is None else self.profile.event(kind).name
        inbox, before = self._inbox, self._inbox.received

        def came() -> str | None:
            messages = (*inbox.events, *inbox.since(before))
            return next((str(m) for m in messages if _matches(m, name, vcpu)), None)

        inbox.watch(came, within_s)

    def quiet(self, within_s: float) -> None:
        """Watch for a while that nothing at all comes. Raises as :meth:`no_event` does."""
        inbox, before = self._inbox, self._inbox.received
        inbox.watch(lambda: next((str(m) for m in inbox.since(before)), None), within_s)

    def expect_close(self, timeout_s: float = 10) -> int:
        """Wait until the peer ends the stream; returns when it did (CLOCK_MONOTONIC, ns).

        Messages may come before. Afterwards the session still has to be closed here.

        :raises SilenceError: still open. :raises UsageError: it was closed here.
        """
        inbox = self._inbox
        if inbox.closed_here:
            raise UsageError("the session was closed here, the peer cannot close it any more")
        return inbox.wait(
            lambda: inbox.ended_ns if inbox.ended is not None else None,
            timeout_s,
            "the end of the stream",
        )

    @property
    def state(self) -> State:
        """Where the session stands."""
        if self._inbox.closed_here:
            return State.CLOSED
        if self._inbox.ended is not None:
            return State.ENDED
        return State.UNHOOK_ANNOUNCED if self._inbox.counts["UNHOOK"] else State.OPEN

    @property
    def closed(self) -> bool:
        """Whether the stream has ended, whoever ended it."""
        return self._inbox.ended is not None

    @property
    def close_reason(self) -> str | None:
        """Why the stream ended (end of stream, Connection reset by peer, closed here), or None."""
        return self._inbox.ended

    # -- what passed ---------------------------------------------------------------------------

    @property
    def log(self) -> list[Message]:
        """The last messages of both directions, in order (see ``log_limit``)."""
        return list(self._inbox.log)

    @property
    def received(self) -> list[Message]:
        """Of :attr:`log`, those from the kernel, in the order in which they came."""
        return [m for m in self.log if not m.outgoing]

    @property
    def unanswered(self) -> list[Pending]:
        """Commands whose reply has not come."""
        return self._inbox.unanswered()

    @property
    def problems(self) -> list[HarnessError]:
        """All errors that the reader found, met by a wait or not."""
        return [p.error for p in self._inbox.problems]

    # -- closing -------------------------------------------------------------------------------

    def shutdown(self, how: Literal["read", "write", "both"] = "write") -> None:
        """Shut down a direction: with ``write`` the kernel sees the end, its replies still come."""
        self._note(f"shutdown {how}")
        self._wire.shutdown(_SHUTDOWN[how])

    def close(self) -> None:
        """Close the socket, end the reader, and raise what nobody met. Idempotent.

        :raises HarnessError: the first problem that the reader found and no wait raised; the
            others are notes to it. The session is closed all the same.
        """
        self._close(abort=False)

    def abort(self) -> None:
        """As :meth:`close`, but a TCP connection is reset, as when the tool's machine dies."""
        self._close(abort=True)

    def _close(self, *, abort: bool) -> None:
        if not self._inbox.closed_here:
            self._inbox.closed_here = True
            self._note("abort" if abort else "close")
        self._wire.close(abort=abort)
        problems = self._inbox.unmet()
        for other in problems[1:]:
            problems[0].add_note(f"also: {other}")
        if problems:
            raise problems[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except HarnessError as problem:
            error.add_note(f"the session also met: {problem}")

    # -- what is kept of what is sent ----------------------------------------------------------

    def _sending(self, ns: int, data: bytes) -> None:
        """Called by the wire in the order of the stream."""
        if len(data) >= HEADER.size:
            id, size, seq = HEADER.unpack_from(data)
            if size == len(data) - HEADER.size:
                payload = data[HEADER.size :]
                self._inbox.log.append(Message(self.codec, ns, id, seq, payload, outgoing=True))
                if self._channel is not None:
                    self._channel.sent(ns, id, seq, payload)
                return
        if self._channel is not None:
            self._channel.raw(True, data)

    def _note(self, text: str) -> None:
        if self._channel is not None:
            self._channel.note(text)


def _matches(message: Message, name: str | None, vcpu: int | None) -> bool:
    return (
        isinstance(message, EventMessage)
        and name in (None, message.name)
        and vcpu in (None, message.vcpu)
    )
