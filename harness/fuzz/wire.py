# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes to the executor in the host, and what comes back: bytes to values.

The other end is ``guest-images/fuzz``; its text says how frames are made.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Arg",
    "Kind",
    "Mode",
    "Op",
    "Outcome",
    "Replied",
    "Sock",
    "Streamed",
    "config",
    "encode_cases",
    "form",
    "image",
    "read_outcomes",
]

_RECORD = struct.Struct("<HHI")
_U32 = struct.Struct("<I")
_STREAM = struct.Struct("<BBBBBBHHII")
_SUMMARY = struct.Struct("<7I")
_REPLY = struct.Struct("<HHI16s")


class Kind(enum.IntEnum):
    """What a record asks for."""

    CONFIG, IMAGE, FORM, CASE = 1, 2, 3, 4
    (
        VM, VMEND, RUN, STOP, SOCK, END, IOCTL, STREAM, PARAM, DELAY, MEMSLOT, FAIL, READY, FORGET,
    ) = range(16, 30)  # fmt: skip


class Arg(enum.IntEnum):
    """The argument of an ioctl; OURS to KVM_FD and CLOSED_FD replace its first four bytes."""

    BYTES, OURS, PEER, VM_FD, VCPU_FD, KVM_FD, NULL, UNMAPPED, KERNEL, EDGE, VALUE, CLOSED_FD = (
        range(12)
    )


class Sock(enum.IntEnum):
    """What a slot for descriptors is filled with."""

    (
        UNIX_STREAM, UNIX_SEQPACKET, UNIX_DGRAM, TCP_PAIR, TCP_ALONE, TCP_LISTENING, PIPE, FILE,
        EVENTFD, UDP, UNIX_ALONE,
    ) = range(11)  # fmt: skip


class Mode(enum.IntEnum):
    """What the tool's side waits for when all is sent."""

    NONE, REPLIES, END, SHUT = range(4)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. ``expect`` is for whoever judges the result; it is not sent."""

    kind: Kind
    payload: bytes
    lane: int = 0
    expect: object = None

    @classmethod
    def vm(cls, vm: int, image: int, *, reuse: bool = False, **more: object) -> Op:
        """Make a virtual machine of an image, or let one serve again that an earlier case used."""
        return cls(Kind.VM, bytes([vm, image, reuse]), **more)  # type: ignore[arg-type]

    @classmethod
    def ioctl(
        cls, vm: int, request: int, argument: bytes = b"", *, arg: Arg = Arg.BYTES, slot: int = 0,
        **more: object,
    ) -> Op:  # fmt: skip
        """An ioctl on a virtual machine."""
        head = struct.pack("<BBBBI", vm, arg, slot, 0, request)
        return cls(Kind.IOCTL, head + argument, **more)  # type: ignore[arg-type]

    @classmethod
    def sock(cls, slot: int, kind: Sock, *, room: int = 0, **more: object) -> Op:
        """Fill a slot; ``room`` is the size of the buffers, 0: as usual."""
        return cls(Kind.SOCK, struct.pack("<BBI", slot, kind, room), **more)  # type: ignore[arg-type]

    @classmethod
    def end(cls, slot: int, *, peer: bool, how: int, **more: object) -> Op:
        """Shut one end of a slot down (``how`` as for shutdown(2)), or close it (3)."""
        return cls(Kind.END, bytes([slot, peer, how]), **more)  # type: ignore[arg-type]

    @classmethod
    def memslot(
        cls, vm: int, slot: int, *, flags: int, gpa: int, size: int, offset: int, **more: object
    ) -> Op:
        """Change a memory slot; ``offset`` is where in the VM's memory it lies."""
        payload = struct.pack("<BIIQQQ", vm, slot, flags, gpa, size, offset)
        return cls(Kind.MEMSLOT, payload, **more)  # type: ignore[arg-type]

    @classmethod
    def stream(
        cls, slot: int, pieces: Sequence[bytes], mode: Mode, *, deaf: bool = False,
        answers: tuple[int, int, int] = (100, 0, 0), chunk: int = 0, linger_ms: int = 0,
        expected: int = 0, seed: int = 1, **more: object,
    ) -> Op:  # fmt: skip
        """Be the tool on a slot's other end.

        :param pieces: bytes; answers to events go between two of them, never into one.
        :param deaf: do not read while there is still something to send.
        :param answers: so many percent of the events are answered with CONTINUE, with any
            action the event has, and wrongly; the rest never.
        :param chunk: send so many bytes at once, 0: as many as possible.
        :param linger_ms: stay at least so long, for events.
        :param expected: how many replies :attr:`Mode.REPLIES` waits for.
        :param seed: of what decides on answers.
        """
        head = _STREAM.pack(slot, mode, deaf, *answers, chunk, linger_ms, expected, seed)
        body = b"".join(_U32.pack(len(piece)) + piece for piece in pieces)
        return cls(Kind.STREAM, head + body, **more)  # type: ignore[arg-type]


