# SPDX-License-Identifier: GPL-2.0-or-later
"""A result on the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from harness.bench.kinds import EXIT, EXIT_KERNEL
from harness.bench.result import Kind, Result
from harness.report.charts import columns_of, decades, time_text
from harness.report.figures import COLUMN_FACTOR, Distribution, Ratio
from harness.report.store import write_atomically

__all__ = ["print_result", "render_page", "write_page"]


def _interval(ratio: Ratio | None) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""


def _share(ratio: Ratio | None) -> str:
    return f"{100 * ratio.value:.0f} %" if ratio else ""


def _time_of(one: Distribution | None, what: str = "median_ns") -> str:
    return time_text(getattr(one, what)) if one else ""


def _part_of(kind: Kind, what: str) -> str:
    return time_text(getattr(kind.parts, what)) if kind.parts else ""


_WIDE = 110
_PARTS = ("out", "answer", "back", "own")
_CELLS: dict[str, Callable[[Kind], str]] = {
    "median": lambda kind: _time_of(kind.hold),
    "p90": lambda kind: _time_of(kind.hold, "p90_ns"),
    "p99": lambda kind: _time_of(kind.hold, "p99_ns"),
    "ratio": lambda kind: "1" if kind.name == EXIT else _interval(kind.ratio),
    "out": lambda kind: _part_of(kind, "out_ns"),
    "answer": lambda kind: _part_of(kind, "answer_ns"),
    "back": lambda kind: _part_of(kind, "back_ns"),
    "own": lambda kind: _time_of(kind.own),
    "own share": lambda kind: _share(kind.own_share),
}


def what_it_is(result: Result) -> str:
    """On what the figures were made; the first words tell an emulated CPU from a real one."""
    where = f"{result.machine.virtualisation or result.machine.cpu_model}"
    if result.emulated:
        return f"EMULATED, not hardware: {where}. These figures compare with each other only."
    if result.machine.hypervisor:
        return f"NOT SHOWN TO BE HARDWARE, a virtual machine: {where}."
    return f"Hardware: {result.machine.cpu_model}, {where}."


def print_result(result: Result, console: Console | None = None) -> None:
    """A table of all kinds, and what went wrong."""
    console = console or Console()
    rounds, samples = result.options["rounds"], result.options["samples"]
    table = Table(
        title=f"{what_it_is(result)}\nOne event and its reply: how long it holds a vCPU",
        title_justify="left",
        caption=(
            f"{rounds} rounds of {samples} samples. ratio: to the plain exit, with its 95 % "
            "interval; out, answer, back: medians of its parts; own: the same messages without a "
            "guest"
        ),
        caption_justify="left",
    )
    titles = [
        title for title in _CELLS if title not in _PARTS or console.width >= _WIDE
    ]  # what a narrow terminal lacks, the page has
    table.add_column("kind", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for kind in result.kinds:
        cells = [_CELLS[title](kind) for title in titles] if kind.hold else ["-"]
        table.add_row(kind.name, *cells, end_section=kind.name == EXIT_KERNEL)
    console.print(table)
    for kind in result.kinds:
        if kind.lacking:
            console.print(f"{kind.name}: not to be had: {kind.lacking}")
        elif kind.failed:
            console.print(f"{kind.name}: not measured: {kind.failed}", style="red")
    for line in result.complaints:
        console.print(f"the host's kernel: {line}", style="red", markup=False)


def render_page(result: Result) -> str:
    """The page as text; it needs nothing outside of it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.bench", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"time": time_text, "interval": _interval, "share": _share}
    shown = [kind for kind in result.kinds if kind.hold is not None]
    everything = [
        at
        for kind in shown
        for one in (kind.hold, kind.own)
        if one is not None
        for at, _ in one.histogram
    ]
    low, high = min(everything, default=1.0), max(everything, default=10.0) * COLUMN_FACTOR
    style = resources.files("harness.report").joinpath("page.css").read_text("utf-8")
    return environment.get_template("bench.html.j2").render(
        result=result,
        what_it_is=what_it_is(result),
        shown=shown,
        plain=EXIT,
        columns=lambda one: columns_of(one.histogram, low=low, high=high, factor=COLUMN_FACTOR),
        decades=decades(low, high),
        css=Markup(style),
    )


def write_page(result: Result, path: Path) -> None:
    """Write the page.

    :raises OSError: it cannot be written; an older page is left as it was.
    """
    write_atomically(path, render_page(result))
