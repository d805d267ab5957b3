# SPDX-License-Identifier: GPL-2.0-or-later
"""The medium that Bochs boots a host from: a loader, a kernel, and the host's whole system.

Bochs emulates a whole PC and starts no kernel by itself, and every instruction counts: so
the system is an initramfs of what the tests of the kernel need and no more (Python with its
library already compiled, a small SSH server, busybox; no QEMU), not packed, and the loader
is a sector of our own (``guest-images/bochs/loader.S``) that reads all of it in half a
second, where a general boot loader takes four.

The medium is a bootable CD: the El Torito specification, version 1.0, says where its boot
record and boot catalogue are. There is no file system on it.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build import cache, progress
from harness.build.cpio import CpioWriter
from harness.build.images import (
    LIBRARIES,
    LOADER,
    build_base,
    libraries_of,
    unpack_base,
    write_busybox,
)
from harness.build.run import run_logged
from harness.errors import BuildError
from harness.paths import GUEST_IMAGES

if TYPE_CHECKING:
    from harness.build.kernel import KernelBuild
    from harness.settings import Settings

__all__ = ["build_medium"]

_SOURCES = GUEST_IMAGES / "bochs"
# Counted up, each for itself, when the code below makes something else of the same inputs.
_RECIPES = {"bochs-system": "2", "bochs-medium": "1"}
_TIMEOUT_S = 300

_SECTOR = 2048
_DISK_SECTOR = 512
_BOOT_RECORD, _CATALOGUE, _LOADER_SECTOR, _FIRST_SECTOR = 17, 18, 19, 20

# The loader's table: sector, count and address of each part; an empty one ends it.
_TABLE, _ENTRY = 0x1C0, struct.Struct("<3I")

# Where the kernel's parts go, by Documentation/arch/x86/boot.rst; the first two as in
# loader.S. Between setup code and command line the setup code has its heap and its stack.
_SETUP_AT, _COMMAND_LINE_AT, _KERNEL_AT = 0x10000, 0x1E000, 0x100000
_HEAP_END = _COMMAND_LINE_AT - _SETUP_AT - 0x200
_COMMAND_LINE_SIZE = 2048
_BELOW_TOP = 4 << 20
"""How far below the end of memory the initramfs ends; firmware has its tables there."""

# Parts of Python's library that no program in a host imports.
_USELESS = frozenset({
    "asyncio", "concurrent", "curses", "dbm", "distutils", "email", "ensurepip", "html", "http",
    "idlelib", "lib2to3", "logging", "multiprocessing", "pydoc_data", "sqlite3", "test",
    "tkinter", "turtledemo", "unittest", "venv", "wsgiref", "xml", "xmlrpc", "_pyrepl",
})  # fmt: skip
_MODULES = ("_ctypes", "_json", "mmap")
"""Compiled modules that are not part of Python's program."""


def build_medium(
    settings: Settings, *, kernel: KernelBuild, keys: Path, options: Sequence[str]
) -> Path:
    """A medium for this kernel with this command line; made if the cache does not have it.

    :param keys: as made by :func:`harness.build.images.build_keys`.
    :raises BuildError: a tool or the disk failed, or the kernel cannot be booted like this.
    """
    root = settings.cache
    system = _build_system(settings, keys=keys)
    inputs: dict[str, cache.Input] = {
        "kernel": kernel.key,
        "system": system.name,
        "loader": _SOURCES / "loader.S",
        "options": " ".join(options),
        "memory": str(settings.host_memory_mb),
        "recipe": _RECIPES["bochs-medium"],
    }

    def make(into: Path) -> None:
        loader = _assemble(into, log=root / "logs" / "bochs-medium.log")
        parts = _parts(
            kernel.bzimage.read_bytes(),
            (system / "initrd").read_bytes(),
            command_line=" ".join(options),
            memory=settings.host_memory_mb << 20,
        )
        (into / "medium").write_bytes(_medium(loader, parts))

    return cache.entry("bochs-medium", inputs, make, root=root) / "medium"


# -- the system -----------------------------------------------------------------------


