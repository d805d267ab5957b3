# SPDX-License-Identifier: GPL-2.0-or-later
"""Values for fields: sensible ones, and ones that break things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from harness.abi import Codec, Command, Field, Profile, Struct

__all__ = ["MEMORY", "Shape", "Values"]

MEMORY = 1 << 20
"""Bytes of memory of each guest, from address 0 on."""

_PAGE = 4096
_EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 4095, 4096, 8183, 8184,
          0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32,
          (1 << 47) - 1, 1 << 52, 0x7FFFFFFFFFFFFFFF, 1 << 63, (1 << 64) - 1)  # fmt: skip
_MSRS = (0x10, 0x1B, 0x3A, 0xFE, 0x174, 0x175, 0x176, 0x1D9, 0x277, 0x2FF, 0x1FFF, 0x2000,
         0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101,
         0xC0000102, 0xC0000103, 0xC0001FFF, 0xC0002000, 0x40000000, 0x4B564D00)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a guest decides which values are sensible."""

    vcpus: int
    code: int
    """Where its code begins."""
    uninitialised: bool = False
    """All vCPUs but the first wait for INIT and SIPI."""


class Values:
    """Draws values for the fields of a profile's structs. Without state but the profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._codec = Codec(profile)
        self._events = [event.id for event in profile.events.values()]
        self._commands = [command.id for command in profile.commands.values()]
        self._by_name: Mapping[str, Callable[[Random, Shape], int]] = {
            "vcpu": lambda r, s: r.randrange(s.vcpus),
            "enable": lambda r, _s: r.random() < 0.8,
            "wait": lambda r, _s: r.getrandbits(1),
            "gpa": _gpa,
            "gva": _gpa,
            "cr": lambda r, _s: r.choice((0, 3, 4)),
            "msr": lambda r, _s: r.choice(_MSRS),
            "msrs_idx": lambda r, _s: r.choice(_MSRS),
            "nr": lambda r, _s: r.randrange(32),
            "function": lambda r, _s: r.choice((0, 1, 7, 0xB, 0xD, 0x40000000, 0x80000000)),
            "index": lambda r, _s: r.randrange(3),
            "xcr": lambda r, _s: 0,
            "rip": lambda r, s: s.code + r.randrange(64),
            "rflags": lambda r, _s: 2 | r.choice((0, 0x100, 0x200, 0x10000, 0x40000)),
        }

    def sensible(self, rng: Random, command: Command, shape: Shape) -> dict[str, Any]:
        """Fields of a command that may well succeed."""
        fields: dict[str, Any] = {}
        if command.is_vcpu:
            fields["vcpu"] = rng.randrange(shape.vcpus)
        request = command.request
        if request is None:
            return fields
        for field in request.fields:
            if not field.is_padding:
                fields[field.name] = self._field(rng, field, shape)
        if "gpa" in fields and "size" in fields:  # within a page
            size = rng.choice((1, 8, 64, 4096, rng.randint(1, _PAGE)))
            fields["gpa"] = fields["gpa"] // _PAGE * _PAGE + rng.randint(0, _PAGE - size)
            fields["size"] = size
            if "data" in fields:
                fields["data"] = rng.randbytes(size)
        elif request.tail is not None:
            fields.pop(str(request.tail.count))  # the codec counts
        return fields

    def _field(self, rng: Random, field: Field, shape: Shape) -> Any:
        if field.flexible:
            count = rng.choice((0, 1, 2, 3, 8, 40))
            if field.struct is None:
                return [self._scalar(rng, field, shape) for _ in range(count)]
            return [self._struct(rng, field.struct, shape) for _ in range(count)]
        if field.struct is not None:
            return rng.randbytes(field.size) if rng.random() < 0.3 else bytes(field.size)
        if isinstance(field.count, int):
            return rng.randbytes(field.count) if field.type == "u8" else [0] * field.count
        return self._scalar(rng, field, shape)

    def _struct(self, rng: Random, layout: Struct, shape: Shape) -> dict[str, Any]:
        return {
            field.name: self._field(rng, field, shape)
            for field in layout.fields
            if not field.is_padding
        }

    def _scalar(self, rng: Random, field: Field, shape: Shape) -> int:
        if field.table == "event":
            return rng.choice(self._events)
        if field.table == "command":
            return rng.choice(self._commands)
        if field.table == "access":
            return rng.getrandbits(3)
        draw = self._by_name.get(field.name)
        if draw is not None:
            return int(draw(rng, shape))
        return self.any(rng, field)

    def any(self, rng: Random, field: Field) -> int:
        """Any value that the field's type can hold, mostly one near an edge."""
        bits = 8 * field.element_size
        value = rng.getrandbits(bits) if rng.random() < 0.3 else rng.choice(_EDGES)
        if rng.random() < 0.2:
            value += rng.choice((-1, 1))
        value &= (1 << bits) - 1
        if field.type.startswith("s") and value >> (bits - 1):
            value -= 1 << bits
        return value

    def one_wrong(self, rng: Random, command: Command, shape: Shape) -> bytes:
        """The payload of a sensible command but for one field, padding and counters included."""
        payload = bytearray(self.payload(rng, command, shape))
        places: list[tuple[int, Field]] = []
        at = 0
        if command.is_vcpu:
            header = self._profile.structs["kvmi_vcpu_hdr"]
            places += [(field.offset, field) for field in header.fields]
            at = header.size
        if command.request is not None:
            for field in command.request.fields:
                places += self._places(field, at, len(payload))
        if not places:
            return rng.randbytes(rng.randrange(64))
        offset, field = rng.choice(places)
        size = field.element_size
        raw = self.any(rng, field) & ((1 << 8 * size) - 1)
        payload[offset : offset + size] = raw.to_bytes(size, "little")
        return bytes(payload)

    def _places(self, field: Field, at: int, end: int) -> list[tuple[int, Field]]:
        """Where single values of a field are; of a flexible array, those of the first element."""
        if field.struct is not None:
            start = at + field.offset
            inner = field.struct.fields if start + field.struct.size <= end else ()
            return [place for one in inner for place in self._places(one, start, end)]
        if field.offset + at + field.element_size > end:
            return []
        return [(at + field.offset, field)]

    def payload(self, rng: Random, command: Command, shape: Shape) -> bytes:
        """The payload of a command that may well succeed, with flexible arrays that fit."""
        fields = self.sensible(rng, command, shape)
        return self._codec.encode_command(command, **fields)[1]


def _gpa(rng: Random, shape: Shape) -> int:
    if rng.random() < 0.1:
        return rng.choice((MEMORY, MEMORY - 1, 0xFEE00000, 1 << 40, (1 << 64) - 1, 0xFFFBC000))
    page = rng.randrange(MEMORY // _PAGE) if rng.random() < 0.5 else shape.code // _PAGE + 16
    return page * _PAGE + rng.choice((0, 0, 8, 4088, 4095))
