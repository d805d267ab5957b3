# SPDX-License-Identifier: GPL-2.0-or-later
"""VM_READ_PHYSICAL and VM_WRITE_PHYSICAL."""

from __future__ import annotations

import random
import struct

import pytest
from causes import cause
from checks import continues, ends_dead, gone
from lab import Lab

from harness.errors import SessionClosed
from harness.manager.payloads import FREE, MAILBOX_WORDS
from harness.manager.smallvm import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, Slot, SmallVm
from harness.plugin.fixtures import ClauseNotes
from harness.tool import Session

PAGE = 4096
MEMORY = 256 << 10
HIGH = 0x1_0000_0000
CROSSING = [(FREE, 4097), (FREE + 1, 4096), (FREE + 4095, 2), (FREE + 0x800, 0x801),
            (FREE, 8192), (FREE, 0xFFFF), (FREE + 0xFFF, 0xFFFF)]  # fmt: skip
NOWHERE = [MEMORY, MEMORY + 5 * PAGE + 8, HIGH - PAGE, HIGH + PAGE, 1 << 45, (1 << 52) - 8,
           0xFFFF_FFFF_FFFF_F000, 0xFFFF_FFFF_FFFF_FFF0]  # fmt: skip


def _pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.clause("READPHYS-OK")
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 2048, 4095])
def test_read(vm: SmallVm, session: Session, size: int) -> None:
    """VM_READ_PHYSICAL answers exactly size bytes, equal to the memory at gpa."""
    pattern = _pattern(2 * PAGE)
    vm.write(FREE, pattern)
    for offset in (0, 1, PAGE - size, PAGE):
        reply = session.command("VM_READ_PHYSICAL", gpa=FREE + offset, size=size).ok()
        assert reply.data == pattern[offset : offset + size]
        assert len(reply.raw) == 8 + size


@pytest.mark.clause("READPHYS-OK")
def test_read_is_current(lab: Lab) -> None:
    """VM_READ_PHYSICAL answers what guest and device manager wrote a moment before."""
    vm, session = lab.pair()
    last = 0
    for number in range(5):
        vm.write(FREE, struct.pack("<Q", number))
        assert session.command("VM_READ_PHYSICAL", gpa=FREE, size=8).ok().data[0] == number
        vm.progresses(rounds=1)
        ticks = session.command("VM_READ_PHYSICAL", gpa=0, size=8).ok().data
        assert int.from_bytes(ticks, "little") > last
        last = int.from_bytes(ticks, "little")


@pytest.mark.clause("READPHYS-OK", "LIFE-MEMSAFETY")
def test_any_memory_slot(lab: Lab) -> None:
    """Every memory slot can be read, above 4 GB and read-only ones too, all in the same way."""
    high = Slot(slot=1, gpa=HIGH, size=PAGE)
    rom = Slot(slot=2, gpa=0x80000, size=PAGE, flags=KVM_MEM_READONLY)
    vm, session = lab.pair(slots=[high, rom], run=False)
    for seed, slot in enumerate((high, rom)):
        pattern = _pattern(PAGE, seed)
        vm.write(slot.gpa, pattern)
        reply = session.command("VM_READ_PHYSICAL", gpa=slot.gpa, size=PAGE).ok()
        assert reply.data == pattern
    session.command("VM_WRITE_PHYSICAL", gpa=HIGH, data=b"any").ok()
    assert vm.read(HIGH, 3) == b"any"


@pytest.mark.clause("READPHYS-FULLPAGE")
def test_read_full_page(vm: SmallVm, session: Session) -> None:
    """A whole aligned page can be read in one command."""
    pattern = _pattern(2 * PAGE)
    vm.write(FREE, pattern)
    for page in (0, 1):
        reply = session.command("VM_READ_PHYSICAL", gpa=FREE + page * PAGE, size=PAGE).ok()
        assert reply.data == pattern[page * PAGE :][:PAGE]


@pytest.mark.clause("READPHYS-EINVAL-ZERO")
def test_read_zero(session: Session) -> None:
    """VM_READ_PHYSICAL of size 0 answers KVM_EINVAL, also where there is no memory."""
    for gpa in (0, FREE, FREE + 4095, *NOWHERE):
        session.command("VM_READ_PHYSICAL", gpa=gpa, size=0).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("READPHYS-EINVAL-CROSS")
@pytest.mark.parametrize(("gpa", "size"), CROSSING)
def test_read_crossing(session: Session, gpa: int, size: int) -> None:
    """VM_READ_PHYSICAL of a range that leaves its page answers KVM_EINVAL."""
    session.command("VM_READ_PHYSICAL", gpa=gpa, size=size).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("READPHYS-EINVAL-PADDING")
