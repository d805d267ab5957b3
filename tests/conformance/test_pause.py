# SPDX-License-Identifier: GPL-2.0-or-later
"""VM_PAUSE_VCPU and the PAUSE event."""

from __future__ import annotations

import pytest
from checks import continues, enable, ends_dead, next_event_of, silent
from lab import Lab

from harness.errors import ConformanceError, SilenceError, UsageError
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.plugin.fixtures import ClauseNotes
from harness.tool import Pending, Session

# The reference allows 1001 outstanding requests; whoever allows more has no limit in practice.
MANY = 1300
SOON_S, HELD = 0.3, 2


def _pause(session: Session, *, vcpu: int = 0, wait: int = 0) -> None:
    session.command("VM_PAUSE_VCPU", vcpu=vcpu, wait=wait).ok()


@pytest.mark.clause("PAUSE-OK")
@pytest.mark.parametrize("wait", [0, 1])
def test_pause(lab: Lab, wait: int) -> None:
    """VM_PAUSE_VCPU succeeds, one PAUSE event comes, and the vCPU stands until it is answered."""
    vm, session = lab.pair(vcpus=2)
    vm.progresses(vcpu=1)
    _pause(session, vcpu=1, wait=wait)
    event = next_event_of(session, "PAUSE", vcpu=1)
    vm.stands_still(vcpu=1)
    vm.progresses(vcpu=0)
    session.answer(event)
    vm.progresses(vcpu=1)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("PAUSE-OK")
def test_pause_before_first_entry(lab: Lab) -> None:
    """A vCPU that has not run yet sends its PAUSE event before it executes anything."""
    vm, session = lab.pair(run=False)
    _pause(session)
    silent(session)
    vm.run()
    event = next_event_of(session, "PAUSE")
    assert event.regs.rip == vm.machine.linear("_start")
    assert vm.word("ticks") == 0
    session.answer(event)
    vm.progresses()


@pytest.mark.clause("PAUSE-OK")
def test_pause_halted(lab: Lab) -> None:
    """A vCPU that is halted in the kernel sends its PAUSE event too, and stays halted."""
    vm, session = lab.pair(payload="halt", irqchip=True)
    vm.wait_word("ticks", 1)
    vm.stands_still()
    for wait in (0, 1):
        _pause(session, wait=wait)
        event = next_event_of(session, "PAUSE")
        assert event.regs.rip == vm.machine.linear("halt_site") + 1
        session.answer(event)
    session.command("VCPU_GET_INFO").ok()
    vm.stands_still()
    assert vm.word("ticks") == 1


@pytest.mark.clause("PAUSE-COUNT")
@pytest.mark.parametrize("count", [1, 2, 7])
def test_count(lab: Lab, count: int) -> None:
    """n successful commands yield n PAUSE events, one after the other, and the vCPU runs after."""
    vm, session = lab.pair()
    vm.progresses()
    for _ in range(count):
        _pause(session)
    ticks = set()
    for _ in range(count):
        event = next_event_of(session, "PAUSE")
        ticks.add(vm.word("ticks"))
        session.answer(event)
    assert len(ticks) == 1, "guest code ran between two events"
    vm.progresses()
    silent(session, vcpus=[0])
    assert session.count("PAUSE") == count


@pytest.mark.clause("PAUSE-WAIT")
def test_wait(lab: Lab) -> None:
    """With wait=1 no guest code runs any more once the reply is there."""
    vm, session = lab.pair(vcpus=2)
    for _ in range(10):
        for vcpu in (0, 1):
            vm.progresses(vcpu=vcpu, rounds=1)
        for vcpu in (0, 1):
            _pause(session, vcpu=vcpu, wait=1)
        before = [vm.word("ticks", vcpu=vcpu) for vcpu in (0, 1)]
        events = [session.next_event("PAUSE", vcpu=vcpu, timeout_s=5) for vcpu in (0, 1)]
        vm.stands_still(vcpu=1, for_s=0.02)
        assert [vm.word("ticks", vcpu=vcpu) for vcpu in (0, 1)] == before
        for event in events:
            session.answer(event)


