# SPDX-License-Identifier: GPL-2.0-or-later
"""C structs described by data: offsets from natural alignment, packing, unpacking.

A struct is a list of fields, each written ``name:type``, ``name:type[3]`` or
``name:type[counter]``, where ``counter`` is an earlier field that holds the number of elements
(a flexible array, last in its struct). ``/table`` after the type names the table of names that
the values of the field belong to. Little endian, no packing, as the kernel's uapi headers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.errors import MalformedMessage, UsageError

__all__ = ["Field", "Record", "Struct", "build_structs"]

_SCALARS = {
    "u8": "B", "s8": "b", "u16": "H", "s16": "h",
    "u32": "I", "s32": "i", "u64": "Q", "s64": "q",
}  # fmt: skip

_FIELD = re.compile(r"(?P<name>\w+):(?P<type>\w+)(?:\[(?P<count>\w+)\])?(?:/(?P<table>\w+))?")


class Record(Mapping[str, Any]):
    """The values of one struct: a read-only mapping whose fields are attributes, too.

    Arrays of bytes are ``bytes``, other arrays are tuples, structs are records.
    """

    __slots__ = ("_layout", "_values")

    def __init__(self, layout: Struct, values: dict[str, Any]) -> None:
        self._layout = layout
        self._values = values

    @property
    def _struct(self) -> Struct:
        """The struct that this record is an instance of."""
        return self._layout

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"struct {self._layout.name} has no field {name!r}") from None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Record):
            return self._layout.name == other._layout.name and self._values == other._values
        return self._values == other

    def __hash__(self) -> int:
        return hash((self._layout.name, tuple(self._values.items())))

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self._values.items())
        return f"{self._layout.name}({inside})"

    def plain(self) -> dict[str, Any]:
        """The same as dicts, lists, ints and hex strings, ready for JSON."""
        return {name: _plain(value) for name, value in self._values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.plain()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True)
class Field:
    """One field of a struct.

    ``count`` is None for a single value, a number for an array, a field's name for a flexible
    array (whose ``size`` is 0). ``offset`` and ``size`` are in bytes.
    """

    name: str
    type: str
    count: int | str | None
    table: str | None
    offset: int
    size: int
    struct: Struct | None = field(default=None, repr=False)

    @property
    def is_padding(self) -> bool:
        """Whether the field has no meaning and has to be zero."""
        return self.name.startswith("pad") or self.name == "reserved"

    @property
    def flexible(self) -> bool:
        """Whether this is an array whose length another field tells."""
        return isinstance(self.count, str)

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return self.struct.size if self.struct else struct.calcsize(_SCALARS[self.type])

    def range_error(self, value: object) -> str | None:
        """Why ``value`` does not fit, or None when it does."""
        if self.type not in _SCALARS:
            return None
        bits = int(self.type[1:])
        low, high = (
            (0, 2**bits - 1) if self.type[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
        if not isinstance(value, int):
            return f"{value!r} is not a number"
        return None if low <= value <= high else f"{value:#x} does not fit {self.type}"


@dataclass(frozen=True, eq=False)
class Struct:
    """The layout of one C struct. ``size`` and ``align`` are in bytes, ``size`` without the
    flexible array at the end, ``padding`` are (offset, size, name) of everything that must be
    zero, and ``lax`` the same of what should be, but is not promised.
    """

    name: str
    fields: tuple[Field, ...]
    size: int
    align: int
    padding: tuple[tuple[int, int, str], ...]
    lax: tuple[tuple[int, int, str], ...]
    _plan: struct.Struct = field(default=struct.Struct("<"), repr=False)

    @property
    def tail(self) -> Field | None:
        """The flexible array at the end, also when it is that of the last field's struct."""
        last = self.fields[-1]
        if last.flexible:
            return last
        return last.struct.tail if last.struct and last.count is None else None

    def has(self, name: str) -> bool:
        """Whether there is a field of that name."""
        return any(one.name == name for one in self.fields)

    def field(self, name: str) -> Field:
        """The field of that name; KeyError when there is none."""
        for one in self.fields:
            if one.name == name:
                return one
        raise KeyError(name)

    # -- packing ---------------------------------------------------------------------------

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Bytes of this struct.

        Missing fields are zero. A missing counter of a flexible array is the number of elements
        given; a given one is taken as it is, right or wrong.

        :raises UsageError: unknown field, or a value that does not fit.
        """
        unknown = set(values) - {f.name for f in self.fields}
        if unknown:
            known = ", ".join(f.name for f in self.fields)
            raise UsageError(
                f"struct {self.name} has no field {', '.join(sorted(unknown))}",
                hint=f"it has: {known}",
            )
        counted = dict(values)
        last = self.fields[-1]
        if isinstance(last.count, str) and last.name in values:
            counted.setdefault(last.count, len(values[last.name]))
        out = bytearray()
        for one in self.fields:
            out += bytes(one.offset - len(out))
            out += self._pack_field(one, counted.get(one.name))
        out += bytes(max(0, self.size - len(out)))
        return bytes(out)

    def _pack_field(self, one: Field, value: Any) -> bytes:
        if value is None:
            return bytes(one.size)
        if one.count is None:
            return self._pack_element(one, value)
        if one.type == "u8" and isinstance(value, (bytes, bytearray, memoryview)):
            data = bytes(value)
        elif isinstance(value, Sequence):
            data = b"".join(self._pack_element(one, v) for v in value)
        else:
            raise UsageError(f"{self.name}.{one.name} is an array, and {value!r} is none")
        if isinstance(one.count, int) and len(data) != one.size:
            raise UsageError(f"{self.name}.{one.name} has {one.size} bytes, not {len(data)}")
        return data

    def _pack_element(self, one: Field, value: Any) -> bytes:
        if one.struct is not None:
            if isinstance(value, (bytes, bytearray)) and len(value) == one.struct.size:
                return bytes(value)
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{self.name}.{one.name} takes {one.struct.size} bytes or the fields of "
                    f"{one.struct.name}, not {value!r:.80}"
                )
            return one.struct.pack(value)
        problem = one.range_error(value)
        if problem:
            raise UsageError(f"{self.name}.{one.name}: {problem}")
        return struct.pack("<" + _SCALARS[one.type], value)

    # -- unpacking -------------------------------------------------------------------------

    def unpack(self, data: bytes, offset: int = 0, *, what: str = "") -> Record:
        """The record at ``offset``; a flexible array takes what its counter says.

        Padding is not looked at (see :meth:`check_padding`).

        :param what: the message that the bytes belong to, for errors.
        :raises MalformedMessage: the bytes end too early; names the struct and field.
        """
        if len(data) - offset < self.size:
            raise MalformedMessage(
                f"{what or 'message'}: {self.name} has {max(0, len(data) - offset)} bytes, "
                f"expected {self.size}"
            )
        raw = iter(self._plan.unpack_from(data, offset))
        values: dict[str, Any] = {}
        for one in self.fields:
            if one.flexible:
                values[one.name] = self._unpack_tail(one, values, data, offset + self.size, what)
            elif one.struct is not None:
                values[one.name] = self._unpack_struct(one, data, offset + one.offset, what)
            elif one.count is None or one.type == "u8":
                values[one.name] = next(raw)
            else:
                assert isinstance(one.count, int)
                values[one.name] = tuple(next(raw) for _ in range(one.count))
        return Record(self, values)

    def _unpack_struct(self, one: Field, data: bytes, offset: int, what: str) -> Any:
        assert one.struct is not None
        if one.count is None:
            return one.struct.unpack(data, offset, what=what)
        assert isinstance(one.count, int)
        step = one.struct.size
        return tuple(
            one.struct.unpack(data, offset + i * step, what=what) for i in range(one.count)
        )

    def _unpack_tail(
        self, one: Field, values: Mapping[str, Any], data: bytes, offset: int, what: str
    ) -> Any:
        count = int(values[str(one.count)])
        need = count * one.element_size
        if len(data) - offset < need:
            raise MalformedMessage(
                f"{what or 'message'}: {self.name}.{one.name} has {len(data) - offset} bytes, "
                f"but {one.count} = {count} asks for {need}"
            )
        if one.struct is not None:
            step = one.struct.size
            return tuple(
                one.struct.unpack(data, offset + i * step, what=what) for i in range(count)
            )
        if one.type == "u8":
            return bytes(data[offset : offset + need])
        return struct.unpack_from(f"<{count}{_SCALARS[one.type]}", data, offset)

    def unpack_lenient(self, data: bytes) -> Record:
        """The record as a reader sees it who takes missing bytes for zero; never fails.

        A flexible array that is shorter than its counter says has the elements that are there.
        """
        padded = data + bytes(max(0, self.size - len(data)))
        try:
            return self.unpack(padded)
        except MalformedMessage:
            tail = self.fields[-1]
            there = (len(padded) - self.size) // tail.element_size
            whole = padded[: self.size + there * tail.element_size]
            counter = self.field(str(tail.count))
            width = counter.size
            cut = bytearray(whole)
            cut[counter.offset : counter.offset + width] = there.to_bytes(width, "little")
            values = dict(self.unpack(bytes(cut)))
            values[counter.name] = int.from_bytes(
                padded[counter.offset : counter.offset + width], "little"
            )
            return Record(self, values)

    def total_size(self, record: Mapping[str, Any]) -> int:
        """Bytes of a record with its flexible array."""
        last = self.fields[-1]
        if last.flexible:
            return self.size + len(record[last.name]) * last.element_size
        if last.struct is not None and last.count is None:
            return self.size - last.size + last.struct.total_size(record[last.name])
        return self.size

    def check_padding(self, data: bytes, offset: int = 0, *, what: str = "") -> None:
        """:raises MalformedMessage: a field that must be zero is not; names it."""
        for at, size, name in self.padding:
            found = data[offset + at : offset + at + size]
            if found.count(0) != size:
                raise MalformedMessage(
                    f"{what or 'message'}: {name} is {bytes(found).hex(' ')}, expected zero"
                )

    def dirty_lax_padding(self, data: bytes, offset: int = 0) -> tuple[str, ...]:
        """Names of the padding that is not zero although nobody promised it."""
        return tuple(
            name
            for at, size, name in self.lax
            if data[offset + at : offset + at + size].count(0) != size
        )


def build_structs(described: Mapping[str, tuple[int, bool, Sequence[str]]]) -> dict[str, Struct]:
    """Structs from (size, lax_padding, fields) by name, each after those that it contains.

    :raises UsageError: a field that cannot be read, or a size that natural alignment does not give.
    """
    done: dict[str, Struct] = {}
    for name, (size, lax, fields) in described.items():
        done[name] = _build(name, size, lax, fields, done)
    return done


def _build(
    name: str, size: int, lax: bool, described: Sequence[str], known: Mapping[str, Struct]
) -> Struct:
    fields: list[Field] = []
    for text in described:
        if fields and fields[-1].flexible:
            raise UsageError(f"struct {name}: nothing may follow the flexible {fields[-1].name}")
        end = fields[-1].offset + fields[-1].size if fields else 0
        fields.append(_parse(name, text, end, known))
    align = max(f.struct.align if f.struct else f.element_size for f in fields)
    computed = _round_up(fields[-1].offset + fields[-1].size, align)
    if computed != size:
        raise UsageError(f"struct {name} has {computed} bytes by natural alignment, not {size}")
    return Struct(
        name=name,
        fields=tuple(fields),
        size=size,
        align=align,
        padding=tuple(_zero_spans(name, fields, lax=lax, want_lax=False)),
        lax=tuple(_zero_spans(name, fields, lax=lax, want_lax=True)),
        _plan=struct.Struct(_scalar_plan(fields)),
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _parse(owner: str, text: str, end: int, known: Mapping[str, Struct]) -> Field:
    """The field that ``text`` describes, at the first fitting offset from ``end`` on."""
    match = _FIELD.fullmatch(text)
    if not match:
        raise UsageError(f"struct {owner}: cannot read field {text!r}")
    name, kind, counted = match["name"], match["type"], match["count"]
    inner = known.get(kind)
    if inner is None and kind not in _SCALARS:
        raise UsageError(f"struct {owner}: field {text!r} has an unknown type")
    if hasattr(Record, name):
        raise UsageError(f"struct {owner}: a field must not be called {name}")
    count = int(counted) if counted and counted.isdigit() else counted
    size = inner.size if inner else struct.calcsize(_SCALARS[kind])
    elements = 1 if count is None else count if isinstance(count, int) else 0
    offset = _round_up(end, inner.align if inner else size)
    return Field(name, kind, count, match["table"], offset, size * elements, inner)


def _zero_spans(
    owner: str, fields: Sequence[Field], *, lax: bool, want_lax: bool
) -> Iterator[tuple[int, int, str]]:
    """(offset, size, name) of the padding that must be zero, or of that which only should."""
    for one in fields:
        if one.struct is not None and not one.flexible:
            for start in range(one.offset, one.offset + one.size, one.struct.size):
                inner = one.struct.lax if want_lax else one.struct.padding
                for at, size, name in inner:
                    yield start + at, size, f"{owner}.{one.name}.{name.partition('.')[2]}"
        elif one.is_padding and lax == want_lax:
            yield one.offset, one.size, f"{owner}.{one.name}"


def _scalar_plan(fields: Sequence[Field]) -> str:
    """Format for the struct module that reads all but structs and the flexible array."""
    plan, at = "<", 0
    for one in fields:
        if one.struct is not None or one.flexible:
            continue
        plan += f"{one.offset - at}x"
        if one.count is None:
            plan += _SCALARS[one.type]
        else:
            plan += f"{one.count}{'s' if one.type == 'u8' else _SCALARS[one.type]}"
        at = one.offset + one.size
    return plan
