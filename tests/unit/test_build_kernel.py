# SPDX-License-Identifier: GPL-2.0-or-later
"""What a killed kernel build leaves must not get into the next kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.build.kernel import half_written_removed


def _object(build: Path, name: str, *, written: int, recorded: int | None) -> Path:
    """An object of Kbuild's, and its record unless the build was killed before that."""
    path = build / "sub" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("object")
    os.utime(path, (written, written))
    if recorded is not None:
        record = path.with_name(f".{name}.cmd")
        record.write_text("command")
        os.utime(record, (recorded, recorded))
    return path


def test_objects_newer_than_their_record_are_made_again(tmp_path: Path) -> None:
    whole = _object(tmp_path, "whole.o", written=10, recorded=11)
    cut = _object(tmp_path, "cut.o", written=20, recorded=11)
    first = _object(tmp_path, "first.o", written=20, recorded=None)
    (tmp_path / ".unfinished").touch()
    with half_written_removed(tmp_path):
        assert whole.exists()
        assert not cut.exists()
        # make builds what has no record in any case.
        assert first.exists()
    assert not (tmp_path / ".unfinished").exists()


def test_nothing_is_removed_after_a_build_that_ended(tmp_path: Path) -> None:
    touched = _object(tmp_path, "touched.o", written=20, recorded=11)
    with half_written_removed(tmp_path):
        assert touched.exists()


def test_a_build_that_did_not_end_is_remembered(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), half_written_removed(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / ".unfinished").exists()
