# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages in words: as a dict for transcripts, and as one line for people.

Nothing here fails: what cannot be decoded is given as hex, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.abi import Codec, Record
from harness.abi.reading import name_of, read_event_reply, read_request
from harness.errors import MalformedMessage

__all__ = ["explain", "hex_lines", "one_line"]

_LINE_DATA = 16
_EVENT_REGS = ("rip", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi")


def explain(
    codec: Codec,
    *,
    outgoing: bool,
    id: int,
    seq: int,
    payload: bytes,
    request: bytes | None = None,
    previous: bytes | None = None,
) -> dict[str, Any]:
    """One message as a dict ready for JSON.

    ``kind`` is command, reply, event or event-reply; ``name`` that of the command or event;
    ``fields`` the decoded fields, 64-bit numbers as hex strings. A reply has ``error`` (None on
    success), ``data`` is hex. ``malformed`` says why a message cannot be decoded, ``hex`` has its
    payload then.

    :param request: the payload of the command, for its reply.
    :param previous: the payload of the event before on the same vCPU: special registers and MSRs
        that are equal are ``"same"``.
    """
    profile = codec.profile
    entry: dict[str, Any] = {"id": id, "seq": seq, "size": len(payload)}
    if outgoing and id == profile.event_reply:
        name, fields = read_event_reply(profile, payload)
        return {"kind": "event-reply", "name": name, **entry, "fields": _plain(fields)}
    if outgoing:
        name, fields = read_request(profile, id, payload)
        return {
            "kind": "command",
            "name": name,
            **entry,
            "fields": _request_fields(codec, id, fields),
        }
    if is_event(codec, id, payload):
        return _explain_event(codec, entry, payload, previous)
    try:
        reply = codec.decode_reply(id, payload, request=request, seq=seq)
    except MalformedMessage as error:
        command = profile.command_by_id.get(id)
        name = command.name if command else f"id {id}"
        return {"kind": "reply", "name": name, **entry, **_malformed(error, payload)}
    entry = {"kind": "reply", "name": reply.command, **entry, "error": reply.error}
    if reply.fields:
        entry["fields"] = _record(codec, reply.fields)
    if reply.data:
        entry["data"] = reply.data.hex()
    return entry


def is_event(codec: Codec, id: int, payload: bytes) -> bool:
    """Whether a message from the kernel is an event.

    Ids 0 and 1 also occur in replies: to a command with id 0 and to an event reply that the
    kernel refuses. These are 8 bytes, and begin with a negative number.
    """
    if id not in (codec.profile.vm_event, codec.profile.vcpu_event):
        return False
    return not (len(payload) == 8 and payload[3] & 0x80)


def _explain_event(
    codec: Codec, entry: dict[str, Any], payload: bytes, previous: bytes | None
) -> dict[str, Any]:
    try:
        event, vcpu = codec.check_event(entry["id"], payload, seq=entry["seq"])
    except MalformedMessage as error:
        return {"kind": "event", "name": "?", **entry, **_malformed(error, payload)}
    entry = {"kind": "event", "name": event.name, **entry}
    if vcpu is None:
        return entry
    entry["vcpu"] = vcpu
    entry["fields"] = _record(codec, codec.event_fields(event, payload))
    layout = codec.arch
    start = codec.arch_offset
    arch: dict[str, Any] = {}
    for one in layout.fields:
        span = slice(start + one.offset, start + one.offset + one.size)
        if one.is_padding:
            continue
        if one.struct is None:
            arch[one.name] = int.from_bytes(payload[span], "little")
        elif one.name != "regs" and previous is not None and previous[span] == payload[span]:
            arch[one.name] = "same"
        else:
            arch[one.name] = _record(codec, one.struct.unpack(payload, span.start))
    entry["arch"] = arch
    dirty = codec.dirty_padding(payload)
    if dirty:
        entry["dirty_padding"] = list(dirty)
    return entry


def _malformed(error: MalformedMessage, payload: bytes) -> dict[str, Any]:
    return {"malformed": error.message, "hex": payload.hex()}


def _request_fields(codec: Codec, id: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    command = codec.profile.command_by_id.get(id)
    if command is None or command.request is None:
        return _plain(fields)
    out = {}
    known = {f.name: f for f in command.request.fields}
    for key, value in fields.items():
        if key in known:
            named = name_of(codec.profile, known[key], value) if isinstance(value, int) else None
            out[key] = named or _value(codec, known[key].type, value)
        else:
            out[key] = _plain({key: value})[key]
    return out


def _record(codec: Codec, record: Record) -> dict[str, Any]:
    """The fields of a record without padding that is zero, 64-bit numbers in hex."""
    out: dict[str, Any] = {}
    for one in record._struct.fields:
        value = record[one.name]
        if type(value) is int:
            if one.type == "u64":
                out[one.name] = hex(value)
            elif value or not one.is_padding:
                out[one.name] = (name_of(codec.profile, one, value) if one.table else None) or value
        elif not (one.is_padding and not any(value)):
            out[one.name] = _value(codec, one.type, value)
    return out


def _value(codec: Codec, kind: str, value: Any) -> Any:
    if isinstance(value, Record):
        return _record(codec, value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_value(codec, kind, v) for v in value]
    return f"{value:#x}" if kind in ("u64", "s64") else value


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.hex() if isinstance(v, bytes) else f"{v:#x}" if isinstance(v, int) and v >= 2**32
            else v for k, v in fields.items()}  # fmt: skip


# -- one line ------------------------------------------------------------------------------------


def one_line(entry: Mapping[str, Any]) -> str:
    """A dict of :func:`explain` on one line."""
    head = f"{entry['name']} (seq {entry['seq']})"
    if "malformed" in entry:
        return f"{entry['kind']} {head}: MALFORMED: {entry['malformed']}"
    if entry["kind"] == "reply":
        return f"reply {head}: {entry['error'] or 'ok'}{_tail(entry)}"
    if entry["kind"] == "event":
        vcpu = f" vcpu {entry['vcpu']}" if "vcpu" in entry else ""
        return f"event {head}{vcpu}{_tail(entry)}{_registers(entry.get('arch', {}))}"
    return f"{entry['kind'].replace('-', ' ')} {head}{_tail(entry)}"


def _tail(entry: Mapping[str, Any]) -> str:
    text = "".join(f" {k}={_short(v)}" for k, v in entry.get("fields", {}).items())
    if entry.get("data"):
        text += f" {len(entry['data']) // 2} bytes: {_short(entry['data'])}"
    return text


def _registers(arch: Mapping[str, Any]) -> str:
    if not arch:
        return ""
    regs = arch.get("regs", {})
    return f" mode={arch.get('mode')}" + "".join(f" {n}={regs.get(n)}" for n in _EVENT_REGS)


def _short(value: Any) -> str:
    if isinstance(value, str) and not value.startswith("0x") and len(value) > 2 * _LINE_DATA:
        return f"{value[: 2 * _LINE_DATA]}... ({len(value) // 2} bytes)"
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{k}={_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        shown = ", ".join(_short(v) for v in value[:8])
        return f"[{shown}{', ...' if len(value) > 8 else ''}]"
    return str(value)


def hex_lines(data: bytes, *, indent: str = "", limit: int = 4096) -> str:
    """A hex dump, 16 bytes a line, cut at ``limit`` bytes."""
    lines = []
    for at in range(0, min(len(data), limit), 16):
        row = data[at : at + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{indent}{at:04x}  {row.hex(' '):<47}  {text}")
    if len(data) > limit:
        lines.append(f"{indent}... {len(data) - limit} bytes more")
    return "\n".join(lines)
