# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_TRANSLATE_GVA."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pytest
from checks import next_event_of, requires
from lab import Lab

from harness.manager.payloads import ALIAS, FREE, PAGE_DIRECTORY, PDPT, PML4
from harness.manager.smallvm import SmallVm
from harness.tool import Session

NOWHERE = 0xFFFF_FFFF_FFFF_FFFF
DIRECTORY, TABLE, OTHER_PDPT, OTHER_ROOT = FREE, FREE + 0x1000, FREE + 0x2000, FREE + 0x3000
PAGE = FREE + 0x8000
GB, MB2 = 1 << 30, 1 << 21
BASE = 2 * GB
PRESENT, WRITABLE, USER, LARGE = 1, 2, 4, 0x80

# Of the table at BASE: number of the page, its entry, and where it is (None: nowhere).
PAGES = (
    (0, PAGE | PRESENT | WRITABLE | USER, PAGE),
    (1, PAGE + 0x1000 | PRESENT, PAGE + 0x1000),  # for the kernel only, to be read only
    (2, PAGE | WRITABLE | USER, None),
    (3, 0x12_3456_7000 | PRESENT | WRITABLE, 0x12_3456_7000),  # no memory there
    (4, 1 << 51 | PAGE | PRESENT | WRITABLE, None),  # more than the CPU has address bits
    (5, PAGE + 0x1000 | PRESENT | USER, PAGE + 0x1000),
    (511, PAGE | PRESENT | WRITABLE, PAGE),
)


def _vm(lab: Lab, **wanted: Any) -> tuple[SmallVm, Session]:
    """A guest with small pages at BASE, large ones behind, and none of it in OTHER_ROOT."""
    words = {
        PDPT + 2 * 8: DIRECTORY | 7,
        DIRECTORY: TABLE | 7,
        DIRECTORY + 8: 4 * MB2 | LARGE | PRESENT,
        DIRECTORY + 16: 4 * MB2 | LARGE,
        **{TABLE + 8 * number: entry for number, entry, _ in PAGES},
        OTHER_ROOT: OTHER_PDPT | 7,
        OTHER_PDPT: PAGE_DIRECTORY | 7,
    }
    memory = [(at, struct.pack("<Q", word)) for at, word in words.items()]
    vm, session = lab.pair(payload="system", memory=memory, **wanted)
    requires(session, command="VCPU_TRANSLATE_GVA")
    return vm, session


def _check(session: Session, expected: Mapping[int, int], *, vcpu: int = 0) -> None:
    """Check the translations of some addresses, asked for in one go."""
    pending = {gva: session.send("VCPU_TRANSLATE_GVA", vcpu=vcpu, gva=gva) for gva in expected}
    found = {gva: one.reply(10).ok().fields.gpa for gva, one in pending.items()}
    assert found == expected


def _gpa(session: Session, gva: int, *, vcpu: int = 0) -> int:
    gpa: int = session.command("VCPU_TRANSLATE_GVA", vcpu=vcpu, gva=gva).ok().fields.gpa
    return gpa


@pytest.mark.clause("GVA-OK")
@pytest.mark.parametrize("cpl", [0, 3])
def test_translation(lab: Lab, cpl: int) -> None:
    """Each byte of a mapped page has its place, whoever may use the page, memory or not."""
    vm, session = _vm(lab, cpl=cpl)
    expected = {
        BASE + number * 0x1000 + offset: NOWHERE if gpa is None else gpa + offset
        for number, _, gpa in PAGES
        for offset in (0, 1, 0x7F8, 0xFFF)
    }
    _check(session, expected)
    _check(session, {0: 0, PML4 + 5: PML4 + 5, ALIAS + PML4 + 5: PML4 + 5, BASE + MB2: 4 * MB2,
                     BASE + 2 * MB2 - 1: 5 * MB2 - 1})  # fmt: skip
    # The guest's own access to these pages goes there.
    for number, where in ((0, PAGE), (5, PAGE + 0x1000)):
        vm.write(where + 0x10, struct.pack("<Q", 0x1234_0000 + number))
        words = vm.perform("read", BASE + number * 0x1000 + 0x10)
        assert (words["result"], words["faults"]) == (0x1234_0000 + number, 0)


@pytest.mark.clause("GVA-UNMAPPED")
def test_unmapped(lab: Lab) -> None:
    """Nothing there, at whichever level, or no address at all: success, with all ones."""
    _, session = _vm(lab)
    unmapped = (
        BASE + 0x2000, BASE + 0x6000, BASE + 2 * MB2, BASE + 3 * MB2, 3 * GB, 512 * GB,
        0x7FFF_FFFF_F000, 0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000, NOWHERE,
    )  # fmt: skip
    _check(session, {gva: NOWHERE for gva in unmapped} | {ALIAS: 0})


@pytest.mark.clause("GVA-OK", "GVA-UNMAPPED")
def test_current_tables(lab: Lab) -> None:
    """The page tables are those in use, on that vCPU and at that moment, in an event too."""
    vm, session = _vm(lab, vcpus=2)
    vm.perform("set_cr3", OTHER_ROOT, vcpu=1)
    for gva, here, there in ((PML4, PML4, PML4), (BASE, PAGE, NOWHERE), (ALIAS, 0, NOWHERE)):
        assert [_gpa(session, gva, vcpu=vcpu) for vcpu in (0, 1)] == [here, there]
    session.command("VM_PAUSE_VCPU", vcpu=1, wait=1).ok()
    event = next_event_of(session, "PAUSE", vcpu=1)
    assert _gpa(session, BASE, vcpu=1) == NOWHERE
    session.answer(event)
    vm.perform("set_cr3", PML4, vcpu=1)
    assert _gpa(session, BASE, vcpu=1) == PAGE
    # A changed entry counts at once: the command does not go by what the CPU remembers.
    session.command("VM_PAUSE_VCPU", vcpu=0, wait=1).ok()
    event = next_event_of(session, "PAUSE")
    assert _gpa(session, BASE) == PAGE
    vm.write(TABLE, struct.pack("<Q", 0))
    assert _gpa(session, BASE) == NOWHERE
    session.answer(event)


@pytest.mark.clause("GVA-OK")
@pytest.mark.parametrize(("mode", "payload"), [("protected32", "calls32"), ("real16", "spin16")])
def test_without_paging(lab: Lab, mode: Any, payload: str) -> None:
    """Without paging an address is its own translation."""
    vm, session = lab.pair(mode=mode, payload=payload)
    requires(session, command="VCPU_TRANSLATE_GVA")
    vm.progresses()
    _check(session, {gva: gva for gva in (0, 0x1234, FREE, 0xC000_0000)})
