# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of samples: what they are for samples whose figures are known."""

from __future__ import annotations

import random
import statistics

import pytest

from harness.report.figures import COLUMN_FACTOR, distribution, quantile, ratio


def test_quantiles() -> None:
    """Between two neighbours a quantile goes by proportion; the ends are the extremes."""
    values = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert [quantile(values, part) for part in (0, 0.5, 0.9, 1)] == [10, 30, 46, 50]
    assert quantile([7.0], 0.99) == 7


def test_distribution_of_known_samples() -> None:
    """All samples count, rounds keep their own medians, columns hold everything."""
    one = distribution([[100.0, 200.0, 300.0], [1000.0, 2000.0, -3.0]])
    assert (one.samples, one.median_ns, one.least_ns, one.most_ns) == (6, 250, -3, 2000)
    assert one.rounds_ns == [200, 1000]
    assert sum(number for _, number in one.histogram) == 6
    for sample in (100.0, 200.0, 2000.0):
        assert any(low <= sample < low * COLUMN_FACTOR for low, _ in one.histogram)


def test_ratio_is_taken_within_rounds() -> None:
    """A machine that gets slower and slower changes both sides, and so no ratio."""
    below = [100.0 * 1.5**n for n in range(10)]
    found = ratio([3 * one for one in below], below)
    assert found.value == pytest.approx(3)
    assert found.low == pytest.approx(3)
    assert found.high == pytest.approx(3)


def test_interval_covers_as_often_as_it_says() -> None:
    """Of many experiments with a known ratio, about 95 % have it in their interval."""
    chance = random.Random(1)
    covered = 0
    experiments = 100
    for number in range(experiments):
        below = [chance.lognormvariate(5, 0.1) for _ in range(12)]
        above = [2 * one * chance.lognormvariate(0, 0.2) for one in below]
        found = ratio(above, below, seed=number)
        assert found.low <= found.value <= found.high
        covered += found.low <= 2 <= found.high
    assert covered / experiments > 0.85


def test_interval_repeats_with_its_seed() -> None:
    """The same samples and seed give the same interval."""
    above, below = [3.0, 5.0, 4.0, 9.0], [1.0, 2.0, 1.5, 2.5]
    assert ratio(above, below, seed=7) == ratio(above, below, seed=7)
    assert ratio(above, below).value == statistics.median([3, 2.5, 4 / 1.5, 3.6])
