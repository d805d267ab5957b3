# SPDX-License-Identifier: GPL-2.0-or-later
"""The payloads assemble, and the machine around them is what the CPU wants."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import pytest

from harness.errors import BuildError
from harness.manager import payloads
from harness.manager.payloads import ALIAS, CODE, MAILBOX_WORDS, REGS, SREGS, Machine, Payload
from harness.paths import GUEST_IMAGES

NAMES = sorted(path.stem for path in (GUEST_IMAGES / "payloads").glob("*.S"))


@pytest.mark.parametrize("name", NAMES)
def test_payload_assembles_for_both_vendors(name: str, tmp_path: Path) -> None:
    """Each source assembles, and only a hypercall differs between the vendors."""
    amd = Payload.load(name, vendor="AMD", root=tmp_path)
    intel = Payload.load(name, vendor="Intel", root=tmp_path)
    assert amd.symbols == intel.symbols
    assert amd.symbols["_start"] == 0
    different = {at for at, pair in enumerate(zip(amd.code, intel.code, strict=True))
                 if pair[0] != pair[1]}  # fmt: skip
    if "call_site" in amd.symbols:
        site = amd.symbols["call_site"]
        assert different == {site + 2}
        assert amd.code[site : site + 3] == b"\x0f\x01\xd9"
        assert intel.code[site : site + 3] == b"\x0f\x01\xc1"
    else:
        assert different == set()


def test_layout_is_the_same_in_both_languages() -> None:
    """layout.inc and payloads.py name the same addresses."""
    text = (GUEST_IMAGES / "payloads" / "layout.inc").read_text()
    found = {
        name.lower(): int(value, 0)
        for name, value in re.findall(r"^\s*\.set\s+(\w+), (\w+)", text, re.MULTILINE)
    }
    assert found.pop("mailbox") == payloads.mailbox(0)
    assert found.pop("dump_a") == payloads.DUMP_A
    assert found.pop("dump_b") == payloads.DUMP_B
    assert found == MAILBOX_WORDS


def test_unknown_payload(tmp_path: Path) -> None:
    """A payload that is not there is a build error that names the file."""
    with pytest.raises((BuildError, FileNotFoundError)):
        Payload.load("nothing", vendor="AMD", root=tmp_path)


def test_memory_chunks_do_not_overlap(tmp_path: Path) -> None:
    """Tables, code and mailboxes of a guest with all vCPUs have places of their own."""
    machine = Machine(payload=Payload.load("calls", vendor="AMD", root=tmp_path), vcpus=4)
    ends = sorted((start, start + len(data)) for start, data in machine.memory())
    for (_, end), (start, _) in itertools.pairwise(ends):
        # The GDT's page holds the task segments too, which have their own chunks.
        assert end <= start
    assert ends[-1][1] <= payloads.FREE


def test_state_of_a_user_mode_vcpu(tmp_path: Path) -> None:
    """Privilege level, entry point, mailbox and own task segment of the second vCPU in ring 3."""
    machine = Machine(
        payload=Payload.load("calls", vendor="AMD", root=tmp_path), vcpus=2, cpl=3, alias=True
    )
    state = machine.state(1)
    regs = dict(zip(REGS, struct.unpack("<18Q", bytes.fromhex(state["regs"])), strict=True))
    assert regs["rip"] == CODE + ALIAS
    assert regs["r15"] == payloads.mailbox(1)
    patches = {offset: bytes.fromhex(text) for offset, text in state["sregs"]}
    for name in ("cs", "ss"):
        selector, dpl = (
            struct.unpack_from("<H", patches[SREGS[name]], 12)[0],
            patches[SREGS[name]][16],
        )
        assert (selector & 3, dpl) == (3, 3)
    assert struct.unpack_from("<H", patches[SREGS["tr"]], 12)[0] == 0x48 + 16


def test_descriptor_of_64_bit_code() -> None:
    """The first entry after the null descriptor is the well-known one of 64-bit ring 0 code."""
    found = payloads._descriptor(access=0x9B, flags=0xA)
    assert int.from_bytes(found, "little") == 0x00AF9B000000FFFF
