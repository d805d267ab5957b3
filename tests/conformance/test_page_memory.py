# SPDX-License-Identifier: GPL-2.0-or-later
"""Restricted pages and what else KVM does with memory: huge pages and the dirty log."""

from __future__ import annotations

import time

import pytest
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
    linear,
    next_access,
    perform,
    restrict,
)

from harness.manager.payloads import FREE
from harness.manager.smallvm import KVM_MEM_LOG_DIRTY_PAGES, Slot, SmallVm
from harness.plugin import skip_clause
from harness.tool import Session

BASE, HUGE = 0x4000_0000, 2 << 20
JOINED_S = 5.0


def _slot(*, gpa: int = BASE, flags: int = 0) -> Slot:
    return Slot(slot=1, gpa=gpa, size=2 * HUGE, flags=flags, huge=True)


def _huge_pair(lab: Lab) -> tuple[SmallVm, Session]:
    """A guest that KVM maps two huge pages for, as its statistics say."""
    vm, session = access_pair(lab, payload="access32", slots=[_slot()])
    if not vm.huge_pages_back(_slot()):
        skip_clause("the host gives no huge pages to programs that ask for them (madvise)")
    _touch(vm)
    assert vm.statistic("pages_2m") == 2
    return vm, session


def _touch(vm: SmallVm, base: int = BASE) -> None:
    """Read from both huge pages."""
    for gpa in (base, base + HUGE):
        perform(vm, "read", gpa + 0x40 * PAGE)


def _write(vm: SmallVm, trace: Trace, *gpas: int) -> list[int]:
    """Write to each address; answer those where that was an event."""
    for gpa in gpas:
        perform(vm, "write", linear(vm, gpa), 1)
    seen = trace.take()
    assert {one.access for one in seen} <= {W}
    return [one.gpa for one in seen]


def _become(vm: SmallVm, huge: int, *, base: int = BASE) -> None:
    """Wait until so many huge pages are mapped, accessing memory meanwhile."""
    deadline = time.monotonic() + JOINED_S * vm.manager.host.patience
    while (found := vm.statistic("pages_2m")) != huge:
        assert time.monotonic() < deadline, f"{found} huge pages are mapped, not {huge}"
        _touch(vm, base)


@pytest.mark.clause("SETPAGE-OK", "SETPAGE-FORGET")
@pytest.mark.parametrize("number", [0, 5, 511])
def test_huge_page_is_split(lab: Lab, number: int) -> None:
    """Restricting a page in a huge one splits that one alone; lifted, it is joined again."""
    vm, session = _huge_pair(lab)
    trace = Trace(session)
    page = BASE + number * PAGE
    for _ in range(2):
        restrict(session, R | X, page)
        beside = (page ^ PAGE, BASE + 0x40 * PAGE, BASE + HUGE)
        assert _write(vm, trace, page, *beside, page + 8) == [page, page + 8]
        _touch(vm)
        assert vm.statistic("pages_2m") == 1
        restrict(session, RWX, page)
        assert _write(vm, trace, page, *beside) == []
        _become(vm, 2)


@pytest.mark.clause("SETPAGE-OK", "SETPAGE-FORGET")
def test_several_in_a_huge_page(lab: Lab) -> None:
    """A huge page is joined again when the last of its pages was lifted, not earlier."""
    vm, session = _huge_pair(lab)
    trace = Trace(session)
    pages = [BASE, BASE + 17 * PAGE, BASE + HUGE - PAGE, BASE + HUGE]
    restrict(session, R | X, *pages)
    assert _write(vm, trace, *pages) == pages
    _touch(vm)
    assert vm.statistic("pages_2m") == 0
    restrict(session, RWX, *pages[1:])
    _become(vm, 1)
    assert _write(vm, trace, *pages) == pages[:1]
    assert vm.statistic("pages_2m") == 1
    restrict(session, RWX, pages[0])
    _become(vm, 2)
    assert _write(vm, trace, *pages) == []


@pytest.mark.clause("UNHOOK-PAGES-LIFTED")
@pytest.mark.parametrize("how", ["close", "unhook"])
def test_joined_at_the_end(lab: Lab, how: str) -> None:
    """When the session ends, huge pages are mapped as such again."""
    vm, session = _huge_pair(lab)
    restrict(session, NONE, BASE + 5 * PAGE, BASE + HUGE)
    _become(vm, 0)
    lab.end(vm, session, how)
    perform(vm, "modify", BASE + 5 * PAGE)
    _become(vm, 2)


@pytest.mark.clause("SETPAGE-OK", "SETPAGE-SLOTMOVE")
def test_dirty_logging_of_a_huge_page(lab: Lab) -> None:
    """Switching the dirty log on and off, which splits and joins, leaves restrictions alone."""
    vm, session = _huge_pair(lab)
    trace = Trace(session)
    page = BASE + 5 * PAGE
    restrict(session, R | X, page)
    for _ in range(2):
        for flags in (KVM_MEM_LOG_DIRTY_PAGES, 0):
            vm.set_slot(_slot(flags=flags))
            assert _write(vm, trace, page, page + PAGE, page + 16) == [page, page + 16]
        _become(vm, 1)
    vm.set_slot(_slot(gpa=BASE + 2 * HUGE))
    assert _write(vm, trace, page + 2 * HUGE) == []
    _become(vm, 2, base=BASE + 2 * HUGE)
    vm.set_slot(_slot())
    assert _write(vm, trace, page) == [page]
    _become(vm, 1)


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE")
@pytest.mark.parametrize("routine", ["write", "sse_write", "locked"])
def test_dirty_log(lab: Lab, routine: str) -> None:
    """A write to a restricted page is in the dirty log once it was let through, not before."""
    vm, session = access_pair(lab, flags=KVM_MEM_LOG_DIRTY_PAGES)
    pages = {FREE // PAGE, FREE // PAGE + 1}
    restrict(session, R | X, FREE)
    for _ in range(2):
        perform(vm, "read", linear(vm, FREE))
        vm.dirty_pages()
        vm.order(routine, linear(vm, FREE), 1)
        event, seen = next_access(session)
        assert seen.where == (W, FREE)
        assert not vm.dirty_pages() & pages
        session.answer(event)
        vm.finish()
        assert vm.dirty_pages() & pages == {FREE // PAGE}
    restrict(session, NONE, FREE + PAGE)
    trace = Trace(session)
    perform(vm, "read", linear(vm, FREE + PAGE))
    assert trace.take()[0].where == (R, FREE + PAGE)
    assert not vm.dirty_pages() & pages
