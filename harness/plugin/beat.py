# SPDX-License-Identifier: GPL-2.0-or-later
"""This process's sign of life: what it does now, and that it still lives.

Written into its slot of the run's shared-memory counter, where the live view reads it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from harness.counters import Counters, SlotWriter, attach, create

if TYPE_CHECKING:
    from harness.abi import Profile

__all__ = ["COUNTERS", "SLOTS", "Beat", "open_counters"]

COUNTERS = "counters"
"""Name of the counter's file in the run's directory."""

SLOTS = 64
"""Enough for any number of workers; one that replaces a dead one takes over its slot."""

INTERVAL_S = 1.0


def open_counters(run_dir: Path, *, profile: Profile | None = None) -> Counters:
    """The run's counter, made if it is not there; safe in several processes at once.

    :param profile: whose events are counted, v12's by default.
    """
    path = run_dir / COUNTERS
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".{COUNTERS}-{os.getpid()}")
        events = {e.id: e.name for e in profile.event_by_id.values()} if profile else None
        create(own, slots=SLOTS, events=events).close()
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(own)
        own.unlink()
    return attach(path)


class Beat:
    """Opens the slot and beats in it from a thread of its own until closed."""

    def __init__(self, run_dir: Path, index: int) -> None:
        self._counters = open_counters(run_dir)
        self._index = index
        self.slot: SlotWriter = self._counters.slot(index)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvmi-beat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.slot.beat()

    def test(self, name: str) -> None:
        """Say which test runs; empty between tests."""
        self.slot.test(name)

    def phase(self, text: str) -> None:
        """Say what the test does now."""
        self.slot.phase(text)

    def counts(self) -> dict[str, int]:
        """What this process counted so far: events by kind, commands, replies."""
        now = self._counters.read_slot(self._index)
        return now.events | {
            "commands": now.commands,
            "replies": now.replies,
            "problems": now.problems,
        }

    def close(self) -> None:
        """Stop beating, and give up the slot; its counts stay."""
        self._stop.set()
        self._thread.join(timeout=5)
        self.slot.release()
        self._counters.close()