def _build_system(settings: Settings, *, keys: Path) -> Path:
    base = build_base(settings)
    inputs: dict[str, cache.Input] = {
        "base": base.name,
        "keys": keys.name + (keys / "host.pub").read_text() + (keys / "client.pub").read_text(),
        "init": _SOURCES / "init",
        "recipe": _RECIPES["bochs-system"],
    }

    def make(into: Path) -> None:
        with (
            progress.step("Write the system of a host in Bochs"),
            tempfile.TemporaryDirectory(dir=into) as scratch,
        ):
            log = settings.cache / "logs" / "bochs-system.log"
            system = Path(scratch) / "system"
            unpack_base(base, system, log=log)
            _compile_library(system, log=log)
            with (into / "initrd").open("wb") as out:
                _write_system(CpioWriter(out), system=system, keys=keys)

    return cache.entry("bochs-system", inputs, make, root=settings.cache)


def _library(system: Path) -> Path:
    """Python's library in the system; its version is the release's choice."""
    return next((system / "usr/lib").glob("python3.*"))


def _compile_library(system: Path, *, log: Path) -> None:
    """Compile all of Python's library, by the Python that will read it."""
    library = _library(system)
    libraries = system / LIBRARIES
    run_logged(
        [
            str(libraries / LOADER), "--library-path", str(libraries),
            str(system / "usr/bin" / library.name),
            "-m", "compileall", "-q", "-f", "-s", str(system),
            # Without a source beside it, nothing is compared with its time.
            "--invalidation-mode", "unchecked-hash", str(library),
        ],
        cwd=system,
        log=log,
        timeout_s=_TIMEOUT_S,
        env={"PYTHONHOME": str(system / "usr"), "LC_ALL": "C.UTF-8"},
        what="compiling Python's library",
    )  # fmt: skip


def _write_system(archive: CpioWriter, *, system: Path, keys: Path) -> None:
    archive.file("init", (_SOURCES / "init").read_bytes(), mode=0o755)
    write_busybox(archive, system)
    library = _library(system)
    python = system / "usr/bin" / library.name
    archive.copy("usr/bin/python3", python)
    archive.link("bin/python3", "/usr/bin/python3")
    archive.copy("bin/dropbear", system / "usr/sbin/dropbear")
    modules = [path for name in _MODULES for path in library.glob(f"lib-dynload/{name}.*.so")]
    programs = [python, system / "usr/sbin/dropbear", *modules]
    libraries = {one.name: one for program in programs for one in libraries_of(system, program)}
    archive.copy(f"lib64/{LOADER}", system / LIBRARIES / LOADER)
    for name, path in sorted(libraries.items()):
        archive.copy(f"lib/{name}", path)
    _write_library(archive, library, modules)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/shells", b"/bin/sh\n")
    archive.file("etc/dropbear/host", (keys / "dropbear").read_bytes(), mode=0o600)
    # dropbear looks at the owner and the mode of all directories on the way.
    archive.directory("root", mode=0o700)
    archive.directory("root/.ssh", mode=0o700)
    archive.file("root/.ssh/authorized_keys", (keys / "client.pub").read_bytes(), mode=0o600)
    archive.finish()


def _write_library(archive: CpioWriter, library: Path, modules: Sequence[Path]) -> None:
    """Python's library as bytecode alone, where Python looks for modules without a source."""
    place = f"usr/lib/{library.name}"
    for path in sorted(library.rglob("__pycache__/*.pyc")):
        inside = path.parent.parent.relative_to(library)
        module, _, level = path.stem.partition(".cpython-")
        if (inside.parts[:1] and inside.parts[0] in _USELESS) or ".opt-" in level:
            continue
        archive.copy(str(Path(place, inside, f"{module}.pyc")), path)
    for path in modules:
        archive.copy(f"{place}/lib-dynload/{path.name}", path)


# -- the medium -----------------------------------------------------------------------


