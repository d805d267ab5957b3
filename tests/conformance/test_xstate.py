# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_GET_XCR, VCPU_GET_XSAVE, VCPU_SET_XSAVE, and the XSETBV event."""

from __future__ import annotations

from typing import Any

import pytest
from causes import CR4_OSXSAVE, CR4_PAE, pair_for, shows_xsetbv
from checks import enable, next_event_of, requires, silent
from lab import Lab
from userspace import get_xsave, set_xcr0

from harness.abi import Reply, load_clauses
from harness.manager.payloads import MAILBOX_WORDS, mailbox
from harness.manager.smallvm import SmallVm
from harness.tool import EventMessage, Session

CR4_OSFXSR = 0x600  # and OSXMMEXCPT
X87, SSE, AVX = 1, 2, 4
# Where the XSAVE area has them (Intel SDM volume 1, "Legacy Region of an XSAVE Area").
MXCSR, XMM0, XMM5, XSTATE_BV = 24, 160, 160 + 5 * 16, 512
PATTERN = bytes(range(0x10, 0x20)) + bytes(range(0xA0, 0xB0))
OTHER = bytes(range(0x40, 0x50)) + bytes(range(0x60, 0x70))


def _area(vcpu: int = 0) -> int:
    return mailbox(vcpu) + MAILBOX_WORDS["area"]


def _xsave_vm(lab: Lab, *, vcpus: int = 1) -> tuple[SmallVm, Session]:
    """A guest with extended states switched on, PATTERN in xmm0 and xmm5 of each vCPU."""
    vm, session = lab.pair(payload="system", vcpus=vcpus)
    requires(session, command="VCPU_GET_XSAVE")
    for vcpu in range(vcpus):
        vm.perform("set_cr4", CR4_PAE | CR4_OSXSAVE | CR4_OSFXSR, vcpu=vcpu)
        # A CPU that executes XSETBV in the guest, unseen by KVM, may lose it at an exit.
        assert any(
            vm.perform("set_xcr", 0, X87 | SSE, vcpu=vcpu)["result"] == X87 | SSE for _ in range(3)
        )
        vm.write(_area(vcpu), PATTERN)
        assert vm.perform("load_xmm", vcpu=vcpu)["faults"] == 0
    return vm, session


def _xmm(vm: SmallVm, *, vcpu: int = 0) -> bytes:
    """What the guest finds in xmm0 and xmm5."""
    vm.write(_area(vcpu), bytes(32))
    vm.perform("store_xmm", vcpu=vcpu)
    return vm.read(_area(vcpu), 32)


def _get(session: Session, *, vcpu: int = 0) -> bytes:
    reply = session.command("VCPU_GET_XSAVE", vcpu=vcpu).ok()
    assert len(reply.raw) == 8 + 4096
    return reply.raw[8:]


def _record(area: bytes) -> dict[str, Any]:
    """An area as the codec takes it."""
    words = [int.from_bytes(area[at : at + 4], "little") for at in range(0, len(area), 4)]
    return {"region": words}


def _set(session: Session, area: bytes, *, vcpu: int = 0, length: int | None = None) -> Reply:
    """Ask for other XSAVE state; before v12 nothing is around the area."""
    request = session.profile.command("VCPU_SET_XSAVE").request
    record = _record(area)
    fields = {"xsave": record} if request and request.has("xsave") else record
    return session.command("VCPU_SET_XSAVE", vcpu=vcpu, length=length, **fields)


def _patched(area: bytes, at: int, data: bytes) -> bytes:
    return area[:at] + data + area[at + len(data) :]


def _xcr0(session: Session, *, vcpu: int = 0) -> int:
    value: int = session.command("VCPU_GET_XCR", vcpu=vcpu, xcr=0).ok().fields.value
    return value


