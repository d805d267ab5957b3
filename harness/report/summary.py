# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal summary: counts by group, what went wrong, and where to read on."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from harness.report.model import Outcome
from harness.report.view import RunView, TestView

__all__ = ["STYLES", "print_summary", "summary_of"]

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
    """Print the summary; colours only where the console has them.

    Lines of text are not broken: commands and paths in them are there to be copied.
    """
    console = console or Console(highlight=False)
    for part in summary_of(view):
        console.print(part, soft_wrap=isinstance(part, Text))


def summary_of(view: RunView) -> list[RenderableType]:
    """The summary as things that rich can print, one below the other."""
    parts: list[RenderableType] = [Text(), _groups(view)]
    bad = view.bad_tests
    if bad:
        parts += [Text(), Rule("What went wrong", align="left", style="dim")]
        for test in bad[:SHOWN]:
            parts += _bad(view, test)
        if len(bad) > SHOWN:
            parts.append(Text(f"... and {len(bad) - SHOWN} more tests; the report has all of them"))
    parts += [Text(), *_closing(view)]
    return parts


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


def _bad(view: RunView, test: TestView) -> list[RenderableType]:
    verdict = test.first
    lines = [
        Text.assemble(
            (f"{test.verdict:<5} ", STYLES[test.verdict]), (" ".join(test.blamed) or "-", "bold")
        ),
        Text(f"      {test.test}"),
        Text(f"      {verdict.reason}"),
        Text(f"      again: {view.rerun([test.test])}", "dim"),
    ]
    folders = {path.rpartition("/")[0] for path in verdict.evidence.values()}
    folder = next((path for path in sorted(folders) if path.startswith("evidence/")), None)
    if folder:
        lines.append(Text(f"      evidence: {view.path(folder)}", "dim"))
    return [*lines]


def _closing(view: RunView) -> list[RenderableType]:
    facts = view.facts
    machine = facts.machine
    what = [f"series {facts.series}" if facts.series else "", f"target {facts.target}"]
    if machine is not None:
        what.append(machine.virtualisation)
    lines: list[RenderableType] = []
    if machine is not None and machine.caution:
        lines.append(Text(machine.caution, "yellow"))
    lines += [Text(" · ".join(part for part in what if part), "dim")]
    lines += [Text(f"note: {note}", "yellow") for note in view.run.notes]
    if view.run.end is not None and view.run.end.reason:
        lines.append(Text(f"note: {view.run.end.reason}", "yellow"))
    style = {0: "bold green", 1: "bold red"}.get(view.exit_code, "bold yellow")
    lines.append(Text(view.headline + ".", style))
    return lines
