# SPDX-License-Identifier: GPL-2.0-or-later
"""What the interface promises for a message: which answers are right, and whether it ends
the session. Only what is certain is demanded; the rest has to be an answer that the
interface names for the command."""

from __future__ import annotations

import enum
from collections.abc import Set
from dataclasses import dataclass

from harness.abi import HEADER, Command, Profile, Record

__all__ = ["Closes", "Permissions", "Rules", "Sent"]


class Closes(enum.Enum):
    """Whether a message ends the session."""

    NEVER = "never"
    MAYBE = "maybe"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Permissions:
    """What is allowed in a session, by id."""

    commands: Set[int]
    events: Set[int]


@dataclass(frozen=True, slots=True)
class Sent:
    """One message as sent, and what may be answered."""

    id: int
    seq: int
    payload: bytes
    lane: int = -1
    """The vCPU that answers it, or -1: the receiver does. Answers of one lane are in order."""
    errors: frozenset[int] = frozenset()
    """Right values of kvmi_error_code.err; empty: it has no reply."""
    size: int = 8
    """Size of a successful reply."""
    closes: Closes = Closes.NEVER

    @property
    def frame(self) -> bytes:
        """The message with its header."""
        return HEADER.pack(self.id, len(self.payload), self.seq) + self.payload


class Rules:
    """The rules of a profile, for a kernel that has these commands and events.

    :param commands: ids of the commands that VM_CHECK_COMMAND knows.
    :param events: ids of the events that VM_CHECK_EVENT knows.
    """

    def __init__(self, profile: Profile, *, commands: Set[int], events: Set[int]) -> None:
        self.profile = profile
        self.commands = commands
        self.events = events
        self._no = {name: -number for name, number in profile.errno.items()}
        self._always = frozenset(c.id for c in profile.commands.values() if c.always_allowed)
        self._errors = {
            command.id: frozenset(self._no[name] for name in command.errors)
            | self._only("KVM_EINVAL", "KVM_EBUSY", "KVM_ENOMEM", "KVM_EAGAIN")
            for command in profile.commands.values()
        }

    def _only(self, *names: str) -> frozenset[int]:
        return frozenset(self._no[name] for name in names)

    def judge(
        self, id: int, seq: int, payload: bytes, *, permissions: Permissions, vcpus: int,
        uninitialised: bool = False,
    ) -> Sent:  # fmt: skip
        """What an honest message (its size is true) is answered with."""
        if len(payload) > self.profile.max_message_size:
            return Sent(id, seq, payload, closes=Closes.ALWAYS)
        if id == self.profile.vcpu_event:
            return self._unsolicited(id, seq, payload, vcpus)
        command = self.profile.command_by_id.get(id)
        refusal = ""
        if command is None or id not in self.commands:
            refusal = "KVM_ENOSYS"
        elif id not in permissions.commands and id not in self._always:
            refusal = "KVM_EPERM"
        lane = -1
        if command is not None and command.is_vcpu and not refusal:
            header = self.profile.structs["kvmi_vcpu_hdr"].unpack_lenient(payload[:8])
            lane = header["vcpu"]
            if header["padding1"] or header["padding2"] or lane >= vcpus:
                refusal = "KVM_EINVAL"
            elif uninitialised and lane > 0:
                refusal = "KVM_EAGAIN"
        if command is None or refusal:
            return Sent(id, seq, payload, errors=self._only(refusal))
        errors, size, closes = self._specific(command, payload, permissions, vcpus)
        return Sent(id, seq, payload, lane, errors, size, closes)

    def _unsolicited(self, id: int, seq: int, payload: bytes, vcpus: int) -> Sent:
        """A reply to no event. With a wrong vCPU header some kernels answer an error instead."""
        header = self.profile.structs["kvmi_vcpu_hdr"].unpack_lenient(payload[:8])
        if len(payload) >= 16 and (
            header["padding1"] or header["padding2"] or header["vcpu"] >= vcpus
        ):
            errors = self._only("KVM_EINVAL")
            return Sent(id, seq, payload, errors=errors, closes=Closes.MAYBE)
        return Sent(id, seq, payload, closes=Closes.ALWAYS)

    def _specific(
        self, command: Command, payload: bytes, permissions: Permissions, vcpus: int
    ) -> tuple[frozenset[int], int, Closes]:
        """Right errors, the size of a successful reply, and whether the session ends."""
        possible = self._errors[command.id] | {0}
        size = 8 + (command.reply.size if command.reply else 0)
        request = command.request
        if request is None:
            if command.name in ("GET_VERSION", "VM_GET_INFO"):
                possible = frozenset({0})
            return possible, size, Closes.NEVER
        body = payload[8:] if command.is_vcpu else payload
        there = request.unpack_lenient(body)
        count = there[str(request.tail.count)] if request.tail else 0
        needed = request.size + (count * request.tail.element_size if request.tail else 0)
        if command.reply_data is not None:
            size += there[command.reply_data]
        if command.reply is not None and command.reply.tail is not None:
            size += count * command.reply.tail.element_size
        if not command.short or len(body) >= needed:
            return self._fields(command, there, permissions, vcpus), size, Closes.NEVER
        if command.short == "close":  # or an error, as the text has it
            return (possible - {0} if count else possible), size, Closes.MAYBE
        whole = count == 0 and request.tail is not None
        return (possible if whole else self._only(command.short)), size, Closes.NEVER

    def _fields(
        self, command: Command, there: Record, permissions: Permissions, vcpus: int
    ) -> frozenset[int]:
        """Right errors for a command that is whole."""
        assert command.request is not None
        possible = self._errors[command.id] | {0}
        wrong = any(_set(there[field.name]) for field in command.request.fields if field.is_padding)
        # A flag is 0 or 1.
        wrong |= any(there[name] > 1 for name in ("enable", "wait") if name in there)
        wrong |= command.name == "VM_PAUSE_VCPU" and there["vcpu"] >= vcpus
        if wrong:
            return possible - {0}
        if command.name == "VM_CHECK_COMMAND":
            return self._check(there["id"], self.commands, self._always, permissions.commands)
        if command.name == "VM_CHECK_EVENT":
            return self._check(there["id"], self.events, frozenset(), permissions.events)
        if "gpa" in there and "size" in there:  # what is read or written lies within one page
            page = self.profile.constants["PAGE_SIZE"]
            if not 0 < there["size"] <= page - there["gpa"] % page:
                return self._only("KVM_EINVAL")
        return possible

    def _check(
        self, id: int, known: Set[int], always: Set[int], allowed: Set[int]
    ) -> frozenset[int]:
        if id not in known:
            return self._only("KVM_ENOENT")
        if id in always:
            return frozenset({0})
        return frozenset({0}) if id in allowed else self._only("KVM_EPERM")


def _set(value: object) -> bool:
    return any(value) if isinstance(value, (bytes, tuple)) else bool(value)
