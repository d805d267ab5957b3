# SPDX-License-Identifier: GPL-2.0-or-later
"""GET_VERSION, VM_CHECK_COMMAND, VM_CHECK_EVENT, VM_GET_INFO and VCPU_GET_INFO."""

from __future__ import annotations

import struct

import pytest
from checks import ALWAYS_ALLOWED, continues, supported_commands, supported_events
from lab import Lab

from harness.abi import Profile
from harness.errors import ConformanceError
from harness.manager.smallvm import SmallVm
from harness.tool import Session

KVM_GET_TSC_KHZ = 0xAEA3


@pytest.mark.clause("GETVERSION-OK")
def test_version(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """GET_VERSION succeeds with version 1, with everything allowed and with nothing."""
    session = lab.hook(vm, allow=False)
    for allow in (0, 1, 0):
        assert vm.command(-1, allow) == "OK"
        assert vm.event(-1, allow) == "OK"
        assert session.command("GET_VERSION").ok().fields.version == profile.version == 1


@pytest.mark.clause("GETVERSION-MAXSIZE")
def test_max_msg_size(session: Session, profile: Profile) -> None:
    """GET_VERSION says that messages have at most 8184 bytes after the header."""
    reply = session.command("GET_VERSION").ok()
    assert reply.fields.max_msg_size == profile.max_message_size == 8184


@pytest.mark.clause("GETVERSION-FEATURES")
def test_features(session: Session) -> None:
    """The reply has 24 bytes, features from the 16th on: singlestep is 0 or 1, padding zero."""
    reply = session.command("GET_VERSION").ok()
    assert len(reply.raw) == 24
    assert reply.fields.features.singlestep in (0, 1)
    flags = sum(not name.startswith("padding") for name in reply.fields.features)
    assert reply.raw[16 + flags :] == bytes(8 - flags)
    assert set(reply.raw[16:]) <= {0, 1}


@pytest.mark.clause("GETVERSION-ALWAYSALLOWED", "CHKCMD-ALWAYSALLOWED", "CHKEVT-ALWAYSALLOWED")
def test_cannot_be_disallowed(vm: SmallVm, session: Session) -> None:
    """The query commands go on working whatever the COMMAND ioctl is asked for."""
    names = [*sorted(ALWAYS_ALLOWED), None]
    for name in names:
        vm.command(-1 if name is None else name, 0)
        continues(session)
        session.command("VM_CHECK_COMMAND", id="GET_VERSION").ok()
        session.command("VM_CHECK_EVENT", id="PAUSE").ok()


@pytest.mark.clause("CHKCMD-OK")
def test_check_command(session: Session, profile: Profile) -> None:
    """VM_CHECK_COMMAND answers 0 for each VM and vCPU command of the interface."""
    all_of_them = {command.common for command in profile.commands.values()}
    assert supported_commands(session, profile) == all_of_them
    for name in sorted(profile.commands):
        assert session.command("VM_CHECK_COMMAND", id=name).ok().raw == bytes(8)


@pytest.mark.clause("CHKCMD-ENOENT")
def test_check_unknown_command(vm: SmallVm, session: Session, profile: Profile) -> None:
    """VM_CHECK_COMMAND answers KVM_ENOENT for ids that are no command, 0 and 1 included."""
    unknown = [id for id in range(128) if id not in profile.command_by_id]
    for allow in (1, 0):
        assert vm.command(-1, allow) == "OK"
        for id in (*unknown, 0x102, 0x7FFF, 0x8002, 0xFFFE, 0xFFFF):
            session.command("VM_CHECK_COMMAND", id=id).fails("KVM_ENOENT")
    continues(session)


@pytest.mark.clause("CHKCMD-EPERM")
def test_check_disallowed_command(vm: SmallVm, session: Session, profile: Profile) -> None:
    """VM_CHECK_COMMAND answers KVM_EPERM for a command that is there and not allowed."""
    for name in sorted(supported_commands(session, profile) - ALWAYS_ALLOWED):
        assert vm.command(name, 0) == "OK"
        session.command("VM_CHECK_COMMAND", id=name).fails("KVM_EPERM")
        assert vm.command(name, 1) == "OK"
        session.command("VM_CHECK_COMMAND", id=name).ok()


@pytest.mark.clause("CHKCMD-EINVAL-PADDING")
def test_check_command_padding(vm: SmallVm, session: Session) -> None:
    """VM_CHECK_COMMAND answers KVM_EINVAL for padding, before it looks at the id."""
    assert vm.command("VM_GET_INFO", 0) == "OK"
    for wrong in session.codec.wrong_paddings("VM_CHECK_COMMAND"):
        for id in ("GET_VERSION", "VM_GET_INFO", 0x7777, 0):
            session.command("VM_CHECK_COMMAND", id=id, **wrong).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("CHKEVT-OK")
def test_check_event(session: Session, profile: Profile) -> None:
    """VM_CHECK_EVENT answers 0 for each VM and vCPU event of the interface."""
    all_of_them = {event.common for event in profile.events.values()}
    assert supported_events(session, profile) == all_of_them
    for name in sorted(profile.events):
        assert session.command("VM_CHECK_EVENT", id=name).ok().raw == bytes(8)


@pytest.mark.clause("CHKEVT-ENOENT")
def test_check_unknown_event(vm: SmallVm, session: Session, profile: Profile) -> None:
    """VM_CHECK_EVENT answers KVM_ENOENT for ids that are no event."""
    unknown = [id for id in range(128) if id not in profile.event_by_id]
    for allow in (1, 0):
        assert vm.event(-1, allow) == "OK"
        for id in (*unknown, 0x101, 0x7FFF, 0x8001, 0xFFFE, 0xFFFF):
            session.command("VM_CHECK_EVENT", id=id).fails("KVM_ENOENT")
    continues(session)


@pytest.mark.clause("CHKEVT-EPERM")
def test_check_disallowed_event(vm: SmallVm, session: Session, profile: Profile) -> None:
    """VM_CHECK_EVENT answers KVM_EPERM for an event that is there and not allowed."""
    for name in sorted(supported_events(session, profile)):
        assert vm.event(name, 0) == "OK"
        session.command("VM_CHECK_EVENT", id=name).fails("KVM_EPERM")
        assert vm.event(name, 1) == "OK"
        session.command("VM_CHECK_EVENT", id=name).ok()


@pytest.mark.clause("CHKEVT-EINVAL-PADDING")
def test_check_event_padding(vm: SmallVm, session: Session) -> None:
    """VM_CHECK_EVENT answers KVM_EINVAL for padding, before it looks at the id."""
    assert vm.event("HYPERCALL", 0) == "OK"
    for wrong in session.codec.wrong_paddings("VM_CHECK_EVENT"):
        for id in ("UNHOOK", "HYPERCALL", 0x7777):
            session.command("VM_CHECK_EVENT", id=id, **wrong).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("VMINFO-COUNT")
@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_vcpu_count(lab: Lab, vcpus: int) -> None:
    """VM_GET_INFO answers the number of vCPUs, running or not."""
    vm, session = lab.pair(vcpus=vcpus, run=False)
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == vcpus
    vm.run()
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == vcpus
    session.command("VCPU_GET_INFO", vcpu=vcpus - 1).ok()
    session.command("VCPU_GET_INFO", vcpu=vcpus).fails("KVM_EINVAL")


@pytest.mark.clause("VMINFO-PADDING")
def test_info_padding(lab: Lab) -> None:
    """The reply of VM_GET_INFO has 24 bytes, of which the last 12 are zero."""
    _, session = lab.pair(vcpus=3)
    assert session.command("VM_GET_INFO").ok().raw == struct.pack("<iIIIII", 0, 0, 3, 0, 0, 0)


@pytest.mark.clause("VCPUINFO-TSC")
def test_tsc_speed(lab: Lab) -> None:
    """VCPU_GET_INFO answers the TSC frequency in Hz that KVM has for the vCPU, or 0."""
    vm, session = lab.pair(vcpus=2)
    speeds = [session.command("VCPU_GET_INFO", vcpu=vcpu).ok().fields.tsc_speed for vcpu in (0, 1)]
    vm.stop(1)
    answer = lab.manager.link.call("ioctl", on=f"vcpu:{vm.name}:1", request=KVM_GET_TSC_KHZ)
    if answer["ret"] <= 0:
        raise ConformanceError(f"KVM_GET_TSC_KHZ answered {answer}")
    assert speeds[0] == speeds[1]
    assert speeds[1] in (0, answer["ret"] * 1000)
