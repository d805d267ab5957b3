# SPDX-License-Identifier: GPL-2.0-or-later
"""Variants of a series have a place of their own, and only one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import variants
from harness.errors import DeadlineError
from harness.settings import load_settings
from harness.variants import passing_place


def test_empty_and_gone(tmp_path: Path) -> None:
    """What a killed run left is gone at the start, what this one leaves at the end."""
    settings = load_settings(cache=tmp_path)
    left = tmp_path / "mutants" / "killed" / "kernel"
    left.mkdir(parents=True)
    with passing_place(settings, "mutants") as place:
        assert not left.exists()
        (place / "of-this-one").mkdir(parents=True)
    assert not place.exists()


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process would delete what the first one is at work with: it is refused."""
    settings = load_settings(cache=tmp_path)
    monkeypatch.setattr(variants, "_PATIENCE_S", 0.0)
    with passing_place(settings, "mutants") as place:
        place.mkdir()
        again = passing_place(settings, "mutants")
        with pytest.raises(DeadlineError, match="still held by process"):
            again.__enter__()
        assert place.exists()
    with passing_place(settings, "mutants"):
        pass
