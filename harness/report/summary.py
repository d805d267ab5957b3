# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal summary: counts by group, what went wrong, and where to read on."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from harness.report.evidence import evidence_files, kind_of, messages_of, text_of
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

EXPLAINED = 3
"""How many of them with messages, guests and kernel log."""

MESSAGES_SHOWN, WIDTH = 16, 240
LINES_SHOWN = {"guests": 66, "kernel_log": 30}


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
        for number, test in enumerate(bad[:SHOWN]):
            parts += _bad(view, test)
            if number < EXPLAINED and test.verdict is Outcome.FAIL:
                parts += _story(view, test)
        if len(bad) > SHOWN:
            parts.append(Text(f"... and {len(bad) - SHOWN} more tests; the report has all of them"))
    parts += [Text(), *_known(view), *_closing(view)]
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
        Text(f"      {_printable(verdict.reason)}"),
        Text(f"      again: {view.rerun([test.test], target=test.target)}", "dim"),
    ]
    folders = {path.rpartition("/")[0] for path in verdict.evidence.values()}
    folder = next((path for path in sorted(folders) if path.startswith("evidence/")), None)
    if folder:
        lines.append(Text(f"      evidence: {view.path(folder)}", "dim"))
    return [*lines]


def _story(view: RunView, test: TestView) -> list[RenderableType]:
    """What led to a failure: the last messages, the guests, and what the kernel said."""
    parts: list[tuple[str, list[str], int]] = []
    for name, relative in evidence_files(test.first.evidence, first=("transcript", "guests")):
        path = view.path(relative)
        if kind_of(path) == "messages":
            messages, before = messages_of(path, limit=MESSAGES_SHOWN)
            lines = [
                f"{message.at_s:10.6f} {_ARROWS.get(message.direction, '--')} {message.text}"
                for message in messages
            ]
            parts.append(("The exchange that led to it", lines, before))
        elif name in LINES_SHOWN:
            excerpt = text_of(path, lines=LINES_SHOWN[name])
            title = "The guests" if name == "guests" else "The host's kernel log of that time"
            parts.append((title, excerpt.text.splitlines(), excerpt.left_out))
    if "kernel_log" not in test.first.evidence:
        parts.append(("The host's kernel said nothing during the test", [], 0))
    shown: list[RenderableType] = []
    for title, lines, before in parts:
        more = f" ({before} earlier lines are in the evidence)" if before else ""
        shown.append(Text(f"      {title}{':' if lines else ''}{more}", "bold"))
        shown += [Text("        " + _printable(line), "dim") for line in lines]
    return shown


_ARROWS = {"in": "<-", "out": "->"}


def _printable(line: str) -> str:
    """A line of evidence that cannot disturb a terminal, cut where nobody reads on."""
    text = "".join(character if character.isprintable() else "." for character in line.expandtabs())
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _known(view: RunView) -> list[RenderableType]:
    """What a list of known failures says about this run."""
    lines = [f"known: {clause} fails, see {one.tracked}" for clause, one in view.known.items()]
    lines += [
        f"{clause} holds again: take it off the known failures ({one.tracked})"
        for clause, one in view.passes_again.items()
    ]
    return [Text(line, "yellow") for line in lines]


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
