# SPDX-License-Identifier: GPL-2.0-or-later
"""Bases that somebody has: tarballs and git trees, unpacked by tar and git."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from harness.build.progress import step
from harness.build.sources import Source, linux_source, named_source, qemu_source, unpack
from harness.errors import UsageError
from harness.settings import load_settings


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git tree with a tag, and a commit after it."""
    place = tmp_path / "tree"
    (place / "kernel").mkdir(parents=True)

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=place,
            check=True,
            capture_output=True,
        )

    git("init", "-q", "-b", "main")
    (place / "kernel/Makefile").write_text("one\n")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    git("tag", "v6.13")
    (place / "kernel/Makefile").write_text("two\n")
    git("commit", "-q", "-a", "-m", "two")
    return place


def _unpacked(source: Source, into: Path) -> str:
    with step("unpack") as progress:
        unpack(source, into, log=into.with_suffix(".log"), progress=progress)
    return (into / "kernel/Makefile").read_text()


def test_a_commit_is_a_base(tree: Path, tmp_path: Path) -> None:
    settings = load_settings(kernel_base=f"{tree}:v6.13", qemu_base=f"{tree}:main", cache=tmp_path)
    source = linux_source(settings)
    assert (source.name, source.version, source.upstream) == ("linux", "6.13", "6.13")
    assert _unpacked(source, tmp_path / "one") == "one\n"
    # What is not committed is no part of it.
    (tree / "kernel/Makefile").write_text("three\n")
    other = qemu_source(settings)
    assert other.version.startswith("6.13-1-g")
    assert _unpacked(other, tmp_path / "two") == "two\n"
    assert source.digest != other.digest


def test_a_tarball_is_a_base(tree: Path, tmp_path: Path) -> None:
    tarball = tmp_path / "linux-6.13.2.tar.xz"
    with tarfile.open(tarball, "w:xz") as archive:
        archive.add(tree / "kernel", "linux-6.13.2/kernel")
    source = named_source("linux", tarball)
    assert (source.version, source.upstream) == ("6.13.2", "6.13.2")
    assert _unpacked(source, tmp_path / "src") == "two\n"


def test_a_part_of_a_source(tree: Path, tmp_path: Path) -> None:
    for name in ("Kconfig", "Makefile", "net/Kconfig.debug", "net/scripts/x.c", "scripts/a/b.sh"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tree)]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "more"], check=True)
    tarball = tmp_path / "linux-6.13.2.tar.xz"
    with tarfile.open(tarball, "w:xz") as archive:
        archive.add(tree, "linux-6.13.2", filter=lambda one: None if ".git" in one.name else one)
    wanted = ("Makefile", "*Kconfig*", "scripts/*")
    for number, base in enumerate((Path(f"{tree}:main"), tarball)):
        into = tmp_path / f"part{number}"
        with step("unpack") as progress:
            source = named_source("linux", base)
            unpack(source, into, only=wanted, log=tmp_path / "log", progress=progress)
        files = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
        assert files == {"Kconfig", "Makefile", "net/Kconfig.debug", "scripts/a/b.sh"}


def test_what_is_no_base(tree: Path, tmp_path: Path) -> None:
    for base, complaint in (
        (tmp_path / "none", "there is no base"),
        (Path(f"{tree}:gone"), "no commit gone in"),
        (Path(f"{tmp_path}:main"), "no commit main in"),
        (tree / "kernel/Makefile", "is no tarball"),
    ):
        with pytest.raises(UsageError, match=complaint):
            named_source("linux", base)
