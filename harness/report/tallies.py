# SPDX-License-Identifier: GPL-2.0-or-later
"""What each worker counted, read from the run's shared-memory event counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.counters import attach, quantile_ns
from harness.errors import HarnessError

__all__ = ["Bucket", "Tally", "tallies_of"]


@dataclass(frozen=True)
class Bucket:
    """One column of a latency histogram: from ``label`` to twice as much.

    ``height`` is in percent of the highest column.
    """

    label: str
    number: int
    height: float


@dataclass(frozen=True)
class Histogram:
    """A latency histogram, cut to the columns that are not empty."""

    title: str
    median: str
    buckets: list[Bucket]


@dataclass(frozen=True)
class Tally:
    """One worker's counts."""

    worker: str
    events: dict[str, int]
    commands: int
    failed_replies: int
    bytes_in: int
    bytes_out: int
    histograms: list[Histogram]


def tallies_of(run_dir: Path) -> list[Tally]:
    """What the workers counted; empty when the run has no counter or it cannot be read."""
    try:
        with attach(run_dir / "counters") as counters:
            slots = [slot for slot in counters.read() if slot.used]
    except (HarnessError, OSError):
        return []
    return [
        Tally(
            worker=f"worker {slot.index}",
            events=dict(sorted(slot.events.items())),
            commands=slot.commands,
            failed_replies=slot.failed_replies,
            bytes_in=slot.bytes_in,
            bytes_out=slot.bytes_out,
            histograms=[
                histogram
                for title, latency in (
                    ("event to answer", slot.event_latency),
                    ("command to reply", slot.command_latency),
                )
                if (histogram := _histogram(title, latency))
            ],
        )
        for slot in slots
        if slot.commands or slot.events
    ]


def _histogram(title: str, latency: Sequence[int]) -> Histogram | None:
    used = [index for index, number in enumerate(latency) if number]
    if not used:
        return None
    # One empty column on each side shows where the distribution ends.
    columns = range(max(0, used[0] - 1), min(len(latency), used[-1] + 2))
    highest = max(latency)
    return Histogram(
        title=title,
        median=_time(quantile_ns(latency, 0.5) or 0),
        buckets=[
            Bucket(_time(2**index), latency[index], round(100 * latency[index] / highest, 2))
            for index in columns
        ],
    )


def _time(nanoseconds: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= size:
            value = nanoseconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{nanoseconds:.0f} ns"