@pytest.mark.clause("PAUSE-WAIT", "PAUSE-NOWAIT")
@pytest.mark.parametrize("wait", [0, 1])
def test_vcpu_that_cannot_leave(lab: Lab, wait: int) -> None:
    """While a vCPU cannot leave the guest wait=1 has no reply, and wait=0 has one at once.

    The host's processor that executes the guest is held from outside.
    """
    # It may be out of the guest when it is held, on a slow host most of the time: until the reply
    # was missing twice, it is tried again.
    tries = 20 if wait else 3
    for cpu in (0, 1):
        tried, held = _pauses_of_a_held_vcpu(lab, wait=wait, cpu=cpu, tries=tries)
        if tried == tries or held == HELD:
            assert held == (HELD if wait else 0), f"{held} of {tried} had no reply"
            return
    skip_clause("this host stands still as a whole while one of its processors does")


def _pauses_of_a_held_vcpu(lab: Lab, *, wait: int, cpu: int, tries: int) -> tuple[int, int]:
    """How often a vCPU was paused so, and how often there was no reply meanwhile."""
    vm = lab.vm(payload="system")  # which does not leave the guest by itself
    session = lab.hook_apart(vm, cpu=cpu)
    other = lab.hook_apart(lab.vm(), cpu=cpu, run=False)
    tried = held = 0
    for _ in range(2 * tries):
        vm.progresses()
        paused = None
        try:
            with lab.manager.host.frozen(cpu):
                # The host lives on, unless it waits for that processor, as the network may.
                if _comes(other.send("GET_VERSION"), SOON_S):
                    paused = session.send("VM_PAUSE_VCPU", wait=wait)
                    came = _comes(paused, SOON_S if wait else 2)
                    # Where the kernel waits for the vCPU, it does so with the other processor.
                    if came or wait or _comes(other.send("GET_VERSION"), SOON_S):
                        tried += 1
                        held += not came
        except UsageError as error:
            skip_clause(error.message)
        if paused is not None:
            paused.reply(10).ok()
            session.answer(next_event_of(session, "PAUSE"))
        if tried == tries or held == HELD:
            break
    return tried, held


def _comes(pending: Pending, within_s: float) -> bool:
    try:
        pending.reply(within_s).ok()
    except SilenceError:
        return False
    return True


@pytest.mark.clause("PAUSE-WAIT")
def test_wait_outside_of_the_guest(lab: Lab) -> None:
    """With wait=1 a vCPU that is outside of the guest already does not delay the reply."""
    _, session = lab.pair(run=False)
    session.command("VM_PAUSE_VCPU", wait=1, timeout_s=5).ok()
    continues(session)


@pytest.mark.clause("PAUSE-NOWAIT")
def test_nowait(lab: Lab) -> None:
    """With wait=0 the reply comes at once, from a vCPU in an event or outside KVM_RUN too."""
    vm, session = lab.pair(vcpus=2, run=False)
    vm.run(0)
    enable(session, "HYPERCALL", vcpu=0)
    vm.call_out(1, vcpu=0)
    event = next_event_of(session, "HYPERCALL", vcpu=0)
    for vcpu in (0, 1):
        session.command("VM_PAUSE_VCPU", vcpu=vcpu, wait=0, timeout_s=5).ok()
    silent(session)
    session.answer(event)
    session.answer(next_event_of(session, "PAUSE", vcpu=0))
    vm.wait_word("done", 1, vcpu=0)


