# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases of ioctls: random sequences of them, from one thread or from several at once."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from random import Random

from harness.abi import Codec, Profile
from harness.fuzz.images import GUESTS
from harness.fuzz.values import MEMORY, Values
from harness.fuzz.wire import Arg, Kind, Mode, Op, Sock

__all__ = ["Call", "CallCases"]

_NOISE = ("HOOK", "UNHOOK", "COMMAND", "EVENT", "PREUNHOOK")
_BAD_POINTERS = (Arg.NULL, Arg.UNMAPPED, Arg.KERNEL, Arg.EDGE)
_DESCRIPTORS = (Arg.OURS,) * 12 + (
    Arg.PEER, Arg.VM_FD, Arg.VCPU_FD, Arg.KVM_FD, Arg.CLOSED_FD, Arg.BYTES,
)  # fmt: skip
_SOCKS = (Sock.UNIX_STREAM,) * 12 + (Sock.TCP_PAIR,) * 3 + tuple(Sock)

# What a thread does, and how often compared with the rest.
_STEPS, _WEIGHTS = zip(
    ("HOOK", 18), ("UNHOOK", 14), ("COMMAND", 6), ("EVENT", 6), ("PREUNHOOK", 8), ("failing", 8),
    ("unknown", 3), ("talk", 12), ("shut", 8), ("replace", 5), ("switched_off", 3),
    ("start_or_stop", 4), ("memory", 2), ("delay", 1.5), ("destroy", 1.5),
    strict=True,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One of the ioctls as issued, for whoever judges what it answered."""

    name: str
    """Empty: none of ours."""
    vm: int
    arg: Arg
    slot: int = -1
    allow: int = 0
    id: int = 0
    padding: int = 0
    may_fail: bool = False
    """An allocation or copy in it was made to fail."""


class CallCases:
    """Makes cases of ioctls. What is sent depends on the profile, the seed and the number."""

    def __init__(self, profile: Profile, *, seed: str) -> None:
        self._profile = profile
        self._codec = Codec(profile)
        self._values = Values(profile)
        self._seed = seed
        self._commands = list(profile.commands.values())

    def case(self, number: int) -> list[Op]:
        """The operations of the case of that number."""
        rng = Random(f"{self._seed}/calls/{number}")
        lanes = rng.choices((1, 2, 3), (5, 4, 1))[0]
        ops: list[Op] = []
        for vm in range(1 if rng.random() < 0.85 else 2):
            image = rng.choices(range(len(GUESTS)), [guest.weight for guest in GUESTS])[0]
            ops.append(Op.vm(vm, image, reuse=True, expect={0}))
            for vcpu in range(GUESTS[image].vcpus):
                if rng.random() < 0.6:
                    ops.append(Op(Kind.RUN, bytes([vm, vcpu]), expect={0}))
        for slot in range(4):
            ops.append(self._sock(rng, slot))
        if rng.random() < 0.7:
            ops += self._hooked(rng)
        ops.append(Op(Kind.READY, b""))  # the other lanes begin
        for lane in range(lanes):
            for _ in range(rng.randint(2, 14)):
                ops += self._step(rng, lane)
        return ops

    def _sock(self, rng: Random, slot: int, lane: int = 0) -> Op:
        room = 1 if rng.random() < 0.1 else 0
        return Op.sock(slot, rng.choice(_SOCKS), room=room, lane=lane)

    def _hooked(self, rng: Random) -> list[Op]:
        """Begin in a state in which much is possible."""
        return [
            self._call("HOOK", 0, Arg.OURS, slot=rng.randrange(4)),
            self._call("COMMAND", 0, Arg.BYTES, allow=1, id=-1),
            self._call("EVENT", 0, Arg.BYTES, allow=1, id=-1),
        ]

    def _call(
        self, name: str, vm: int, arg: Arg, *, lane: int = 0, slot: int = 0, allow: int = 0,
        id: int = 0, padding: int = 0, may_fail: bool = False, uuid: bytes = bytes(16),
    ) -> Op:  # fmt: skip
        if name == "HOOK":
            request, data = self._codec.encode_ioctl(name, fd=-1, padding=padding, uuid=uuid)
        elif name in ("COMMAND", "EVENT"):
            request, data = self._codec.encode_ioctl(name, allow=allow, id=id)
        else:
            request, data = self._codec.encode_ioctl(name)
        call = Call(name, vm, arg, slot, allow, id, padding, may_fail)
        return Op.ioctl(vm, request, data, arg=arg, slot=slot, lane=lane, expect=call)

    def _step(self, rng: Random, lane: int) -> list[Op]:
        """What one thread does next."""
        vm = 0 if rng.random() < 0.92 else 1
        slot = rng.randrange(4)
        what = rng.choices(_STEPS, _WEIGHTS)[0]
        if what.isupper():
            there = self._profile.has(f"ioctl {what}")
            return [self._random_call(rng, what, vm, slot, lane)] if there else []
        made: list[Op] = getattr(self, "_" + what)(rng, vm, slot, lane)
        return made

    def _shut(self, rng: Random, _vm: int, slot: int, lane: int) -> list[Op]:
        """Shut or close one end of a socket."""
        peer = rng.random() < 0.6
        return [Op.end(slot, peer=peer, how=rng.choice((0, 1, 2, 3, 3)), lane=lane)]

    def _replace(self, rng: Random, _vm: int, slot: int, lane: int) -> list[Op]:
        """Close a socket and make another."""
        return [
            Op.end(slot, peer=True, how=3, lane=lane),
            Op.end(slot, peer=False, how=3, lane=lane),
            self._sock(rng, slot, lane),
        ]

    def _switched_off(self, rng: Random, _vm: int, _slot: int, lane: int) -> list[Op]:
        """Something while the module's parameter is off."""
        return [
            Op(Kind.PARAM, b"\0", lane),
            *self._step(rng, lane),
            Op(Kind.PARAM, b"\1", lane),
        ]

    def _start_or_stop(self, rng: Random, vm: int, _slot: int, lane: int) -> list[Op]:
        """Let a vCPU enter the guest, or get it out."""
        kind = Kind.STOP if rng.random() < 0.4 else Kind.RUN
        return [Op(kind, bytes([vm, rng.randrange(3)]), lane)]

    def _delay(self, rng: Random, _vm: int, _slot: int, lane: int) -> list[Op]:
        return [Op(Kind.DELAY, struct.pack("<I", rng.choice((0, 50, 500, 2000))), lane)]

    def _destroy(self, rng: Random, vm: int, _slot: int, lane: int) -> list[Op]:
        """Destroy the virtual machine, whatever is going on; perhaps make another."""
        ops = [Op(Kind.VMEND, bytes([vm]), lane)]
        if rng.random() < 0.7:
            ops.append(Op.vm(vm, rng.randrange(len(GUESTS)), lane=lane))
        return ops

    def _random_call(
        self, rng: Random, name: str, vm: int, slot: int, lane: int, *, may_fail: bool = False
    ) -> Op:
        arg = Arg.BYTES
        if name == "HOOK":
            arg = rng.choice(_DESCRIPTORS)
        if name in ("HOOK", "COMMAND", "EVENT") and rng.random() < 0.08:
            arg = rng.choice(_BAD_POINTERS)
        id, allow = rng.choice((-1, -1, rng.randrange(32), rng.randrange(32))), rng.randrange(2)
        if rng.random() < 0.15:
            id = rng.choice((-2, 31, 63, 64, 0xFFFF, 0x10000, 0x7FFFFFFF, -0x80000000))
        if rng.random() < 0.1:
            allow = rng.choice((2, 0xFFFFFFFF))
        padding = rng.getrandbits(32) | 1 if rng.random() < 0.06 else 0
        return self._call(
            name, vm, arg, lane=lane, slot=slot, allow=allow, id=id, padding=padding,
            may_fail=may_fail, uuid=rng.randbytes(16),
        )  # fmt: skip

    def _failing(self, rng: Random, vm: int, slot: int, lane: int) -> list[Op]:
        """One of them while something that it needs fails."""
        name = rng.choice(("HOOK", "HOOK", *_NOISE))
        return [
            Op(Kind.FAIL, struct.pack("<I", rng.randint(1, 12)), lane),
            self._random_call(rng, name, vm, slot, lane, may_fail=True),
            Op(Kind.FAIL, struct.pack("<I", 0), lane),
        ]

    def _unknown(self, rng: Random, vm: int, slot: int, lane: int) -> list[Op]:
        """One of them with another size or direction: an ioctl that KVM does not have."""
        request = rng.choice(list(self._profile.ioctls.values())).request
        request ^= 1 << rng.choice((16, 17, 18, 19, 30, 31))
        unknown = Call("", vm, Arg.BYTES)
        return [Op.ioctl(vm, request, rng.randbytes(64), slot=slot, lane=lane, expect=unknown)]

    def _talk(self, rng: Random, _vm: int, slot: int, lane: int) -> list[Op]:
        """A few commands of the tool; nobody waits for replies."""
        shape = GUESTS[0].shape
        frames = []
        for seq in range(rng.randint(1, 6)):
            command = rng.choice(self._commands)
            draw = self._values.payload if rng.random() < 0.8 else self._values.one_wrong
            payload = draw(rng, command, shape)
            frames.append(self._codec.frame(command.id, payload, 0x8000_0000 + seq))
        if rng.random() < 0.5:
            for event in self._profile.events.values():
                if event.enabling.endswith("_CONTROL_EVENTS"):
                    id, payload = self._codec.encode_command(
                        event.enabling, event_id=event.id, enable=1
                    )
                    frames.append(self._codec.frame(id, payload, 0x8000_0100))
        answers = rng.choice(((100, 0, 0), (50, 20, 10)))
        linger_ms = rng.choice((0, 0, 3))
        return [
            Op.stream(
                slot, frames, Mode.NONE, answers=answers, linger_ms=linger_ms,
                seed=rng.getrandbits(32), lane=lane,
            )
        ]  # fmt: skip

    def _memory(self, rng: Random, vm: int, _slot: int, lane: int) -> list[Op]:
        """Log dirty pages or not, make it read-only, or add and delete a slot beside it."""
        if rng.random() < 0.6:
            flags = rng.choice((0, 1, 2, 3))
            return [Op.memslot(vm, 0, flags=flags, gpa=0, size=MEMORY, offset=0, lane=lane)]
        gpa, size = rng.choice((MEMORY, 2 * MEMORY, 1 << 30)), rng.choice((0, 0x10000))
        flags = rng.choice((0, 1))
        return [Op.memslot(vm, 1, flags=flags, gpa=gpa, size=size, offset=0x20000, lane=lane)]
