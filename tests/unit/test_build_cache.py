# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache: what is complete has its name, and nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.build import cache
from harness.errors import BuildError, DeadlineError


def _fill(place: Path) -> None:
    (place / "out").write_text("made")


def test_the_same_inputs_are_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(place: Path) -> None:
        made.append(place)
        _fill(place)

    source = tmp_path / "source"
    source.write_text("content")
    inputs: dict[str, cache.Input] = {"text": "one", "raw": b"two", "file": source}
    first = cache.entry("thing", inputs, make, root=tmp_path / "cache")
    again = cache.entry("thing", inputs, make, root=tmp_path / "cache")
    assert first == again
    assert len(made) == 1
    assert (first / "out").read_text() == "made"
    record = json.loads((first / "inputs.json").read_text())
    assert record["text"]["value"] == "one"
    assert len(record["file"]["sha256"]) == 64


def test_every_input_counts(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_text("1")
    root = tmp_path / "cache"
    seen = {cache.entry("thing", {"tree": tree}, _fill, root=root)}
    (tree / "a").write_text("2")
    seen.add(cache.entry("thing", {"tree": tree}, _fill, root=root))
    (tree / "a").rename(tree / "b")
    seen.add(cache.entry("thing", {"tree": tree}, _fill, root=root))
    (tree / "b").chmod(0o755)
    seen.add(cache.entry("thing", {"tree": tree}, _fill, root=root))
    seen.add(cache.entry("thing", {"tree": tree, "more": ""}, _fill, root=root))
    assert len(seen) == 5


def test_a_failed_make_leaves_nothing(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        _fill(place)
        raise BuildError("no")

    with pytest.raises(BuildError, match="no"):
        cache.entry("thing", {"a": "b"}, fail, root=tmp_path)
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["lock"]


def test_a_killed_make_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from harness.build import cache;"
        "cache.entry('thing', {'a': 'b'},"
        "lambda p: ((p / 'out').write_text('half'), os.kill(os.getpid(), signal.SIGKILL)),"
        "root=Path(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=False)
    assert len(list((tmp_path / "thing").glob("*.partial"))) == 1
    place = cache.entry("thing", {"a": "b"}, _fill, root=tmp_path)
    assert (place / "out").read_text() == "made"
    assert not list((tmp_path / "thing").glob("*.partial"))


def test_a_full_disk_says_where_and_what_to_do(tmp_path: Path) -> None:
    def overflow(place: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(BuildError) as caught:
        cache.entry("thing", {"a": "b"}, overflow, root=tmp_path)
    assert "no space left" in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "KVMI_CACHE" in caught.value.hint


def test_a_cache_that_cannot_be_made_is_a_build_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot be written"):
        cache.entry("thing", {}, _fill, root=tmp_path / "file")


def test_too_little_room_is_noticed_beforehand(tmp_path: Path) -> None:
    cache.require_space(tmp_path, megabytes=0, purpose="nothing")
    with pytest.raises(BuildError, match="are free"):
        cache.require_space(tmp_path, megabytes=1 << 40, purpose="everything")


def test_two_at_once_make_one_entry(tmp_path: Path) -> None:
    made: list[int] = []
    begun = threading.Event()

    def make(place: Path) -> None:
        made.append(1)
        begun.set()
        time.sleep(0.3)  # long enough for the other thread to come to the lock
        _fill(place)

    def ask() -> None:
        cache.entry("thing", {"a": "b"}, make, root=tmp_path)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert made == [1]


def test_a_lock_is_waited_for_no_longer_than_asked(tmp_path: Path) -> None:
    with (
        cache.lock(tmp_path / "lock", what="x"),
        pytest.raises(DeadlineError, match=str(os.getpid())),
        cache.lock(tmp_path / "lock", what="x", timeout_s=0.2),
    ):
        pass


def test_clean_keeps_what_was_used_lately(tmp_path: Path) -> None:
    old = cache.entry("thing", {"a": "old"}, _fill, root=tmp_path)
    new = cache.entry("thing", {"a": "new"}, _fill, root=tmp_path)
    os.utime(old, (0, 0))
    assert cache.clean(tmp_path, unused_days=7) == 1
    assert not old.exists()
    assert new.exists()


def test_clean_deletes_source_trees_that_are_old(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with cache.lock(tmp_path / "trees" / name / "lock", what=name):
            (tmp_path / "trees" / name / "src").mkdir()
    os.utime(tmp_path / "trees" / "old" / "lock", (0, 0))
    assert cache.clean(tmp_path, unused_days=7) == 1
    assert [path.name for path in (tmp_path / "trees").iterdir()] == ["new"]


def test_many_of_a_kind_do_not_pile_up(tmp_path: Path) -> None:
    places = []
    for number in range(12):
        place = cache.entry("thing", {"a": str(number)}, _fill, root=tmp_path)
        os.utime(place, (number, number))
        places.append(place)
    assert [place.exists() for place in places] == [False] * 4 + [True] * 8
