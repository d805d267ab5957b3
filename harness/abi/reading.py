# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of the tool's side, read back for people: transcripts and error texts.

What the tool sends may be wrong on purpose, so nothing here fails; what cannot be read is given
as bytes under ``excess`` or ``payload``.
"""

from __future__ import annotations

from typing import Any

from harness.abi.layout import Field, Record, Struct
from harness.abi.profile import Profile

__all__ = ["name_of", "read_event_reply", "read_request"]


def name_of(profile: Profile, field: Field, value: int) -> str | None:
    """The name that a field's value has (of an event, a command, an action), or None."""
    if field.table == "event":
        event = profile.event_by_id.get(value)
        return event.name if event else None
    if field.table == "command":
        command = profile.command_by_id.get(value)
        return command.name if command else None
    if field.table == "access":
        bits = profile.names["access"]
        return "".join(name if value & bit else "-" for name, bit in bits.items()).lower()
    for name, number in profile.names.get(field.table or "", {}).items():
        if number == value:
            return name
    return None


def read_request(profile: Profile, id: int, payload: bytes) -> tuple[str, dict[str, Any]]:
    """Name and fields of a command as sent.

    Missing bytes read as zero, as the kernel does it. Padding is shown when it is not zero.
    """
    command = profile.command_by_id.get(id)
    if command is None:
        return f"id {id}", {"payload": payload} if payload else {}
    fields: dict[str, Any] = {}
    rest = payload
    if command.is_vcpu:
        header, rest = _take(profile.structs["kvmi_vcpu_hdr"], rest)
        fields["vcpu"] = header["vcpu"]
        fields.update((f"hdr_{k}", v) for k, v in header.items() if k != "vcpu" and v)
    if command.request is not None:
        record, rest = _take(command.request, rest)
        fields.update(_meaning(command.request, record))
    if rest:
        fields["excess"] = rest
    return command.name, fields


def read_event_reply(profile: Profile, payload: bytes) -> tuple[str, dict[str, Any]]:
    """Event name and fields of an event reply as sent."""
    header, rest = _take(profile.structs["kvmi_vcpu_hdr"], payload)
    fields: dict[str, Any] = {"vcpu": header["vcpu"]}
    fields.update((f"hdr_{k}", v) for k, v in header.items() if k != "vcpu" and v)
    layout = profile.event_reply_common
    common, rest = _take(layout, rest)
    fields["action"] = (
        name_of(profile, layout.field("action"), common["action"]) or common["action"]
    )
    fields.update(_meaning(layout, common, without=("action", "event")))
    event = profile.event_by_id.get(common["event"])
    if event is not None and event.reply is not None and rest:
        own, rest = _take(event.reply, rest)
        fields.update(_meaning(event.reply, own))
    if rest:
        fields["excess"] = rest
    if len(payload) < profile.structs["kvmi_vcpu_hdr"].size + layout.size:
        fields["length"] = len(payload)
    return event.name if event else f"event {common['event']}", fields


def _take(layout: Struct, data: bytes) -> tuple[Record, bytes]:
    record = layout.unpack_lenient(data)
    return record, data[layout.total_size(record) :]


def _meaning(layout: Struct, record: Record, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a record, without padding that is zero as it should be."""
    return {
        f.name: record[f.name]
        for f in layout.fields
        if f.name not in without and not (f.is_padding and not _any(record[f.name]))
    }


def _any(value: Any) -> bool:
    return any(value) if isinstance(value, (bytes, tuple)) else bool(value)
