# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of runs that were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invoke.context import Context

from harness.settings import load_settings
from tasks.common import harness_task

__all__ = ["report_all", "report_compare", "report_merge", "report_render"]


def _report(run: str | None, known: str | None = None, **options: Any) -> int:
    from harness.conform import report as render

    return render(load_settings(known=known), run=Path(run) if run else None, **options)


@harness_task("all", default=True)
def report_all(_context: Context, run: str | None = None) -> int:
    """Make the report of a run again from its verdicts, and show the summary."""
    return _report(run)


@harness_task("render")
def report_render(
    _context: Context,
    run: str | None = None,
    formats: str = "",
    against: str | None = None,
    known: str | None = None,
) -> int:
    """Make some documents of a run from its verdicts."""
    before = Path(against) if against else None
    return _report(run, known, formats=formats.replace(",", " ").split(), against=before)


@harness_task("compare")
def report_compare(_context: Context, before: str, after: str) -> int:
    """Tell what broke, was mended, is new, vanished, or got slower from one run to another."""
    from harness.report.compare import compare_runs, tell

    found = compare_runs(Path(before), Path(after))
    print("\n".join(tell(found)))
    return found.exit_code


@harness_task("merge")
def report_merge(_context: Context, runs: str, reports: str | None = None) -> int:
    """Make one run of the parts that were run with --shard, and its report."""
    from harness.conform import merged_report
    from harness.report.merge import merge

    settings = load_settings(reports=reports)
    place = merge([Path(run) for run in runs.split()], reports=settings.reports)
    return merged_report(place)
