# SPDX-License-Identifier: GPL-2.0-or-later
"""VM_SET_PAGE_ACCESS: the command, and which accesses it makes an event of."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from checks import continues, enable, ends_dead, requires, silent
from lab import Lab
from pages import (
    NONE,
    PAGE,
    RWX,
    R,
    Trace,
    W,
    X,
    access_pair,
    fetch_page,
    linear,
    next_access,
    perform,
    restrict,
)

from harness.errors import SessionClosed
from harness.manager.payloads import FREE
from harness.manager.smallvm import KVM_MEM_READONLY, Slot, SmallVm
from harness.plugin.fixtures import ClauseNotes

MEMORY = 256 << 10
HIGH = 0x1_0000_0000
NOWHERE = [MEMORY, MEMORY + 5 * PAGE + 8, HIGH - PAGE, HIGH + PAGE, 0xFEE0_0000, 0xFFFB_D000,
           1 << 45, (1 << 52) - 8, 0xFFFF_FFFF_FFFF_F000, 0xFFFF_FFFF_FFFF_FFF0]  # fmt: skip
MOST_ENTRIES = (8184 - 8) // 16
NAMES = {access: "".join(c if access & b else "-" for c, b in (("r", R), ("w", W), ("x", X)))
         for access in range(8)}  # fmt: skip


def _entry(gpa: int, access: int = R, **more: Any) -> dict[str, Any]:
    return {"gpa": gpa, "access": access, **more}


def _writes_are_seen(vm: SmallVm, trace: Trace, *pages: int) -> list[int]:
    """Write to each page; answer those on which that was an event."""
    found = []
    for page in pages:
        perform(vm, "write", linear(vm, page + 8), 1)
        events = [access.where for access in trace.take()]
        assert events in ([], [(W, page + 8)]), events
        found += [page] if events else []
    return found


def check_accesses(lab: Lab, access: int, *, payload: str = "access") -> None:
    """Read, write and fetch a page with that access allowed, and the pages beside it."""
    vm, session = access_pair(lab, payload=payload)
    trace = Trace(session)
    page, data = fetch_page(vm), fetch_page(vm) + 0x800
    word = 0x5A5A_5A5A
    vm.write(data, struct.pack("<Q", word))
    restrict(session, access, page)
    for round in (1, 2):  # a page that was let through once is restricted again
        assert perform(vm, "read", linear(vm, data)) == word
        expected = [] if access & R else [(R, data)]
        assert [seen.where for seen in trace.take()] == expected, f"read {round}"

        word += 1
        perform(vm, "write", linear(vm, data), word)
        expected = [] if access & W else [(W, data)]
        assert [seen.where for seen in trace.take()] == expected, f"write {round}"
        assert struct.unpack("<Q", vm.read(data, 8))[0] == word

        assert perform(vm, "slide") == 30
        fetched = trace.take()
        if access & X:
            assert fetched == [], f"fetch {round}"
        else:
            assert {seen.access for seen in fetched} == {X}, f"fetch {round}"
            assert {seen.gpa & -PAGE for seen in fetched} == {page}
    for beside in (page - 8, page + PAGE + 8, FREE):
        perform(vm, "read", linear(vm, beside))
        assert trace.take() == []
    restrict(session, RWX, page)
    perform(vm, "write", linear(vm, data), word)
    assert perform(vm, "read", linear(vm, data)) == word
    assert perform(vm, "slide") == 30
    assert trace.take() == []


@pytest.mark.clause("SETPAGE-OK", "SETPAGE-FORGET", "EV-PF-ONLYTRACKED", "EV-PF-CONTINUE")
@pytest.mark.parametrize("access", range(8), ids=NAMES.__getitem__)
def test_accesses(lab: Lab, access: int) -> None:
    """A read, write or fetch raises an event exactly when its bit is cleared, again and again."""
    check_accesses(lab, access)


@pytest.mark.clause("SETPAGE-OK", "SETPAGE-FORGET", "EV-PF-ONLYTRACKED", "EV-PF-CONTINUE")
@pytest.mark.parametrize("access", range(8), ids=NAMES.__getitem__)
def test_accesses_without_paging(lab: Lab, access: int) -> None:
    """The same for a guest in protected mode without paging."""
    check_accesses(lab, access, payload="access32")


@pytest.mark.clause("SETPAGE-OK")
def test_any_address_of_the_page(lab: Lab) -> None:
    """The address of an entry names the whole page that holds it, and no other."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    restrict(session, R | X, FREE + PAGE + 0xFFF)
    pages = (FREE, FREE + PAGE, FREE + 2 * PAGE)
    assert _writes_are_seen(vm, trace, *pages) == [FREE + PAGE]
    for offset in (0, PAGE - 8):
        perform(vm, "write", linear(vm, FREE + PAGE + offset), 1)
        assert [seen.where for seen in trace.take()] == [(W, FREE + PAGE + offset)]


