# SPDX-License-Identifier: GPL-2.0-or-later
"""Restricted pages with several vCPUs at them, and with everything else going on meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from causes import CR4_DE, CR4_PAE, pair_for, select_cr
from checks import enable, ends_dead, next_event_of, requires
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
    rest,
    restrict,
)

from harness.errors import ConformanceError, HarnessError
from harness.manager.payloads import FREE
from harness.manager.smallvm import KVM_MEM_LOG_DIRTY_PAGES, SmallVm
from harness.tool import Session

ENOUGH = 12
"""So many events of each vCPU show that it gets its share, in a tenth of a second."""

MANY = 100
"""So many make it likely that one vCPU is at a page while another is let through."""

FAIR_S = 10.0


def _u64(vm: SmallVm, gpa: int) -> int:
    return int.from_bytes(vm.read(gpa, 8), "little")


def _events_of_each(session: Session, trace: Trace, vcpus: range, *, more: int = ENOUGH) -> None:
    """Wait until each of these vCPUs had that many more events."""
    wanted = {vcpu: len(trace.seen.get(vcpu, [])) + more for vcpu in vcpus}
    limit_s = FAIR_S * max(1, more / ENOUGH)
    deadline = time.monotonic() + limit_s
    while late := [v for v, n in wanted.items() if len(trace.seen.get(v, [])) < n]:
        if time.monotonic() > deadline:
            counts = {vcpu: len(trace.seen.get(vcpu, [])) for vcpu in vcpus}
            raise ConformanceError(f"vCPU {late} gets no share: {counts} events in {limit_s:g} s")
        session.wait_count("PF", session.count("PF") + 1, timeout_s=5)


@contextlib.contextmanager
def _hammering(
    vm: SmallVm, session: Session, routines: list[str], access: int, *, more: int = ENOUGH
) -> Iterator[Trace]:
    """Each vCPU goes on at its own word of a restricted page; each access has its event.

    That is checked at the end: the counts that the guest keeps are those of the events.
    """
    trace = Trace(session)
    vcpus = range(len(routines))
    restrict(session, access, FREE)
    for vcpu, routine in enumerate(routines):
        vm.order(routine, linear(vm, FREE) + 8 * vcpu, vcpu=vcpu)
    _events_of_each(session, trace, vcpus, more=more)
    yield trace
    for vcpu, routine in enumerate(routines):
        words = rest(vm, vcpu=vcpu)
        reads = routine == "hammer_read"
        done = words["result"] if reads else _u64(vm, FREE + 8 * vcpu)
        seen = trace.take(vcpu)
        assert {one.where for one in seen} == {(R if reads else W, FREE + 8 * vcpu)}
        assert done == len(seen), f"vCPU {vcpu}: {done} accesses, {len(seen)} events"
        assert words["faults"] == 0


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE")
@pytest.mark.parametrize(
    ("routines", "access"),
    [
        (["hammer", "hammer"], R | X),
        (["hammer_sse", "hammer"], R | X),
        (["hammer_sse", "hammer_sse"], X),
        (["hammer_read", "hammer_sse"], X),
        (["hammer_sse", "hammer_read", "hammer_sse"], NONE),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("exact")
def test_no_access_without_event(lab: Lab, routines: list[str], access: int) -> None:
    """While one vCPU is let through, no other finds the page open: all accesses are events."""
    vm, session = access_pair(lab, vcpus=len(routines))
    with _hammering(vm, session, routines, access, more=MANY):
        pass


@pytest.mark.clause("SETPAGE-OK", "EVT-OTHER-VCPU-RUN")
@pytest.mark.usefixtures("exact")
def test_other_page_is_free(lab: Lab) -> None:
    """A vCPU at a page that is not restricted has no events, and runs while another has them."""
    vm, session = access_pair(lab, vcpus=2)
    vm.order("hammer", linear(vm, FREE + PAGE), vcpu=1)
    with _hammering(vm, session, ["hammer_sse"], R | X) as trace:
        vm.progresses(vcpu=1, rounds=100)
    rest(vm, vcpu=1)
    assert trace.take(1) == []


@pytest.mark.clause("EVT-OTHER-VCPU-RUN", "EV-PF-CONTINUE")
def test_another_event_of_the_same_instruction(lab: Lab) -> None:
    """Others run while the tool thinks about an instruction that it let pass a restriction."""
    vm, session = pair_for(lab, "CR", vcpus=2)
    requires(session, command="VM_SET_PAGE_ACCESS", event="PF")
    Trace(session)
    select_cr(session, 4)
    enable(session, "CR")
    enable(session, "PF")
    restrict(session, R | W, vm.machine.address("set_cr4") & -PAGE)
    vm.order("set_cr4", CR4_PAE | CR4_DE)
    event = next_event_of(session, "CR")
    vm.progresses(vcpu=1)
    session.answer(event)
    assert vm.finish()["result"] == CR4_PAE | CR4_DE


@pytest.mark.clause("SETPAGE-OK", "SETPAGE-FORGET")
def test_in_force_with_the_reply(lab: Lab) -> None:
    """Once the command is answered, no vCPU writes without an event; once lifted, all do."""
    vm, session = access_pair(lab, vcpus=2)
    vm.order("hammer", linear(vm, FREE))
    for _ in range(8):
        vm.progresses(rounds=20)
        restrict(session, R | X, FREE)
        before = _u64(vm, FREE)
        event, seen = next_access(session)
        assert seen.where == (W, FREE)
        assert _u64(vm, FREE) == before
        restrict(session, RWX, FREE)
        session.answer(event, "RETRY")
    vm.progresses(rounds=20)
    session.no_event(within_s=0)
    rest(vm)


def _signals(vm: SmallVm, session: Session) -> None:
    for number in range(6):
        vm.stop(number % 2)
        vm.run(number % 2)


def _dirty_log(vm: SmallVm, session: Session) -> None:
    for _number in range(6):
        vm.dirty_pages()


def _pauses(vm: SmallVm, session: Session) -> None:
    session.handle("PAUSE", lambda _: "CONTINUE")
    for number in range(6):
        session.command("VM_PAUSE_VCPU", vcpu=number % 2, wait=1).ok()


def _questions(vm: SmallVm, session: Session) -> None:
    for number in range(12):
        session.command("VCPU_GET_REGISTERS", vcpu=number % 2, nmsrs=0).ok()


def _settings(vm: SmallVm, session: Session) -> None:
    for number in range(12):
        restrict(session, R | X, FREE, FREE + PAGE * (1 + number % 3))
        restrict(session, RWX, FREE + PAGE * (1 + number % 3))


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE")
@pytest.mark.parametrize(
    "meanwhile", [_signals, _dirty_log, _pauses, _questions, _settings],
    ids=lambda function: function.__name__.strip("_"),
)  # fmt: skip
@pytest.mark.usefixtures("exact")
def test_disturbed(lab: Lab, meanwhile: Callable[[SmallVm, Session], None]) -> None:
    """Signals, the dirty log, commands and settings meanwhile let no access through unseen."""
    vm, session = access_pair(lab, vcpus=2, flags=KVM_MEM_LOG_DIRTY_PAGES)
    with _hammering(vm, session, ["hammer_sse", "hammer"], R | X) as trace:
        meanwhile(vm, session)
        _events_of_each(session, trace, range(2), more=3)


@pytest.mark.clause("UNHOOK-PAGES-LIFTED", "EVT-DISCONNECT-CONTINUE")
@pytest.mark.parametrize("how", ["close", "unhook"])
def test_end_in_full_swing(lab: Lab, how: str) -> None:
    """A session may end while vCPUs are being let through: all go on, nothing is restricted."""
    vm = lab.vm(payload="access", vcpus=2)
    vm.run()
    for number in range(4):
        session = lab.hook(vm)
        for vcpu in (0, 1):
            enable(session, "PF", vcpu=vcpu)
            vm.order("hammer_sse", linear(vm, FREE) + 8 * vcpu, vcpu=vcpu)
        came = threading.Semaphore(0)

        def answer(_: object, came: threading.Semaphore = came) -> str:
            came.release()
            return "CONTINUE"

        session.handle("PF", answer)
        restrict(session, R | X, FREE)
        for _ in range(4 + number):
            assert came.acquire(timeout=5)
        if how == "unhook":
            assert vm.unhook() == "OK"
        # An answer may meet a socket that is closed by now, which is nobody's fault.
        with contextlib.suppress(HarnessError):
            session.close()
        if how == "close":
            ends_dead(lab.manager, vm)
        for vcpu in (0, 1):
            vm.progresses(vcpu=vcpu, rounds=20)
            rest(vm, vcpu=vcpu)
        if how == "close":
            assert vm.unhook() == "OK"
    assert perform(vm, "read", linear(vm, FREE)) > 0
