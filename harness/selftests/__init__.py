# SPDX-License-Identifier: GPL-2.0-or-later
"""Does a series leave KVM as it was? The kernel's own selftests, with it and without.

Every selftest is run in hosts with three kernels:

=========  =========================================================================
``base``   the kernel without the series
``off``    the kernel with it, introspection switched off
``on``     the kernel with it, ``kvm.introspection=1``, and nobody introspects
=========  =========================================================================

What a test gives with the series is compared with what it gives without: its verdict, the
place of the failed assertion, each of its sub-tests, and the complaints of the kernel. A
test that fails the same way everywhere is no difference: an emulated processor lacks much.
What differs is run again, on both, before it is called a difference.
"""

from __future__ import annotations

from harness.selftests.outcome import BASE, OFF, ON, Comparison, Outcome, verdict_of
from harness.selftests.runner import compare
from harness.selftests.tell import run, summary

__all__ = [
    "BASE", "OFF", "ON", "Comparison", "Outcome", "compare", "run", "summary", "verdict_of",
]  # fmt: skip
