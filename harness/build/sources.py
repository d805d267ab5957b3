# SPDX-License-Identifier: GPL-2.0-or-later
"""The sources that we build: Debian's ``linux-source-6.12``, QEMU 10.0, and Bochs 3.0.

What was fetched stays until :func:`fetch` is asked for something newer, so a new point
release in the archive rebuilds nothing behind anybody's back.

::

    <cache>/sources/linux-source-6.12/source.json, linux-source-6.12_….deb
    <cache>/sources/qemu/source.json, qemu_….dsc, qemu_….orig.tar.xz, …
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from harness.build import cache
from harness.build.archive import Apt, Archive, machine_archives, machine_codename, primary
from harness.build.progress import Step, step
from harness.build.run import bound_to_us, output_of, refuse_full_disk, run_logged
from harness.errors import BuildError, UsageError
from harness.series.remote import commit_of
from harness.settings import Settings

__all__ = [
    "Source",
    "bochs_source",
    "fetch",
    "linux_source",
    "named_source",
    "qemu_source",
    "unpack",
]

LINUX_PACKAGE = "linux-source-6.12"
QEMU_PACKAGE = "qemu"
QEMU_VERSION = "10.0"
BOCHS_PACKAGE = "bochs"
# The Debian release that has QEMU 10.0 and Bochs 3.0, and the kernel for a machine whose own
# lacks it.
RELEASE = "trixie"


@dataclass(frozen=True)
class Source:
    """A source in the cache."""

    name: str
    """The package's name."""
    version: str
    """Debian's version of it."""
    digest: str
    """SHA-256 over what was fetched."""
    main_file: Path
    """The .deb, .dsc, or tarball; the git tree if there is a commit."""
    commit: str = ""
    """The commit of that tree."""

    @property
    def upstream(self) -> str:
        """The version its authors gave it, such as ``6.12.57`` or ``10.0.2``."""
        without_epoch = self.version.rpartition(":")[2]
        return re.split(r"[-+~]", without_epoch, maxsplit=1)[0]


def linux_source(settings: Settings) -> Source:
    """The kernel's source: the one of the settings, or Debian's, fetched if the cache has none.

    :raises UsageError: the settings name something that is no source.
    """
    if settings.kernel_base:
        return named_source("linux", settings.kernel_base)
    return _kept(settings, LINUX_PACKAGE) or fetch(settings, LINUX_PACKAGE)


def qemu_source(settings: Settings) -> Source:
    """QEMU's source: the one of the settings, or Debian's, fetched if the cache has none.

    :raises UsageError: the settings name something that is no source.
    """
    if settings.qemu_base:
        return named_source("qemu", settings.qemu_base)
    return _kept(settings, QEMU_PACKAGE) or fetch(settings, QEMU_PACKAGE)


def bochs_source(settings: Settings) -> Source:
    """Bochs's source, fetched if the cache has none."""
    return _kept(settings, BOCHS_PACKAGE) or fetch(settings, BOCHS_PACKAGE)


def named_source(name: str, base: Path) -> Source:
    """The source that somebody has: a tarball, or ``TREE:REF`` of a git tree.

    :raises UsageError: it is neither.
    """
    if base.is_file():
        with base.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = re.search(r"-(\d+(?:\.\d+)+(?:-rc\d+)?)\.(?:orig\.)?tar", base.name)
        if ".tar" not in base.name:
            raise UsageError(f"the base {base} is no tarball", hint="such as linux-6.12.tar.xz")
        return Source(name, found[1] if found else base.name, digest, base)
    tree, _, reference = str(base).rpartition(":")
    place = Path(tree)
    if not tree or not place.is_dir():
        raise UsageError(
            f"there is no base {base}", hint="a base is a tarball, or TREE:REF of a git tree"
        )
    commit = commit_of(place, reference, what=f"the base {base}")
    version = output_of(["git", "describe", "--tags", "--always", commit], cwd=place)
    # A commit's id is a digest of the content.
    return Source(name, version.strip().removeprefix("v"), commit, place, commit)


def _kept(settings: Settings, package: str) -> Source | None:
    place = settings.cache / "sources" / package
    try:
        record = json.loads((place / "source.json").read_text())
        source = Source(package, record["version"], record["digest"], place / record["main_file"])
    except (OSError, ValueError, KeyError):
        return None
    return source if source.main_file.is_file() else None


