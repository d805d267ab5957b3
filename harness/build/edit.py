# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on a series: a git tree with the patches as commits, and the way back to files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness.build import cache, sources
from harness.build.progress import step
from harness.build.run import output_of
from harness.build.series import Series, load_series
from harness.errors import PatchError, UsageError
from harness.settings import Settings

__all__ = ["KINDS", "edit", "open_tree", "refresh", "write_back"]

KINDS = ("kernel", "qemu")
_BASE = "base"
_GIT_TIMEOUT_S = 900


def edit(settings: Settings, kind: str, *, directory: Path | None = None) -> Path:
    """Make a work tree of the series ``kind`` (``kernel`` or ``qemu``); returns its place.

    :param directory: where; it must not exist yet. Default: ``edit/<kind>`` in the cache.
    :raises UsageError: the directory is there already.
    :raises PatchError: a patch does not apply; the tree stands at it, ready for the fix.
    """
    series, place = _which(settings, kind, directory)
    source = (sources.linux_source if kind == "kernel" else sources.qemu_source)(settings)
    log = settings.cache / "logs" / f"edit-{kind}.log"
    with cache.full_disk(place.parent, "making a tree to edit"), step(f"Make {place}") as progress:
        open_tree(
            place,
            series,
            unpack=lambda into: sources.unpack(source, into, log=log, progress=progress),
            base=f"{source.name} {source.version}",
            kind=kind,
        )
    return place


def refresh(settings: Settings, kind: str, *, directory: Path | None = None) -> list[str]:
    """Write the commits of the tree that :func:`edit` made back into the series' directory.

    :returns: the names of the patches that are new or differ.
    :raises UsageError: there is no such tree, or it has work that is not committed.
    """
    series, place = _which(settings, kind, directory)
    return write_back(place, series.directory)


def _which(settings: Settings, kind: str, directory: Path | None) -> tuple[Series, Path]:
    if kind not in KINDS:
        raise UsageError(f"there is no series {kind!r}", hint=f"it is one of {', '.join(KINDS)}")
    where = settings.kernel_series if kind == "kernel" else settings.qemu_series
    return load_series(where), (directory or settings.cache / "edit" / kind).absolute()


def open_tree(
    place: Path, series: Series, *, unpack: Callable[[Path], None], base: str, kind: str
) -> None:
    """Make ``place`` a git tree: the unpacked source, tagged ``base``, then the patches.

    :param unpack: makes the directory that it is given.
    :param base: the source's name, for messages.
    :raises UsageError: ``place`` exists.
    :raises PatchError: git stopped at a patch; ``git am --continue`` goes on after the fix.
    """
    if place.exists():
        raise UsageError(
            f"{place} exists already",
            hint=f"go on in it, or delete it first; `inv tree.refresh {kind}` writes it back",
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    unpack(partial)
    _git(partial, "init", "-q")
    # Eighty thousand files: their compression would take longer than everything else.
    for name, value in (("core.compression", "0"), ("gc.auto", "0"), ("commit.gpgSign", "false")):
        _git(partial, "config", name, value)
    if not _said(partial, "config", "user.email"):
        _git(partial, "config", "user.name", "kvmi-harness")
        _git(partial, "config", "user.email", "kvmi-harness@localhost")
    _git(partial, "add", "-A", "-f")
    _git(partial, "commit", "-q", "--no-verify", "-m", base)
    _git(partial, "tag", _BASE)
    partial.rename(place)
    if not series.patches:
        return
    paths = [str(patch.path.absolute()) for patch in series.patches]
    done = subprocess.run(
        ["git", "am", "-q", "--no-3way", *paths], cwd=place, capture_output=True, check=False
    )
    if done.returncode == 0:
        return
    applied = int(_said(place, "rev-list", "--count", f"{_BASE}..HEAD"))
    stopped = series.patches[min(applied, len(series.patches) - 1)]
    raise PatchError(
        f"{place} is made, but patch {stopped.name} does not apply to {base}",
        hint=(
            f"there: git apply --reject {stopped.path.absolute()}, correct what *.rej shows, "
            f"git add, git am --continue; then `inv tree.refresh {kind}`"
        ),
        details=done.stderr.decode(errors="replace").strip(),
    )


def write_back(place: Path, directory: Path) -> list[str]:
    """Replace the patches in ``directory`` by the commits of ``place`` since ``base``.

    A cover letter stays. Patches that did not change keep every byte.

    :returns: the names of the patches that are new or differ.
    :raises UsageError: no tree of ours, ``git am`` or a rebase under way, or uncommitted work.
    """
    if not (place / ".git").is_dir() or not _said(place, "tag", "--list", _BASE):
        raise UsageError(f"{place} is no tree to edit", hint="`inv tree.edit` makes one")
    for name in ("rebase-apply", "rebase-merge"):
        if (place / ".git" / name).exists():
            raise UsageError(
                f"in {place} git is in the middle of a series",
                hint="finish with git am --continue or git rebase --continue first",
            )
    if changed := _said(place, "status", "--porcelain", "--untracked-files=no"):
        raise UsageError(
            f"{place} has work that is not committed",
            hint="commit it, or amend the patch that it belongs to",
            details=changed,
        )
    directory = directory.absolute()  # git runs in the tree
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".refresh-") as scratch:
        _git(
            place, "format-patch", "-q", "--zero-commit", "--no-signature", "-N",
            "--subject-prefix=PATCH", "--src-prefix=a/", "--dst-prefix=b/",
            "-o", scratch, f"{_BASE}..HEAD",
        )  # fmt: skip
        written = sorted(Path(scratch).glob("*.patch"))
        differing = [
            path.name
            for path in written
            if not (directory / path.name).is_file()
            or (directory / path.name).read_bytes() != path.read_bytes()
        ]
        names = {path.name for path in written}
        for old in directory.glob("*.patch"):
            if old.name not in names and not old.name.startswith("0000-"):
                old.unlink()
        for path in written:
            if path.name in differing:
                shutil.move(path, directory / path.name)
    return differing


def _git(place: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_DIR")}
    return output_of(["git", *arguments], cwd=place, env=environment, timeout_s=_GIT_TIMEOUT_S)


def _said(place: Path, *arguments: str) -> str:
    """What git says, or nothing if it fails."""
    done = subprocess.run(["git", *arguments], cwd=place, capture_output=True, check=False)
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""
