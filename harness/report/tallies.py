# SPDX-License-Identifier: GPL-2.0-or-later
"""What each worker counted, read from the run's shared-memory event counter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.counters import SlotSnapshot, attach, quantile_ns
from harness.errors import HarnessError

__all__ = ["Tally", "tallies_of"]


@dataclass(frozen=True)
class Tally:
    """One worker's counts. The latencies are medians in ns, None where nothing was answered."""

    worker: str
    events: dict[str, int]
    commands: int
    failed_replies: int
    bytes_in: int
    bytes_out: int
    answer_ns: float | None
    reply_ns: float | None


def tallies_of(run_dir: Path) -> list[Tally]:
    """What the workers counted; empty when the run has no counter or it cannot be read.

    A run that was merged has the counters of its parts.
    """
    parts = sorted(run_dir.glob("parts/*/counters"))
    return [
        Tally(
            worker=f"{f'{path.parent.name} ' if parts else ''}worker {slot.index}",
            events=dict(sorted(slot.events.items())),
            commands=slot.commands,
            failed_replies=slot.failed_replies,
            bytes_in=slot.bytes_in,
            bytes_out=slot.bytes_out,
            answer_ns=quantile_ns(slot.event_latency, 0.5),
            reply_ns=quantile_ns(slot.command_latency, 0.5),
        )
        for path in parts or [run_dir / "counters"]
        for slot in _slots(path)
        if slot.commands or slot.events
    ]


def _slots(path: Path) -> Iterator[SlotSnapshot]:
    try:
        with attach(path) as counters:
            yield from [slot for slot in counters.read() if slot.used]
    except (HarnessError, OSError):
        return
