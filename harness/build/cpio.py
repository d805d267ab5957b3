# SPDX-License-Identifier: GPL-2.0-or-later
"""Write an initramfs: a cpio archive in the "newc" format.

Written here rather than by cpio(1) because the archive has what an ordinary user cannot
make in a directory: files of root and device nodes. The format is the one of
Documentation/driver-api/early-userspace/buffer-format.rst in the kernel.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["CpioWriter"]


class CpioWriter:
    """Adds entries, all of them owned by root, to an archive; :meth:`finish` ends it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._known: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        parent = name.rpartition("/")[0]
        if parent and parent not in self._known:
            self.directory(parent)
        self._known.add(name)
        self._inode += 1
        encoded = name.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor,
        # rdevminor, namesize, check; each eight hexadecimal digits.
        fields = (
            self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0,
        )  # fmt: skip
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        # Name and data are each padded so that what follows begins at a multiple of four.
        for piece in (header + encoded, data):
            self._out.write(piece + b"\0" * (-len(piece) % 4))

    def directory(self, name: str, *, mode: int = 0o755) -> None:
        """A directory. Those above an entry are made with it, so this is for empty ones."""
        self._entry(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        """A regular file."""
        self._entry(name, stat.S_IFREG | mode, data)

    def copy(self, name: str, source: Path) -> None:
        """A regular file with the content and the permissions of ``source``."""
        self.file(name, source.read_bytes(), mode=stat.S_IMODE(source.stat().st_mode))

    def link(self, name: str, to: str) -> None:
        """A symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(to))

    def device(self, name: str, *, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._entry(name, stat.S_IFCHR | mode, b"", (major, minor))

    def finish(self) -> None:
        """Write the entry that ends the archive."""
        self._entry("TRAILER!!!", 0, b"")
