# SPDX-License-Identifier: GPL-2.0-or-later
"""Series, and the trees that switch between them; with git, on a tree of three files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from harness.build.series import Patch, load_series
from harness.build.tree import SourceTree
from harness.errors import PatchError, UsageError

_LINES = [f"line {number}\n" for number in range(1, 41)]


def _unpack(src: Path) -> None:
    (src / "sub").mkdir(parents=True)
    (src / "sub" / "a.c").write_text("".join(_LINES))
    (src / "b.c").write_text("other\n")
    (src / "untouched.c").write_text("never\n")


def _unpack_part(src: Path) -> None:
    _unpack(src)
    (src / "b.c").unlink()
    (src / "untouched.c").unlink()


def _patch(directory: Path, name: str, changes: dict[str, tuple[str, str]]) -> Path:
    """A patch file that turns each (old, new) pair's first text into its second."""
    directory.mkdir(parents=True, exist_ok=True)
    body = [f"From: A Developer <a@example.org>\nSubject: [PATCH 1/9] Change\n {name}\n\n---\n"]
    for path, (old, new) in changes.items():
        for side, text in (("a", old), ("b", new)):
            place = directory / "sides" / side / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if text:
                place.write_text(text)
        diff = subprocess.run(
            ["git", "diff", "--no-index", "--no-prefix", "a", "b"],
            cwd=directory / "sides",
            capture_output=True,
            check=False,
        )
        body.append(diff.stdout.decode())
        subprocess.run(["rm", "-r", str(directory / "sides")], check=True)
    patch = directory / name
    patch.write_text("".join(body) + "-- \n2.39.5\n")
    return patch


def _changed(line: int) -> str:
    lines = list(_LINES)
    lines[line - 1] = f"changed {line}\n"
    return "".join(lines)


@pytest.fixture
def tree(tmp_path: Path) -> SourceTree:
    made = SourceTree(tmp_path / "tree", kind="kernel", base="linux-source 6.12")
    with made.locked():
        made.prepare(_unpack)
    return made


