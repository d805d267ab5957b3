# SPDX-License-Identifier: GPL-2.0-or-later
"""What only versions of the interface before v12 promise."""

from __future__ import annotations

import struct

import pytest
from checks import (
    ALWAYS_ALLOWED,
    allowed_commands,
    allowed_events,
    continues,
    ends_dead,
    requires,
    silent,
)
from lab import Lab

from harness.abi import Profile
from harness.errors import SilenceError
from harness.manager.small import PARAMETER, SmallManager
from harness.manager.smallvm import Slot, SmallVm
from harness.plugin.fixtures import ClauseNotes
from harness.tool import Session

NOT_HOOKED = "EFAULT"


@pytest.mark.clause("CAP-REGARDLESS")
def test_capability_without_parameter(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """The capability answers the version also while kvm.introspection is off."""
    with lab.introspection_off():
        assert lab.manager.read_file(PARAMETER + profile.module_parameter).strip() == "N"
        assert lab.manager.capability(profile.capability) == profile.version
        assert lab.manager.capability(profile.capability, on=f"vm:{vm.name}") == profile.version


@pytest.mark.clause("IOCCMD-ALLOW-BIT0")
def test_allow_command_by_bit_0(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """COMMAND takes 3 for 1 and 2 for 0, for one id and for all."""
    session = lab.hook(vm, allow=False)
    assert vm.command("VM_GET_INFO", 2) == "OK"
    assert allowed_commands(session, profile) == ALWAYS_ALLOWED
    assert vm.command("VM_GET_INFO", 0xFFFF_FFFF) == "OK"
    assert allowed_commands(session, profile) == ALWAYS_ALLOWED | {"VM_GET_INFO"}
    assert vm.command(-1, 3) == "OK"
    assert allowed_commands(session, profile) > ALWAYS_ALLOWED | {"VM_GET_INFO"}
    assert vm.command(-1, 0x8000_0000) == "OK"
    assert allowed_commands(session, profile) == ALWAYS_ALLOWED


@pytest.mark.clause("IOCEVT-ALLOW-BIT0")
def test_allow_event_by_bit_0(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """EVENT takes 3 for 1 and 2 for 0, for one id and for all."""
    session = lab.hook(vm, allow=False)
    assert vm.event("UNHOOK", 2) == "OK"
    assert allowed_events(session, profile) == set()
    assert vm.event("UNHOOK", 3) == "OK"
    assert allowed_events(session, profile) == {"UNHOOK"}
    assert vm.event(-1, 0x101) == "OK"
    assert allowed_events(session, profile) > {"UNHOOK"}
    assert vm.event(-1, 0x100) == "OK"
    assert allowed_events(session, profile) == set()


@pytest.mark.clause("GETVERSION-BARE")
def test_version_reply(session: Session, profile: Profile) -> None:
    """The reply has 16 bytes: the error code, the version, and padding that is zero."""
    reply = session.command("GET_VERSION").ok()
    assert reply.raw == struct.pack("<iIII", 0, 0, profile.version, 0)


@pytest.mark.clause("CHKCMD-EINVAL-UNKNOWN")
def test_check_unknown_command(vm: SmallVm, session: Session, profile: Profile) -> None:
    """CHECK_COMMAND answers KVM_EINVAL for an id that is no command, whatever is allowed."""
    for allow in (1, 0):
        assert vm.command(-1, allow) == "OK"
        for id in (0, 1, *(n for n in range(64, 70) if n not in profile.command_by_id), 0xFFFF):
            session.command("VM_CHECK_COMMAND", id=id).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("CHKEVT-EINVAL-UNKNOWN")
def test_check_unknown_event(vm: SmallVm, session: Session, profile: Profile) -> None:
    """CHECK_EVENT answers KVM_EINVAL for an id that is no event, whatever is allowed."""
    beyond = max(profile.event_by_id) + 1
    for allow in (1, 0):
        assert vm.event(-1, allow) == "OK"
        for id in (beyond, beyond + 1, 32, 64, 0x100, 0xFFFF):
            session.command("VM_CHECK_EVENT", id=id).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("MSG-EOPNOTSUPP-UNKNOWN")
def test_unknown_ids(session: Session, profile: Profile) -> None:
    """Ids that are no command answer KVM_EOPNOTSUPP, whatever they carry; the session goes on."""
    unknown = [id for id in range(70, 80) if id not in profile.command_by_id]
    for id in (*unknown, 0x7777, 0xFFFF):
        for payload in (b"", bytes(8), b"\xff" * 40):
            session.reply_to(session.send_raw(id, payload)).fails("KVM_EOPNOTSUPP")
    continues(session)


@pytest.mark.clause("MAXGFN-OK")
def test_max_gfn(lab: Lab) -> None:
    """GET_MAX_GFN answers the end of the highest memory slot, in page frames."""
    _, session = lab.pair(memory_kb=512)
    requires(session, command="VM_GET_MAX_GFN")
    assert session.command("VM_GET_MAX_GFN").ok().fields.gfn == (512 << 10) >> 12
    _, session = lab.pair(slots=[Slot(slot=1, gpa=1 << 32, size=0x3000)])
    assert session.command("VM_GET_MAX_GFN").ok().fields.gfn == ((1 << 32) + 0x3000) >> 12


@pytest.mark.clause("PAUSE-DISALLOWED-CLOSE")
def test_pause_disallowed(lab: Lab, vm: SmallVm, session: Session) -> None:
    """A pause while its event is disallowed closes the socket, and the vCPU runs on."""
    vm.run()
    assert vm.event("PAUSE", 0) == "OK"
    session.send("VM_PAUSE_VCPU", wait=0)
    session.expect_close(timeout_s=5)
    ends_dead(lab.manager, vm)
    vm.progresses()


@pytest.mark.clause("HOOK-NOSOCKET")
def test_no_socket(lab: Lab, vm: SmallVm, clauses: ClauseNotes) -> None:
    """HOOK refuses what is no descriptor, and a device, a pipe and a VM; nothing is hooked."""
    link, name = lab.manager.link, lab.manager.new_name
    device = link.call("open", name=name("file"), path="/dev/null")
    pipe = link.call("pipe", name=name("pipe"))[0]
    results = {vm.hook(fd) for fd in (-1, 1_000_000, 0x7FFF_FFFF, device, pipe, vm.fd)}
    assert results in ({"EFAULT"}, {"EINVAL"})
    clauses.seen("HOOK-NOSOCKET", results.pop().lower())
    assert vm.command(-1) == NOT_HOOKED


@pytest.mark.clause("HOOK-WAITS")
def test_hook_waits(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """HOOK on a hooked VM returns when the tool of the earlier session is gone, and not before."""
    session = lab.hook(vm)
    fd, sock = lab.connect(vm)
    request, argument = lab.codec.encode_ioctl("HOOK", fd=fd, uuid=bytes(16))
    link = lab.manager.link
    second = link.send("ioctl", on=f"vm:{vm.name}", request=request, arg={"hex": argument.hex()})
    for _ in range(3):
        continues(session)
    assert vm.command(-1, 0) == "OK"
    assert allowed_commands(session, profile) == ALWAYS_ALLOWED
    assert not link.answered(second)
    session.close()
    answer = link.wait(second, what="the second HOOK", timeout_s=5)
    assert answer["ret"] == 0
    again = lab.session(sock)
    # What the first session was allowed is forgotten.
    assert allowed_commands(again, profile) == ALWAYS_ALLOWED
    assert allowed_events(again, profile) == set()


@pytest.mark.clause("HOOK-WAITS")
def test_hook_again_at_once(lab: Lab, vm: SmallVm) -> None:
    """A VM can be hooked again and again, each time the tool before closed its socket."""
    vm.run()
    for _ in range(20):
        session = lab.hook(vm)
        continues(session)
        session.close()
    vm.progresses()


def _subscribe(session: Session) -> None:
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()


def _notify(vm: SmallVm, profile: Profile, flag: int) -> str:
    request = profile.ioctl("PREUNHOOK").request
    return vm.request(request, {"value": flag}, what=f"UNHOOK({flag})")


@pytest.mark.clause("NOTIFY-ABI")
def test_notify_abi(vm: SmallVm, session: Session, profile: Profile) -> None:
    """Request 0xAEFE takes a flag where others have a pointer: 0 and 1 send the same event."""
    assert profile.ioctl("PREUNHOOK").request == 0xAEFE
    _subscribe(session)
    for flag in (0, 1):
        assert vm.request(0x4008AEFE, {"value": flag}, what="0x4008AEFE") == "ENOTTY"
        assert _notify(vm, profile, flag) == "OK"
        session.next_event("UNHOOK", timeout_s=5)
    silent(session)


@pytest.mark.clause("NOTIFY-SENDS")
def test_notify_sends(vm: SmallVm, session: Session, profile: Profile) -> None:
    """Each UNHOOK puts exactly one event on the socket, and none unless it was enabled."""
    _notify(vm, profile, 0)
    silent(session)
    _subscribe(session)
    numbers = []
    for _ in range(3):
        assert _notify(vm, profile, 0) == "OK"
        numbers.append(session.next_event("UNHOOK", timeout_s=5).seq)
    silent(session)
    assert numbers == sorted(set(numbers))


@pytest.mark.clause("NOTIFY-NOTUNHOOKED")
def test_notify_ends_nothing(
    lab: Lab, vm: SmallVm, session: Session, manager: SmallManager, profile: Profile
) -> None:
    """After UNHOOK the guest runs and the tool has its commands, until it closes the socket."""
    vm.run()
    _subscribe(session)
    assert _notify(vm, profile, 0) == "OK"
    session.next_event("UNHOOK", timeout_s=5)
    with pytest.raises(SilenceError):
        session.expect_close(timeout_s=0.3)
    session.command("VM_GET_INFO").ok()
    vm.progresses()
    session.close()
    ends_dead(manager, vm)
    vm.progresses()
    continues(lab.hook(vm))


@pytest.mark.clause("NOTIFY-EFAULT-NOTHOOKED")
def test_notify_not_hooked(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """UNHOOK answers EFAULT on a VM that is not hooked, whatever the flag."""
    assert _notify(vm, profile, 0) == NOT_HOOKED
    assert _notify(vm, profile, 1) == NOT_HOOKED
    session = lab.hook(vm)
    _subscribe(session)
    assert _notify(vm, profile, 0) == "OK"


@pytest.mark.clause("NOTIFY-EFAULT-SOCKERR")
@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_notify_dead_socket(
    lab: Lab, vm: SmallVm, session: Session, how: str, profile: Profile
) -> None:
    """UNHOOK answers EFAULT once the tool closed the socket, or the device manager shut it."""
    _subscribe(session)
    if how == "close":
        session.close()
        ends_dead(lab.manager, vm)
    else:
        assert lab.manager.shutdown(vm.socket) == "OK"
        session.expect_close(timeout_s=5)
    for flag in (0, 1, 0):
        assert _notify(vm, profile, flag) == NOT_HOOKED