def _record(kind: int, payload: bytes, lane: int = 0) -> bytes:
    return _RECORD.pack(kind, lane, len(payload)) + payload


def _frame(records: bytes) -> bytes:
    return _U32.pack(len(records)) + records


def encode_cases(cases: Iterable[tuple[int, Iterable[Op]]]) -> bytes:
    """The frame of some cases, each with its number."""
    records = []
    for number, ops in cases:
        records.append(_record(Kind.CASE, _U32.pack(number)))
        records += [_record(op.kind, op.payload, op.lane) for op in ops]
    return _frame(b"".join(records))


def config(*, deadline_s: float, unhook: int, event_message: int, parameter: str) -> bytes:
    """The frame that tells the executor what it cannot know.

    :param deadline_s: after so long without progress something is stuck.
    :param unhook: the ioctl that ends a session. :param event_message: id of event messages.
    :param parameter: path of the module's parameter.
    """
    head = struct.pack("<IIH", int(deadline_s * 1000), unhook, event_message)
    return _frame(_record(Kind.CONFIG, head + parameter.encode() + b"\0"))


def form(event: int, actions: Iterable[int], *, extra: int = 0, value_at: int = 0) -> bytes:
    """The frame that says how an event is answered.

    :param extra: size of the reply's own part. :param value_at: where in the event's payload
        the reply's own part is copied from.
    """
    bitmap = sum(1 << action for action in actions)
    return _frame(_record(Kind.FORM, struct.pack("<HBBI", event, bitmap, extra, value_at)))


def image(
    number: int, *, memory: int, irqchip: bool, chunks: Sequence[tuple[int, bytes]],
    states: Sequence[tuple[bytes, Sequence[tuple[int, bytes]]]],
) -> bytes:  # fmt: skip
    """The frame with what virtual machines are made of.

    :param memory: bytes of guest memory. :param chunks: what is where in it.
    :param states: for each vCPU struct kvm_regs, and patches of struct kvm_sregs.
    """
    parts = [struct.pack("<IQIII", number, memory, irqchip, len(states), len(chunks))]
    parts += [struct.pack("<QI", at, len(data)) + data for at, data in chunks]
    for regs, patches in states:
        parts.append(regs + _U32.pack(len(patches)))
        parts += [struct.pack("<II", at, len(data)) + data for at, data in patches]
    return _frame(_record(Kind.IMAGE, b"".join(parts)))


# -- results ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replied:
    """One message that came, events apart; ``head`` is the start of its payload."""

    id: int
    size: int
    seq: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Streamed:
    """What became of a stream."""

    stuck: bool
    """Nothing moved until the deadline, though something was waited for."""
    ended: bool
    """The kernel ended the stream."""
    events: int
    answered: int
    wrongly: int
    """So many events were answered in a wrong way."""
    written: int
    replies: list[Replied]


@dataclass(slots=True)
class Outcome:
    """What became of a case: results by lane, in the order of its operations."""

    number: int = -1
    restarts: int = 0
    """So many times a vCPU had gone astray and was started again."""
    lanes: dict[int, list[int | Streamed]] = field(default_factory=dict)
    cleaned: list[int] = field(default_factory=list)
    """What the final UNHOOK of each virtual machine answered."""
    stuck: str = ""
    """Where everything was, if a lane did not come back from the kernel."""


_DONE, _RESULT, _STREAMED, _CLEANED, _STUCK = 1, 2, 3, 4, 5


def read_outcomes(data: bytes) -> list[Outcome]:
    """The outcomes in a frame's records, one for each case; just one if that is stuck."""
    outcomes: list[Outcome] = []
    for kind, lane, payload in _records(data):
        if kind == _DONE:
            outcomes.append(Outcome(*struct.unpack("<II", payload)))
        elif kind == _RESULT:
            outcomes[-1].lanes.setdefault(lane, []).append(_U32.unpack(payload)[0])
        elif kind == _STREAMED:
            outcomes[-1].lanes.setdefault(lane, []).append(_streamed(payload))
        elif kind == _CLEANED:
            outcomes[-1].cleaned = [number for (number,) in _U32.iter_unpack(payload)]
        elif kind == _STUCK:
            (number,) = _U32.unpack_from(payload)
            where = payload[_U32.size :].decode(errors="replace")
            outcomes.append(Outcome(number, stuck=where or "nobody knows where"))
    return outcomes


def _records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at < len(data):
        kind, lane, size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        yield kind, lane, data[at : at + size]
        at += size


def _streamed(payload: bytes) -> Streamed:
    stuck, ended, _replies, events, answered, wrongly, written = _SUMMARY.unpack_from(payload)
    came = [Replied(*fields) for fields in _REPLY.iter_unpack(payload[_SUMMARY.size :])]
    return Streamed(bool(stuck), bool(ended), events, answered, wrongly, written, came)