@pytest.mark.clause("GETXCR-OK")
def test_xcr0(lab: Lab) -> None:
    """VCPU_GET_XCR answers XCR0 of that vCPU as user space set it, running and in an event."""
    vm, session = lab.pair(payload="system", vcpus=2)
    requires(session, command="VCPU_GET_XCR")
    assert [_xcr0(session, vcpu=vcpu) for vcpu in (0, 1)] == [X87, X87]
    vm.stop(1)
    set_xcr0(vm, X87 | SSE, vcpu=1)
    vm.run(1)
    assert [_xcr0(session, vcpu=vcpu) for vcpu in (0, 1)] == [X87, X87 | SSE]
    session.command("VM_PAUSE_VCPU", vcpu=1, wait=1).ok()
    event = next_event_of(session, "PAUSE", vcpu=1)
    assert _xcr0(session, vcpu=1) == X87 | SSE
    session.answer(event)
    vm.progresses(vcpu=1)


@pytest.mark.clause("GETXCR-OK")
def test_xcr0_of_the_guest(lab: Lab) -> None:
    """After the guest changed XCR0 VCPU_GET_XCR answers the new value."""
    vm, session = lab.pair(payload="system")
    requires(session, command="VCPU_GET_XCR")
    shows_xsetbv(lab, vm)
    vm.perform("identify", 0xD)
    supported = vm.read(_area(), 1)[0]
    for value in [X87 | SSE, X87] + [X87 | SSE | AVX] * bool(supported & AVX):
        assert vm.perform("set_xcr", 0, value)["result"] == value
        assert _xcr0(session) == value


@pytest.mark.clause("GETXCR-EINVAL-XCR")
def test_other_xcr(lab: Lab) -> None:
    """Any other extended control register answers KVM_EINVAL."""
    _, session = lab.pair(payload="system")
    requires(session, command="VCPU_GET_XCR")
    for xcr in (1, 2, 7, 0x80, 0xFF):
        session.command("VCPU_GET_XCR", xcr=xcr).fails("KVM_EINVAL")
    session.command("VCPU_GET_XCR", xcr=0).ok()


def _watched(lab: Lab, *, vcpus: int = 1) -> tuple[SmallVm, Session]:
    vm, session = pair_for(lab, "XSETBV", vcpus=vcpus)
    for vcpu in range(vcpus):
        vm.perform("set_cr4", CR4_PAE | CR4_OSXSAVE, vcpu=vcpu)
    enable(session, "XSETBV", vcpu=vcpus - 1)
    return vm, session


def _event(session: Session, old: int, new: int, *, vcpu: int = 0) -> EventMessage:
    event = next_event_of(session, "XSETBV", vcpu=vcpu)
    fields = event.fields
    assert (fields.xcr, fields.old_value, fields.new_value) == (0, old, new)
    return event


@pytest.mark.clause("EV-XSETBV-PAYLOAD")
def test_xsetbv(lab: Lab) -> None:
    """Each change of XCR0 is one event with both values; the guest has the new one after it."""
    vm, session = _watched(lab)
    vm.perform("identify", 0xD)
    values = [X87 | SSE, X87, X87 | SSE]
    values += [X87 | SSE | AVX, X87] if vm.read(_area(), 1)[0] & AVX else []
    old = X87
    for new in values:
        vm.order("set_xcr", 0, new)
        event = _event(session, old, new)
        session.answer(event)
        words = vm.finish()
        assert (words["result"], words["faults"]) == (new, 0)
        # The same once more is no change.
        assert vm.perform("set_xcr", 0, new)["result"] == new
        old = new
    silent(session, vcpus=[0])


