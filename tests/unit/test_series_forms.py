# SPDX-License-Identifier: GPL-2.0-or-later
"""The forms of a series, with git, b4, and the project's own patches."""

from __future__ import annotations

import functools
import gzip
import http.server
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import paths
from harness.build.series import load_series
from harness.build.tree import SourceTree
from harness.errors import BuildError, PatchError, UsageError
from harness.series import anchored, fetched
from harness.settings import load_settings, with_series

OWN = paths.KERNEL_CONFIG / "linux"
SOME = sorted(OWN.glob("*.patch"))[:3]


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=tree, capture_output=True, check=True)
    return done.stdout.decode()


def _commit(tree: Path, subject: str, content: str) -> None:
    (tree / "f.c").write_text(content)
    _git(tree, "add", "-A")
    _git(tree, "commit", "-q", "-m", f"{subject}\n\nWith a body, and café.")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git tree with the tag v1.0 and three commits after it."""
    place = tmp_path / "tree"
    place.mkdir()
    _git(place, "init", "-q", "-b", "main")
    # Settings that would spoil patches, as some have them.
    for name, value in {
        "user.name": "Zoë",
        "user.email": "z@example.org",
        "diff.noprefix": "true",
        "format.attach": "true",
        "format.coverLetter": "true",
    }.items():
        _git(place, "config", name, value)
    _commit(place, "base", "0\n")
    _git(place, "tag", "v1.0")
    for number in (1, 2, 3):
        _commit(place, f"sub: change {number}", f"{number}\n")
    return place


def _mbox(place: Path, *texts: str) -> Path:
    place.write_text("".join(f"From x Thu Jan  1 00:00:00 1970\n{text}\n" for text in texts))
    return place


def _mail(subject: str, file: str = "f.c", *, message_id: str = "x@y", answers: str = "") -> str:
    reference = f"In-Reply-To: <{answers}>\n" if answers else ""
    return (
        f"From: A <a@example.org>\nSubject: {subject}\nMessage-ID: <{message_id}>\n{reference}\n"
        f"Words.\n---\ndiff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n"
        "@@ -1 +1 @@\n-0\n+1\n-- \n2.39\n"
    )


def _source(place: Path) -> SourceTree:
    def unpack(src: Path) -> None:
        src.mkdir(parents=True)
        (src / "f.c").write_text("0\n")

    made = SourceTree(place, kind="kernel", base="linux-source 6.12")
    with made.locked():
        made.prepare(unpack)
    return made


def test_a_directory_of_something_else_is_no_series(tmp_path: Path) -> None:
    """Nothing at all stands for no patches; files that are not called so are a mistake."""
    assert fetched(tmp_path, root=tmp_path / "cache") == tmp_path
    (tmp_path / "series.toml").touch()
    assert fetched(tmp_path, root=tmp_path / "cache") == tmp_path
    (tmp_path / "0001-kvmi.diff").touch()
    with pytest.raises(UsageError, match=r"holds no patches: .* but 0001-kvmi.diff is"):
        fetched(tmp_path, root=tmp_path / "cache")


def test_the_own_series_is_whole_and_used_where_it_lies(tmp_path: Path) -> None:
    assert fetched(OWN, root=tmp_path) == OWN


def test_an_mbox_of_own_patches_is_the_same_series(tmp_path: Path) -> None:
    mbox = tmp_path / "own.mbox"
    mbox.write_bytes(b"".join(path.read_bytes() for path in SOME))
    series = load_series(fetched(mbox, root=tmp_path / "cache"))
    assert series.directory.name == "own"
    assert [patch.subject for patch in series.patches] == [
        load_series(OWN).patches[number].subject for number in range(3)
    ]
    for made, given in zip(series.patches, SOME, strict=True):
        diff = given.read_bytes().split(b"\n---\n")[1]
        assert diff.split(b"\n-- \n")[0] in made.content
    assert fetched(mbox, root=tmp_path / "cache") == series.directory


def test_a_range_of_commits_becomes_patches_whatever_the_users_git_does(
    tmp_path: Path, tree: Path
) -> None:
    series = load_series(fetched(f"{tree}:v1.0..main", root=tmp_path / "cache"))
    assert [patch.subject for patch in series.patches] == [f"sub: change {n}" for n in (1, 2, 3)]
    assert series.made_for == f"commit {_git(tree, 'rev-parse', 'v1.0')[:12]}"
    assert "From: Zoë <z@example.org>".encode() in series.patches[0].content
    source = _source(tmp_path / "source")
    with source.locked():
        source.switch(series)
    assert (source.src / "f.c").read_text() == "3\n"


def test_ranges_that_are_no_series_are_refused(tmp_path: Path, tree: Path) -> None:
    def refused(text: str, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            fetched(text, root=tmp_path / "cache")

    refused(f"{tree}:v1.0..gone", "no commit gone")
    refused(f"{tree}:main..v1.0", "has 0 commits")
    refused(f"{tmp_path}:v1.0..main", "no git tree")
    refused(f"{tmp_path}/none:v1.0..main", "is no directory")
    refused(str(tree), "is a git tree")
    _git(tree, "checkout", "-q", "-b", "side", "HEAD~1")
    (tree / "other.c").write_text("x\n")
    _git(tree, "add", "-A")
    _git(tree, "commit", "-q", "-m", "side")
    _git(tree, "merge", "-q", "--no-edit", "main")
    refused(f"{tree}:v1.0..side", "is a merge")


def test_a_tree_elsewhere_is_cloned_and_followed(tmp_path: Path, tree: Path) -> None:
    root = tmp_path / "cache"
    url = f"file://{tree}"
    whole = load_series(fetched(f"{url}#main", root=root))
    assert len(whole.patches) == 3
    assert whole.directory.name == "main"
    part = load_series(fetched(f"{url}#main~1..main", root=root))
    assert [patch.subject for patch in part.patches] == ["sub: change 3"]
    _commit(tree, "sub: change 4", "4\n")
    assert len(load_series(fetched(f"{url}#main", root=root)).patches) == 4
    with pytest.raises(UsageError, match="no commit gone"):
        fetched(f"{url}#gone", root=root)
    _git(tree, "tag", "-d", "v1.0")
    with pytest.raises(UsageError, match="cannot be told") as caught:
        fetched(f"{url}#main", root=root)
    assert "BASE..TIP" in caught.value.hint
    with pytest.raises(BuildError, match="fetching file://") as failed:
        fetched(f"file://{tmp_path}/none#main", root=root)
    assert "network" in failed.value.hint


@contextmanager
def _archive(place: Path) -> Iterator[str]:
    """A list's archive, as public-inbox serves it, of the files below ``place``."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_message_id_is_fetched_by_b4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mbox = _mbox(
        tmp_path / "thread",
        _mail("[PATCH 0/2] cover", message_id="0@list", answers="").split("diff --git")[0],
        _mail("[PATCH 2/2] second", "g.c", message_id="2@list", answers="0@list"),
        _mail("Re: [PATCH 2/2] second", message_id="r@list", answers="0@list"),
        _mail("[PATCH 1/2] first", message_id="1@list", answers="0@list"),
    )
    served = tmp_path / "served/all/0@list"
    served.mkdir(parents=True)
    (served / "t.mbox.gz").write_bytes(gzip.compress(mbox.read_bytes()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b4"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "b4"))
    with _archive(tmp_path / "served") as url:
        series = load_series(fetched(f"{url}/all/0@list", root=tmp_path / "cache"))
        with pytest.raises(BuildError, match="b4 could not fetch") as failed:
            fetched(f"{url}/all/1@list", root=tmp_path / "cache")
    assert "network" in failed.value.hint
    assert [patch.subject for patch in series.patches] == ["first", "second"]
    assert series.title == "cover"
    assert "replies among the patches, left out: 1" in capfd.readouterr().err


def test_without_b4_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python3"))
    with pytest.raises(UsageError, match="b4 is needed") as caught:
        fetched("20250101.x@example.org", root=tmp_path)
    assert "pip install b4" in caught.value.hint


def test_an_mbox_of_two_series_names_both_and_how_to_choose(tmp_path: Path) -> None:
    mbox = _mbox(
        tmp_path / "two.mbox",
        _mail("[PATCH 1/1] one", message_id="a"),
        _mail("[PATCH v2 1/2] two", message_id="b"),
        _mail("[PATCH v2 2/2] three", "g.c", message_id="c"),
    )
    with pytest.raises(UsageError, match='holds 2 series: "one", 1 of 1') as caught:
        fetched(mbox, root=tmp_path / "cache")
    assert f'{mbox}#2  v2 of "two", 2 of 2 patches' in caught.value.details
    series = load_series(fetched(f"{mbox}#2", root=tmp_path / "cache"))
    assert [patch.subject for patch in series.patches] == ["two", "three"]
    with pytest.raises(UsageError, match=r"no .*#3"):
        fetched(f"{mbox}#3", root=tmp_path / "cache")


def test_a_reply_in_the_place_of_a_patch_is_named(tmp_path: Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    (series / "0001-a.patch").write_text(_mail("[PATCH 1/2] a"))
    (series / "0002-b.patch").write_text(_mail("Re: [PATCH 2/2] b"))
    with pytest.raises(UsageError, match=r'0002-b.patch in .* is a reply, not a patch: 2/2 "b"'):
        fetched(series, root=tmp_path)
    (series / "0002-b.patch").unlink()
    with pytest.raises(UsageError, match="patch 2/2 is missing"):
        fetched(series, root=tmp_path)


def test_a_series_for_another_base_says_so_with_file_and_hunk(tmp_path: Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    (series / "0000-cover.patch").write_text(
        f"Subject: [PATCH 0/1] x\n\nWords\n\nbase-commit: {'ab' * 20}\n"
    )
    text = _mail("[PATCH 1/1] a").replace("-0\n", "-something else\n")
    (series / "0001-a.patch").write_text(text)
    source = _source(tmp_path / "source")
    with source.locked(), pytest.raises(PatchError) as caught:
        source.switch(load_series(fetched(series, root=tmp_path)))
    assert "patch 0001-a.patch does not apply to linux-source 6.12" in caught.value.message
    assert "the series says that it is for commit abababababab" in caught.value.message
    assert "f.c line 1 (hunk @@ -1 +1 @@)" in caught.value.message


def test_settings_keep_other_forms_until_they_are_fetched(tmp_path: Path, tree: Path) -> None:
    file = tmp_path / "kvmi-harness.toml"
    file.write_text('kernel_series = "tree:v1.0..main"\nqemu_series = "tree:v1.0..main~1"\n')
    settings = load_settings(file, cache=tmp_path / "cache")
    assert settings.kernel_series == f"{tree}:v1.0..main"
    with pytest.raises(UsageError, match="no directory"):
        load_series(settings.kernel_series)
    settings = with_series(settings)
    assert len(load_series(settings.kernel_series).patches) == 3
    assert len(load_series(settings.qemu_series).patches) == 2


@pytest.mark.parametrize(
    "text", ["https://example.org/l.git#b", "git@example.org:l.git#a..b", "2025.x-1@example.org"]
)
def test_forms_that_name_nothing_here_stay_as_they_are(tmp_path: Path, text: str) -> None:
    assert anchored(text, base=tmp_path) == text


def test_what_is_nothing_lists_the_forms(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory or file") as caught:
        fetched(tmp_path / "none", root=tmp_path)
    assert "message id" in caught.value.hint
