# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases of messages: sessions in which the tool says what it should not.

Each case has a guest, whose vCPUs run (code that raises events, often), and sessions on it one
after another. A session is a stream of messages: right ones, right ones with one field wrong,
cut and extended ones, unknown ones, noise. It ends in order, or with a message that the
kernel has to end it for, or in the middle of one.

Everything is drawn from the case's own generator of random numbers, so a case is the same
whichever others are run with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from harness.abi import HEADER, Codec, Command, Profile
from harness.fuzz.expect import Closes, Permissions, Rules, Sent
from harness.fuzz.images import GUESTS, Guest
from harness.fuzz.values import Values
from harness.fuzz.wire import Arg, Kind, Mode, Op, Sock

__all__ = ["MessageCases", "Session"]

_FIRST_SEQ = 0x8000_0000
"""Far from the kernel's own: no reply to an event is right by chance, and the executor can
tell a reply from an event also where a message has the id of one."""

_ANSWERS = ((100, 0, 0),) * 4 + ((0, 0, 0), (60, 20, 0), (80, 10, 10), (30, 30, 0))
"""See :meth:`Op.stream`: in most sessions events are simply answered."""

_KINDS, _WEIGHTS = zip(
    ("right", 42), ("one wrong", 30), ("length", 12), ("noise", 10), ("unknown", 5), ("answer", 1),
    strict=True,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Session:
    """What was sent in a session, for whoever judges what came back."""

    sent: Sequence[Sent]
    closes: Closes
    tail: bytes = b""
    """What came after the last whole message."""
    mode: Mode = Mode.REPLIES
    running: bool = True
    """Whether all vCPUs run: those that do not answer nothing."""
    lossy: bool = False
    """Whether it is TCP: where the kernel ends the session and more comes from the tool, TCP resets
    the connection, and what it had not sent of the kernel's replies yet is lost."""


class MessageCases:
    """Makes cases of messages.

    :param rules: of the kernel under test: what is expected, and so what ends a session.
    :param size: messages of one case, about.
    """

    def __init__(self, profile: Profile, rules: Rules, *, seed: str, size: int) -> None:
        self._profile = profile
        self._codec = Codec(profile)
        self._rules = rules
        self._values = Values(profile)
        self._seed = seed
        self._size = size
        self._commands = list(profile.commands.values())
        self._events = [event.id for event in profile.events.values()]
        self._vcpu_events = [e for e in profile.events.values() if e.is_vcpu]

    def case(self, number: int) -> list[Op]:
        """The operations of the case of that number."""
        rng = Random(f"{self._seed}/messages/{number}")
        image = rng.choices(range(len(GUESTS)), [guest.weight for guest in GUESTS])[0]
        guest = GUESTS[image]
        running = rng.random() < 0.9
        ops = [Op.vm(0, image, expect={0})]
        if running:
            ops += [Op(Kind.RUN, bytes([0, vcpu]), expect={0}) for vcpu in range(guest.vcpus)]
        left, slot = self._size, 0
        while left > 0:
            session_ops, count = self._session(rng, guest, running=running, slot=slot, left=left)
            ops += session_ops
            left -= count
            slot = (slot + 1) % 32
        return ops

    # -- one session

    def _session(
        self, rng: Random, guest: Guest, *, running: bool, slot: int, left: int
    ) -> tuple[list[Op], int]:
        ioctl = self._codec.encode_ioctl
        kind = Sock.TCP_PAIR if rng.random() < 0.15 else Sock.UNIX_STREAM
        room = rng.choice((1, 4608)) if rng.random() < 0.1 else 0
        hook, argument = ioctl("HOOK", fd=0, uuid=rng.randbytes(16))
        ops = [
            Op.sock(slot, kind, room=room, expect={0}),
            Op.ioctl(0, hook, argument, arg=Arg.OURS, slot=slot, expect={0}),
        ]
        allowing, permissions = self._allow(rng)
        ops += allowing
        seq = _FIRST_SEQ + rng.getrandbits(24)
        shape = guest.shape
        sent: list[Sent] = []

        def add(id: int, payload: bytes) -> Sent:
            one = self._rules.judge(
                id, (seq + len(sent)) & 0xFFFFFFFF, payload, permissions=permissions,
                vcpus=shape.vcpus, uninitialised=shape.uninitialised,
            )  # fmt: skip
            sent.append(one)
            return one

        linger_ms = 0
        if rng.random() < 0.5:
            linger_ms = rng.choice((0, 10, 40))
            for id, payload in self._enable_events(rng, guest):
                add(id, payload)
        for _ in range(min(left, int(rng.expovariate(1 / 60)) + 1)):
            if add(*self._message(rng, guest)).closes is not Closes.NEVER:
                break  # what comes after it is for nobody
        answers = rng.choice(_ANSWERS)
        tail, mode, closes = self._ending(rng, guest, sent, add)
        if answers[2] and closes is Closes.NEVER:
            closes = Closes.MAYBE
        expected = sum(1 for one in sent if one.errors and (running or one.lane < 0))
        session = Session(sent, closes, tail, mode, running, lossy=kind is Sock.TCP_PAIR)
        ops.append(
            Op.stream(
                slot, _pieces(rng, sent, tail), mode, deaf=rng.random() < 0.1, answers=answers,
                chunk=rng.choice((1, 7, 8, 100)) if rng.random() < 0.1 else 0,
                linger_ms=linger_ms, expected=expected, seed=rng.getrandbits(32), expect=session,
            )
        )  # fmt: skip
        if rng.random() < 0.3:
            ops.append(Op.end(slot, peer=True, how=3, expect={0}))
        ops.append(Op.ioctl(0, ioctl("UNHOOK")[0], expect={0}))
        if ops[-2].kind is not Kind.END:
            ops.append(Op.end(slot, peer=True, how=3, expect={0}))
        ops.append(Op.end(slot, peer=False, how=3, expect={0}))
        return ops, len(sent)

    def _ending(
        self, rng: Random, guest: Guest, sent: list[Sent], add: Callable[[int, bytes], Sent]
    ) -> tuple[bytes, Mode, Closes]:
        """How a session ends: bytes that are no message, what is waited for, who ends it."""
        if sent[-1].closes is not Closes.NEVER:
            mode = Mode.END if sent[-1].closes is Closes.ALWAYS else Mode.SHUT
            return b"", mode, Closes.ALWAYS
        wish = rng.random()
        if wish < 0.45:
            add(self._profile.command("GET_VERSION").id, b"")
            return b"", Mode.REPLIES, Closes.NEVER
        if wish < 0.75:
            return self._violation(rng), Mode.END, Closes.ALWAYS
        if wish < 0.9:  # in the middle of a message
            whole = add(*self._message(rng, guest)).frame
            sent.pop()
            return whole[: rng.randrange(1, len(whole))], Mode.SHUT, Closes.ALWAYS
        return b"", Mode.NONE, Closes.MAYBE

    def _allow(self, rng: Random) -> tuple[list[Op], Permissions]:
        """Allow everything, or each thing with some probability."""
        ops = []
        allowed: list[set[int]] = []
        everything = (
            ("COMMAND", [c.id for c in self._commands], self._rules.commands),
            ("EVENT", self._events, self._rules.events),
        )
        for name, ids, known in everything:
            if rng.random() < 0.7:
                request, argument = self._codec.encode_ioctl(name, allow=1, id=-1)
                ops.append(Op.ioctl(0, request, argument, expect={0}))
                allowed.append(set(ids))
                continue
            chosen = {id for id in ids if rng.random() < 0.6}
            for id in sorted(chosen):
                request, argument = self._codec.encode_ioctl(name, allow=1, id=id)
                ops.append(Op.ioctl(0, request, argument, expect={0} if id in known else None))
            allowed.append(chosen)
        return ops, Permissions(allowed[0], allowed[1])

    def _enable_events(self, rng: Random, guest: Guest) -> list[tuple[int, bytes]]:
        """Commands by which the guest's code raises events."""
        found = []
        encode = self._codec.encode_command
        for vcpu in range(guest.vcpus):
            for event in self._vcpu_events:
                if event.controllable and rng.random() < 0.6:
                    found.append(
                        encode("VCPU_CONTROL_EVENTS", vcpu=vcpu, event_id=event.id, enable=1)
                    )
            for cr in (0, 3, 4):
                if rng.random() < 0.4:
                    found.append(encode("VCPU_CONTROL_CR", vcpu=vcpu, cr=cr, enable=1))
            if rng.random() < 0.4:
                found.append(encode("VCPU_CONTROL_MSR", vcpu=vcpu, msr=0xC0000082, enable=1))
        if rng.random() < 0.4:
            pages = [
                {"gpa": guest.touched + page * 4096, "access": rng.getrandbits(3)}
                for page in range(rng.randint(1, 8))
            ]
            found.append(encode("VM_SET_PAGE_ACCESS", entries=pages))
        return found

    # -- one message

    def _message(self, rng: Random, guest: Guest) -> tuple[int, bytes]:
        """Id and payload of a message whose size will be true."""
        command = rng.choice(self._commands)
        draw = rng.choices(_KINDS, _WEIGHTS)[0]
        if draw == "right":
            return command.id, self._values.payload(rng, command, guest.shape)
        if draw == "one wrong":
            return command.id, self._values.one_wrong(rng, command, guest.shape)
        if draw == "noise":
            return command.id, rng.randbytes(rng.randrange(65))
        if draw == "length":
            return command.id, self._wrong_length(rng, command, guest)
        if draw == "unknown":
            id = rng.choice((0, rng.randrange(2, 80), rng.randrange(2, 1 << 16)))
            return id, rng.randbytes(rng.choice((0, 8, rng.randrange(600))))
        start = rng.randbytes(8) if rng.random() < 0.5 else bytes(8)
        return self._profile.vcpu_event, start + bytes(rng.randrange(24))

    def _wrong_length(self, rng: Random, command: Command, guest: Guest) -> bytes:
        payload = self._values.payload(rng, command, guest.shape)
        if rng.random() < 0.6:
            return payload[: rng.randint(0, len(payload))]
        room = self._profile.max_message_size - len(payload)
        more = room if rng.random() < 0.1 else rng.randrange(64)
        return payload + rng.randbytes(min(more, room))

    def _violation(self, rng: Random) -> bytes:
        """Bytes that end the session, whatever the vCPUs do."""
        limit = self._profile.max_message_size
        wish = rng.randrange(4)
        if wish == 0:  # too big, with or without all that it announces
            size = rng.choice((limit + 1, 0xFFFF, rng.randint(limit + 1, 0xFFFF)))
            return HEADER.pack(rng.choice(self._commands).id, size, 1) + rng.randbytes(
                rng.choice((0, 8, size))
            )
        if wish == 1:  # a reply to no event
            event = rng.choice(self._vcpu_events)
            payload = self._codec.encode_event_reply(event, rng.randrange(3))
            return HEADER.pack(self._profile.vcpu_event, len(payload), _FIRST_SEQ) + payload
        if wish == 2:  # one that is too short
            size = rng.randrange(16)
            return HEADER.pack(self._profile.vcpu_event, size, _FIRST_SEQ) + bytes(size)
        # Noise, until it has been understood as something of the above.
        return rng.randbytes(rng.randrange(4)) + HEADER.pack(0xFFFF, 0xFFFF, 0xFFFFFFFF) * 4096


def _pieces(rng: Random, sent: Sequence[Sent], tail: bytes) -> list[bytes]:
    """The stream, cut between messages: what goes out at once."""
    frames = [one.frame for one in sent]
    pieces, at = [], 0
    while at < len(frames):
        count = rng.choice((1, 2, 8, 32))
        pieces.append(b"".join(frames[at : at + count]))
        at += count
    return [*pieces, tail] if tail else pieces