@pytest.mark.clause("EV-XSETBV-PAYLOAD")
def test_no_xsetbv(lab: Lab) -> None:
    """No event: of another vCPU, of a value or register that the CPU refuses, of user space."""
    vm, session = _watched(lab, vcpus=2)
    assert vm.perform("set_xcr", 0, X87 | SSE, vcpu=0)["result"] == X87 | SSE
    for faults, (xcr, value) in enumerate([(0, 0), (0, X87 | AVX), (0, 1 << 63 | X87), (2, 1)], 1):
        words = vm.perform("set_xcr", xcr, value, vcpu=1)
        assert (words["faults"], words["vector"]) == (faults, 13)
    vm.stop(1)
    set_xcr0(vm, X87 | SSE, vcpu=1)
    vm.run(1)
    vm.progresses(vcpu=1)
    silent(session, vcpus=[0, 1])
    vm.order("set_xcr", 0, X87, vcpu=1)
    session.answer(_event(session, X87 | SSE, X87, vcpu=1))
    assert vm.finish(vcpu=1)["result"] == X87
    enable(session, "XSETBV", vcpu=1, on=False)
    assert vm.perform("set_xcr", 0, X87 | SSE, vcpu=1)["result"] == X87 | SSE
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("GETXSAVE-OK")
def test_get_xsave(lab: Lab) -> None:
    """VCPU_GET_XSAVE answers 4096 bytes, those that user space gets, with the guest's values."""
    vm, session = _xsave_vm(lab, vcpus=2)
    vm.write(_area(0), OTHER)
    vm.perform("load_xmm", vcpu=0)
    areas = [_get(session, vcpu=vcpu) for vcpu in (0, 1)]
    for vcpu, expected in ((0, OTHER), (1, PATTERN)):
        area = areas[vcpu]
        assert area[XMM0 : XMM0 + 16] + area[XMM5 : XMM5 + 16] == expected
        assert area[XSTATE_BV] & SSE
        vm.stop(vcpu)
        assert get_xsave(vm, vcpu=vcpu) == area


@pytest.mark.clause("SETXSAVE-OK")
@pytest.mark.parametrize("when", ["running", "event"])
def test_set_xsave(lab: Lab, when: str) -> None:
    """VCPU_SET_XSAVE changes what the guest finds in its registers, on that vCPU only."""
    vm, session = _xsave_vm(lab, vcpus=2)
    area = _get(session, vcpu=1)
    wanted = _patched(_patched(area, XMM0, OTHER[:16]), XMM5, OTHER[16:])
    event = None
    if when == "event":
        session.command("VM_PAUSE_VCPU", vcpu=1, wait=1).ok()
        event = next_event_of(session, "PAUSE", vcpu=1)
    _set(session, wanted, vcpu=1).ok()
    assert _get(session, vcpu=1) == wanted
    if event:
        session.answer(event)
    assert _xmm(vm, vcpu=1) == OTHER
    assert _xmm(vm, vcpu=0) == PATTERN


@pytest.mark.clause("SETXSAVE-OK")
def test_write_back(lab: Lab) -> None:
    """Writing back what was read succeeds and changes nothing; so does a longer message."""
    vm, session = _xsave_vm(lab)
    area = _get(session)
    _set(session, area).ok()
    if "MSG-LONG-OK" in load_clauses(session.profile.name):
        _set(session, area, length=8 + 4096 + 100).ok()
    assert _get(session) == area
    assert _xmm(vm) == PATTERN


@pytest.mark.clause("SETXSAVE-EINVAL-SHORT")
def test_incomplete(lab: Lab) -> None:
    """An area of less than 4096 bytes, even by one, answers KVM_EINVAL and sets nothing."""
    vm, session = _xsave_vm(lab)
    wanted = _patched(_get(session), XMM0, OTHER[:16])
    for length in (8, 9, 8 + 512, 8 + 4095):
        _set(session, wanted, length=length).fails("KVM_EINVAL")
    assert _xmm(vm) == PATTERN


@pytest.mark.clause("SETXSAVE-EINVAL-REJECTED")
@pytest.mark.parametrize(
    ("at", "data"),
    [(XSTATE_BV, b"\xff" * 8), (XSTATE_BV, (1 << 62 | 3).to_bytes(8, "little")),
     (MXCSR, b"\xff" * 4)],
    ids=["all states", "unknown state", "mxcsr"],
)  # fmt: skip
def test_refused(lab: Lab, at: int, data: bytes) -> None:
    """What KVM refuses answers KVM_EINVAL: unknown states, reserved bits of MXCSR; no effect."""
    vm, session = _xsave_vm(lab)
    wanted = _patched(_patched(_get(session), XMM0, OTHER[:16]), at, data)
    _set(session, wanted).fails("KVM_EINVAL")
    assert _xmm(vm) == PATTERN