@pytest.mark.clause("PAUSE-EINVAL-PADDING")
def test_padding(lab: Lab) -> None:
    """Each byte of padding makes the command answer KVM_EINVAL, and no event comes."""
    vm, session = lab.pair()
    for wrong in session.codec.wrong_paddings("VM_PAUSE_VCPU"):
        session.command("VM_PAUSE_VCPU", vcpu=0, wait=1, **wrong).fails("KVM_EINVAL")
    vm.progresses()
    silent(session, vcpus=[0])


@pytest.mark.clause("PAUSE-EINVAL-WAIT")
def test_wait_above_one(lab: Lab) -> None:
    """wait above 1 answers KVM_EINVAL, and no event comes."""
    vm, session = lab.pair()
    for wait in (2, 3, 0x80, 0xFF):
        session.command("VM_PAUSE_VCPU", vcpu=0, wait=wait).fails("KVM_EINVAL")
    vm.progresses()
    silent(session, vcpus=[0])


@pytest.mark.clause("PAUSE-EINVAL-VCPU")
def test_index(lab: Lab) -> None:
    """An index that is not below the number of vCPUs answers KVM_EINVAL, and no event comes."""
    vm, session = lab.pair(vcpus=2)
    for vcpu in (2, 3, 0x100, 0x8000, 0xFFFF):
        session.command("VM_PAUSE_VCPU", vcpu=vcpu, wait=1).fails("KVM_EINVAL")
    vm.progresses(vcpu=1)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("PAUSE-EAGAIN")
def test_not_ready(lab: Lab, clauses: ClauseNotes) -> None:
    """A vCPU that waits to be started answers KVM_EAGAIN; the reference code succeeds instead."""
    vm, session = lab.pair(vcpus=2, irqchip=True)
    vm.progresses(vcpu=0)
    error = session.command("VM_PAUSE_VCPU", vcpu=1, wait=0).error
    if error not in (None, "KVM_EAGAIN"):
        raise ConformanceError(f"VM_PAUSE_VCPU answered {error}, expected KVM_EAGAIN or success")
    clauses.seen("PAUSE-EAGAIN", "eagain" if error else "never")
    if error:
        silent(session, vcpus=[0])
    vm.stands_still(vcpu=1)
    continues(session)


@pytest.mark.clause("PAUSE-EBUSY", "PAUSE-DROP-ON-CLOSE")
def test_too_many(lab: Lab, clauses: ClauseNotes) -> None:
    """Too many queued PAUSE requests answer KVM_EBUSY; all vanish when the session ends."""
    vm, session = lab.pair(vcpus=2, run=False)
    vm.run(1)
    sent = [session.send("VM_PAUSE_VCPU", vcpu=0, wait=0) for _ in range(MANY)]
    errors = [pending.reply(30).error for pending in sent]
    accepted = errors.index("KVM_EBUSY") if "KVM_EBUSY" in errors else MANY
    assert accepted == lab.profile.constants.get("MAX_PAUSE_REQUESTS", accepted) < MANY
    assert errors == [None] * accepted + ["KVM_EBUSY"] * (MANY - accepted)
    clauses.note(f"{accepted} PAUSE requests were queued before KVM_EBUSY")
    # The limit is the vCPU's own.
    _pause(session, vcpu=1)
    session.answer(next_event_of(session, "PAUSE", vcpu=1))
    vm.progresses(vcpu=1)

    session.close()
    ends_dead(lab.manager, vm)
    vm.run(0)
    vm.progresses(vcpu=0)
    assert vm.unhook() == "OK"
    again = lab.hook(vm)
    vm.progresses(vcpu=0)
    silent(again, vcpus=[0, 1])
    _pause(again, vcpu=0)
    again.answer(next_event_of(again, "PAUSE", vcpu=0))
    silent(again, vcpus=[0, 1])


