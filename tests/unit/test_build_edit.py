# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on a series: from files to commits and back, with git on a small tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.build.edit import open_tree, write_back
from harness.build.series import load_series
from harness.errors import PatchError, UsageError


def _unpack(into: Path) -> None:
    into.mkdir()
    (into / "a.c").write_text("one\ntwo\nthree\n")


def _git(place: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=A Developer", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=place, check=True, capture_output=True)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A series of two patches, made the way a developer makes them."""
    directory = tmp_path / "series"
    directory.mkdir()
    open_tree(tmp_path / "first", load_series(directory), unpack=_unpack, base="x", kind="qemu")
    for word in ("four", "five"):
        with (tmp_path / "first" / "a.c").open("a") as file:
            file.write(f"{word}\n")
        _git(tmp_path / "first", "commit", "-qam", f"Add {word}")
    assert write_back(tmp_path / "first", directory) == [
        "0001-Add-four.patch",
        "0002-Add-five.patch",
    ]
    return directory


def test_there_and_back_changes_nothing(tmp_path: Path, series: Path) -> None:
    before = {path.name: path.read_bytes() for path in series.iterdir()}
    (series / "0000-cover-letter.patch").write_text("words")
    open_tree(tmp_path / "again", load_series(series), unpack=_unpack, base="x", kind="qemu")
    assert (tmp_path / "again" / "a.c").read_text() == "one\ntwo\nthree\nfour\nfive\n"
    assert write_back(tmp_path / "again", series) == []
    after = {path.name: path.read_bytes() for path in series.iterdir()}
    assert after == before | {"0000-cover-letter.patch": b"words"}


def test_the_series_may_be_named_from_here(
    tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative directory is this process's, not one of the tree."""
    open_tree(tmp_path / "again", load_series(series), unpack=_unpack, base="x", kind="qemu")
    monkeypatch.chdir(tmp_path)
    assert write_back(tmp_path / "again", Path(series.name)) == []
    assert len(list(series.iterdir())) == 2


def test_a_dropped_and_a_changed_commit_are_written(tmp_path: Path, series: Path) -> None:
    open_tree(tmp_path / "again", load_series(series), unpack=_unpack, base="x", kind="qemu")
    _git(tmp_path / "again", "reset", "-q", "--hard", "HEAD~1")
    _git(tmp_path / "again", "commit", "-q", "--amend", "-m", "Append four")
    assert write_back(tmp_path / "again", series) == ["0001-Append-four.patch"]
    assert [path.name for path in series.iterdir()] == ["0001-Append-four.patch"]


def test_a_patch_that_does_not_apply_leaves_a_tree_to_fix_it_in(
    tmp_path: Path, series: Path
) -> None:
    first = series / "0001-Add-four.patch"
    first.write_text(first.read_text().replace(" three\n", " drei\n"))
    with pytest.raises(PatchError) as caught:
        open_tree(tmp_path / "again", load_series(series), unpack=_unpack, base="x", kind="qemu")
    assert "0001-Add-four.patch" in caught.value.message
    assert "git am --continue" in caught.value.hint
    with pytest.raises(UsageError, match="in the middle"):
        write_back(tmp_path / "again", series)
    with (tmp_path / "again" / "a.c").open("a") as file:
        file.write("four\n")
    _git(tmp_path / "again", "add", "a.c")
    _git(tmp_path / "again", "am", "--continue")
    assert write_back(tmp_path / "again", series) == ["0001-Add-four.patch"]
    assert len(load_series(series).patches) == 2


def test_work_that_is_not_committed_is_not_lost(tmp_path: Path, series: Path) -> None:
    (tmp_path / "first" / "a.c").write_text("changed\n")
    with pytest.raises(UsageError, match="not committed"):
        write_back(tmp_path / "first", series)
    with pytest.raises(UsageError, match="exists already"):
        open_tree(tmp_path / "first", load_series(series), unpack=_unpack, base="x", kind="qemu")


def test_any_other_directory_is_refused(tmp_path: Path, series: Path) -> None:
    with pytest.raises(UsageError, match="no tree to edit"):
        write_back(tmp_path, series)
