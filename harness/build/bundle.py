# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine that is not ours lacks: QEMU with its libraries, and what guests boot.

::

    qemu/bin/qemu-system-x86_64    runs ``program`` with the libraries beside it
    qemu/bin/program, qemu/lib/, qemu/share/
    guest/bzImage, guest/initrd

All of it is taken from the host image, so it is what the other targets run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build import cache, progress
from harness.build.images import LIBRARIES, LOADER, libraries_of
from harness.build.run import run_logged

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.settings import Settings

__all__ = ["build_bundle"]

_TIMEOUT_S = 300
_RECIPE = "1"
# The machine's own libraries may be older than those that QEMU was linked with.
_START = f"""\
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
exec "$here/../lib/{LOADER}" --library-path "$here/../lib" "$here/program" "$@"
"""


def build_bundle(settings: Settings, images: Images) -> Path:
    """The tar file, compressed with gzip.

    :raises BuildError: the host image cannot be read.
    """
    log = settings.cache / "logs" / "bundle.log"

    def make(into: Path) -> None:
        with progress.step("Pack QEMU and the guest for another machine"):
            system, files = into / "system", into / "files"
            (system / LIBRARIES).parent.mkdir(parents=True)
            (files / "guest").mkdir(parents=True)
            # debugfs reads the image without mounting it. It complains of owners that only
            # root can give to a file, which nobody needs here.
            commands = (
                f"rdump /opt/qemu {files}\nrdump /{LIBRARIES} {(system / LIBRARIES).parent}\n"
            )
            (into / "commands").write_text(commands)
            run_logged(
                ["/sbin/debugfs", "-f", str(into / "commands"), str(images.host_disk)],
                cwd=into,
                log=log,
                timeout_s=_TIMEOUT_S,
                what="reading the host image",
            )
            start = files / "qemu/bin/qemu-system-x86_64"
            program = start.rename(start.with_name("program"))
            start.write_text(_START)
            start.chmod(0o755)
            lib = files / "qemu/lib"
            lib.mkdir()
            for path in [system / LIBRARIES / LOADER, *libraries_of(system, program)]:
                shutil.copy(path, lib / path.name)
            shutil.copyfile(images.guest_kernel, files / "guest/bzImage")
            shutil.copyfile(images.guest_initrd, files / "guest/initrd")
            run_logged(
                ["tar", "-czf", str(into / "bundle.tar.gz"), "--owner=0", "--group=0", "-C",
                 str(files), "."],
                cwd=into,
                log=log,
                timeout_s=_TIMEOUT_S,
            )  # fmt: skip
            shutil.rmtree(system)
            shutil.rmtree(files)

    inputs: dict[str, cache.Input] = {"images": images.key, "recipe": _RECIPE, "start": _START}
    return cache.entry("bundle", inputs, make, root=settings.cache) / "bundle.tar.gz"