@pytest.mark.clause("PAUSE-EBUSY")
def test_room_again(lab: Lab) -> None:
    """After KVM_EBUSY each PAUSE event that was sent makes room for one more request."""
    vm, session = lab.pair(run=False)
    sent = [session.send("VM_PAUSE_VCPU", wait=0) for _ in range(MANY)]
    assert sent[-1].reply(30).error == "KVM_EBUSY"
    vm.run()
    session.answer(next_event_of(session, "PAUSE"))
    event = next_event_of(session, "PAUSE")
    for _ in range(2):
        _pause(session)
    session.command("VM_PAUSE_VCPU", wait=0).fails("KVM_EBUSY")
    session.answer(event)
    next_event_of(session, "PAUSE")


@pytest.mark.clause("PAUSE-EPERM")
def test_disallowed_event(lab: Lab) -> None:
    """While the PAUSE event is disallowed the command answers KVM_EPERM, and no event comes."""
    vm, session = lab.pair()
    assert vm.event("PAUSE", 0) == "OK"
    for wait in (0, 1):
        session.command("VM_PAUSE_VCPU", wait=wait).fails("KVM_EPERM")
    vm.progresses()
    silent(session, vcpus=[0])
    assert vm.event("PAUSE", 1) == "OK"
    _pause(session)
    session.answer(next_event_of(session, "PAUSE"))


@pytest.mark.clause("PAUSE-DROP-ON-CLOSE")
def test_unhook_drops_requests(lab: Lab) -> None:
    """PAUSE requests that were not sent as events yet are gone after UNHOOK and a new HOOK."""
    vm, session = lab.pair()
    for _ in range(5):
        _pause(session)
    next_event_of(session, "PAUSE")
    assert vm.unhook() == "OK"
    vm.progresses()
    again = lab.hook(vm)
    vm.progresses()
    silent(again, vcpus=[0])


@pytest.mark.clause("EV-PAUSE-LOWPRIO")
def test_after_commands(lab: Lab) -> None:
    """PAUSE comes only when no command is queued for the vCPU, requested before them or not."""
    vm, session = lab.pair(run=False)
    _pause(session)
    sent = [session.send("VCPU_GET_INFO") for _ in range(5)]
    _pause(session)
    sent += [session.send("VCPU_GET_REGISTERS", nmsrs=0) for _ in range(5)]
    continues(session)
    vm.run()
    first = next_event_of(session, "PAUSE")
    for pending in sent:
        assert pending.reply(5).ok().received_ns <= first.received_ns
    order = [message.kind for message in session.received if message.name != "GET_VERSION"]
    assert order[-1] == "event", order
    session.answer(first)
    session.answer(next_event_of(session, "PAUSE"))
    vm.progresses()


@pytest.mark.clause("EV-PAUSE-LOWPRIO")
@pytest.mark.parametrize(("kind", "name"), [(0, "HYPERCALL"), (1, "BREAKPOINT")])
def test_after_other_event(lab: Lab, kind: int, name: str) -> None:
    """A PAUSE that is requested during another event comes after it, before guest code runs."""
    vm, session = lab.pair()
    enable(session, name)
    vm.call_out(1, kind=kind)
    event = next_event_of(session, name)
    ticks = vm.word("ticks")
    _pause(session)
    silent(session, vcpus=[0])
    session.answer(event)
    pause = next_event_of(session, "PAUSE")
    assert vm.word("ticks") == ticks
    assert vm.word("done") == 0
    session.answer(pause)
    vm.wait_word("done", 1)
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-PAUSE-NOTCONTROLLED", "VCPUCTLEVT-IMPLICIT")
@pytest.mark.parametrize("enabled", [None, 0, 1])
def test_not_controlled(vm: SmallVm, session: Session, enabled: int | None) -> None:
    """PAUSE comes whether VCPU_CONTROL_EVENTS was never used for it, disabled or enabled it."""
    vm.run()
    if enabled is not None:
        enable(session, "PAUSE", on=bool(enabled))
        vm.progresses()
        silent(session, vcpus=[0])
    _pause(session)
    session.answer(next_event_of(session, "PAUSE"))
    vm.progresses()
