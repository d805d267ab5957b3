# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages as a session hands them out."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from harness.abi import Codec, Event, Record
from harness.tool.explain import explain, one_line

__all__ = ["EventMessage", "Message"]


class Message:
    """One message of either direction, as it went over the socket.

    ``ns`` is when it was received or about to be sent (CLOCK_MONOTONIC).
    """

    def __init__(
        self, codec: Codec, ns: int, id: int, seq: int, payload: bytes, *, outgoing: bool = False
    ) -> None:
        self.codec = codec
        self.ns = ns
        self.outgoing = outgoing
        self.id = id
        self.seq = seq
        self.payload = payload

    @property
    def entry(self) -> dict[str, Any]:
        """The message decoded, as in a transcript."""
        return explain(
            self.codec,
            outgoing=self.outgoing,
            id=self.id,
            seq=self.seq,
            payload=self.payload,
        )

    @property
    def kind(self) -> str:
        """``command``, ``reply``, ``event`` or ``event-reply``."""
        return str(self.entry["kind"])

    @property
    def name(self) -> str:
        """Name of the command or event."""
        return str(self.entry["name"])

    def __str__(self) -> str:
        return one_line(self.entry)

    def __repr__(self) -> str:
        return f"<{self}>"


class EventMessage(Message):
    """One event, checked when it came, decoded when it is looked at.

    ``definition`` is the event's entry in the profile, ``vcpu`` the index (None for UNHOOK).
    """

    def __init__(
        self,
        codec: Codec,
        ns: int,
        id: int,
        seq: int,
        payload: bytes,
        *,
        definition: Event,
        vcpu: int | None,
    ) -> None:
        super().__init__(codec, ns, id, seq, payload)
        self.definition = definition
        self.vcpu = vcpu
        self.answered = False

    @property
    def name(self) -> str:
        """Short name, such as HYPERCALL."""
        return self.definition.name

    @property
    def kind(self) -> str:
        """``event``."""
        return "event"

    @property
    def received_ns(self) -> int:
        """When it was received (CLOCK_MONOTONIC)."""
        return self.ns

    @property
    def raw(self) -> bytes:
        """The payload."""
        return self.payload

    @cached_property
    def common(self) -> Record:
        """The record kvmi_vcpu_event. Not for UNHOOK, which has none."""
        return self.codec.event_common(self.payload)

    @property
    def mode(self) -> int:
        """Bytes of the vCPU's code: 2, 4 or 8."""
        return int(self.common.arch.mode)

    @property
    def regs(self) -> Record:
        """General registers (kvm_regs)."""
        registers: Record = self.common.arch.regs
        return registers

    @property
    def sregs(self) -> Record:
        """Special registers (kvm_sregs)."""
        registers: Record = self.common.arch.sregs
        return registers

    @property
    def msrs(self) -> Record:
        """The nine MSRs that come with each event (kvmi_event_msrs)."""
        registers: Record = self.common.arch.msrs
        return registers

    @cached_property
    def fields(self) -> Record:
        """The event's own fields; empty when it has none."""
        return self.codec.event_fields(self.definition, self.payload)

    @property
    def dirty_padding(self) -> tuple[str, ...]:
        """Padding of the common part that is not zero, which the interface does not promise."""
        return self.codec.dirty_padding(self.payload) if self.definition.is_vcpu else ()
