# SPDX-License-Identifier: GPL-2.0-or-later
"""Target bochs without a host: its medium, its machine, what it needs.

The medium is read as a BIOS reads it. Where Bochs is installed, it is started for real, on
a medium with a kernel of a few instructions.
"""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.build import medium
from harness.build.packages import BOCHS_BUILD_PACKAGES, BOCHS_PACKAGES, PACKAGES, packages_for
from harness.errors import BuildError, LostHostError, UsageError
from harness.hosts import target_for
from harness.hosts.bochs import KERNEL_OPTIONS, BochsTarget
from harness.hosts.bochs_machine import (
    BochsMachine,
    BochsProgram,
    Place,
    _configuration,
    _Port,
    find_program,
)
from harness.settings import load_settings

SECTOR = 2048
BUILT = BochsProgram("/somewhere/bochs", "3.0", debugger=False, ticks_per_us=400)
DEBIAN = BochsProgram("bochs-bin", "2.7", debugger=True, ticks_per_us=200)


@pytest.fixture
def image() -> bytes:
    """A kernel as far as a boot loader looks at it: header, four setup sectors, the rest."""
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<Q", setup, 0x258, 16 << 20)  # pref_address
    struct.pack_into("<I", setup, 0x260, 8 << 20)  # init_size
    return bytes(setup) + b"KERNEL" * 1000


# -- the medium -----------------------------------------------------------------------


def test_loader_leaves_room_for_its_table(tmp_path: Path) -> None:
    """The loader's code ends before the table, and all of it is one sector of a disk."""
    code = medium._assemble(tmp_path, log=tmp_path / "log")
    assert len(code) == 512
    assert not any(code[medium._TABLE :])
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]


def test_medium_boots_as_el_torito_says(image: bytes) -> None:
    """Boot record, catalogue and loader are where a BIOS looks, and the catalogue adds up."""
    parts = medium._parts(image, b"INITRD", command_line="a=b", memory=256 << 20)
    made = medium._medium(b"\xeb\xfe".ljust(512, b"\0"), parts)
    record = made[17 * SECTOR :]
    assert record[:7] == b"\0CD001\1"
    assert record[7:39].rstrip(b"\0") == b"EL TORITO SPECIFICATION"
    catalogue = made[SECTOR * struct.unpack_from("<I", record, 0x47)[0] :]
    assert sum(struct.unpack("<16H", catalogue[:32])) & 0xFFFF == 0
    assert catalogue[30:32] == b"\x55\xaa"
    bootable, kind, _, _, _, sectors, start = struct.unpack_from("<BBHBBHI", catalogue, 32)
    assert (bootable, kind, sectors) == (0x88, 0, 1)
    assert made[start * SECTOR :].startswith(b"\xeb\xfe")
    assert len(made) % SECTOR == 0


def test_loader_finds_all_parts(image: bytes) -> None:
    """The table names every part: where it lies, how long it is, where it goes; then it ends."""
    parts = medium._parts(image, b"I" * 5000, command_line="a=b", memory=256 << 20)
    made = medium._medium(bytes(512), parts)
    table = made[19 * SECTOR + medium._TABLE :]
    for number, (address, data) in enumerate(parts):
        sector, count, to = struct.unpack_from("<3I", table, 12 * number)
        assert to == address
        assert made[sector * SECTOR : sector * SECTOR + len(data)] == data
        assert count * SECTOR - len(data) in range(SECTOR)
    assert struct.unpack_from("<3I", table, 12 * len(parts))[1] == 0


def test_kernel_is_told_what_it_asks_for(image: bytes) -> None:
    """The kernel's header says where initramfs and command line are, as boot.rst wants it."""
    (low_at, low), (kernel_at, kernel), (initrd_at, initrd) = medium._parts(
        image, b"I" * 5000, command_line="console=ttyS0", memory=256 << 20
    )
    assert (low_at, kernel_at) == (0x10000, 0x100000)
    assert kernel == image[5 * 512 :]
    assert struct.unpack_from("<II", low, 0x218) == (initrd_at, len(initrd))
    (line_at,) = struct.unpack_from("<I", low, 0x228)
    assert low[line_at - low_at :] == b"console=ttyS0\0"
    (heap_end,) = struct.unpack_from("<H", low, 0x224)
    assert len(image[: 5 * 512]) < heap_end + 0x200 <= line_at - low_at
    assert low[0x211] & 0x80
    assert initrd_at + len(initrd) <= 256 << 20
    assert initrd_at % 4096 == 0


@pytest.mark.parametrize(
    ("broken", "memory", "line"),
    [(True, 256, "a"), (False, 24, "a"), (False, 256, "a" * 3000)],
    ids=["no kernel", "too little memory", "too long a command line"],
)
def test_what_cannot_boot_is_refused(image: bytes, broken: bool, memory: int, line: str) -> None:
    """What would hang in the emulator is an error when the medium is made."""
    with pytest.raises(BuildError):
        medium._parts(image[1:] if broken else image, b"", command_line=line, memory=memory << 20)


# -- the machine ----------------------------------------------------------------------


