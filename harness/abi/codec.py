# SPDX-License-Identifier: GPL-2.0-or-later
"""The codec: messages to bytes and back, made from a profile.

Encoding is free: tests have to be able to send what is wrong, so padding, counters and lengths
can be set to anything. Decoding what the kernel sends is strict: each deviation is a
:class:`~harness.errors.MalformedMessage` that names message, struct and field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from harness.abi.layout import Record, Struct
from harness.abi.messages import EMPTY, EventBody, Reply
from harness.abi.profile import Command, Event, Profile
from harness.errors import MalformedMessage, UsageError

__all__ = ["HEADER", "Codec", "frame"]

#: kvmi_msg_hdr: id, size, seq.
HEADER = struct.Struct("<HHI")

_ERROR_CODE = struct.Struct("<iI")
_SIZE_AND_VCPU = struct.Struct("<HH")
_EVENT_REPLY = struct.Struct("<HHIBBHI")


def frame(id: int, payload: bytes, seq: int, *, size: int | None = None) -> bytes:
    """One message: header and payload. ``size`` overrides the header's field, for lies."""
    return HEADER.pack(id, len(payload) if size is None else size, seq) + payload


class Codec:
    """Messages of one profile. Stateless and safe to share between threads."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        s = profile.structs
        self._vcpu_hdr = s["kvmi_vcpu_hdr"]
        self._header = profile.event_header
        self._common = profile.event_common
        # Where an event has its common part.
        self._start = self._header.size if self._header else 0
        self._common_end = self._start + self._common.size
        arch = self._common.field("arch")
        assert arch.struct is not None
        #: The state of the vCPU in its events, and where it is.
        self.arch: Struct = arch.struct
        self.arch_offset = self._start + arch.offset
        # Which event it is, is told by the header, or else by the common part.
        teller = (self._header or self._common).field("event")
        self._number = slice(teller.offset, teller.offset + teller.size)
        self._zero = slice(teller.offset + teller.size, self._start)
        self._actions = profile.names["action"]
        # By event id: the event, its exact payload size, and the id of its message.
        self._event_forms: dict[int, tuple[Event, int, int]] = {}
        for event in profile.event_by_id.values():
            own = event.payload.size if event.payload else 0
            whole = event.is_vcpu or self._header is None
            start = self._common_end if whole else self._start
            message_id = profile.vcpu_event if event.is_vcpu else profile.vm_event
            self._event_forms[event.id] = (event, start + own, message_id)

    # -- structs -------------------------------------------------------------------------------

    def pack(self, name: str, values: Mapping[str, Any] | None = None, **fields: Any) -> bytes:
        """Bytes of the struct of that name; see :meth:`harness.abi.layout.Struct.pack`."""
        layout = self._struct(name)
        return layout.pack(self._resolve(layout, {**(values or {}), **fields}))

    def unpack(self, name: str, data: bytes, offset: int = 0) -> Record:
        """The record of the struct of that name at ``offset``."""
        return self._struct(name).unpack(data, offset)

    def _struct(self, name: str) -> Struct:
        try:
            return self.profile.structs[name]
        except KeyError:
            raise UsageError(f"{self.profile.name} has no struct {name}") from None

    def _resolve(self, layout: Struct, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values with names (of events, actions, ...) replaced by their numbers."""
        out = dict(values)
        for one in layout.fields:
            value = out.get(one.name)
            if one.table and isinstance(value, str):
                out[one.name] = self.number(one.table, value)
            elif one.struct is not None and isinstance(value, Mapping):
                out[one.name] = self._resolve(one.struct, value)
            elif one.struct is not None and isinstance(value, (list, tuple)):
                out[one.name] = [
                    self._resolve(one.struct, v) if isinstance(v, Mapping) else v for v in value
                ]
        return out

    def number(self, table: str, name: str) -> int:
        """The number of a name in a table: ``number("event", "HYPERCALL")``, bits as ``"RW"``.

        :raises UsageError: no such name.
        """
        if table == "event":
            return self.profile.event(name).id
        if table == "command":
            return self.profile.command(name).id
        names = self.profile.names[table]
        if name in names:
            return names[name]
        if name and all(letter in names for letter in name):
            return sum(names[letter] for letter in set(name))
        raise UsageError(f"{name!r} is not among {table}: {', '.join(names)}")

    @staticmethod
    def frame(id: int, payload: bytes, seq: int, *, size: int | None = None) -> bytes:
        """One message, see :func:`frame`."""
        return frame(id, payload, seq, size=size)

    # -- commands ------------------------------------------------------------------------------

    def encode_command(
        self, name: str | Command, *, length: int | None = None, **fields: Any
    ) -> tuple[int, bytes]:
        """Message id and payload of a command.

        Fields are those of the request struct; names of events, commands and access bits may
        stand for their numbers. vCPU commands also take ``vcpu`` (0 when absent),
        ``hdr_padding1`` and ``hdr_padding2``. VCPU_SET_REGISTERS also takes ``regs``, all
        registers at once. What is not given is zero; counters are filled in.

        :param length: cut or zero-extend the payload to that many bytes.
        :raises UsageError: unknown command or field, or a value that does not fit.
        """
        command = self.profile.command(name)
        values = dict(fields)
        payload = b""
        if command.is_vcpu:
            payload += self._vcpu_hdr.pack(
                {
                    "vcpu": values.pop("vcpu", 0),
                    "padding1": values.pop("hdr_padding1", 0),
                    "padding2": values.pop("hdr_padding2", 0),
                }
            )
        if command.request is not None:
            if command.request.name == "kvm_regs" and "regs" in values:
                values = {**values.pop("regs"), **values}
            payload += command.request.pack(self._resolve(command.request, values))
        elif values:
            raise UsageError(f"{command.name} has no field {', '.join(values)}")
        return command.id, _fit(payload, length)

    def wrong_paddings(self, name: str | Command) -> Iterator[dict[str, Any]]:
        """Arguments for :meth:`encode_command`, each of which sets one byte of padding to 1.

        One for every byte of padding of the command's request, the vCPU header included.
        """
        command = self.profile.command(name)
        layouts = [("hdr_", self._vcpu_hdr)] if command.is_vcpu else []
        layouts += [("", command.request)] if command.request else []
        for prefix, layout in layouts:
            for one in layout.fields:
                for byte in range(one.size if one.is_padding else 0):
                    raw = bytes(i == byte for i in range(one.size))
                    value = getattr(
                        layout.unpack(bytes(one.offset) + raw + bytes(layout.size)), one.name
                    )
                    yield {prefix + one.name: value}

    def decode_reply(
        self,
        command: str | int | Command,
        payload: bytes,
        *,
        request: bytes | None = None,
        seq: int = 0,
    ) -> Reply:
        """The reply to a command, checked to the byte.

        :param command: what was sent; an id that is no command may only be answered by an error.
        :param request: the payload sent, from which the size of the answer follows.
        :raises MalformedMessage: a size, padding or error code that the interface does not allow.
        """
        known = self._known(command)
        name = known.name if known else f"id {command}"
        what = f"reply to {name} (seq {seq})"
        if len(payload) < _ERROR_CODE.size:
            raise MalformedMessage(
                f"{what}: kvmi_error_code has {len(payload)} bytes, expected {_ERROR_CODE.size}"
            )
        err, padding = _ERROR_CODE.unpack_from(payload)
        if padding:
            raise MalformedMessage(
                f"{what}: kvmi_error_code.padding is {padding:#x}, expected zero"
            )
        if err > 0:
            raise MalformedMessage(f"{what}: kvmi_error_code.err is {err}, expected 0 or negative")
        body = payload[_ERROR_CODE.size :]
        if err and body:
            raise MalformedMessage(
                f"{what}: kvmi_msg_hdr.size is {len(payload)}, expected {_ERROR_CODE.size} "
                f"since kvmi_error_code.err is {err}"
            )
        error = self.profile.error_name(err)
        if err:
            return Reply(name, err, error, EMPTY, b"", payload, seq)
        if known is None:
            raise MalformedMessage(
                f"{what}: kvmi_error_code.err is 0, and there is no such command"
            )
        fields, data = self._reply_body(known, body, request, what)
        return Reply(name, 0, None, fields, data, payload, seq)

    def _known(self, command: str | int | Command) -> Command | None:
        if isinstance(command, int):
            return self.profile.command_by_id.get(command)
        return self.profile.command(command)

    def _reply_body(
        self, command: Command, body: bytes, request: bytes | None, what: str
    ) -> tuple[Record, bytes]:
        asked = self._lenient_request(command, request)
        start = _ERROR_CODE.size
        if command.reply_data is not None:
            if asked is not None:
                due = asked[command.reply_data] * command.reply_unit
                _check_size(what, start + len(body), start + due)
            return EMPTY, body
        if command.reply is None:
            _check_size(what, start + len(body), start)
            return EMPTY, b""
        if command.reply.tail is None or len(body) < command.reply.size:
            _check_size(what, start + len(body), start + command.reply.size)
        fields = command.reply.unpack(body, what=what)
        _check_size(what, start + len(body), start + command.reply.total_size(fields))
        command.reply.check_padding(body, what=what)
        if asked is not None and command.reply.tail and command.request and command.request.tail:
            counter = str(command.reply.tail.count)
            found = fields[command.reply.fields[-1].name][counter]
            if found != asked[str(command.request.tail.count)]:
                raise MalformedMessage(
                    f"{what}: {counter} is {found}, "
                    f"expected {asked[str(command.request.tail.count)]} as in the request"
                )
        return fields, b""

    def _lenient_request(self, command: Command, request: bytes | None) -> Record | None:
        if request is None or command.request is None:
            return None
        start = self._vcpu_hdr.size if command.is_vcpu else 0
        return command.request.unpack_lenient(request[start:])

    # -- events --------------------------------------------------------------------------------

    def check_event(self, id: int, payload: bytes, *, seq: int = 0) -> tuple[Event, int | None]:
        """Which event this is, and the vCPU's index (None for the VM event), checked to the byte.

        The cheap half of :meth:`decode_event`, for a session that has thousands of them.

        :raises MalformedMessage: unknown event id, wrong message id or size, padding not zero.
        """
        first = self._header or self._common
        if len(payload) < first.size:
            raise MalformedMessage(
                f"event (seq {seq}): {first.name} has {len(payload)} bytes, expected {first.size}"
            )
        number = int.from_bytes(payload[self._number], "little")
        form = self._event_forms.get(number)
        if form is None:
            raise MalformedMessage(
                f"event (seq {seq}): {first.name}.event is {number}, "
                f"which {self.profile.name} does not know"
            )
        event, size, message_id = form
        if len(payload) != size or any(payload[self._zero]) or id != message_id:
            what = f"event {event.name} (seq {seq})"
            if id != message_id:
                raise MalformedMessage(f"{what}: kvmi_msg_hdr.id is {id}, expected {message_id}")
            _check_size(what, len(payload), size)
            first.check_padding(payload, what=what)
        if self._header is not None and not event.is_vcpu:
            return event, None
        # With these two, the common part begins in all versions.
        own_size, vcpu = _SIZE_AND_VCPU.unpack_from(payload, self._start)
        if own_size != self._common.size:
            raise MalformedMessage(
                f"event {event.name} (seq {seq}): {self._common.name}.size is {own_size}, "
                f"expected {self._common.size}"
            )
        if event.payload is not None:
            event.payload.check_padding(
                payload, self._common_end, what=f"event {event.name} (seq {seq})"
            )
        return event, vcpu if event.is_vcpu else None

    def decode_event(self, id: int, payload: bytes, *, seq: int = 0) -> EventBody:
        """The whole event, checked as :meth:`check_event` does."""
        event, vcpu = self.check_event(id, payload, seq=seq)
        if vcpu is None:
            return EventBody(event.name, None, None, self.event_fields(event, payload))
        return EventBody(
            event.name,
            vcpu,
            self.event_common(payload),
            self.event_fields(event, payload),
            self.dirty_padding(payload),
        )

    def event_common(self, payload: bytes) -> Record:
        """The record of the common part of a vCPU event that was checked."""
        return self._common.unpack(payload, self._start)

    def event_fields(self, event: Event, payload: bytes) -> Record:
        """The event's own part, of an event that was checked."""
        return event.payload.unpack(payload, self._common_end) if event.payload else EMPTY

    def dirty_padding(self, payload: bytes) -> tuple[str, ...]:
        """Padding of a vCPU event's common part that is not zero (which nobody promised)."""
        return self._common.dirty_lax_padding(payload, self._start)

    def encode_event_reply(
        self,
        event: str | int | Event,
        action: str | int = "CONTINUE",
        *,
        vcpu: int = 0,
        event_id: int | None = None,
        hdr_padding1: int = 0,
        hdr_padding2: int = 0,
        padding1: int = 0,
        padding2: int = 0,
        length: int | None = None,
        **fields: Any,
    ) -> bytes:
        """Payload of the reply to a vCPU event (its message has the event's seq).

        :param action: name or any number. :param event_id: overrides the field of that meaning.
        :param length: cut or zero-extend to that many bytes.
        :raises UsageError: the event has no such field, or a value does not fit.
        """
        definition = self.profile.event(event)
        number = self._actions.get(action, -1) if isinstance(action, str) else action
        if number < 0:
            raise UsageError(f"there is no action {action}", hint=", ".join(self._actions))
        try:
            payload = _EVENT_REPLY.pack(
                vcpu, hdr_padding1, hdr_padding2, number,
                definition.id if event_id is None else event_id, padding1, padding2,
            )  # fmt: skip
        except struct.error as error:
            raise UsageError(f"reply to event {definition.name}: {error}") from None
        if definition.reply is not None:
            payload += definition.reply.pack(fields)
        elif fields:
            raise UsageError(
                f"the reply to event {definition.name} has no field {', '.join(fields)}"
            )
        return payload if length is None else _fit(payload, length)

    # -- ioctls --------------------------------------------------------------------------------

    def encode_ioctl(self, name: str, **fields: Any) -> tuple[int, bytes]:
        """Request value and argument (empty when it takes none) of a VM ioctl.

        :param name: as in v12.
        :raises UsageError: unknown ioctl or field.
        """
        ioctl = self.profile.ioctl(name)
        if ioctl.argument is None:
            if fields:
                raise UsageError(f"the ioctl {name} takes no argument")
            return ioctl.request, b""
        return ioctl.request, ioctl.argument.pack(fields)


def _fit(payload: bytes, length: int | None) -> bytes:
    if length is None:
        return payload
    return payload[:length] + bytes(max(0, length - len(payload)))


def _check_size(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise MalformedMessage(f"{what}: kvmi_msg_hdr.size is {found}, expected {expected}")
