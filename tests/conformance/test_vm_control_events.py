# SPDX-License-Identifier: GPL-2.0-or-later
"""VM_CONTROL_EVENTS."""

from __future__ import annotations

import pytest
from checks import continues, silent, unwanted
from lab import Lab

from harness.abi import Profile
from harness.manager.smallvm import SmallVm
from harness.tool import Session


@pytest.mark.clause("VMCTLEVT-ENABLE")
def test_enable(vm: SmallVm, session: Session) -> None:
    """Enabling UNHOOK succeeds, also twice, and then the event is sent."""
    assert vm.preunhook() == unwanted(vm)
    for _ in range(2):
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)
    silent(session)


@pytest.mark.clause("VMCTLEVT-DISABLE")
def test_disable(vm: SmallVm, session: Session) -> None:
    """Disabling UNHOOK succeeds, also twice, and then the event is not sent any more."""
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=0).ok()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)
    for _ in range(2):
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=0).ok()
        assert vm.preunhook() == unwanted(vm)
    silent(session)
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)


@pytest.mark.clause("VMCTLEVT-EINVAL-PADDING")
def test_padding(vm: SmallVm, session: Session) -> None:
    """Each byte of padding makes the command answer KVM_EINVAL, and nothing is enabled."""
    for wrong in session.codec.wrong_paddings("VM_CONTROL_EVENTS"):
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1, **wrong).fails(
            "KVM_EINVAL"
        )
    assert vm.preunhook() == unwanted(vm)
    silent(session)


@pytest.mark.clause("VMCTLEVT-EINVAL-ENABLE")
def test_enable_above_one(vm: SmallVm, session: Session) -> None:
    """enable above 1 answers KVM_EINVAL, and neither enables nor disables."""
    for enable in (2, 3, 0x80, 0xFF):
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=enable).fails("KVM_EINVAL")
    assert vm.preunhook() == unwanted(vm)
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=2).fails("KVM_EINVAL")
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)


@pytest.mark.clause("VMCTLEVT-EINVAL-UNKNOWN")
@pytest.mark.parametrize("event", [2, 4, 6, 18, 20, 62, 64, 0x100, 0x8000, 0xFFFE])
def test_unknown(session: Session, event: int) -> None:
    """An event id that is not known answers KVM_EINVAL for enabling and disabling."""
    for enable in (1, 0):
        session.command("VM_CONTROL_EVENTS", event_id=event, enable=enable).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("VMCTLEVT-EINVAL-VCPUEVENT")
def test_vcpu_events(lab: Lab, profile: Profile) -> None:
    """The id of a vCPU event answers KVM_EINVAL, allowed or not, and enables nothing."""
    vm, session = lab.pair()
    for allow in (1, 0):
        assert vm.event(-1, allow) == "OK"
        for event in profile.events.values():
            if event.is_vcpu:
                session.command("VM_CONTROL_EVENTS", event_id=event.id, enable=1).fails(
                    "KVM_EINVAL"
                )
    assert vm.event(-1, 1) == "OK"
    vm.wait_word("done", vm.call_out(1))
    vm.wait_word("done", vm.call_out(1, kind=1))
    silent(session, vcpus=[0])


@pytest.mark.clause("VMCTLEVT-EPERM")
def test_disallowed(vm: SmallVm, session: Session) -> None:
    """While UNHOOK is disallowed the command answers KVM_EPERM, for enabling and disabling."""
    assert vm.event("UNHOOK", 0) == "OK"
    for enable in (1, 0):
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=enable).fails("KVM_EPERM")
    assert vm.preunhook() == unwanted(vm)
    assert vm.event("UNHOOK", 1) == "OK"
    assert vm.preunhook() == unwanted(vm)
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)