def _assemble(into: Path, *, log: Path) -> bytes:
    """The loader's sector, its table still empty."""
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        for argv in (
            ["as", "--32", "-o", "object", str(_SOURCES / "loader.S")],
            ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "-o", "linked", "object"],
            ["objcopy", "-O", "binary", "-j", ".text", "linked", "code"],
        ):
            run_logged(
                argv, cwd=Path(scratch), log=log, timeout_s=_TIMEOUT_S, what="making the loader"
            )
        return Path(scratch, "code").read_bytes()


def _parts(
    image: bytes, initrd: bytes, *, command_line: str, memory: int
) -> list[tuple[int, bytes]]:
    """What the loader puts where: the kernel in two parts, made ready, and the initramfs.

    :param image: a bzImage.
    :param memory: of the machine, in bytes.
    :raises BuildError: the kernel cannot be booted like this.
    """
    if image[0x202:0x206] != b"HdrS":
        raise BuildError("the kernel is no bzImage", hint="build it with `inv build.kernel`")
    end = (image[0x1F1] + 1) * _DISK_SECTOR
    setup, kernel = bytearray(image[:end]), image[end:]
    initrd_at = (memory - _BELOW_TOP - len(initrd)) & ~0xFFF
    (init_size,) = struct.unpack_from("<I", image, 0x260)
    (preferred,) = struct.unpack_from("<Q", image, 0x258)
    if preferred + init_size > initrd_at:
        raise BuildError(
            f"kernel and system do not fit into {memory >> 20} MB",
            hint="set host_memory_mb to more",
        )
    encoded = command_line.encode() + b"\0"
    if len(encoded) > _COMMAND_LINE_SIZE or end > _HEAP_END:
        raise BuildError(f"the kernel's command line is too long: {len(encoded)} bytes")
    # From here on fields of the header, by their offsets in boot.rst.
    struct.pack_into("<H", setup, 0x1FA, 0xFFFF)  # vid_mode: as it is
    setup[0x210] = 0xFF  # type_of_loader: none that has a number
    setup[0x211] |= 0x80  # loadflags: heap_end_ptr is valid
    struct.pack_into("<II", setup, 0x218, initrd_at, len(initrd))
    struct.pack_into("<H", setup, 0x224, _HEAP_END)
    struct.pack_into("<I", setup, 0x228, _COMMAND_LINE_AT)
    low = bytes(setup).ljust(_COMMAND_LINE_AT - _SETUP_AT, b"\0") + encoded
    return [(_SETUP_AT, low), (_KERNEL_AT, kernel), (initrd_at, initrd)]


def _medium(loader: bytes, parts: Sequence[tuple[int, bytes]]) -> bytes:
    """The whole medium, for a BIOS to boot from."""
    table = b""
    sector = _FIRST_SECTOR
    for address, data in parts:
        count = -(-len(data) // _SECTOR)
        table += _ENTRY.pack(sector, count, address)
        sector += count
    table += _ENTRY.pack(0, 0, 0)
    boot = loader[:_TABLE] + table
    assert len(boot) <= _DISK_SECTOR
    volume = b"\1CD001\1"
    record = b"\0CD001\1" + b"EL TORITO SPECIFICATION".ljust(64, b"\0")
    record += struct.pack("<I", _CATALOGUE)
    pieces = {16: volume, _BOOT_RECORD: record, _CATALOGUE: _catalogue(), _LOADER_SECTOR: boot}
    head = b"".join(pieces.get(number, b"").ljust(_SECTOR, b"\0") for number in range(20))
    return head + b"".join(data + b"\0" * (-len(data) % _SECTOR) for _, data in parts)


def _catalogue() -> bytes:
    """The boot catalogue: a validation entry, and the one thing to boot."""
    validation = bytearray(struct.pack("<BBH24sHBB", 1, 0, 0, b"", 0, 0x55, 0xAA))
    checksum = -sum(struct.unpack("<16H", validation)) & 0xFFFF
    struct.pack_into("<H", validation, 28, checksum)
    # Bootable, no emulation, one sector to the place where boot sectors go.
    return bytes(validation) + struct.pack("<BBHBBHI20x", 0x88, 0, 0, 0, 0, 1, _LOADER_SECTOR)