@pytest.mark.clause("UNHOOK-PAGES-LIFTED")
@pytest.mark.parametrize("how", ["close", "unhook"])
def test_many_are_lifted_at_the_end(lab: Lab, how: str) -> None:
    """However many pages are restricted, none is when the session is over."""
    first, count = 0x10_0000, 5 * MOST_ENTRIES
    slot = Slot(slot=1, gpa=first, size=count * PAGE)
    vm, session = access_pair(lab, payload="access32", slots=[slot])
    pages = [first + number * PAGE for number in range(count)]
    for start in range(0, count, MOST_ENTRIES):
        restrict(session, R | X, *pages[start : start + MOST_ENTRIES])
    tried = [*pages[::500], pages[-1]]
    assert _writes_are_seen(vm, Trace(session), *tried) == tried
    if how == "close":
        session.close()
        ends_dead(lab.manager, vm)
    assert vm.unhook() == "OK"
    again = lab.hook(vm)
    enable(again, "PF")
    assert _writes_are_seen(vm, Trace(again), *tried) == []


@pytest.mark.clause("SETPAGE-OK")
def test_last_setting_counts(lab: Lab) -> None:
    """Setting a page again replaces what it had, also within one message."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    for access in (R | X, NONE, R | W, W | X, R):
        restrict(session, access, FREE)
        perform(vm, "read", linear(vm, FREE))
        assert [seen.access for seen in trace.take()] == ([] if access & R else [R])
        perform(vm, "write", linear(vm, FREE), 1)
        assert [seen.access for seen in trace.take()] == ([] if access & W else [W])
    entries = [_entry(FREE, access) for access in (NONE, RWX, R | W, R | X)]
    session.command("VM_SET_PAGE_ACCESS", entries=entries).ok()
    perform(vm, "read", linear(vm, FREE))
    assert _writes_are_seen(vm, trace, FREE) == [FREE]


@pytest.mark.clause("SETPAGE-OK")
def test_many_pages(lab: Lab) -> None:
    """A message of the greatest size sets 511 pages, and each counts."""
    first = 0x10_0000
    slot = Slot(slot=1, gpa=first, size=(MOST_ENTRIES + 1) * PAGE)
    vm, session = access_pair(lab, payload="access32", slots=[slot])
    trace = Trace(session)
    pages = [first + number * PAGE for number in range(MOST_ENTRIES)]
    restrict(session, R | X, *pages)
    tried = [*pages[::100], pages[-1], pages[-1] + PAGE]
    assert _writes_are_seen(vm, trace, *tried) == tried[:-1]
    restrict(session, RWX, *pages)
    assert _writes_are_seen(vm, trace, *tried) == []


@pytest.mark.clause("SETPAGE-OK")
def test_all_vcpus_and_only_enabled(lab: Lab) -> None:
    """A restriction holds for every vCPU; those without PF events enabled notice nothing."""
    vm, session = access_pair(lab, vcpus=2, events=False)
    trace = Trace(session)
    restrict(session, NONE, FREE)
    for vcpu in (0, 1):
        perform(vm, "modify", linear(vm, FREE), vcpu=vcpu)
    assert trace.seen == {}
    enable(session, "PF", vcpu=1)
    for vcpu in (0, 1):
        perform(vm, "write", linear(vm, FREE), 5, vcpu=vcpu)
    assert [seen.where for seen in trace.take(1)] == [(W, FREE)]
    enable(session, "PF", vcpu=0)
    for vcpu in (0, 1):
        perform(vm, "read", linear(vm, FREE), vcpu=vcpu)
        assert [seen.where for seen in trace.take(vcpu)] == [(R, FREE)]
    enable(session, "PF", vcpu=1, on=False)
    for vcpu in (0, 1):
        perform(vm, "write", linear(vm, FREE), 6, vcpu=vcpu)
    assert [seen.where for seen in trace.take(0)] == [(W, FREE)]
    assert trace.seen == {}
    assert vm.read(FREE, 1) == b"\6"


@pytest.mark.clause("SETPAGE-OK")
def test_vcpu_that_nobody_spoke_of(lab: Lab) -> None:
    """A restriction does not hold up a vCPU that the tool has not addressed in any command.

    Not even where KVM carries out the instruction, as one that reads a port.
    """
    vm, session = access_pair(lab, events=False)
    restrict(session, X, FREE)
    vm.write(FREE, b"\x5a")
    vm.order("port_in", linear(vm, FREE))
    assert vm.wait_exit().reason == "IO"
    vm.run()
    vm.finish()
    assert vm.read(FREE, 1) == b"\0"


@pytest.mark.clause("SETPAGE-OK")
def test_before_first_use(lab: Lab) -> None:
    """A page that the guest never touched, and memory that the host never backed, can be set."""
    vm = lab.vm(payload="access")
    session = lab.hook(vm)
    requires(session, command="VM_SET_PAGE_ACCESS", event="PF")
    restrict(session, NONE, FREE + PAGE)
    vm.run()
    enable(session, "PF")
    trace = Trace(session)
    assert perform(vm, "read", linear(vm, FREE + PAGE)) == 0
    assert [seen.where for seen in trace.take()] == [(R, FREE + PAGE)]


@pytest.mark.clause("SETPAGE-OK")
def test_tool_and_manager_are_not_restricted(lab: Lab) -> None:
    """VM_READ_PHYSICAL, VM_WRITE_PHYSICAL and the device manager reach a restricted page."""
    vm, session = access_pair(lab)
    restrict(session, NONE, FREE)
    vm.write(FREE, b"abc")
    assert session.command("VM_READ_PHYSICAL", gpa=FREE, size=3).ok().data == b"abc"
    session.command("VM_WRITE_PHYSICAL", gpa=FREE, data=b"xyz").ok()
    assert vm.read(FREE, 3) == b"xyz"
    silent(session, vcpus=[0])
    trace = Trace(session)
    assert perform(vm, "read", linear(vm, FREE)) == int.from_bytes(b"xyz", "little")
    assert [seen.where for seen in trace.take()] == [(R, FREE)]


@pytest.mark.clause("SETPAGE-FORGET")
def test_while_waiting_for_a_reply(lab: Lab) -> None:
    """A page can be set while a vCPU waits in an event of it; lifted, nothing more is raised."""
    vm, session = access_pair(lab)
    restrict(session, NONE, FREE)
    vm.order("locked", linear(vm, FREE), 3)
    event, _ = next_access(session)
    restrict(session, RWX, FREE)
    session.answer(event, "RETRY")
    vm.finish()
    assert vm.read(FREE, 1) == b"\3"
    silent(session, vcpus=[0])


@pytest.mark.clause("SETPAGE-ALLTRIED")
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_all_are_tried(lab: Lab, place: str) -> None:
    """Around entries that fail all others are applied, and the command still fails."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    pages = [FREE + number * PAGE for number in range(4)]
    good = [_entry(page) for page in pages[1:3]]
    at = {"first": 0, "middle": 1, "last": 2}[place]
    bits, gpa = _entry(FREE, 8), _entry(NOWHERE[0])
    for bad in ([bits], [gpa], [bits, gpa]):
        entries = good[:at] + bad + good[at:]
        session.command("VM_SET_PAGE_ACCESS", entries=entries).fails("KVM_EINVAL")
        assert _writes_are_seen(vm, trace, *pages) == pages[1:3]
        restrict(session, RWX, *pages)


