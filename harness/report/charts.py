# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers to shapes: timelines, lanes and histograms, in percent of their width.

Data only; the page's template draws them as SVG, whose text stays HTML so that it can be
read on a phone, printed, searched and spoken.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.plugin.timeline import Step
from harness.report.model import Outcome, Verdict

__all__ = [
    "Bar",
    "Block",
    "Column",
    "Lane",
    "Share",
    "bars_of",
    "columns_of",
    "decades",
    "duration",
    "lanes_of",
    "rates_of",
    "shares_of",
    "ticks",
    "time_text",
]

SMALLEST_PERCENT = 0.4


def duration(seconds: float) -> str:
    """A duration for people: three digits at most."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def time_text(ns: float) -> str:
    """A time for people, three digits."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            value = ns / size
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{ns:.0f} ns"


@dataclass(frozen=True)
class Share:
    """One verdict's part of a stacked bar."""

    outcome: Outcome
    number: int
    start: float
    width: float


def shares_of(counts: dict[Outcome, int]) -> list[Share]:
    """The parts of a stacked bar, in percent; verdicts that do not occur are left out."""
    total = sum(counts.values())
    shares = []
    start = 0.0
    for outcome, number in counts.items():
        if number:
            width = 100 * number / total
            shares.append(Share(outcome, number, round(start, 3), round(width, 3)))
            start += width
    return shares


@dataclass(frozen=True)
class Bar:
    """One step of a sequence. ``state``: ok, failed, cut, or mark (no duration)."""

    label: str
    depth: int
    state: str
    start: float
    width: float
    start_s: float
    duration_s: float
    detail: str


def bars_of(steps: Sequence[Step], *, total_s: float | None = None) -> list[Bar]:
    """A sequence's steps in the order in which they began.

    A step that began and never ended was cut short; its bar goes to the end.
    """
    ends = {step.number: step for step in steps if step.state in ("ok", "failed")}
    last = max([step.at_s for step in steps], default=0.0)
    span = max(total_s or 0.0, last) or 1.0
    bars = []
    for step in steps:
        if step.state not in ("begin", "mark"):
            continue
        end = ends.get(step.number)
        if step.state == "mark":
            state, until, detail = "mark", step.at_s, step.detail
        elif end is not None:
            state, until, detail = end.state, end.at_s, end.detail
        else:
            state, until, detail = "cut", last, ""
        width = 100 * (until - step.at_s) / span
        bars.append(
            Bar(
                label=step.step,
                depth=step.depth,
                state=state,
                start=round(min(100 * step.at_s / span, 100 - SMALLEST_PERCENT), 3),
                width=round(max(width, SMALLEST_PERCENT), 3),
                start_s=step.at_s,
                duration_s=until - step.at_s,
                detail=detail,
            )
        )
    return bars


@dataclass(frozen=True)
class Block:
    """One test in a worker's lane."""

    label: str
    outcome: Outcome
    start: float
    width: float
    duration_s: float
    anchor: str


@dataclass(frozen=True)
class Lane:
    """What one worker did, from the run's first test to its last."""

    worker: str
    blocks: tuple[Block, ...]


def _seconds(stamp: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return None


def lanes_of(tests: Iterable[tuple[Verdict, str]]) -> tuple[list[Lane], float]:
    """Each worker's tests over time, and the whole time in seconds.

    :param tests: one verdict of each test, with the anchor of what is said about it.
    """
    timed = [(v, anchor, at) for v, anchor in tests if (at := _seconds(v.started)) is not None]
    if not timed:
        return [], 0.0
    zero = min(at for _v, _anchor, at in timed)
    span = max(at + v.duration_s for v, _anchor, at in timed) - zero or 1.0
    lanes: dict[str, list[Block]] = {}
    for verdict, anchor, at in sorted(timed, key=lambda entry: entry[2]):
        block = Block(
            label=verdict.test.rpartition("::")[2],
            outcome=verdict.verdict,
            start=round(100 * (at - zero) / span, 3),
            width=round(max(100 * verdict.duration_s / span, 0.15), 3),
            duration_s=verdict.duration_s,
            anchor=anchor,
        )
        lanes.setdefault(verdict.worker, []).append(block)
    return [Lane(worker, tuple(blocks)) for worker, blocks in sorted(lanes.items())], span


def ticks(span_s: float) -> list[tuple[float, str]]:
    """Round times to write under an axis, with their place in percent."""
    if span_s <= 0:
        return []
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
    step = next((step for step in steps if span_s / step <= 6), 7200)
    found = []
    at = 0.0
    while at <= span_s * 0.97:
        label = duration(at).removesuffix(" 00 s") if at else "0"
        found.append((round(100 * at / span_s, 3), label))
        at += step
    return found


@dataclass(frozen=True)
class Column:
    """One column of a chart, in percent; ``low`` is where it begins on the axis."""

    start: float
    width: float
    height: float
    low: float
    number: int


def columns_of(
    histogram: Iterable[tuple[float, int]], *, low: float, high: float, factor: float
) -> list[Column]:
    """The columns of a histogram, in percent of an axis from ``low`` to ``high``.

    :param histogram: where each column begins, and its number.
    :param factor: a column ends at so many times its beginning.
    """
    span = math.log(high / low)
    columns = list(histogram)
    most = max((number for _, number in columns), default=1)
    return [
        Column(
            start=round(100 * math.log(at / low) / span, 3),
            width=round(100 * math.log(factor) / span, 3),
            height=round(max(100 * number / most, 1), 2),
            low=at,
            number=number,
        )
        for at, number in columns
    ]


def rates_of(per_second: Sequence[int], *, most_columns: int = 240) -> list[Column]:
    """Numbers per second as columns over time; of seconds that share a column, the highest."""
    together = math.ceil(len(per_second) / most_columns) or 1
    highest = max(per_second, default=0) or 1
    return [
        Column(
            start=round(100 * first / len(per_second), 3),
            width=round(100 * together / len(per_second), 3),
            height=round(100 * number / highest, 2),
            low=float(first),
            number=number,
        )
        for first in range(0, len(per_second), together)
        if (number := max(per_second[first : first + together]))
    ]


def decades(low: float, high: float) -> list[tuple[float, float]]:
    """The powers of ten from ``low`` to ``high``, each with its place in percent of that."""
    span = math.log(high / low)
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [
        (10.0**power, round(100 * math.log(10**power / low) / span, 3))
        for power in range(first, last + 1)
    ]
