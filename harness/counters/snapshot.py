# SPDX-License-Identifier: GPL-2.0-or-later
"""Slots as read: plain values, and sums over them."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.counters.layout import FIELDS, WORD, Header, text_offsets

__all__ = ["SlotSnapshot", "Totals", "decode_slot", "quantile_ns", "total"]

_WORDS = struct.Struct(f"<{sum(FIELDS.values())}Q")


@dataclass(frozen=True)
class SlotSnapshot:
    """One slot at one moment. Times are CLOCK_MONOTONIC in ns.

    ``events`` are counts by event name (only those that occurred). The latencies are histograms:
    element n counts those from 2**n to 2**(n+1)-1 ns. ``torn``: the writer stood, or died, in
    mid-update; each number is good, but one update may be half in.
    """

    index: int
    pid: int
    generation: int
    started_ns: int
    heartbeat_ns: int
    commands: int
    replies: int
    failed_replies: int
    event_replies: int
    problems: int
    bytes_in: int
    bytes_out: int
    events: dict[str, int]
    command_latency: tuple[int, ...]
    event_latency: tuple[int, ...]
    phase: str
    test: str
    torn: bool

    @property
    def used(self) -> bool:
        """Whether the slot ever had a writer."""
        return self.generation > 0

    @property
    def event_count(self) -> int:
        """Events of all kinds."""
        return sum(self.events.values())


@dataclass(frozen=True)
class Totals:
    """Sums over slots."""

    events: dict[str, int]
    commands: int
    replies: int
    failed_replies: int
    event_replies: int
    problems: int
    bytes_in: int
    bytes_out: int
    command_latency: tuple[int, ...]
    event_latency: tuple[int, ...]


def decode_slot(index: int, data: bytes, header: Header, *, torn: bool) -> SlotSnapshot:
    """The snapshot of a slot's bytes."""
    words = _WORDS.unpack_from(data)

    def many(name: str) -> tuple[int, ...]:
        return words[WORD[name] : WORD[name] + FIELDS[name]]

    def text(name: str) -> str:
        offset, size = text_offsets()[name]
        return data[offset : offset + size].partition(b"\0")[0].decode(errors="replace")

    single = {
        name: words[WORD[name]]
        for name, count in FIELDS.items()
        if count == 1 and name != "sequence"
    }
    events = {
        header.events.get(id, f"event {id}"): count
        for id, count in enumerate(many("events"))
        if count
    }
    return SlotSnapshot(
        index=index,
        **single,
        events=events,
        command_latency=many("command_latency"),
        event_latency=many("event_latency"),
        phase=text("phase"),
        test=text("test"),
        torn=torn,
    )


def total(slots: Iterable[SlotSnapshot]) -> Totals:
    """The sums."""
    some = list(slots)
    events: Counter[str] = Counter()
    for slot in some:
        events.update(slot.events)
    return Totals(
        events=dict(events),
        commands=sum(s.commands for s in some),
        replies=sum(s.replies for s in some),
        failed_replies=sum(s.failed_replies for s in some),
        event_replies=sum(s.event_replies for s in some),
        problems=sum(s.problems for s in some),
        bytes_in=sum(s.bytes_in for s in some),
        bytes_out=sum(s.bytes_out for s in some),
        command_latency=_add(s.command_latency for s in some),
        event_latency=_add(s.event_latency for s in some),
    )


def _add(histograms: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*histograms, strict=True)) or (0,)


def quantile_ns(histogram: Sequence[int], quantile: float) -> float | None:
    """A quantile (0 to 1) of a histogram, by proportion within its bucket; None when empty."""
    wanted = quantile * sum(histogram)
    if not any(histogram):
        return None
    below = 0
    for bucket, count in enumerate(histogram):
        if count and below + count >= wanted:
            return float(2**bucket * (1 + (wanted - below) / count))
        below += count
    raise AssertionError("a quantile is at most 1")