@pytest.mark.clause("SETPAGE-EINVAL-BITS")
def test_unsupported_bits(lab: Lab) -> None:
    """An access with other bits than R, W and X answers KVM_EINVAL and changes nothing."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    for before in (RWX, R | X):
        restrict(session, before, FREE)
        for wrong in (0x08, 0x09, 0x0F, 0x10, 0x20, 0x40, 0x80, 0xFF):
            entries = [_entry(FREE, wrong)]
            session.command("VM_SET_PAGE_ACCESS", entries=entries).fails("KVM_EINVAL")
        assert _writes_are_seen(vm, trace, FREE) == ([] if before & W else [FREE])


@pytest.mark.clause("SETPAGE-EINVAL-GPA")
def test_nowhere(lab: Lab) -> None:
    """An address without memory of the guest answers KVM_EINVAL, whatever the access."""
    _, session = access_pair(lab, slots=[Slot(slot=1, gpa=HIGH, size=PAGE)])
    for gpa in NOWHERE:
        for access in (R, NONE, RWX):
            entries = [_entry(gpa, access)]
            session.command("VM_SET_PAGE_ACCESS", entries=entries).fails("KVM_EINVAL")
    restrict(session, R, MEMORY - 1, HIGH)
    continues(session)


@pytest.mark.clause("SETPAGE-EINVAL-GPA")
def test_deleted_slot(lab: Lab) -> None:
    """Memory that was taken away is no address to set any more."""
    vm, session = access_pair(lab, slots=[Slot(slot=1, gpa=HIGH, size=PAGE)])
    restrict(session, R, HIGH)
    vm.set_slot(Slot(slot=1, gpa=HIGH, size=0))
    session.command("VM_SET_PAGE_ACCESS", entries=[_entry(HIGH)]).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("SETPAGE-EINVAL-PADDING")
def test_padding(lab: Lab) -> None:
    """Each byte of padding, in the header and in each entry, answers KVM_EINVAL."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    entries = [_entry(FREE)]
    for wrong in session.codec.wrong_paddings("VM_SET_PAGE_ACCESS"):
        session.command("VM_SET_PAGE_ACCESS", entries=entries, **wrong).fails("KVM_EINVAL")
    for byte in range(7):
        padding = tuple(int(byte == number) for number in range(7))
        entries = [_entry(FREE, padding=padding)]
        session.command("VM_SET_PAGE_ACCESS", entries=entries).fails("KVM_EINVAL")
    assert _writes_are_seen(vm, trace, FREE) == []
    # In an entry it is that entry's failure: the others are tried.
    entries = [_entry(FREE), _entry(FREE + PAGE, padding=(0, 0, 0, 1, 0, 0, 0))]
    session.command("VM_SET_PAGE_ACCESS", entries=entries).fails("KVM_EINVAL")
    assert _writes_are_seen(vm, trace, FREE + PAGE) == []


