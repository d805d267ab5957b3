# SPDX-License-Identifier: GPL-2.0-or-later
"""The event PF: what it tells, and what its replies do to the instruction."""

from __future__ import annotations

import struct
from collections import Counter

import pytest
from checks import continues, silent
from lab import Lab
from pages import (
    ALL_ONES,
    NONE,
    PAGE,
    RWX,
    Access,
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

from harness.manager.payloads import FREE, MAILBOX_WORDS, PAGE_DIRECTORY, mailbox
from harness.manager.smallvm import KVM_GET_REGS, KVM_SET_GUEST_DEBUG, SmallVm
from harness.plugin.fixtures import ClauseNotes

SOURCE, TARGET = FREE + 0x120, FREE + PAGE + 0x340
VALUE = 0x0123_4567_89AB_CDEF
TF = 0x100
CR2 = 232  # in struct kvm_sregs
KVM_GUESTDBG_STEP = 0x3  # KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP
PORT = 0x99


def _u64(vm: SmallVm, gpa: int) -> int:
    return int.from_bytes(vm.read(gpa, 8), "little")


def _put(vm: SmallVm, gpa: int, value: int = VALUE) -> None:
    vm.write(gpa, struct.pack("<Q", value))


def _where(seen: list[Access]) -> list[tuple[int, int]]:
    return [access.where for access in seen]


# -- what it tells


@pytest.mark.clause("EV-PF-PAYLOAD")
@pytest.mark.parametrize(("routine", "access"), [("read", R), ("write", W)])
@pytest.mark.parametrize("offset", [0, 0x123, 0xFF8])
def test_payload(lab: Lab, clauses: ClauseNotes, routine: str, access: int, offset: int) -> None:
    """The event has the exact address, the violated bit, and zero padding; gva may be unknown."""
    vm, session = access_pair(lab, vcpus=2)
    restrict(session, RWX & ~access, FREE)
    gva = linear(vm, FREE) + offset
    vm.order(routine, gva, VALUE, vcpu=1)
    event, seen = next_access(session, vcpu=1)
    assert len(event.payload) == 576
    assert struct.unpack_from("<BBHI", event.payload, 568) == (access, 0, 0, 0)
    assert seen.gpa == FREE + offset
    # Intel's processors tell it with each access of an instruction, AMD's do not.
    assert seen.gva == gva or (seen.gva == ALL_ONES and lab.manager.vendor == "AMD")
    clauses.note(f"gva of a {routine} is {'unknown' if seen.gva == ALL_ONES else 'known'}")
    assert seen.rip == vm.machine.linear(routine)
    assert (event.regs.rdi, event.regs.rsi) == (gva, VALUE)
    session.answer(event)
    vm.finish(vcpu=1)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("EV-PF-PAYLOAD", "EV-PF-FETCH-RIP")
def test_payload_of_a_fetch(lab: Lab) -> None:
    """For a fetch gva is rip, which is not the physical address here, and the bit is X."""
    vm, session = access_pair(lab, alias=True)
    restrict(session, R | W, fetch_page(vm))
    vm.order("slide")
    event, seen = next_access(session)
    assert struct.unpack_from("<BBHI", event.payload, 568) == (X, 0, 0, 0)
    assert seen.gva == seen.rip == vm.machine.linear("slide")
    assert seen.gpa == vm.machine.address("slide")
    restrict(session, RWX, fetch_page(vm))
    session.answer(event)
    vm.finish()


@pytest.mark.clause("EV-PF-FETCH-RIP", "EV-PF-CONTINUE")
@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.usefixtures("exact")
def test_fetches_in_a_row(lab: Lab, alias: bool) -> None:
    """Each instruction of a page that must not be executed raises its event, in order."""
    vm, session = access_pair(lab, alias=alias)
    trace = Trace(session)
    restrict(session, NONE, fetch_page(vm))
    start, end = vm.machine.linear("slide"), vm.machine.linear("slide_end")
    expected = [start, *range(start + 2, end, 3), end]  # xor, 30 increments, return
    delta = start - vm.machine.address("slide")
    for _ in range(2):
        assert perform(vm, "slide") == 30
        seen = trace.take()
        assert {access.access for access in seen} == {X}
        assert [access.rip for access in seen] == expected
        assert [access.gva for access in seen] == expected
        assert [access.gpa for access in seen] == [rip - delta for rip in expected]


@pytest.mark.clause("EV-PF-ONLYTRACKED")
@pytest.mark.parametrize(("access", "routine"), [(W, "read"), (R, "write"), (X, "read")])
def test_only_cleared_bits(lab: Lab, access: int, routine: str) -> None:
    """Hardware that cannot express a restriction is not the tool's business: no other event."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    restrict(session, RWX & ~access, FREE)
    for _ in range(3):
        perform(vm, routine, linear(vm, FREE), VALUE)
    assert trace.take() == []


# -- CONTINUE


@pytest.mark.clause("EV-PF-CONTINUE")
def test_continue_write(lab: Lab) -> None:
    """A write does not happen before CONTINUE, and happens once with it, as each later one."""
    vm, session = access_pair(lab)
    restrict(session, R | X, FREE)
    for number in range(1, 4):
        vm.order("locked", linear(vm, FREE), 5)
        event, seen = next_access(session)
        assert seen.where == (W, FREE)
        vm.stands_still(for_s=0.05)
        assert _u64(vm, FREE) == 5 * (number - 1)
        session.answer(event, "CONTINUE")
        vm.finish()
        assert _u64(vm, FREE) == 5 * number
        assert vm.word("result") == 5 * (number - 1)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-PF-CONTINUE")
@pytest.mark.parametrize(
    "routine",
    ["read", "write", "push", "pop", "sse_read", "sse_write", "x87_write", "exchange16", "locked"],
)
def test_kinds_of_instructions(lab: Lab, routine: str) -> None:
    """CONTINUE lets any kind of instruction through, also those that KVM cannot emulate."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    old = 0 if routine == "exchange16" else VALUE
    _put(vm, TARGET & -16, old)
    restrict(session, NONE, TARGET)
    reads = {"read", "pop", "sse_read"}
    both = {"exchange16", "locked"}
    for _ in range(2):
        result = perform(vm, routine, linear(vm, TARGET & -16), 0x77)
        seen = _where(trace.take())
        first, gpa = seen[0]
        assert gpa == TARGET & -16
        if routine in both:
            assert first in (R, W)
            assert len(seen) == len(set(seen)) <= 2
        else:
            assert seen == [(R if routine in reads else W, gpa)]
        after = _u64(vm, TARGET & -16)
        if routine in reads:
            assert (result, after) == (old, old)
        elif routine == "locked":
            assert (result, after) == (old, old + 0x77)
        else:
            assert after == (7 if routine == "x87_write" else 0x77)
        old = after
        assert vm.word("faults") == 0
        if routine == "exchange16":
            old = 0
            _put(vm, TARGET & -16, 0)


@pytest.mark.clause("EV-PF-CONTINUE", "SETPAGE-OK")
@pytest.mark.parametrize("allowed", [X, R | X, W | X], ids=["--x", "r-x", "-wx"])
def test_read_modify_write(lab: Lab, clauses: ClauseNotes, allowed: int) -> None:
    """An instruction that reads and writes raises what is cleared of both, each once.

    Where reading alone is cleared, the processor may report such an access as a write.
    """
    vm, session = access_pair(lab)
    trace = Trace(session)
    restrict(session, allowed, FREE)
    for number in (1, 2, 3):
        perform(vm, "modify", linear(vm, FREE))
        seen = _where(trace.take())
        assert len(seen) == len(set(seen))
        assert set(seen) <= {(bit, FREE) for bit in (R, W) if not allowed & bit}
        if not allowed & W:
            assert seen
        assert _u64(vm, FREE) == number
        clauses.note(f"events of one: {[access for access, _ in seen]}")


@pytest.mark.clause("EV-PF-CONTINUE")
def test_flags_are_the_guests(lab: Lab) -> None:
    """Flags that the guest pushes and pops on a restricted page show no trap flag of ours."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    restrict(session, NONE, FREE)
    perform(vm, "push_flags", linear(vm, FREE))
    assert _where(trace.take()) == [(W, FREE)]
    # Status flags may be anything, of the others interrupts are enabled.
    assert _u64(vm, FREE) & ~0x8D5 == 0x202
    _put(vm, FREE, 0xA02)
    assert perform(vm, "pop_flags", linear(vm, FREE)) == 0xA02
    assert _where(trace.take()) == [(R, FREE)]
    assert vm.word("traps") == 0
    vm.stop()
    assert struct.unpack("<18Q", vm.registers())[17] & TF == 0


@pytest.mark.clause("EV-PF-CONTINUE")
@pytest.mark.usefixtures("exact")
def test_guest_steps_itself(lab: Lab) -> None:
    """A guest that single-steps itself gets the same exceptions on a restricted page."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    _put(vm, FREE)
    perform(vm, "trace", linear(vm, FREE))
    traps = vm.word("traps")
    assert traps > 2
    restrict(session, NONE, FREE)
    for round in (2, 3):
        assert perform(vm, "trace", linear(vm, FREE)) == VALUE
        assert _where(trace.take()) == [(R, FREE)]
        assert vm.word("traps") == round * traps


@pytest.mark.clause("EV-PF-CONTINUE", "EV-PF-FETCH-RIP")
@pytest.mark.usefixtures("exact")
def test_system_call(lab: Lab) -> None:
    """SYSCALL and SYSRET pass alone, too, and the flags that they move are the guest's."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    assert perform(vm, "system_calls") == 0x202
    restrict(session, R | W, fetch_page(vm))
    assert perform(vm, "system_calls") == 0x202
    sites = [vm.machine.linear(label) for label in ("to_user_mode", "user_mode", "called")]
    assert [access.rip for access in trace.take()] == [*sites, sites[-1] + 3]


@pytest.mark.clause("EV-PF-CONTINUE", "EV-PF-FETCH-RIP")
@pytest.mark.usefixtures("exact")
def test_debug_status(lab: Lab) -> None:
    """Instructions that set and read DR6 pass alone, too, and what it says is the guest's."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    status = 0xFFFF0FF1  # as after breakpoint 0
    assert perform(vm, "debug_status", 0, status) == status
    restrict(session, R | W, fetch_page(vm))
    assert perform(vm, "debug_status", 0, status) == status
    assert vm.word("traps") == 0
    site = vm.machine.linear("debug_status")
    assert [access.rip - site for access in trace.take()] == [0, 3, 4, 7]


@pytest.mark.clause("EV-PF-CONTINUE")
@pytest.mark.parametrize("routine", ["write", "sse_write"])
@pytest.mark.usefixtures("exact")
def test_user_space_steps(lab: Lab, routine: str) -> None:
    """User space that single-steps the guest sees the same instructions on a restricted page."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    site = vm.machine.linear(routine)
    ends = [site + 3] if routine == "write" else [site + 5, site + 8]
    for access in (RWX, R | X):
        restrict(session, access, FREE)
        vm.stop()
        vm.order(routine, linear(vm, FREE), VALUE)
        debug = struct.pack("<II64x", KVM_GUESTDBG_STEP, 0)
        assert vm.vcpu_ioctl(KVM_SET_GUEST_DEBUG, debug)[0] == "OK"
        rips = _debug_steps(vm, 24)
        start = rips.index(site)
        assert rips[start + 1 :][: len(ends)] == ends
        assert _where(trace.take()) == ([] if access & W else [(W, FREE)])
        assert _u64(vm, FREE) == VALUE
        assert vm.vcpu_ioctl(KVM_SET_GUEST_DEBUG, bytes(72))[0] == "OK"
        vm.run()
        vm.finish()
        _put(vm, FREE, 0)
    assert vm.word("traps") == 0


def _debug_steps(vm: SmallVm, count: int) -> list[int]:
    """Run a vCPU that user space debugs that often; answer where it stopped each time."""
    steps: list[dict[str, object]] = [
        {"op": "run", "vm": vm.name, "vcpu": 0},
        {"op": "wait_exit", "vm": vm.name, "vcpu": 0, "limit_s": 5},
        {"op": "ioctl", "on": f"vcpu:{vm.name}:0", "request": KVM_GET_REGS,
         "arg": {"hex": bytes(144).hex()}, "out": True},
    ]  # fmt: skip
    answers = vm.manager.batch(steps * count, timeout_s=20)
    assert {found["reason"] for found in answers[1::3]} == {"DEBUG"}
    return [struct.unpack("<18Q", bytes.fromhex(found["out"]))[16] for found in answers[2::3]]


@pytest.mark.clause("EV-PF-CONTINUE")
def test_instruction_that_faults(lab: Lab) -> None:
    """An instruction that is let through and raises an exception raises it in the guest."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    restrict(session, NONE, FREE)
    vm.order("divide", linear(vm, FREE))
    vm.wait_word("faults", 1)
    assert _where(trace.take()) == [(R, FREE)]
    site = vm.machine.linear("divide")
    vm.wait_word("flags", 0, compare="ne")
    assert site < vm.word("fault_top") < site + 16
    assert vm.word("flags") & (TF | 2) == 2


@pytest.mark.clause("EV-PF-CONTINUE", "SETPAGE-OK")
@pytest.mark.parametrize("what", ["stack", "table"])
@pytest.mark.usefixtures("exact")
def test_delivery_of_an_exception(lab: Lab, what: str) -> None:
    """An exception whose delivery touches a restricted page is delivered, once."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    stack = FREE + 0x800
    idt = 0x2000
    restrict(session, X, FREE if what == "stack" else idt)
    for number in (1, 2):
        perform(vm, "breakpoint", linear(vm, stack))
        seen = trace.take()
        assert vm.word("traps") == number
        assert seen
        if what == "stack":
            assert {access.gpa & -PAGE for access in seen} == {FREE}
            assert {access.access for access in seen} == {R, W}
        else:
            assert {access.access for access in seen} == {R}
            assert {access.gpa & -PAGE for access in seen} == {idt}
    assert vm.word("faults") == 0


@pytest.mark.clause("EV-PF-CONTINUE", "SETPAGE-OK")
@pytest.mark.parametrize("allowed", [X, R | X], ids=["--x", "r-x"])
def test_page_tables(lab: Lab, allowed: int) -> None:
    """The processor's own accesses to the guest's page tables are let through like others."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    _put(vm, FREE)
    restrict(session, allowed, PAGE_DIRECTORY)
    for _ in range(3):
        assert perform(vm, "walk", linear(vm, FREE)) == VALUE
    seen = trace.take()
    assert {access.gpa & -PAGE for access in seen} <= {PAGE_DIRECTORY}
    assert {access.access for access in seen} <= ({R, W} if allowed == X else {W})
    if allowed == X:
        assert seen
    restrict(session, RWX, PAGE_DIRECTORY)
    vm.progresses()
    trace.take()
    assert perform(vm, "walk", linear(vm, FREE)) == VALUE
    assert trace.take() == []
    assert vm.word("faults") == 0


DEVICE = 0x18_0000
"""An address without memory: accesses to it are the device manager's."""


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE", "EV-PF-PAYLOAD")
@pytest.mark.parametrize("routine", ["port_out", "port_in", "to_device", "from_device"])
def test_accesses_of_the_emulator(lab: Lab, routine: str) -> None:
    """What KVM reads or writes for an instruction that it has to carry out is an access, too.

    The port or the device sees one access, whatever the tool was asked for.
    """
    vm, session = access_pair(lab)
    trace = Trace(session)
    memory, device = linear(vm, FREE), linear(vm, DEVICE)
    out = {"out": True, "port": PORT, "data": "5a"}
    expected = {
        "port_out": ("port_out", 0, memory, R, {"io": out}),
        "port_in": ("port_in", memory, 0, W, {"io": out | {"out": False, "data": "00"}}),
        "to_device": (
            "move_byte", device, memory, R,
            {"mmio": {"gpa": DEVICE, "write": True, "data": "5a"}},
        ),
        "from_device": (
            "move_byte", memory, device, W,
            {"mmio": {"gpa": DEVICE, "write": False, "data": "00"}},
        ),
    }  # fmt: skip
    label, first, second, bit, seen_outside = expected[routine]
    restrict(session, X, FREE)
    for _ in range(2):
        vm.write(FREE, b"\x5a")
        vm.order(label, first, second)
        found = vm.wait_exit()
        assert {name: getattr(found, name) for name in seen_outside} == seen_outside
        vm.run()
        vm.finish()
        (seen,) = trace.take()
        assert seen.where == (bit, FREE)
        assert seen.gva in (memory, ALL_ONES)
        assert vm.read(FREE, 1) == (b"\x5a" if bit == R else b"\0")
    silent(session, vcpus=[0])


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE")
def test_locked_access_of_the_emulator(lab: Lab) -> None:
    """A locked instruction that KVM carries out is held to the restriction, too, and done once."""
    vm, session = access_pair(lab)
    lab.set_parameter("force_emulation_prefix", "1")
    trace = Trace(session)
    assert perform(vm, "emulated_locked", linear(vm, FREE), 5) == 0
    restrict(session, R | X, FREE)
    for number in (1, 2):
        assert perform(vm, "emulated_locked", linear(vm, FREE), 5) == 5 * number
        seen = trace.take()
        assert _where(seen) == [(W, FREE)]
        assert seen[0].rip == vm.machine.linear("emulated_site")
    assert _u64(vm, FREE) == 15


@pytest.mark.clause("EV-PF-CONTINUE")
@pytest.mark.usefixtures("exact")
def test_instruction_that_page_faults(lab: Lab) -> None:
    """A page fault of the guest's own, met by what is let through, has its address and code."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    nowhere = 0x1234_5678_0000
    restrict(session, R | W, fetch_page(vm))
    vm.order("own_write", nowhere, 5)
    vm.wait_word("flags", 0, compare="ne")  # the handler's last word: CS here, behind the code
    site = vm.machine.linear("own_write")
    assert [(seen.access, seen.rip) for seen in trace.take()] == [(X, site)]
    assert struct.unpack("<2Q", vm.read(mailbox(0) + MAILBOX_WORDS["fault_top"], 16)) == (2, site)
    vm.stop()
    assert struct.unpack_from("<Q", vm.special_registers(), CR2) == (nowhere,)


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE", "EV-PF-MULTI", "EV-PF-PAYLOAD")
def test_device_to_a_page_boundary(lab: Lab) -> None:
    """What is read from a device and stored on two pages is read once, and stored as a whole."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    border = FREE + PAGE
    start = border - 3
    restrict(session, R | X, FREE, border)
    for _ in range(2):
        _put(vm, start)
        vm.order("move", linear(vm, start), linear(vm, DEVICE))
        found = vm.wait_exit()
        assert found.mmio == {"gpa": DEVICE, "write": False, "data": "00" * 8}
        vm.run()
        vm.finish()
        seen = trace.take()
        assert _where(seen) == [(W, start), (W, border)]
        for access in seen:
            assert access.gva in (linear(vm, access.gpa), ALL_ONES)
        assert _u64(vm, start) == 0
    silent(session, vcpus=[0])


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE")
@pytest.mark.usefixtures("exact")
def test_guest_steps_itself_through_the_emulator(lab: Lab) -> None:
    """A guest that single-steps itself gets over an instruction that KVM carries out."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    for round in (1, 2):
        vm.order("trace_out", 0, linear(vm, FREE))
        vm.wait_exit()
        vm.run()
        traps = vm.finish()["traps"]
        if round == 1:
            expected = traps
            restrict(session, X, FREE)
    assert traps == 2 * expected
    assert _where(trace.take()) == [(R, FREE)]


# -- several events of one instruction


@pytest.mark.clause("EV-PF-MULTI", "EV-PF-CONTINUE")
def test_two_pages(lab: Lab) -> None:
    """A move from one restricted page to another raises one event for each, and happens once."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    restrict(session, NONE, SOURCE, TARGET)
    for number in (1, 2):
        _put(vm, SOURCE, number)
        perform(vm, "move", linear(vm, TARGET), linear(vm, SOURCE))
        assert sorted(_where(trace.take())) == [(R, SOURCE), (W, TARGET)]
        assert _u64(vm, TARGET) == number


@pytest.mark.clause("EV-PF-MULTI")
def test_second_access_is_held(lab: Lab) -> None:
    """CONTINUE opens what was reported and no more: the second page waits for its own reply."""
    vm, session = access_pair(lab)
    restrict(session, NONE, SOURCE, TARGET)
    _put(vm, SOURCE)
    vm.order("move", linear(vm, TARGET), linear(vm, SOURCE))
    first, seen_first = next_access(session)
    session.answer(first)
    second, seen_second = next_access(session)
    assert {seen_first.where, seen_second.where} == {(R, SOURCE), (W, TARGET)}
    assert seen_first.rip == seen_second.rip == vm.machine.linear("move")
    vm.stands_still(for_s=0.05)
    assert _u64(vm, TARGET) == 0
    session.answer(second)
    vm.finish()
    assert _u64(vm, TARGET) == VALUE


@pytest.mark.clause("EV-PF-MULTI", "EV-PF-CONTINUE")
@pytest.mark.parametrize("routine", ["read", "write", "locked"])
def test_page_boundary(lab: Lab, routine: str) -> None:
    """An access that lies on two restricted pages raises an event for each."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    border = FREE + PAGE
    start = border - 3
    _put(vm, start)
    restrict(session, NONE, FREE, border)
    result = perform(vm, routine, linear(vm, start), 0x1111_2222_3333_4444)
    seen = trace.take()
    if routine == "locked":
        assert {access.gpa & -PAGE for access in seen} == {FREE, border}
        assert (result, _u64(vm, start)) == (VALUE, VALUE + 0x1111_2222_3333_4444)
    else:
        bit, after = (R, VALUE) if routine == "read" else (W, 0x1111_2222_3333_4444)
        assert sorted(_where(seen)) == [(bit, start), (bit, border)]
        assert _u64(vm, start) == after


@pytest.mark.clause("EV-PF-MULTI", "EV-PF-FETCH-RIP")
@pytest.mark.usefixtures("exact")
def test_instruction_on_two_pages(lab: Lab) -> None:
    """An instruction that lies on two pages raises an event for each that it must not run on.

    gva is rip, or the first byte on the page in question.
    """
    vm, session = access_pair(lab)
    trace = Trace(session)
    site = vm.machine.address("crossing")
    first, second = site & -PAGE, (site & -PAGE) + PAGE
    restrict(session, R | W, second)
    assert perform(vm, "crossing") == 0x1122_3344_5566_7788
    seen = trace.take()
    assert [access.access for access in seen] == [X, X]  # the instruction, and the return
    assert [access.gpa & -PAGE for access in seen] == [second, second]
    assert [access.rip for access in seen] == [vm.machine.linear("crossing") + n for n in (0, 10)]
    assert seen[0].gva in (seen[0].rip, seen[0].rip + 4)
    assert seen[1].gva == seen[1].rip
    restrict(session, R | W, first)
    assert perform(vm, "crossing") == 0x1122_3344_5566_7788
    seen = trace.take()
    assert Counter((a.access, a.gpa & -PAGE) for a in seen) == {(X, first): 1, (X, second): 2}


@pytest.mark.clause("EV-PF-MULTI")
@pytest.mark.parametrize(("routine", "bit"), [("own_write", W), ("own_read", R)])
@pytest.mark.usefixtures("exact")
def test_fetch_and_access(lab: Lab, clauses: ClauseNotes, routine: str, bit: int) -> None:
    """An instruction on a restricted page that accesses this page raises one after the other.

    A processor that can execute only what it can read, as AMD's, may let such a read through.
    """
    vm, session = access_pair(lab)
    trace = Trace(session)
    data = fetch_page(vm) + 0x800
    _put(vm, data)
    restrict(session, NONE, fetch_page(vm))
    perform(vm, routine, linear(vm, data), 5)
    assert _u64(vm, data) == (5 if bit == W else VALUE)
    site = vm.machine.address(routine)
    seen = _where(trace.take())
    if bit == R and lab.manager.vendor == "AMD" and (bit, data) not in seen:
        clauses.note("a page that is opened for execution can be read")
        seen.insert(1, (bit, data))
    assert seen == [(X, site), (bit, data), (X, site + 3)]


@pytest.mark.clause("EV-PF-MULTI", "EV-PF-CONTINUE")
def test_repeated_move(lab: Lab) -> None:
    """A repeated move between restricted pages does all its rounds, and each page is reported."""
    vm, session = access_pair(lab)
    trace = Trace(session)
    data = bytes(range(100, 116))
    restrict(session, NONE, SOURCE, TARGET)
    vm.write(SOURCE, data)
    perform(vm, "move_many", linear(vm, TARGET), linear(vm, SOURCE))
    seen = Counter((a.access, a.gpa & -PAGE) for a in trace.take())
    assert set(seen) == {(R, SOURCE & -PAGE), (W, TARGET & -PAGE)}
    assert vm.read(TARGET - 8, 32) == bytes(8) + data + bytes(8)
    perform(vm, "read", linear(vm, TARGET))
    assert _where(trace.take()) == [(R, TARGET)]


# -- RETRY, and the end


@pytest.mark.clause("EV-PF-RETRY")
def test_retry(lab: Lab) -> None:
    """RETRY executes the instruction again: the same event as long as the page is restricted."""
    vm, session = access_pair(lab)
    restrict(session, R | X, FREE)
    vm.order("locked", linear(vm, FREE), 5)
    sequence = []
    for _ in range(10):
        event, seen = next_access(session)
        assert (seen.where, seen.rip) == ((W, FREE), vm.machine.linear("locked"))
        sequence.append(event.seq)
        session.answer(event, "RETRY")
    event, _ = next_access(session)
    assert _u64(vm, FREE) == 0
    assert sequence == sorted(set(sequence))
    restrict(session, RWX, FREE)
    session.answer(event, "RETRY")
    vm.finish()
    assert (_u64(vm, FREE), vm.word("result")) == (5, 0)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-PF-RETRY")
def test_retry_elsewhere(lab: Lab) -> None:
    """RETRY after the tool changed rip goes on there, without the access."""
    vm, session = access_pair(lab)
    restrict(session, R | X, FREE)
    vm.order("write", linear(vm, FREE), VALUE)
    event, _ = next_access(session)
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rip=event.regs.rip + 3, rax=77).ok()
    session.answer(event, "RETRY")
    vm.finish()
    assert (_u64(vm, FREE), vm.word("result")) == (0, 77)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-PF-CONTINUE")
def test_continue_with_other_registers(lab: Lab) -> None:
    """Registers that the tool sets in the event are those that the instruction uses."""
    vm, session = access_pair(lab)
    restrict(session, R | X, FREE)
    vm.order("write", linear(vm, FREE), VALUE)
    event, _ = next_access(session)
    session.command("VCPU_SET_REGISTERS", regs=event.regs, rsi=0x55).ok()
    session.answer(event)
    vm.finish()
    assert _u64(vm, FREE) == 0x55
    silent(session, vcpus=[0])


@pytest.mark.clause("EVT-CRASH")
def test_crash(lab: Lab) -> None:
    """CRASH ends KVM_RUN with the shutdown exit, without the access."""
    vm, session = access_pair(lab, vcpus=2)
    restrict(session, R | X, FREE)
    vm.order("write", linear(vm, FREE), VALUE, vcpu=1)
    event, _ = next_access(session, vcpu=1)
    session.answer(event, "CRASH")
    assert vm.wait_exit(1).reason == "SHUTDOWN"
    assert _u64(vm, FREE) == 0
    continues(session)
    vm.progresses(vcpu=0)


@pytest.mark.clause("EVT-DISCONNECT-CONTINUE")
@pytest.mark.parametrize("how", ["close", "unhook", "shutdown"])
def test_disconnect(lab: Lab, how: str) -> None:
    """When the session ends the access of the waiting vCPU happens, and all later ones."""
    vm, session = access_pair(lab)
    restrict(session, NONE, FREE)
    vm.order("sse_write", linear(vm, FREE), VALUE)
    next_access(session)
    assert _u64(vm, FREE) == 0
    lab.end(vm, session, how)
    vm.finish()
    assert _u64(vm, FREE) == VALUE
    perform(vm, "sse_write", linear(vm, FREE), 5)
    assert _u64(vm, FREE) == 5


@pytest.mark.clause("EVT-VCPU-HELD", "EVT-OTHER-VCPU-RUN")
def test_held_alone(lab: Lab) -> None:
    """A vCPU in a PF event stands still, also against signals, while others run."""
    vm, session = access_pair(lab, vcpus=2)
    restrict(session, R | X, FREE)
    vm.order("write", linear(vm, FREE), VALUE)
    event, _ = next_access(session)
    vm.kick()
    vm.progresses(vcpu=1, rounds=20)
    vm.stands_still()
    assert _u64(vm, FREE) == 0
    session.answer(event)
    if vm.poll_word("done", 1, compare="ge", timeout_s=0.5) is None:
        # The kick came first: the instruction is executed, and reported, when it runs again.
        vm.stop()
        Trace(session)
        vm.run(0)
        vm.finish()
    assert _u64(vm, FREE) == VALUE


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE")
def test_everything_restricted(lab: Lab) -> None:
    """A guest all of whose memory is restricted still does what it is told."""
    vm, session = access_pair(lab, alias=True)
    trace = Trace(session)
    restrict(session, NONE, *range(0, 0x40000, PAGE))
    _put(vm, SOURCE)
    perform(vm, "move", linear(vm, TARGET), linear(vm, SOURCE))
    restrict(session, RWX, *range(0, 0x40000, PAGE))
    assert _u64(vm, TARGET) == VALUE
    kinds = {access.access for access in trace.take()}
    assert kinds == {R, W, X}
    vm.progresses()
    assert vm.word("faults") == 0
