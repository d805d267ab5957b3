# SPDX-License-Identifier: GPL-2.0-or-later
"""The fuzzer: wrong, random and badly timed messages and ioctls, driven by the ABI data.

::

    values     ─▶ messages ─┐                        ┌─▶ judge (expect) ─▶ faults
                  calls    ─┴▶ wire ─▶ executor ─────┘
                                        (in the host: guest-images/fuzz)

Cases are made here, from a seed, in bulk; they run in the host, without waiting for the
network; their outcomes are judged here. A case depends on nothing but the seed and its number.
"""

from harness.fuzz.executor import Executor
from harness.fuzz.fuzzer import Figures, Fuzzer
from harness.fuzz.plan import Plan, load_plan

__all__ = ["Executor", "Figures", "Fuzzer", "Plan", "load_plan"]