@pytest.mark.clause("SETPAGE-EINVAL-SIZE")
@pytest.mark.parametrize(
    ("count", "carried"), [(2, 1), (1, 0), (0xFFFF, 1), (MOST_ENTRIES + 1, MOST_ENTRIES)]
)
def test_too_few_entries(lab: Lab, clauses: ClauseNotes, count: int, carried: int) -> None:
    """A message that carries fewer entries than it counts answers KVM_EINVAL, or is the last."""
    vm, session = access_pair(lab)
    page = FREE + PAGE
    pending = session.send(
        "VM_SET_PAGE_ACCESS", count=count, entries=[_entry(page)] * carried
    )  # fmt: skip
    try:
        pending.reply(5).fails("KVM_EINVAL")
    except SessionClosed:
        clauses.seen("SETPAGE-EINVAL-SIZE", "closes")
        ends_dead(lab.manager, vm)
        perform(vm, "write", linear(vm, page), 1)
    else:
        clauses.seen("SETPAGE-EINVAL-SIZE", "einval")
        assert _writes_are_seen(vm, Trace(session), page) == []
        continues(session)


@pytest.mark.clause("SETPAGE-EINVAL-SIZE")
def test_half_an_entry(lab: Lab, clauses: ClauseNotes) -> None:
    """The same when the last entry is cut in the middle."""
    _, session = access_pair(lab)
    for length in (8 + 15, 8 + 8, 8 + 1):
        pending = session.send("VM_SET_PAGE_ACCESS", entries=[_entry(FREE)], length=length)
        try:
            pending.reply(5).fails("KVM_EINVAL")
        except SessionClosed:
            clauses.seen("SETPAGE-EINVAL-SIZE", "closes")
            return
    clauses.seen("SETPAGE-EINVAL-SIZE", "einval")


@pytest.mark.clause("SETPAGE-EAGAIN")
def test_without_started_vcpus(lab: Lab, clauses: ClauseNotes) -> None:
    """Before any vCPU ever ran the command works, or answers KVM_EAGAIN and changes nothing."""
    vm = lab.vm(payload="access")
    session = lab.hook(vm)
    requires(session, command="VM_SET_PAGE_ACCESS", event="PF")
    reply = session.command("VM_SET_PAGE_ACCESS", entries=[_entry(FREE)])
    if reply.err:
        reply.fails("KVM_EAGAIN")
    clauses.seen("SETPAGE-EAGAIN", "eagain" if reply.err else "never")
    vm.run()
    enable(session, "PF")
    seen = _writes_are_seen(vm, Trace(session), FREE)
    assert seen == ([] if reply.err else [FREE])


