# SPDX-License-Identifier: GPL-2.0-or-later
"""What a worker needs on a machine: our dependencies, this package with its tests, the inputs.

::

    site-<key>/        the distributions that we depend on, as they are installed here
    run/repository/    harness, tests, guest-images
    run/run/           the run's directory, for the worker: settings, builds, evidence
    run/cache/         payloads, assembled here
    run/python         Python with all of this, in a guard

The machine needs a Python of the same minor version, since some of the distributions are
compiled for it; no compiler, no pip, no network.
"""

from __future__ import annotations

import compileall
import dataclasses
import importlib.metadata
import io
import json
import py_compile
import shlex
import shutil
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from harness import paths
from harness.build import cache, progress
from harness.errors import UsageError
from harness.fleet import guard
from harness.fleet.switch import PLACE
from harness.manager.payloads import Payload
from harness.plugin.inputs import save_builds, save_settings
from harness.series.description import FILE_NAME as DESCRIPTION
from harness.series.description import shipped

if TYPE_CHECKING:
    from harness.build.builds import Builds
    from harness.settings import Settings

__all__ = ["PYTHON", "REPOSITORY", "RUN", "Runtime", "build_site", "closure", "python_here"]

_DISTRIBUTION = "kvmi-harness"
_PACKING = threading.Lock()
RUN = f"{PLACE}/run/run"
REPOSITORY = f"{PLACE}/run/repository"
PYTHON = f"{PLACE}/run/python"
_ROOMS = ("harness", "tests/conformance", "tests/lifecycle", "guest-images", "pyproject.toml")


def python_here() -> str:
    """The minor version of Python, as ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def closure(name: str = _DISTRIBUTION) -> list[Distribution]:
    """All distributions that one needs, without itself; sorted by name.

    :raises UsageError: one is not installed.
    """
    found: dict[str, Distribution] = {}

    def visit(name: str) -> None:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UsageError(
                f"the Python package {name} is not installed", hint="pip install kvmi-harness"
            ) from error
        key = distribution.name.lower()
        if key in found:
            return
        found[key] = distribution
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                visit(requirement.name)

    visit(name)
    return [found[key] for key in sorted(found) if key != name.lower()]


def _files(distribution: Distribution) -> Iterator[tuple[Path, Path]]:
    """The files of a distribution: where each is, and where it belongs."""
    if distribution.files is None:
        raise UsageError(
            f"the files of the Python package {distribution.name} are not known",
            hint="install kvmi-harness with pip, into an environment of its own",
        )
    for file in distribution.files:
        # Programs for the command line lie elsewhere, and nobody calls them there.
        if ".." in file.parts or "__pycache__" in file.parts or file.is_absolute():
            continue
        path = Path(str(file.locate()))
        if path.is_file():
            yield path, Path(*file.parts)


def build_site(settings: Settings) -> Path:
    """The directory of the cache with ``site.tar.gz``; its name is the archive's key.

    :raises UsageError: what we depend on is not installed in a way that can be packed.
    """
    distributions = closure()
    ourselves = importlib.metadata.distribution(_DISTRIBUTION)
    inputs: dict[str, cache.Input] = {
        "distributions": " ".join(f"{one.name}=={one.version}" for one in distributions),
        "python": python_here(),
        "plugin": ourselves.read_text("entry_points.txt") or "",
        "recipe": "1",
    }

    def make(into: Path) -> None:
        with progress.step("Pack what workers on other machines need"):
            site = into / "site"
            for distribution in distributions:
                for path, place in _files(distribution):
                    (site / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, site / place)
            # How pytest finds our plugin.
            info = site / f"{_DISTRIBUTION.replace('-', '_')}-{ourselves.version}.dist-info"
            info.mkdir()
            for name in ("METADATA", "entry_points.txt"):
                text = ourselves.read_text(name) or f"Name: {_DISTRIBUTION}\n"
                (info / name).write_text(text)
            _compile(site)
            with tarfile.open(into / "site.tar.gz", "w:gz", compresslevel=6) as archive:
                archive.add(site, ".", filter=_anonymous)
            shutil.rmtree(site)

    return cache.entry("fleet-site", inputs, make, root=settings.cache)


def _compile(directory: Path) -> None:
    """Compile beforehand: on an emulated processor that takes a minute at each start."""
    compileall.compile_dir(
        directory, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


@dataclasses.dataclass(frozen=True)
class Runtime:
    """All that is the same for all machines of a run."""

    settings: Settings
    builds: Builds
    site: Path

    @property
    def site_name(self) -> str:
        """The directory of the dependencies on a machine."""
        return f"site-{self.site.name}"

    def pack(self, *, vendor: str, python: str) -> bytes:
        """The directory ``run`` for a machine, as a tar file compressed with gzip.

        :param vendor: of its processor, as facts have it.
        :param python: the command of its Python.
        """
        # One at a time: a lock of the cache would be held by children that others start.
        with _PACKING, tempfile.TemporaryDirectory(prefix="kvmi-fleet-") as name:
            place = Path(name)
            repository = place / "repository"
            for room in _ROOMS:
                source = paths.ROOT / room
                (repository / room).parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
                    shutil.copytree(source, repository / room, ignore=ignore)
                else:
                    shutil.copy(source, repository / room)
            _compile(repository / "harness")
            for payload in sorted((paths.GUEST_IMAGES / "payloads").glob("*.S")):
                Payload.load(payload.stem, vendor=vendor, root=place / "cache")
            shutil.copytree(self.builds.images.keys, place / "keys")
            self._inputs(place / "run")
            shutil.copy(guard.__file__, place / "guard.py")
            start = place / "python"
            start.write_text(
                "#!/bin/sh\n"
                f"export PYTHONPATH={PLACE}/{self.site_name} PYTHONDONTWRITEBYTECODE=1\n"
                f'exec {shlex.quote(python)} {PLACE}/run/guard.py "$@"\n'
            )
            start.chmod(0o755)
            data = io.BytesIO()
            with tarfile.open(fileobj=data, mode="w:gz", compresslevel=6) as archive:
                archive.add(place, ".", filter=_anonymous)
            return data.getvalue()

    def _inputs(self, run_dir: Path) -> None:
        """Settings and builds, as they are on the machine."""
        run_dir.mkdir()
        there = Path(PLACE) / "run"
        described = self.settings.description
        if described and described not in shipped():
            shutil.copy(described, run_dir / DESCRIPTION)
            described = str(there / run_dir.name / DESCRIPTION)
        save_settings(
            run_dir,
            dataclasses.replace(
                self.settings,
                target="here",
                workers=1,
                cache=there / "cache",
                reports=there / "reports",
                # It has no source of it.
                kernel=there / "bzImage",
                kernel_base=None,
                qemu_base=None,
                known=None,
                description=described,
            ),
        )
        images = dataclasses.replace(self.builds.images, keys=there / "keys")
        save_builds(run_dir, dataclasses.replace(self.builds, images=images))


def version_of(text: str) -> str:
    """The minor version in what ``python3 -c`` printed as JSON: ``[3, 11]``."""
    major, minor = json.loads(text)
    return f"{major}.{minor}"