def test_read_padding(session: Session) -> None:
    """Each byte of padding makes VM_READ_PHYSICAL answer KVM_EINVAL, also without memory."""
    for wrong in session.codec.wrong_paddings("VM_READ_PHYSICAL"):
        for gpa in (FREE, NOWHERE[0]):
            session.command("VM_READ_PHYSICAL", gpa=gpa, size=8, **wrong).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("READPHYS-ENOENT-NOPAGE")
def test_read_nowhere(lab: Lab) -> None:
    """VM_READ_PHYSICAL answers KVM_ENOENT outside of all memory slots, next to them too."""
    vm, session = lab.pair(slots=[Slot(slot=1, gpa=HIGH, size=PAGE)], run=False)
    for gpa in NOWHERE:
        session.command("VM_READ_PHYSICAL", gpa=gpa, size=8).fails("KVM_ENOENT")
    session.command("VM_READ_PHYSICAL", gpa=MEMORY - 8, size=8).ok()
    vm.set_slot(Slot(slot=1, gpa=HIGH, size=0))
    session.command("VM_READ_PHYSICAL", gpa=HIGH, size=8).fails("KVM_ENOENT")


@pytest.mark.clause("WRITEPHYS-OK")
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 2048, 4095, 4096])
def test_write(vm: SmallVm, session: Session, size: int) -> None:
    """Memory holds the data when the reply is there, and every other byte is as before."""
    expected = bytearray(_pattern(4 * PAGE))
    vm.write(FREE, bytes(expected))
    for seed, offset in enumerate((PAGE, 2 * PAGE - size, PAGE + min(1, PAGE - size))):
        data = _pattern(size, 100 + seed)
        expected[offset : offset + size] = data
        session.command("VM_WRITE_PHYSICAL", gpa=FREE + offset, data=data).ok()
        assert vm.read(FREE, 4 * PAGE) == bytes(expected)
        reply = session.command("VM_READ_PHYSICAL", gpa=FREE + offset, size=size).ok()
        assert reply.data == data


@pytest.mark.clause("WRITEPHYS-OK")
def test_guest_sees_what_was_written(lab: Lab) -> None:
    """A running guest sees what VM_WRITE_PHYSICAL wrote: it makes the calls ordered that way."""
    vm, session = lab.pair()
    for wanted in (3, 7):
        session.command(
            "VM_WRITE_PHYSICAL", gpa=MAILBOX_WORDS["want"], data=struct.pack("<Q", wanted)
        ).ok()
        assert vm.wait_word("done", wanted) == wanted


@pytest.mark.clause("WRITEPHYS-OK")
def test_write_is_logged_dirty(lab: Lab) -> None:
    """What VM_WRITE_PHYSICAL writes is marked dirty, that page alone, so migration carries it."""
    vm, session = lab.pair(flags=KVM_MEM_LOG_DIRTY_PAGES, run=False)
    page = FREE // PAGE
    vm.dirty_pages()
    session.command("VM_READ_PHYSICAL", gpa=FREE + PAGE, size=PAGE).ok()
    assert vm.dirty_pages() == set()
    session.command("VM_WRITE_PHYSICAL", gpa=FREE + 100, data=b"x").ok()
    assert vm.dirty_pages() == {page}
    session.command("VM_WRITE_PHYSICAL", gpa=FREE + 3 * PAGE, data=bytes(PAGE)).ok()
    session.command("VM_WRITE_PHYSICAL", gpa=FREE + 5 * PAGE - 1, data=b"x").ok()
    assert vm.dirty_pages() == {page + 3, page + 4}
    session.command("VM_WRITE_PHYSICAL", gpa=FREE + 4095, data=b"xx").fails("KVM_EINVAL")
    assert vm.dirty_pages() == set()


@pytest.mark.clause("WRITEPHYS-EINVAL-ZERO")
def test_write_zero(session: Session) -> None:
    """VM_WRITE_PHYSICAL of size 0 answers KVM_EINVAL, with and without data behind it."""
    for gpa in (0, FREE, FREE + 4095, *NOWHERE):
        session.command("VM_WRITE_PHYSICAL", gpa=gpa, data=b"").fails("KVM_EINVAL")
        session.command("VM_WRITE_PHYSICAL", gpa=gpa, size=0, data=b"abc").fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("WRITEPHYS-EINVAL-CROSS")
@pytest.mark.parametrize(("gpa", "size"), [item for item in CROSSING if item[1] <= 8160])
def test_write_crossing(vm: SmallVm, session: Session, gpa: int, size: int) -> None:
    """VM_WRITE_PHYSICAL of a range that leaves its page answers KVM_EINVAL and writes nothing."""
    before = _pattern(4 * PAGE)
    vm.write(FREE, before)
    session.command("VM_WRITE_PHYSICAL", gpa=gpa, data=b"z" * size).fails("KVM_EINVAL")
    assert vm.read(FREE, 4 * PAGE) == before
    continues(session)