def test_configuration_of_both_builds(tmp_path: Path) -> None:
    """Paths may have blanks and commas; only Debian's build needs a display that listens."""
    place = Place("w0", tmp_path / "a, b")
    for program in (BUILT, DEBIAN):
        text = _configuration(
            program,
            place,
            medium=Path("/x, y/medium"),
            processor="tigerlake",
            memory_mb=512,
            script=Path("/z, s"),
        )
        assert f'dev="{tmp_path}/a, b/console.log"' in text
        assert 'path="/x, y/medium"' in text
        assert f"ips={program.ticks_per_us}000000" in text
        assert ("rfb" in text) == program.debugger
        assert "memory: guest=512, host=512" in text


def test_port_is_kept_from_others_but_not_from_bochs() -> None:
    """A kept port can be bound and listened on by who reuses addresses, and by nobody else."""
    port = _Port()
    address = ("127.0.0.1", port.number)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)
    with socket.socket() as bochs:
        bochs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bochs.bind(address)
        bochs.listen()
        with socket.create_connection(address, timeout=5):
            pass
    port.close()
    with socket.socket() as later:
        later.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        later.bind(address)


def _ended(tmp_path: Path, last_words: str, status: int) -> BochsMachine:
    place = Place("w0", tmp_path)
    place.log.write_text(last_words)
    child = subprocess.Popen(["sh", "-c", f"exit {status}"])
    child.wait()
    return BochsMachine(child, place, _Port())


def test_end_by_triple_fault_is_a_crash(tmp_path: Path) -> None:
    """A third exception is the kernel's end; switching the machine off is not."""
    frame = "=====\nBochs is exiting with the following message:\n[{}] {}\n=====\n"
    words = frame.format("CPU0  ", "exception(): 3rd (13) exception with no resolution")
    machine = _ended(tmp_path, words, 1)
    assert machine.crashed()
    assert "3rd (13) exception" in (machine.ended() or "")
    machine.close()
    machine = _ended(tmp_path, frame.format("ACPI  ", "ACPI control: soft power off"), 1)
    assert not machine.crashed()
    assert "exit status 1, ACPI control: soft power off" in (machine.ended() or "")
    with pytest.raises(LostHostError, match="soft power off"):
        machine.check()
    machine.close()


def test_missing_bochs_is_named() -> None:
    """A Bochs that is not there is a usage error that leads to the doctor."""
    with pytest.raises(UsageError, match="not installed") as caught:
        find_program("no-such-bochs", debugger=False, ticks_per_us=1)
    assert "doctor" in caught.value.hint


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[BochsMachine]:
    """Debian's Bochs with a kernel that says where it is, and halts."""
    if shutil.which("bochs-bin") is None:
        pytest.skip("Bochs is not installed")
    code = medium._assemble(tmp_path, log=tmp_path / "as.log")
    setup = bytes(0x200) + bytes.fromhex("bafb03 b003 ee baf803 b04b ee f4ebfd")
    parts = [(0x10000, setup), (0x100000, bytes(100_000))]
    (tmp_path / "medium").write_bytes(medium._medium(code, parts))
    program = find_program("bochs-bin", debugger=True, ticks_per_us=200)
    made = BochsMachine.start(
        program,
        Place("unit", tmp_path),
        medium=tmp_path / "medium",
        processor="tigerlake",
        memory_mb=256,
    )
    yield made
    made.close()


@pytest.mark.timeout(120)
def test_real_bochs_runs_our_loader(machine: BochsMachine) -> None:
    """Bochs needs no display, the loader starts the kernel, the console is read, it ends."""
    deadline = time.monotonic() + 100
    while machine.place.console.read_bytes() != b"K":
        machine.check()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert machine.ended() is None
    assert not machine.crashed()
    machine.close()
    assert "signal 9" in (machine.ended() or "")
    machine.close()


# -- the target -----------------------------------------------------------------------


def test_target_by_its_name() -> None:
    """The setting chooses it; it boots, takes its time, and must be prepared first."""
    target = target_for(load_settings(target="bochs"))
    assert isinstance(target, BochsTarget)
    assert target.boots
    assert target.patience > 1
    with pytest.raises(UsageError, match="not prepared"):
        target.facts()


def test_restart_ends_the_machine() -> None:
    """A kernel that panics restarts at once, and by a triple fault, which ends Bochs."""
    assert {"panic=-1", "oops=panic", "reboot=t"} <= set(KERNEL_OPTIONS)


def test_packages_follow_the_settings() -> None:
    """Bochs is asked for where it is used, and a compiler where it is built."""
    assert packages_for(load_settings(target="tcg")) == PACKAGES
    assert packages_for(load_settings(target="bochs", bochs="debian")) == PACKAGES + BOCHS_PACKAGES
    built = packages_for(load_settings(target="bochs", bochs="built"))
    assert built == PACKAGES + BOCHS_BUILD_PACKAGES
    assert "bochs" not in [package.name for package in built]


def test_unknown_build_is_refused() -> None:
    """There are two builds of Bochs; another name is a usage error."""
    with pytest.raises(UsageError):
        load_settings(bochs="newest")


def test_more_memory_than_bochs_has_is_refused() -> None:
    """Before anything is built for it."""
    with pytest.raises(UsageError, match="at most 2048 MB"):
        target_for(load_settings(target="bochs", host_memory_mb=3072))