def test_a_series_is_the_patches_in_the_order_of_their_names(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    _patch(directory, "0002-second.patch", {"b.c": ("other\n", "two\n")})
    _patch(directory, "0001-first.patch", {"b.c": ("other\n", "one\n")})
    (directory / "0000-cover-letter.patch").write_text("words")
    (directory / "notes.txt").write_text("words")
    series = load_series(directory)
    assert [patch.name for patch in series.patches] == ["0001-first.patch", "0002-second.patch"]
    assert series.patches[0].subject == "Change 0001-first.patch"
    assert series.id == f"mine@{series.digest[:12]}"
    assert series.touched() == {"b.c"}


def test_the_lines_that_a_patch_adds(tmp_path: Path) -> None:
    new = "zero\n" + _changed(30)
    path = _patch(tmp_path, "p", {"sub/a.c": ("".join(_LINES), new), "n.c": ("", "a\n+++ b/x\n")})
    patch = Patch(path, path.read_bytes())
    assert patch.added() == {"sub/a.c": {1, 31}, "n.c": {1, 2}}


def test_a_series_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        load_series(tmp_path / "none")


def test_a_tree_of_a_part(tmp_path: Path) -> None:
    part = SourceTree(tmp_path / "part", kind="kernel", base="linux", only=("sub/*",))
    mine = tmp_path / "mine"
    _patch(mine, "1.patch", {"b.c": ("other\n", "new\n")})
    _patch(mine, "2.patch", {"sub/a.c": ("".join(_LINES), _changed(20)), "b.c": ("new\n", "2\n")})
    with part.locked():
        part.prepare(_unpack_part)
        part.switch(load_series(mine))
    assert (part.src / "sub/a.c").read_text() == _changed(20)
    assert not (part.src / "b.c").exists()


def test_switching_touches_only_what_differs(tmp_path: Path, tree: SourceTree) -> None:
    one, both, none = tmp_path / "one", tmp_path / "both", tmp_path / "none"
    _patch(one, "1.patch", {"sub/a.c": ("".join(_LINES), _changed(20))})
    _patch(both, "1.patch", {"sub/a.c": ("".join(_LINES), _changed(20))})
    _patch(both, "2.patch", {"b.c": ("other\n", "new\n"), "made.c": ("", "made\n")})
    none.mkdir()
    a, b, made = tree.src / "sub/a.c", tree.src / "b.c", tree.src / "made.c"
    with tree.locked():
        tree.switch(load_series(one))
        assert a.read_text() == _changed(20)
        os.utime(a, (1, 1))
        os.utime(tree.src / "untouched.c", (1, 1))
        tree.switch(load_series(both))
        assert b.read_text() == "new\n"
        assert made.read_text() == "made\n"
        tree.switch(load_series(none))
        assert a.read_text() == "".join(_LINES)
        assert b.read_text() == "other\n"
        assert not made.exists()
    assert (tree.src / "untouched.c").stat().st_mtime == 1


def test_the_same_content_keeps_its_time(tmp_path: Path, tree: SourceTree) -> None:
    for name, new in (("one", "new\n"), ("two", "newer\n")):
        _patch(tmp_path / name, "1.patch", {"sub/a.c": ("".join(_LINES), _changed(20))})
        _patch(tmp_path / name, "2.patch", {"b.c": ("other\n", new)})
    with tree.locked():
        tree.switch(load_series(tmp_path / "one"))
        before = (tree.src / "sub/a.c").stat().st_mtime_ns
        tree.switch(load_series(tmp_path / "two"))
        assert (tree.src / "sub/a.c").stat().st_mtime_ns == before
        assert (tree.src / "b.c").read_text() == "newer\n"


def test_a_patch_that_does_not_apply_is_named_with_file_line_and_hunk(
    tmp_path: Path, tree: SourceTree
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    _patch(good, "1.patch", {"b.c": ("other\n", "good\n")})
    _patch(bad, "0001-fine.patch", {"b.c": ("other\n", "bad\n")})
    foreign = _changed(20).replace("line 19\n", "nobody's line\n")
    _patch(bad, "0002-stale.patch", {"sub/a.c": (foreign, foreign.replace("changed 20", "x"))})
    with tree.locked():
        tree.switch(load_series(good))
        with pytest.raises(PatchError) as caught:
            tree.switch(load_series(bad))
        assert (tree.src / "b.c").read_text() == "good\n"
    message = caught.value.message
    assert "0002-stale.patch does not apply to linux-source 6.12" in message
    assert "sub/a.c line 17 (hunk @@ -17,7 +17,7 @@" in message
    assert "inv tree.edit kernel" in caught.value.hint
    assert " nobody's line" in caught.value.details


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--- a/none.c\n+++ b/none.c\n@@ -1 +1 @@\n-x\n+y\n", "none.c: does not exist in index"),
        ("--- a/b.c\n+++ b/b.c\n@@ -1,5 +1,5 @@\n-other\n+y\n", "damaged at its line"),
        ("--- /dev/null\n+++ b/b.c\n@@ -0,0 +1 @@\n+y\n", "b.c: already exists in index"),
        ("just words\n", "No valid patches in input"),
    ],
)
def test_other_ways_in_which_a_patch_is_wrong(
    tmp_path: Path, tree: SourceTree, text: str, words: str
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "wrong.patch").write_text(text)
    with tree.locked(), pytest.raises(PatchError) as caught:
        tree.switch(load_series(tmp_path / "bad"))
    assert "wrong.patch" in caught.value.message
    assert words in caught.value.message


def test_what_a_killed_switch_left_is_repaired(tmp_path: Path, tree: SourceTree) -> None:
    one = tmp_path / "one"
    _patch(one, "1.patch", {"sub/a.c": ("".join(_LINES), _changed(20))})
    none = tmp_path / "none"
    none.mkdir()
    with tree.locked():
        tree.switch(load_series(one))
        (tree.src / "sub/a.c").write_text("half")
        (tree.place / "git/index.lock").touch()
        tree.switch(load_series(one))
        assert (tree.src / "sub/a.c").read_text() == _changed(20)
        (tree.src / "sub/a.c").unlink()
        tree.switch(load_series(none))
        assert (tree.src / "sub/a.c").read_text() == "".join(_LINES)


def test_a_tree_that_was_unpacked_half_is_unpacked_again(tmp_path: Path) -> None:
    made = SourceTree(tmp_path / "tree", kind="qemu", base="qemu")

    def fail(src: Path) -> None:
        _unpack(src)
        raise KeyboardInterrupt

    with made.locked():
        with pytest.raises(KeyboardInterrupt):
            made.prepare(fail)
        made.prepare(_unpack)
        assert (made.src / "b.c").read_text() == "other\n"
        made.prepare(fail)  # nothing left to do
