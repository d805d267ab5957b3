# SPDX-License-Identifier: GPL-2.0-or-later
"""One HTML page of a run, which opens from a file: no network, nothing outside of it needed.

The template draws, this module gathers. Links lead to the evidence beside the page, so the
page works best where it was made; without the files it still says everything that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from harness.abi import requirement_documents
from harness.plugin.timeline import load_timeline
from harness.report.charts import Bar, bars_of, duration, lanes_of, shares_of, ticks
from harness.report.evidence import (
    Excerpt,
    Message,
    evidence_files,
    kind_of,
    messages_of,
    text_of,
)
from harness.report.model import Outcome, Verdict
from harness.report.store import write_atomically
from harness.report.tallies import tallies_of
from harness.report.view import RunView, TestView

__all__ = ["write_html"]

MARKS = {
    Outcome.PASS: "✓",
    Outcome.FAIL: "✕",
    Outcome.ERROR: "!",
    Outcome.MISS: "?",
    Outcome.SKIP: "-",
}

_FIRST_EVIDENCE = (
    "transcript", "guests", "kernel_log", "failure", "failure_teardown", "timeline",
)  # fmt: skip


UNFOLDED = 5
"""How many problems are shown in full at first."""

_FILES = ("verdicts.jsonl", "junit.xml", "pytest.log", "settings.json", "build.json")


@dataclass(frozen=True)
class Transcript:
    """A transcript as the page shows it."""

    name: str
    path: str
    messages: list[Message]
    left_out: int


@dataclass(frozen=True)
class Text:
    """A text file as the page shows it."""

    name: str
    title: str
    path: str
    excerpt: Excerpt


@dataclass(frozen=True)
class Sequence:
    """A test with its timeline."""

    test: TestView
    anchor: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Problem:
    """A bad test with all that helps to understand it."""

    test: TestView
    anchor: str
    rerun: str
    transcripts: list[Transcript]
    texts: list[Text]
    files: list[tuple[str, str]]
    bars: list[Bar] = field(default_factory=list)


def write_html(view: RunView, path: Path) -> None:
    """Write the page.

    :raises OSError: it cannot be written; an older page is left as it was.
    """
    write_atomically(path, render_html(view))


def render_html(view: RunView) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "duration": duration,
        "shares": shares_of,
        "clock": _clock,
        "size": _size,
    }
    anchors = {test.test: f"t{number}" for number, test in enumerate(view.tests, start=1)}
    lanes, span_s = lanes_of((test.first, _target(test, anchors)) for test in view.tests)
    return environment.get_template("page.html.j2").render(
        view=view,
        facts=view.facts,
        machine=view.facts.machine,
        marks=MARKS,
        outcomes=list(Outcome),
        anchors=anchors,
        problems=[_problem(view, test, anchors[test.test]) for test in view.bad_tests],
        sequences=[_sequence(view, test, anchors[test.test]) for test in view.sequences],
        unfolded=UNFOLDED,
        lanes=lanes,
        lane_ticks=ticks(span_s),
        span_s=span_s,
        tallies=tallies_of(view.run.path),
        documents=requirement_documents(),
        files=[name for name in _FILES if (view.run.path / name).is_file()],
        css=_part("page.css"),
        script=_part("page.js"),
    )


def _part(name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    return Markup(resources.files("harness.report").joinpath(name).read_text("utf-8"))


def _target(test: TestView, anchors: dict[str, str]) -> str:
    """Where a test is told of: its problem, or its first clause in the table."""
    if test.verdict.bad:
        return anchors[test.test]
    return f"c-{test.clauses[0]}" if test.clauses else ""


def _clock(stamp: str) -> str:
    """An ISO time as people write it."""
    return stamp[:19].replace("T", " ") + " UTC" if stamp else ""


def _size(number: int) -> str:
    """A number of bytes for people."""
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _sequence(view: RunView, test: TestView, anchor: str) -> Sequence:
    bars, total_s = _bars(view, test.first)
    return Sequence(test, anchor, bars, ticks(total_s))


def _bars(view: RunView, verdict: Verdict) -> tuple[list[Bar], float]:
    path = verdict.evidence.get("timeline")
    if path is None or not view.path(path).is_file():
        return [], 0.0
    steps = load_timeline(view.path(path))
    return bars_of(steps), max((step.at_s for step in steps), default=0.0)


def _problem(view: RunView, test: TestView, anchor: str) -> Problem:
    transcripts = []
    texts = []
    files = evidence_files(test.first.evidence, first=_FIRST_EVIDENCE)
    for name, relative in files:
        path = view.path(relative)
        match kind_of(path):
            case "messages":
                messages, left_out = messages_of(path)
                if messages:
                    transcripts.append(Transcript(name, relative, messages, left_out))
            case "text":
                excerpt = text_of(path)
                if excerpt.text.strip():
                    texts.append(Text(name, _title(name), relative, excerpt))
    return Problem(
        test=test,
        anchor=anchor,
        rerun=view.rerun([test.test]),
        transcripts=transcripts,
        texts=texts,
        files=files,
        bars=_bars(view, test.first)[0],
    )


_TITLES = {
    "guests": "Guests: registers, and code around rip",
    "kernel_log": "Kernel log of the host during this test",
    "failure": "Where it failed",
    "failure_teardown": "What tear-down found",
    "host_emulator": "Output of the host's emulator",
    "host_console": "Console of the host, since it was started",
    "stacks": "Where the worker was stuck",
}


_KINDS = {
    "argv_": "Command line of QEMU: ",
    "console_": "Console: ",
    "qemu_": "Output of QEMU: ",
    "qmp_": "QMP: ",
}


def _title(name: str) -> str:
    """What a text of the evidence is, by its name."""
    if name in _TITLES:
        return _TITLES[name]
    for prefix, words in _KINDS.items():
        if name.startswith(prefix):
            return words + name.removeprefix(prefix).replace("_", " ")
    return name.replace("_", " ").replace("/", ": ").capitalize()
