# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters in shared memory: one structure for a whole run, one slot per worker.

    counters = create(run / "counters", slots=4)     # once per run
    slot = attach(run / "counters").slot(0)          # in each worker, its own slot
    attach(run / "counters").read()                  # anybody, at any time

``python -m harness.counters PATH`` shows them.
"""

from harness.counters.shared import Counters, SlotWriter, attach, create
from harness.counters.snapshot import SlotSnapshot, Totals, quantile_ns, total

__all__ = [
    "Counters",
    "SlotSnapshot",
    "SlotWriter",
    "Totals",
    "attach",
    "create",
    "quantile_ns",
    "total",
]
