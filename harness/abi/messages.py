# SPDX-License-Identifier: GPL-2.0-or-later
"""What decoded messages are: replies and events, as values."""

from __future__ import annotations

from dataclasses import dataclass

from harness.abi.layout import Record, Struct
from harness.errors import ConformanceError

__all__ = ["EMPTY", "EventBody", "Reply"]

#: The record of a message that has no fields.
EMPTY = Record(Struct("nothing", (), 0, 1, (), ()), {})


@dataclass(frozen=True)
class Reply:
    """The answer to one command.

    ``err`` is the number on the wire: 0, or negative. ``error`` is its name, None on success.
    ``fields`` are those of the command's reply struct, ``data`` the bytes of a reply that is
    plain data, ``raw`` the whole payload. ``received_ns`` is CLOCK_MONOTONIC, 0 when unknown.
    """

    command: str
    err: int
    error: str | None
    fields: Record
    data: bytes
    raw: bytes
    seq: int = 0
    received_ns: int = 0
    latency_ns: int = 0

    def ok(self) -> Reply:
        """This reply, which has to be a success.

        :raises ConformanceError: it is an error.
        """
        if self.err:
            raise ConformanceError(
                f"{self.command} (seq {self.seq}) answered {self.error} ({self.err}), "
                "expected success"
            )
        return self

    def fails(self, *errors: str) -> Reply:
        """This reply, which has to be one of these errors (``KVM_EINVAL``).

        :raises ConformanceError: it is a success or another error.
        """
        if self.error not in errors:
            found = f"{self.error} ({self.err})" if self.err else "success"
            raise ConformanceError(
                f"{self.command} (seq {self.seq}) answered {found}, expected {' or '.join(errors)}"
            )
        return self


@dataclass(frozen=True)
class EventBody:
    """One event without its header.

    ``common`` is the record kvmi_vcpu_event (None for the VM event), ``vcpu`` its index (None
    likewise), ``fields`` the event's own part. ``dirty_padding`` names padding that is not zero
    where the interface does not promise that it is.
    """

    name: str
    vcpu: int | None
    common: Record | None
    fields: Record
    dirty_padding: tuple[str, ...] = ()
