# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal summary: counts by group, what went wrong, and where to read on."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from harness.report.model import Outcome
from harness.report.view import RunView, TestView

__all__ = ["STYLES", "print_summary", "render_summary"]

STYLES = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.ERROR: "bold yellow",
    Outcome.MISS: "magenta",
    Outcome.SKIP: "dim",
}

SHOWN = 20
"""How many bad tests are shown; the page has all."""


def print_summary(view: RunView, console: Console | None = None) -> None:
    """Print the summary; colours only where the console has them."""
    (console or Console(highlight=False)).print(render_summary(view))


def render_summary(view: RunView) -> RenderableType:
    """The summary as something that rich can print."""
    parts: list[RenderableType] = [Text(), _groups(view)]
    bad = view.bad_tests
    if bad:
        parts += [Text(), Rule("What went wrong", align="left", style="dim")]
        parts += [_bad(view, test) for test in bad[:SHOWN]]
        if len(bad) > SHOWN:
            parts.append(Text(f"... and {len(bad) - SHOWN} more tests; the report has all of them"))
    parts += [Text(), *_closing(view)]
    return Group(*parts)


def _groups(view: RunView) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("Clauses", no_wrap=True)
    for outcome in Outcome:
        table.add_column(outcome.value, justify="right")
    for group in view.groups:
        counts = group.counts
        table.add_row(group.title, *(_number(outcome, counts[outcome]) for outcome in Outcome))
    table.add_section()
    table.add_row(
        Text("all", style="bold"),
        *(_number(outcome, view.counts[outcome]) for outcome in Outcome),
    )
    return table


def _number(outcome: Outcome, number: int) -> Text:
    return Text(str(number), STYLES[outcome]) if number else Text("·", "dim")


def _bad(view: RunView, test: TestView) -> RenderableType:
    verdict = test.first
    head = Text.assemble(
        (f"{test.verdict:<5} ", STYLES[test.verdict]), (" ".join(test.clauses) or "-", "bold")
    )
    lines = Text.assemble(
        test.test, "\n", verdict.reason, "\n", (f"again: {view.rerun([test.test])}", "dim")
    )
    shown = [name for name in ("transcript", "kernel_log", "failure") if name in verdict.evidence]
    if shown:
        paths = "  ".join(verdict.evidence[name] for name in shown)
        lines.append(f"\nevidence: {paths}", "dim")
    return Group(head, Padding(lines, (0, 0, 0, 6)))


def _closing(view: RunView) -> list[RenderableType]:
    facts = view.facts
    machine = facts.machine
    what = [f"series {facts.series}" if facts.series else "", f"target {facts.target}"]
    if machine is not None:
        what.append(machine.virtualisation)
    lines: list[RenderableType] = []
    if machine is not None and machine.emulated:
        lines.append(Text("The CPU is emulated: nothing here was seen on hardware.", "yellow"))
    lines += [Text(" · ".join(part for part in what if part), "dim")]
    lines += [Text(f"note: {note}", "yellow") for note in view.run.notes]
    if view.run.end is not None and view.run.end.reason:
        lines.append(Text(f"note: {view.run.end.reason}", "yellow"))
    style = {0: "bold green", 1: "bold red"}.get(view.exit_code, "bold yellow")
    lines.append(Text(view.headline + ".", style))
    return lines
