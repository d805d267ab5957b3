# SPDX-License-Identifier: GPL-2.0-or-later
"""COMMAND ioctl."""

from __future__ import annotations

import struct

import pytest
from checks import ALWAYS_ALLOWED, allowed_commands, continues, near_misses, supported_commands
from lab import Lab

from harness.abi import Profile
from harness.manager.smallvm import SmallVm
from harness.plugin.fixtures import ClauseNotes
from harness.tool import Session

NOT_HOOKED = "EFAULT"


@pytest.fixture
def denied(lab: Lab, vm: SmallVm) -> Session:
    """The guest of the test hooked, with the permissions that HOOK leaves."""
    return lab.hook(vm, allow=False)


@pytest.mark.clause("IOCCMD-ABI")
def test_abi(vm: SmallVm, denied: Session, profile: Profile) -> None:
    """Its request takes allow and id at offsets 0 and 4 of 8 bytes."""
    request = profile.ioctl("COMMAND").request
    argument = struct.pack("<Ii", 1, profile.command("VM_GET_INFO").id).hex()
    for near_miss in near_misses(request):
        assert vm.request(near_miss, {"hex": argument}, what=f"{near_miss:#x}") == "ENOTTY"
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED
    assert vm.request(request, {"hex": argument}, what="COMMAND") == "OK"
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED | {"VM_GET_INFO"}


@pytest.mark.clause("IOCCMD-EPERM-DISABLED")
def test_disabled(lab: Lab, vm: SmallVm, denied: Session, profile: Profile) -> None:
    """COMMAND answers EPERM while introspection is off, whatever its argument; nothing changes."""
    with lab.introspection_off():
        assert vm.command(-1) == "EPERM"
        assert vm.command(-2) == "EPERM"
        assert vm.ioctl("COMMAND", bad="unmapped") == "EPERM"
        assert lab.vm().command(-1) == "EPERM"
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED


@pytest.mark.clause("IOCCMD-EFAULT-ARG")
@pytest.mark.parametrize("bad", ["null", "unmapped", "edge", "kernel"])
def test_unreadable_argument(vm: SmallVm, denied: Session, profile: Profile, bad: str) -> None:
    """COMMAND answers EFAULT when its argument cannot be read; nothing changes."""
    assert vm.ioctl("COMMAND", allow=1, id=-1, bad=bad) == "EFAULT"
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED


@pytest.mark.clause("IOCCMD-EFAULT-NOTHOOKED")
def test_not_hooked(lab: Lab, vm: SmallVm) -> None:
    """COMMAND answers EFAULT on a VM that is not hooked, and once it was unhooked."""
    for allow in (0, 1):
        for which in (-1, "VM_GET_INFO", "GET_VERSION"):
            assert vm.command(which, allow) == NOT_HOOKED
    lab.hook(vm)
    assert vm.command("VM_GET_INFO") == "OK"
    if lab.profile.has("ioctl UNHOOK"):
        assert vm.unhook() == "OK"
        assert vm.command("VM_GET_INFO") == NOT_HOOKED


@pytest.mark.clause("IOCCMD-EINVAL-UNKNOWN")
def test_unknown(vm: SmallVm, denied: Session, profile: Profile, clauses: ClauseNotes) -> None:
    """COMMAND answers EINVAL for an id that is no command, and nothing becomes usable by it."""
    limit = profile.constants.get("COMMAND_ID_LIMIT", 64)
    for number in (limit, limit + 1, limit + 2, 64, 1000, 0xFFFF, 0x1_0008, 0x7FFF_FFFF):
        assert vm.command(number) == "EINVAL", f"id {number}"
        assert vm.command(number, 0) == "EINVAL", f"id {number}"
    # The text wants EINVAL for these too; the reference code accepts what is below its limit.
    unused = [number for number in range(limit) if number not in profile.command_by_id]
    results = {vm.command(number) for number in unused}
    assert results <= {"EINVAL", "OK"}
    clauses.seen("IOCCMD-EINVAL-UNKNOWN", "strict" if results == {"EINVAL"} else "loose")
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED
    for number in unused[2:]:  # 0 and 1 are no commands on the wire either
        denied.command("VM_CHECK_COMMAND", id=number).fails(profile.unknown_query)


@pytest.mark.clause("IOCCMD-EINVAL-NEG")
@pytest.mark.parametrize("number", [-2, -3, -100, -0x8000_0000])
def test_negative(vm: SmallVm, denied: Session, profile: Profile, number: int) -> None:
    """COMMAND answers EINVAL for a negative id other than -1; nothing changes."""
    assert vm.command(number) == "EINVAL"
    assert vm.command(number, 0) == "EINVAL"
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED


@pytest.mark.clause("IOCCMD-EINVAL-ALLOW")
@pytest.mark.parametrize("allow", [2, 3, 0x100, 0x1_0001, 0x8000_0000, 0xFFFF_FFFF])
def test_allow_above_one(vm: SmallVm, denied: Session, profile: Profile, allow: int) -> None:
    """COMMAND answers EINVAL for allow above 1, for one id and for all; nothing changes."""
    assert vm.command("VM_GET_INFO", allow) == "EINVAL"
    assert vm.command(-1, allow) == "EINVAL"
    assert vm.command("GET_VERSION", allow) == "EINVAL"
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED


@pytest.mark.clause(
    "IOCCMD-EPERM-ALWAYS", "GETVERSION-ALWAYSALLOWED", "CHKCMD-ALWAYSALLOWED",
    "CHKEVT-ALWAYSALLOWED",
)  # fmt: skip
def test_always_allowed(vm: SmallVm, denied: Session, profile: Profile) -> None:
    """The three query commands cannot be disallowed one by one, and go on working."""
    for name in sorted(ALWAYS_ALLOWED):
        assert vm.command(name, 0) == "EPERM", name
        assert vm.command(name, 1) == "OK", name
        denied.command("VM_CHECK_COMMAND", id=name).ok()
    assert allowed_commands(denied, profile) == ALWAYS_ALLOWED
    continues(denied)
    assert vm.event("PAUSE") == "OK"
    denied.command("VM_CHECK_EVENT", id="PAUSE").ok()


@pytest.mark.clause("IOCCMD-ALLOW-ONE")
def test_allow_one(vm: SmallVm, denied: Session, profile: Profile) -> None:
    """allow=1 makes just that command usable, for each command of the kernel."""
    for name in sorted(supported_commands(denied, profile) - ALWAYS_ALLOWED):
        assert vm.command(name) == "OK"
        assert allowed_commands(denied, profile) == ALWAYS_ALLOWED | {name}
        assert vm.command(name, 0) == "OK"
    assert vm.command("VM_GET_INFO") == "OK"
    denied.command("VM_GET_INFO").ok()
    denied.command("VM_CONTROL_EVENTS").fails("KVM_EPERM")


@pytest.mark.clause("IOCCMD-ALLOW-ALL")
def test_allow_all(vm: SmallVm, denied: Session, profile: Profile) -> None:
    """id=-1 with allow=1 makes all commands usable."""
    vm.run()
    assert vm.command(-1) == "OK"
    assert allowed_commands(denied, profile) == supported_commands(denied, profile)
    denied.command("VM_GET_INFO").ok()
    denied.command("VCPU_GET_INFO").ok()


@pytest.mark.clause("IOCCMD-DISALLOW-ONE")
def test_disallow_one(vm: SmallVm, session: Session, profile: Profile) -> None:
    """allow=0 makes that command answer KVM_EPERM from then on, and no other."""
    everything = supported_commands(session, profile)
    for name in sorted(everything - ALWAYS_ALLOWED):
        assert vm.command(name, 0) == "OK"
        session.command(name).fails("KVM_EPERM")
        session.command(name).fails("KVM_EPERM")
        assert allowed_commands(session, profile) == everything - {name}
        assert vm.command(name) == "OK"
    continues(session)


@pytest.mark.clause("IOCCMD-DISALLOW-ALL")
def test_disallow_all(vm: SmallVm, session: Session, profile: Profile) -> None:
    """id=-1 with allow=0 succeeds and leaves just the three query commands."""
    assert vm.command(-1, 0) == "OK"
    assert allowed_commands(session, profile) == ALWAYS_ALLOWED
    session.command("VM_GET_INFO").fails("KVM_EPERM")
    session.command("VCPU_GET_INFO").fails("KVM_EPERM")
    continues(session)


@pytest.mark.clause("IOCCMD-LIVE")
def test_live(vm: SmallVm, session: Session) -> None:
    """Each change is in force for the next command of the running session, both ways."""
    vm.run()
    for name in ("VM_GET_INFO", "VCPU_GET_INFO"):
        for _ in range(3):
            session.command(name).ok()
            assert vm.command(name, 0) == "OK"
            session.command(name).fails("KVM_EPERM")
            assert vm.command(name) == "OK"
        session.command(name).ok()