def fetch(settings: Settings, package: str) -> Source:
    """Fetch the newest that the machine's archive has, replacing what the cache held.

    :raises BuildError: the archive cannot be reached, or does not have it.
    """
    place = settings.cache / "sources" / package
    partial = place.with_suffix(".partial")
    doing = f"fetching the source of {package}"
    with (
        cache.full_disk(settings.cache, doing),
        cache.lock(place.parent / "lock", what="the sources"),
        step(f"Fetch {package}") as progress,
    ):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        main_file, version = _fetch_into(partial, package, settings.cache, progress)
        digest = hashlib.sha256()
        for path in sorted(partial.iterdir()):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        source = Source(package, version, digest.hexdigest(), place / main_file.name)
        record = {"version": version, "digest": source.digest, "main_file": main_file.name}
        (partial / "source.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    return source


def _fetch_into(into: Path, package: str, root: Path, progress: Step) -> tuple[Path, str]:
    codename = machine_codename()
    archives = machine_archives(codename)
    base = primary(archives, codename)
    release = Archive(base.uri, RELEASE, ("main",), base.options)
    log = root / "logs" / f"fetch-{package}.log"
    log.unlink(missing_ok=True)
    if package == QEMU_PACKAGE:
        with Apt(root / "apt", [release.stanza("deb-src")], log=log) as apt:
            apt.update(progress)
            main_file = apt.source(package, into, progress)
        found = re.search(r"^Version: (\S+)", main_file.read_text(errors="replace"), re.MULTILINE)
        version = found[1] if found else "?"
        if f":{QEMU_VERSION}." not in f":{version.rpartition(':')[2]}":
            raise BuildError(
                f"the archive's {RELEASE} has QEMU {version}, not {QEMU_VERSION}",
                hint="the series is for that version; point qemu_series to one for yours",
            )
        return main_file, version
    if package == BOCHS_PACKAGE:
        # Nothing of Debian's changes is of use here: they are about its documentation.
        with Apt(root / "apt", [release.stanza("deb-src")], log=log) as apt:
            apt.update(progress)
            main_file = apt.tarball(package, into, progress)
        return main_file, main_file.name.partition("_")[2].partition(".orig.")[0]
    # The machine's own release first: it is what its user would build from.
    for offered in (archives, [release]):
        with Apt(root / "apt", [one.stanza() for one in offered], log=log) as apt:
            apt.update(progress)
            if versions := apt.versions(package):
                version = versions[0][0]
                return apt.download(package, version, into, progress), version
    raise BuildError(
        f"no suite of {base.uri} that fits this machine has {package}",
        hint=f"looked in {', '.join(one.suite for one in [*archives, release])}",
    )


def unpack(
    source: Source, into: Path, *, only: Sequence[str] = (), log: Path, progress: Step
) -> None:
    """Unpack ``source`` so that ``into``, which does not exist yet, is its top directory.

    :param only: patterns of the paths that are wanted of a kernel's source, all by default;
        each has to find something that no other finds.
    :raises BuildError: what was fetched is damaged.
    """
    if source.main_file.suffix == ".dsc":
        # dpkg-source applies Debian's patches; without them the build looks for files
        # that Debian removed from the tarball.
        run_logged(
            ["dpkg-source", "--no-check", "-x", str(source.main_file), str(into)],
            cwd=into.parent,
            log=log,
            timeout_s=900,
            what="unpacking QEMU's source",
        )
        return
    progress.update(doing=source.main_file.name)
    into.mkdir()
    _unpack_kernel(source, into, only=only, log=log)
    if only:
        _keep_only(only, into)


def _keep_only(only: Sequence[str], into: Path) -> None:
    """Remove what tar unpacked because it takes a pattern for the end of a path, too."""
    for path in (Path(top, name) for top, _, names in os.walk(into) for name in names):
        if not any(fnmatchcase(str(path.relative_to(into)), one) for one in only):
            path.unlink()


def _unpack_kernel(source: Source, into: Path, *, only: Sequence[str], log: Path) -> None:
    wanted = ["--wildcards", "--no-anchored", *only] if only else []
    if source.commit:
        archive = ["git", "-C", str(source.main_file), "archive", "--format=tar", source.commit]
        extract = ["tar", "-x", "-C", str(into), *wanted]
        _pipeline([archive, extract], log=log, what=f"unpacking {source.name}")
        return
    if ".tar" in source.main_file.name:
        run_logged(
            ["tar", "-xf", str(source.main_file), "--strip-components=1", "-C", str(into), *wanted],
            cwd=into,
            log=log,
            timeout_s=900,
            what=f"unpacking the source of {source.name}",
        )
        return
    inner = f"./usr/src/{source.name}.tar.xz"
    # A tarball in a package: piped through, so that the disk sees the files alone.
    stages = [
        ["dpkg-deb", "--fsys-tarfile", str(source.main_file)],
        ["tar", "-xO", inner],
        ["xz", "-dcT0"],
        ["tar", "-x", "--strip-components=1", "-C", str(into), *wanted],
    ]
    _pipeline(stages, log=log, what=f"unpacking {source.name}")


def _pipeline(stages: list[list[str]], *, log: Path, what: str) -> None:
    """Run the programs of ``stages``, each reading what the one before writes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []
    with log.open("wb") as complaints:
        try:
            for number, argv in enumerate(stages):
                last = number == len(stages) - 1
                process = subprocess.Popen(
                    bound_to_us(argv),
                    stdin=running[-1].stdout if running else subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if last else subprocess.PIPE,
                    stderr=complaints,
                )
                if running and (pipe := running[-1].stdout) is not None:
                    pipe.close()  # ours; the writer must see it when its reader dies
                running.append(process)
            statuses = [process.wait(900) for process in running]
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    if any(statuses):
        said = log.read_text(errors="replace").strip()
        refuse_full_disk(said, log.parent, what=what)
        raise BuildError(f"{what} failed", hint=f"log: {log}", details=said)
