# SPDX-License-Identifier: GPL-2.0-or-later
"""Series: trees to work on them, descriptions, and patch by patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invoke.context import Context

from harness.settings import Settings, load_settings, with_series
from tasks.common import harness_task, ready, settings_in

__all__ = ["series_check", "series_describe", "tree_edit", "tree_refresh"]


def _for_series(which: str, directory: str | None) -> Settings:
    options: dict[str, Any] = {f"{which}_series": directory} if directory else {}
    return load_settings(**options)


@harness_task("edit")
def tree_edit(
    _context: Context, which: str, directory: str | None = None, series: str | None = None
) -> None:
    """Make a git tree with a series as commits, to work in."""
    from harness.build.edit import edit

    settings = with_series(_for_series(which, series))
    place = edit(settings, which, directory=Path(directory) if directory else None)
    print(f"{place}: commit or amend there, then: inv tree.refresh {which}")


@harness_task("refresh")
def tree_refresh(
    _context: Context, which: str, directory: str | None = None, series: str | None = None
) -> None:
    """Write the commits of that tree back into the series."""
    from harness.build.edit import refresh

    names = refresh(
        _for_series(which, series), which, directory=Path(directory) if directory else None
    )
    print("\n".join(names) or "nothing changed")


@harness_task("describe")
def series_describe(
    _context: Context,
    kernel_series: str | None = None,
    kernel_base: str | None = None,
    output: str | None = None,
) -> int:
    """Make the description of a series from the headers that it adds; show what differs."""
    from harness.series.describe import describe

    settings = ready(kernel_series=kernel_series, kernel_base=kernel_base)
    return describe(settings, output=Path(output) if output else None)


@harness_task("check")
def series_check(
    _context: Context,
    *,
    which: str = "kernel",
    select: str | None = None,
    bisect: str | None = None,
    target: str | None = None,
    workers: str | None = None,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    kernel_base: str | None = None,
    qemu_base: str | None = None,
    flavour: str | None = None,
    abi: str | None = None,
    description: str | None = None,
    reports: str | None = None,
) -> int:
    """Judge a series patch by patch: applies, builds, boots, checkers, clauses."""
    from harness.series.check import check

    settings = ready(**settings_in(locals()))
    return check(settings, of=which, select=select, bisect=bisect)
