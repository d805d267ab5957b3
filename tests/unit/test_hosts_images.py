# SPDX-License-Identifier: GPL-2.0-or-later
"""What images are made of: the initramfs archive, the keys, the guest's program."""

from __future__ import annotations

import base64
import io
import json
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from harness.build import images
from harness.build.cpio import CpioWriter
from harness.hosts.ssh import Keys
from harness.paths import GUEST_IMAGES
from harness.settings import Settings


def _entries(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Mode, content and device of each entry, read as the kernel's init/initramfs.c does."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, uid, gid, size, name_size = fields[1], fields[2], fields[3], fields[6], fields[11]
        assert (uid, gid) == (0, 0)
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        assert name not in found
        found[name] = mode, data[start : start + size], (fields[9], fields[10])
        at = (start + size + 3) & ~3


def test_archive_has_what_was_put_into_it(tmp_path: Path) -> None:
    """Content, permissions, links, devices; and each directory once, before its content."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    out = io.BytesIO()
    archive = CpioWriter(out)
    archive.copy("init", script)
    archive.device("dev/console", major=5, minor=1)
    archive.file("etc/deep/secret", b"12345", mode=0o600)
    archive.link("etc/deep/link", "secret")
    archive.directory("root", mode=0o700)
    archive.finish()
    entries = _entries(out.getvalue())
    assert list(entries) == [
        "init", "dev", "dev/console", "etc", "etc/deep", "etc/deep/secret", "etc/deep/link", "root",
    ]  # fmt: skip
    assert entries["init"] == (stat.S_IFREG | 0o755, b"#!/bin/sh\n", (0, 0))
    assert entries["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert entries["etc/deep/secret"][:2] == (stat.S_IFREG | 0o600, b"12345")
    assert entries["etc/deep/link"][:2] == (stat.S_IFLNK | 0o777, b"secret")
    assert entries["root"][0] == stat.S_IFDIR | 0o700


def test_keys_are_made_once_and_fit_together(tmp_path: Path) -> None:
    """The same directory every time; private halves for the owner only; both servers' forms."""
    settings = Settings(cache=tmp_path)
    directory = images.build_keys(settings)
    assert images.build_keys(settings) == directory
    keys = Keys(directory)
    assert keys.client.get_base64() == (directory / "client.pub").read_text().split()[1]
    for name in ("client", "host", "dropbear"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
    # dropbear's file begins with the public blob that SSH itself uses.
    blob = base64.b64decode(keys.host_public)
    private = (directory / "dropbear").read_bytes()
    assert private.startswith(blob)
    (length,) = struct.unpack(">I", private[len(blob) : len(blob) + 4])
    assert len(private) == len(blob) + 4 + length
    assert not private[len(blob) + 4] & 0x80  # a negative number otherwise


def test_every_package_is_named_once() -> None:
    """The list has names alone: comments and empty lines are for people."""
    names = images.packages()
    assert "openssh-server" in names
    assert len(names) == len(set(names))
    assert not [name for name in names if " " in name or name.startswith("#")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kvmi-guest as the guest has it; it does not care where it runs."""
    directory = tmp_path_factory.mktemp("guest")
    sources = (GUEST_IMAGES / "guest").glob("*.c")
    images._compile(sources, directory / "kvmi-guest", log=directory / "log")
    assert "warning" not in (directory / "log").read_text()
    return directory / "kvmi-guest"


def _run(program: Path, *arguments: str, text: str = "") -> list[dict[str, object]]:
    done = subprocess.run(
        [program, *arguments], input=text, capture_output=True, text=True, timeout=20, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_guest_program_counts_breakpoints(program: Path) -> None:
    """Without a tool each one comes back as a signal."""
    assert _run(program, "breakpoint", "250") == [{"asked": 250, "made": 250, "trapped": 250}]


def test_guest_program_makes_no_call_for_zero(program: Path) -> None:
    """The empty account has the same form."""
    (account,) = _run(program, "hypercall", "0")
    assert account == {"asked": 0, "made": 0, "returned": {}, "other": 0}


@pytest.mark.skipif(
    not Path("/proc/self/pagemap").exists(), reason="this kernel does not tell physical addresses"
)
def test_guest_program_shows_its_page(program: Path) -> None:
    """The page has a known pattern and can be filled; the address is a page's."""
    try:
        place, shown, filled, again = _run(program, "memory", text="show\nfill 165\nshow\n")
    except subprocess.CalledProcessError as error:
        # Only root learns frame numbers (Documentation/admin-guide/mm/pagemap.rst).
        pytest.skip(error.stderr)
    assert isinstance(place["gpa"], int)
    assert place["gpa"] % 4096 == 0
    pattern = bytes((i * 7 + i // 256) % 256 for i in range(4096))
    assert shown == {"hex": pattern.hex()}
    assert filled == {"filled": 165}
    assert again == {"hex": "a5" * 4096}


def test_guest_program_refuses_nonsense(program: Path) -> None:
    """A wrong call is told apart from a bad result by its status."""
    for wrong in ([], ["hypercall"], ["hypercall", "many"], ["dance"]):
        done = subprocess.run([program, *wrong], capture_output=True, timeout=20, check=False)
        assert done.returncode == 2
        assert done.stderr


@pytest.mark.skipif(
    shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin") is None, reason="no mke2fs"
)
def test_disk_has_the_files_and_belongs_to_root(tmp_path: Path) -> None:
    """The file system can be read back, and is large enough for what is in it."""
    content = tmp_path / "content"
    (content / "opt/deep").mkdir(parents=True)
    (content / "opt/deep/file").write_bytes(b"x" * 3_000_000)
    images._write_disk(content, tmp_path / "disk", log=tmp_path / "log")
    done = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "stat /opt/deep/file", str(tmp_path / "disk")],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert "Size: 3000000" in done.stdout
    assert "User:     0" in done.stdout
