# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of samples: quantiles, histograms, and ratios with an interval.

Samples come in rounds, in each of which everything is measured once, in a random order. What
disturbs a machine for a while disturbs all that is measured in the same round, so things are
compared within rounds; how far the rounds disagree tells what such a ratio is worth.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import msgspec

__all__ = ["COLUMN_FACTOR", "Distribution", "Ratio", "distribution", "quantile", "ratio"]

_PER_OCTAVE = 4
COLUMN_FACTOR = 2 ** (1 / _PER_OCTAVE)
"""A column of a histogram ends at so many times its beginning."""
_RESAMPLES = 4000
_CONFIDENCE = 0.95


class Distribution(msgspec.Struct, kw_only=True):
    """How samples are distributed, in ns."""

    samples: int
    median_ns: float
    p90_ns: float
    p99_ns: float
    least_ns: float
    most_ns: float
    rounds_ns: list[float]
    """The median of each round."""
    histogram: list[tuple[float, int]]
    """Columns that are not empty: where each begins, and its number of samples. Four make a
    doubling: a column ends where the next one may begin, at 2**(1/4) times its beginning."""


class Ratio(msgspec.Struct, kw_only=True):
    """A ratio of two medians, and between what it is with the confidence (0 to 1)."""

    value: float
    low: float
    high: float
    confidence: float


def quantile(ordered: Sequence[float], part: float) -> float:
    """The quantile ``part`` (0 to 1) of ordered values, by proportion between neighbours."""
    at = part * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def distribution(rounds: Sequence[Sequence[float]]) -> Distribution:
    """The distribution of all samples.

    :param rounds: for each round its samples in ns, at least one.
    """
    ordered = sorted(sample for samples in rounds for sample in samples)
    columns: dict[int, int] = {}
    for sample in ordered:
        # What is below a nanosecond, or negative after the clock's cost was taken off, is none.
        column = math.floor(math.log2(max(sample, 1.0)) * _PER_OCTAVE)
        columns[column] = columns.get(column, 0) + 1
    return Distribution(
        samples=len(ordered),
        median_ns=quantile(ordered, 0.5),
        p90_ns=quantile(ordered, 0.9),
        p99_ns=quantile(ordered, 0.99),
        least_ns=ordered[0],
        most_ns=ordered[-1],
        rounds_ns=[statistics.median(samples) for samples in rounds],
        histogram=[(2 ** (column / _PER_OCTAVE), count) for column, count in columns.items()],
    )


def ratio(above_ns: Sequence[float], below_ns: Sequence[float], *, seed: int = 0) -> Ratio:
    """The ratio of what was measured in the same rounds.

    Its value is the median of the rounds' ratios; its interval is the percentile bootstrap of
    that median, over whole rounds: samples of one round are no independent witnesses.

    :param above_ns: the median of each round.
    :param below_ns: of the same rounds, what it is compared with; none is 0.
    """
    ratios = [above / below for above, below in zip(above_ns, below_ns, strict=True)]
    chance = random.Random(seed)
    medians = sorted(
        statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    outside = (1 - _CONFIDENCE) / 2
    return Ratio(
        value=statistics.median(ratios),
        low=quantile(medians, outside),
        high=quantile(medians, 1 - outside),
        confidence=_CONFIDENCE,
    )
