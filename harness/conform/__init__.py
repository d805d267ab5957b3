# SPDX-License-Identifier: GPL-2.0-or-later
"""From a series to a report: build, boot, run the suite, say what came of it.

The suite runs in a pytest of its own (with workers of its own), so that whatever happens to
it, what it has found out is reported: verdicts are in their file the moment they are known,
and this process makes documents of that file. Both end with this process.
"""

from __future__ import annotations

from harness.conform.begin import begin_run, check_inputs, rerun_of
from harness.conform.outcome import (
    INTERRUPTED,
    account,
    death_of,
    ended_run,
    merged_report,
    report,
    tell,
)
from harness.conform.run import conform, prepare_run, run_suite
from harness.conform.selection import KERNEL_SUITES, SUITES, selection, speaks_to_qemu, suites_for
from harness.conform.watch import run_pytest, signals_as_interrupts

__all__ = [
    "INTERRUPTED",
    "KERNEL_SUITES",
    "SUITES",
    "account",
    "begin_run",
    "check_inputs",
    "conform",
    "death_of",
    "ended_run",
    "merged_report",
    "prepare_run",
    "report",
    "rerun_of",
    "run_pytest",
    "run_suite",
    "selection",
    "signals_as_interrupts",
    "speaks_to_qemu",
    "suites_for",
    "tell",
]