@pytest.mark.clause("WRITEPHYS-EINVAL-PADDING")
def test_write_padding(vm: SmallVm, session: Session) -> None:
    """Each byte of padding makes VM_WRITE_PHYSICAL answer KVM_EINVAL and write nothing."""
    for wrong in session.codec.wrong_paddings("VM_WRITE_PHYSICAL"):
        for gpa in (FREE, NOWHERE[0]):
            session.command("VM_WRITE_PHYSICAL", gpa=gpa, data=b"data", **wrong).fails("KVM_EINVAL")
    assert vm.read(FREE, 8) == bytes(8)
    continues(session)


@pytest.mark.clause("WRITEPHYS-ENOENT-NOPAGE")
def test_write_nowhere(lab: Lab) -> None:
    """VM_WRITE_PHYSICAL answers KVM_ENOENT where there is no page, or none that can be written."""
    rom = Slot(slot=1, gpa=HIGH, size=PAGE, flags=KVM_MEM_READONLY)
    vm, session = lab.pair(slots=[rom], run=False)
    vm.write(HIGH, _pattern(PAGE))
    for gpa in NOWHERE:
        session.command("VM_WRITE_PHYSICAL", gpa=gpa, data=b"data").fails("KVM_ENOENT")
    for offset in (0, 100, PAGE - 4):
        session.command("VM_WRITE_PHYSICAL", gpa=HIGH + offset, data=b"data").fails("KVM_ENOENT")
    assert vm.read(HIGH, PAGE) == _pattern(PAGE)
    session.command("VM_WRITE_PHYSICAL", gpa=MEMORY - 4, data=b"data").ok()
    assert vm.read(MEMORY - 8, 8) == b"\0\0\0\0data"


@pytest.mark.clause("WRITEPHYS-SHORT-CLOSE")
@pytest.mark.parametrize(("size", "carried"), [(8, 7), (1, 0), (4096, 4095), (100, 0)])
def test_write_with_too_little_data(
    lab: Lab, clauses: ClauseNotes, size: int, carried: int
) -> None:
    """Without all announced bytes VM_WRITE_PHYSICAL writes nothing, and the socket is closed.

    The text suggests KVM_EINVAL instead, which is accepted too.
    """
    vm, session = lab.pair(run=False)
    pending = session.send("VM_WRITE_PHYSICAL", gpa=FREE, size=size, data=b"z" * carried)
    try:
        pending.reply(5).fails("KVM_EINVAL")
    except SessionClosed:
        clauses.seen("WRITEPHYS-SHORT-CLOSE", "closes")
        session.expect_close(timeout_s=5)
        ends_dead(lab.manager, vm)
        assert vm.preunhook() == gone(vm)
    else:
        clauses.seen("WRITEPHYS-SHORT-CLOSE", "einval")
        continues(session)
    assert vm.read(FREE, PAGE) == bytes(PAGE)


@pytest.mark.clause("WRITEPHYS-OK")
def test_full_dirty_ring(lab: Lab) -> None:
    """With dirty rings the first vCPU writes; no entry is lost when its ring is full.

    Each write takes an entry, also of the same page. What does not fit is refused, since a
    vCPU that waits for the tool cannot have its ring emptied.
    """
    ring = 2048
    vm, session = lab.pair(payload="calls", dirty_ring=16 * ring, flags=KVM_MEM_LOG_DIRTY_PAGES)
    event = cause(vm, session, "HYPERCALL")
    fields = {"gpa": FREE, "size": 4}
    pending = [
        session.send("VM_WRITE_PHYSICAL", **fields, data=struct.pack("<I", number))
        for number in range(ring)
    ]
    errors = [one.reply(20).error for one in pending]
    written = errors.index("KVM_EBUSY")
    assert ring // 2 < written < ring
    assert set(errors[:written]) == {None}
    assert set(errors[written:]) == {"KVM_EBUSY"}
    assert vm.read(FREE, 4) == struct.pack("<I", written - 1)
    session.answer(event)
    assert vm.wait_exit().reason == "DIRTY_RING_FULL"


@pytest.mark.clause("WRITEPHYS-OK")
def test_dirty_ring_without_vcpus(lab: Lab) -> None:
    """With dirty rings and no vCPU yet there is nobody to log the page, so it is not written."""
    vm = lab.vm(vcpus=0, dirty_ring=32 << 10, flags=KVM_MEM_LOG_DIRTY_PAGES)
    session = lab.hook(vm)
    session.command("VM_WRITE_PHYSICAL", gpa=FREE, size=4, data=b"abcd").fails("KVM_EAGAIN")
    assert vm.read(FREE, 4) == bytes(4)
