# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of a run that travel with a report, from a worker on another machine.

Sent with the report of the test that left them, they are here before its verdict is written:
nothing has to be fetched from a machine that may be gone by then. A file that grows from test
to test, such as a console, is sent by what was added.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from harness.errors import InfraError

__all__ = ["Parcels", "unpack"]

LARGEST = 32 << 20
"""What is sent of one file at one time, in bytes; the rest stays where it is."""


class Parcels:
    """What a worker sent so far."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._sent: dict[str, int] = {}

    def pack(self, paths: Iterable[str]) -> dict[str, tuple[int, bytes]]:
        """What is new of these files: by path, where it begins, and the compressed bytes.

        :param paths: relative to the run's directory. One that cannot be read is left out.
        """
        found = {}
        for path in dict.fromkeys(paths):
            start = self._sent.get(path, 0)
            try:
                with (self._run_dir / path).open("rb") as file:
                    if file.seek(0, 2) < start:
                        start = 0  # made anew
                    file.seek(start)
                    data = file.read(LARGEST)
            except OSError:
                continue
            if data or not start:
                found[path] = (start, zlib.compress(data, 1))
                self._sent[path] = start + len(data)
        return found


def unpack(run_dir: Path, parcels: dict[str, tuple[int, bytes]]) -> None:
    """Put files where they belong.

    :raises OSError: they cannot be written.
    :raises InfraError: a path leads out of the run's directory.
    """
    for path, (start, data) in parcels.items():
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:
            raise InfraError(f"a worker sent a file for {path}, outside of the run")
        place = run_dir / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("r+b" if start and place.exists() else "wb") as file:
            file.seek(start)
            file.truncate()
            file.write(zlib.decompress(data))