@pytest.mark.clause("EV-PF-ONLYTRACKED")
def test_other_faults_are_no_events(lab: Lab) -> None:
    """MMIO, writes to read-only memory and the guest's own page faults raise no PF event."""
    rom = Slot(slot=1, gpa=0x10_0000, size=PAGE, flags=KVM_MEM_READONLY)
    vm, session = access_pair(lab, slots=[rom])
    trace = Trace(session)
    restrict(session, X | W, rom.gpa)
    restrict(session, NONE, FREE)
    for gpa in (rom.gpa, 0x18_0000):
        vm.order("write", linear(vm, gpa), 7)
        found = vm.wait_exit()
        assert (found.reason, found.mmio) == (
            "MMIO", {"gpa": gpa, "write": True, "data": "0700000000000000"}
        )  # fmt: skip
        vm.run()
        vm.finish()
    assert trace.take() == []
    perform(vm, "read", linear(vm, rom.gpa))
    assert [seen.where for seen in trace.take()] == [(R, rom.gpa)]
    vm.order("read", 0x1234_5678_0000)
    vm.wait_word("faults", 1)
    assert trace.take() == []
    silent(session, vcpus=[0])


@pytest.mark.clause("UNHOOK-PAGES-LIFTED")
@pytest.mark.parametrize("cleanup", [0, 1])
@pytest.mark.parametrize("how", ["close", "unhook", "unhook in an event"])
def test_lifted_at_the_end(lab: Lab, how: str, cleanup: int) -> None:
    """With the session every restriction ends, whatever the cleanup setting; the next has none."""
    vm, session = access_pair(lab, vcpus=2)
    if session.command("VM_CHECK_COMMAND", id="VM_CONTROL_CLEANUP").err == 0:
        session.command("VM_CONTROL_CLEANUP", enable=cleanup).ok()
    restrict(session, NONE, FREE)
    restrict(session, R, FREE + PAGE, fetch_page(vm))
    vm.order("modify", linear(vm, FREE))
    event, _ = next_access(session)
    if how == "unhook in an event":
        assert vm.unhook() == "OK"
    else:
        if how == "unhook":
            Trace(session)  # there may be a second access, and an event of it
        session.answer(event)
        if how == "close":
            session.close()
            ends_dead(lab.manager, vm)
        else:
            vm.finish()
            assert vm.unhook() == "OK"
    vm.finish()
    perform(vm, "write", linear(vm, FREE), 9, vcpu=1)
    if how == "close":
        assert vm.unhook() == "OK"
    again = lab.hook(vm)
    trace = Trace(again)
    for vcpu in (0, 1):
        enable(again, "PF", vcpu=vcpu)
        for page in (FREE, FREE + PAGE):
            perform(vm, "modify", linear(vm, page), vcpu=vcpu)
        assert perform(vm, "slide", vcpu=vcpu) == 30
    assert trace.seen == {}
    assert vm.read(FREE, 1) == bytes([11])
    restrict(again, R, FREE)
    assert _writes_are_seen(vm, trace, FREE, FREE + PAGE) == [FREE]


@pytest.mark.clause("SETPAGE-SLOTMOVE")
def test_slot_is_moved(lab: Lab) -> None:
    """A restriction belongs to the address: a slot that comes to lie there is restricted."""
    low, high = 0x10_0000, 0x18_0000
    slot = Slot(slot=1, gpa=low, size=4 * PAGE)
    vm, session = access_pair(lab, slots=[slot])
    trace = Trace(session)
    restrict(session, R | X, low + PAGE)
    offsets = range(0, 4 * PAGE, PAGE)

    def seen_at(base: int) -> list[int]:
        return [page - base for page in _writes_are_seen(vm, trace, *(base + o for o in offsets))]

    assert seen_at(low) == [PAGE]
    vm.set_slot(Slot(slot=1, gpa=high, size=4 * PAGE))
    assert seen_at(high) == []
    vm.set_slot(Slot(slot=1, gpa=low - PAGE, size=4 * PAGE))
    assert seen_at(low - PAGE) == [2 * PAGE]
    vm.set_slot(slot)
    assert seen_at(low) == [PAGE]
    restrict(session, RWX, low + PAGE)
    assert seen_at(low) == []


@pytest.mark.clause("SETPAGE-SLOTMOVE")
def test_slot_is_made_anew(lab: Lab) -> None:
    """A restriction is still there when the slot was deleted and made again, of any size."""
    low = 0x10_0000
    vm, session = access_pair(lab, slots=[Slot(slot=1, gpa=low, size=4 * PAGE)])
    trace = Trace(session)
    restrict(session, R | X, low + PAGE)
    pages = [low, low + PAGE]
    present = 1
    for number, size in ((1, 4), (2, 8), (1, 2)):
        vm.set_slot(Slot(slot=present, gpa=low, size=0))
        vm.set_slot(Slot(slot=number, gpa=low, size=size * PAGE))
        present = number
        assert _writes_are_seen(vm, trace, *pages) == [low + PAGE]
