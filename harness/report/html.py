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
from harness.report.charts import (
    Bar,
    bars_of,
    columns_of,
    decades,
    duration,
    lanes_of,
    rates_of,
    shares_of,
    ticks,
    time_text,
)
from harness.report.evidence import (
    MESSAGES_SHOWN,
    TEXT_LINES_SHOWN,
    Excerpt,
    Message,
    evidence_files,
    kind_of,
    messages_of,
    text_of,
)
from harness.report.figures import COLUMN_FACTOR
from harness.report.model import Outcome, Verdict
from harness.report.store import write_atomically
from harness.report.tallies import tallies_of
from harness.report.traffic import Kind, Traffic, traffic_of
from harness.report.view import RunView, TestView

__all__ = ["page_environment", "write_html"]

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

IN_FULL = 25
"""How many problems have all that is worth showing; those after them have the end of it, so that
the page of a run in which everything failed can still be opened."""

SHORT = 30
"""How many messages, and lines of each text, those have."""

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
class Plots:
    """The messages of a target, and the axis on which all their latencies are plotted."""

    target: str
    traffic: Traffic
    low: float
    high: float

    @property
    def kinds(self) -> list[tuple[str, list[Kind]]]:
        """What is plotted, with headings."""
        return [
            ("From an event to its answer", self.traffic.events),
            ("From a command to its reply", self.traffic.commands),
        ]


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
    anchors = {
        (test.test, test.target): f"t{number}" for number, test in enumerate(view.tests, start=1)
    }
    groups = {row.clause.id: number for number, g in enumerate(view.groups) for row in g.rows}
    lanes, span_s = lanes_of((test.first, _target(test, anchors)) for test in view.tests)
    return (
        page_environment("harness.report")
        .get_template("page.html.j2")
        .render(
            view=view,
            series_page=_series_page(view.run.path),
            facts=view.facts,
            machine=view.facts.machine,
            anchors=anchors,
            groups_of=lambda test: sorted({groups[name or "-"] for name in test.clauses or [""]}),
            problems=[
                _problem(view, test, anchors[test.test, test.target], in_full=number < IN_FULL)
                for number, test in enumerate(view.bad_tests)
            ],
            sequences=[
                _sequence(view, test, anchors[test.test, test.target]) for test in view.sequences
            ],
            unfolded=UNFOLDED,
            lanes=lanes,
            lane_ticks=ticks(span_s),
            span_s=span_s,
            tallies=tallies_of(view.run.path),
            plots=_plots(view),
            columns=lambda one, low, high: columns_of(
                one.histogram, low=low, high=high, factor=COLUMN_FACTOR
            ),
            decades=decades,
            column_factor=COLUMN_FACTOR,
            documents=requirement_documents(),
            files=[name for name in _FILES if (view.run.path / name).is_file()],
        )
    )


def page_environment(package: str) -> jinja2.Environment:
    """What the pages of this project have in common: their style, their script, their words.

    :param package: has the page's template; the parts of templates are those of this package.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(name, "") for name in (package, "harness.report")]
        ),
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
        "time": time_text,
        "rates": rates_of,
    }
    environment.globals |= {
        "marks": MARKS,
        "outcomes": list(Outcome),
        "css": _part("page.css"),
        "script": _part("page.js"),
    }
    return environment


def _part(name: str) -> Markup:
    """A file of ours that goes into the page as it is."""
    return Markup(resources.files("harness.report").joinpath(name).read_text("utf-8"))


def _series_page(run_dir: Path) -> str:
    """The page of the series of which this run checked a patch; empty if it is no such run."""
    place = run_dir.parent.parent.parent
    return "../../../patches.html" if (place / "judged.jsonl").is_file() else ""


def _target(test: TestView, anchors: dict[tuple[str, str], str]) -> str:
    """Where a test is told of: its problem, or its first clause in the table."""
    if test.verdict.bad:
        return anchors[test.test, test.target]
    return f"c-{test.clauses[0]}" if test.clauses else ""


def _plots(view: RunView) -> list[Plots]:
    """The messages of each target, as far as transcripts were kept."""
    plots = []
    for target in view.targets:
        verdicts = [one for one in view.verdicts if one.target == target]
        if traffic := traffic_of(view.run.path, verdicts):
            at = [
                low
                for kind in (*traffic.events, *traffic.commands)
                if kind.latency
                for low, _ in kind.latency.histogram
            ]
            plots.append(
                Plots(target, traffic, min(at, default=1.0), max(at, default=1e9) * COLUMN_FACTOR)
            )
    return plots


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


def _problem(view: RunView, test: TestView, anchor: str, *, in_full: bool) -> Problem:
    most_messages, most_lines = (MESSAGES_SHOWN, TEXT_LINES_SHOWN) if in_full else (SHORT, SHORT)
    transcripts = []
    texts = []
    files = evidence_files(test.first.evidence, first=_FIRST_EVIDENCE)
    for name, relative in files:
        path = view.path(relative)
        match kind_of(path):
            case "messages":
                messages, left_out = messages_of(path, limit=most_messages)
                if messages:
                    transcripts.append(Transcript(name, relative, messages, left_out))
            case "text":
                excerpt = text_of(path, lines=most_lines)
                if excerpt.text.strip():
                    texts.append(Text(name, _title(name), relative, excerpt))
    return Problem(
        test=test,
        anchor=anchor,
        rerun=view.rerun([test.test], target=test.target),
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
