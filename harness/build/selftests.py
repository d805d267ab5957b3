# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own KVM selftests, built from the unpatched source of the kernel.

They are linked statically, so they run in any host, on a kernel with a series and on one
without.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.build import cache
from harness.build.kernel import build_environment, compiler, source_tree
from harness.build.progress import step
from harness.build.run import run_logged
from harness.build.series import Series
from harness.build.sources import linux_source, unpack
from harness.errors import BuildError
from harness.settings import Settings

__all__ = ["Selftests", "build_selftests"]

_PLACE = "tools/testing/selftests/kvm"
_FLAGS = "-static"
_TIMEOUT_S = 1800
_SPACE_MB = 600
_SPACE_UNPACKING_MB = 3000
# Lines that make prints, to show how far it is.
_LINES = 200


@dataclass(frozen=True)
class Selftests:
    """The programs in the cache."""

    directory: Path
    source: str
    """Name and version of the kernel source that they are from."""

    def names(self) -> list[str]:
        """The tests as the kernel calls them, such as ``x86_64/state_test``."""
        files = (path for path in self.directory.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.directory)) for path in files)


def build_selftests(settings: Settings) -> Selftests:
    """The selftests of the kernel's source, built if the cache does not have them.

    The series does not count: its kernel is held to the tests of the kernel without it.

    :raises BuildError: fetching, unpacking or compiling failed.
    """
    source = linux_source(settings)
    title = f"{source.name} {source.version}"
    tree = source_tree(settings, source)
    log = settings.cache / "logs" / "selftests.log"
    inputs: dict[str, cache.Input] = {
        "source": f"{title} {source.digest}",
        "recipe": f"{_PLACE} {_FLAGS}",
        "compiler": compiler(),
    }

    def make(into: Path) -> None:
        cache.require_space(settings.cache, megabytes=_SPACE_MB, purpose="building the selftests")
        with (
            step("Build the kernel's selftests", total=_LINES) as progress,
            tempfile.TemporaryDirectory(dir=into) as scratch,
            tree.locked() as lock,
        ):
            log.unlink(missing_ok=True)

            def unpack_source(src: Path) -> None:
                cache.require_space(
                    settings.cache, megabytes=_SPACE_UNPACKING_MB, purpose="the kernel's source"
                )
                unpack(source, src, log=log, progress=progress)

            tree.prepare(unpack_source)
            tree.switch(Series(Path("none"), ()))

            def run(where: Path, *arguments: str) -> None:
                run_logged(
                    ["make", f"-j{settings.jobs}", *arguments],
                    cwd=where,
                    log=log,
                    timeout_s=_TIMEOUT_S,
                    env=build_environment(),
                    what="building the selftests",
                    on_line=lambda _line: progress.advance(),
                    hold=[lock],
                )

            headers, objects = Path(scratch, "headers"), Path(scratch, "objects")
            headers.mkdir()
            objects.mkdir()
            run(tree.src, f"O={headers}", "headers")
            run(
                tree.src / _PLACE,
                "ARCH=x86",
                f"OUTPUT={objects}",
                f"KHDR_INCLUDES=-isystem {headers / 'usr/include'}",
                f"EXTRA_CFLAGS={_FLAGS}",
            )
            _collect(objects, into / "tests", log=log)

    made = cache.entry("selftests", inputs, make, root=settings.cache)
    return Selftests(made / "tests", title)


def _collect(objects: Path, into: Path, *, log: Path) -> None:
    """Strip the programs into their directory; what else make left is not wanted."""
    programs = [
        path
        for path in objects.rglob("*")
        if path.is_file() and os.access(path, os.X_OK) and path.suffix == ""
    ]
    if not programs:
        raise BuildError("building the selftests made no program", hint=f"log: {log}")
    for path in programs:
        target = into / path.relative_to(objects)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        run_logged(["strip", str(target)], cwd=into, log=log, timeout_s=60)
