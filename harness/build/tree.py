# SPDX-License-Identifier: GPL-2.0-or-later
"""Persistent source trees: unpacked once, switched from series to series.

A tree belongs to the cache. git knows only the files that some series touched so far
(importing eighty thousand takes longer than compiling what a patch changes), in a
repository beside the tree; every other file is as it was unpacked. Switching rewrites
just the files whose content differs, so the next ``make`` compiles just what depends
on them.

::

    <cache>/trees/linux-6.12.57/src/        the tree
    <cache>/trees/linux-6.12.57/git/        what git knows of it
    <cache>/trees/linux-6.12.57/manifest    the paths of the unpacked source
    <cache>/trees/linux-6.12.57/build-…/    objects, one directory per configuration
    <cache>/trees/linux-6.12.57/lock        held by whoever switches or builds
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.build import cache
from harness.build.progress import step
from harness.build.run import output_of, refuse_full_disk
from harness.build.series import Series, failure
from harness.build.sources import Source, unpack
from harness.errors import BuildError

__all__ = ["SourceTree"]


class SourceTree:
    """One unpacked source. Use it only inside :meth:`locked` or :meth:`patched`.

    :param place: its directory in the cache.
    :param kind: ``kernel`` or ``qemu``.
    :param base: the source's name and version, for messages.
    :param only: patterns of the paths that are wanted of it, all by default: what has no code
        takes a second to switch, and nobody builds there for minutes. ``*`` matches slashes.
    """

    def __init__(self, place: Path, *, kind: str, base: str, only: Sequence[str] = ()) -> None:
        self.place = place
        self.src = place / "src"
        self._git = place / "git"
        self._manifest = place / "manifest"
        self._kind = kind
        self._base = base
        self._only = only

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Nobody else switches or builds here; yields the lock's descriptor for children."""
        with cache.lock(self.place / "lock", what=self._base) as descriptor:
            yield descriptor

    def prepare(self, unpack: Callable[[Path], None]) -> None:
        """Have the tree unpacked; ``unpack`` makes the directory that it is given."""
        if self._manifest.is_file():
            return
        # The manifest is written last: without it, whatever lies here is incomplete.
        self._discard()
        try:
            unpack(self.src)
            self._run("init", "-q", "--bare", str(self._git))
        except BaseException:
            self._discard()
            raise
        paths = sorted(
            os.path.relpath(Path(top, name), self.src)
            for top, _, names in os.walk(self.src)
            for name in names
        )
        partial = self._manifest.with_suffix(".partial")
        partial.write_text("\n".join(paths) + "\n", errors="surrogateescape")
        partial.rename(self._manifest)

    @contextmanager
    def patched(self, source: Source, series: Series, *, log: Path) -> Iterator[Path]:
        """The directory with ``series`` applied, unpacked now if it never was.

        Nobody changes it until the block ends.

        :raises PatchError: a patch does not apply.
        """
        with self.locked():
            with step(f"Unpack {source.name}") as progress:
                self.prepare(
                    lambda into: unpack(source, into, only=self._only, log=log, progress=progress)
                )
            self.switch(series)
            yield self.src

    def _discard(self) -> None:
        for leftover in (self.src, self._git, *self.place.glob("build-*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def switch(self, series: Series) -> None:
        """Make the tree that of ``series``; only files that differ are written.

        :raises PatchError: a patch does not apply; the tree is unchanged then.
        """
        for name in ("index.lock", "base-index.lock", "new-index.lock"):
            (self._git / name).unlink(missing_ok=True)  # of a git that was killed
        self._learn(series.touched())
        new = self._git / "new-index"
        base = self._git / "base-index"
        if base.exists():
            shutil.copyfile(base, new)
        else:
            new.unlink(missing_ok=True)
        for patch in series.patches:
            applied = self._try(
                "apply",
                "--cached",
                "--whitespace=nowarn",
                *(f"--include={pattern}" for pattern in self._only),
                index="new-index",
                data=patch.content,
            )
            if applied.returncode != 0:
                complaint = applied.stderr.decode(errors="replace")
                refuse_full_disk(complaint, self.place, what="applying patches")
                raise failure(
                    patch, complaint, base=self._base, kind=self._kind, made_for=series.made_for
                )
        tree = self._run("write-tree", index="new-index").strip()
        # --reset also repairs files that a killed predecessor had half written.
        self._run("read-tree", "--reset", "-u", tree, index="index")

    def _learn(self, touched: set[str]) -> None:
        """Tell git the unpacked content of the files that it does not know yet."""
        known = set(self._run("ls-files", "-z", index="base-index").split("\0"))
        pristine = set(self._manifest.read_text(errors="surrogateescape").splitlines())
        unknown = sorted((touched & pristine) - known)
        if not unknown:
            return
        listing = ("\0".join(unknown) + "\0").encode(errors="surrogateescape")
        # The base first: a path that only the tree's index had would count as removed.
        for index in ("base-index", "index"):
            self._run("update-index", "--add", "-z", "--stdin", index=index, data=listing)

    def _environment(self, index: str) -> dict[str, str]:
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
            "GIT_DIR": str(self._git),
            "GIT_WORK_TREE": str(self.src),
            "GIT_INDEX_FILE": str(self._git / index),
            # Nobody's own settings (line ends, attributes, hooks) may change the sources.
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
            "LC_ALL": "C",
        }

    def _run(self, *arguments: str, index: str = "index", data: bytes | None = None) -> str:
        environment = self._environment(index)
        cwd = self.src
        if arguments[0] == "init":  # it refuses a work tree, and the directory is not there yet
            del environment["GIT_WORK_TREE"], environment["GIT_DIR"]
            cwd = self.place
        return output_of(["git", *arguments], cwd=cwd, env=environment, data=data, timeout_s=120)

    def _try(self, *arguments: str, index: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                ["git", *arguments],
                cwd=self.src,
                env=self._environment(index),
                input=data,
                capture_output=True,
                timeout=120,
                check=False,
            )
        except FileNotFoundError as error:
            raise BuildError(
                "git is not installed", hint="`inv doctor` says what to install"
            ) from error
