# SPDX-License-Identifier: GPL-2.0-or-later
"""VM_CONTROL_CLEANUP, and what becomes of interceptions when a session ends.

That an instruction is intercepted shows in the number of the guest's exits: the routines
here execute one a thousand times.
"""

from __future__ import annotations

from typing import Any

import pytest
from causes import select_cr, select_msr
from checks import (
    all_fail,
    continues,
    enable,
    ends_dead,
    next_event_of,
    requires,
    silent,
    supported_events,
)
from lab import Lab

from harness.abi import Profile
from harness.manager.payloads import FREE, PML4
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.tool import Session

MANY = 1000
SYSENTER_CS, KERNEL_GS_BASE = 0x174, 0xC0000102
BREAKPOINT = 3
# By event: the routines that execute such an instruction many times, and their operands.
ROUTINES: dict[str, list[tuple[str, int, int]]] = {
    "BREAKPOINT": [("many_breakpoints", 0, 0)],
    "CR": [("many_cr3", FREE, PML4)],
    "MSR": [("many_msr", SYSENTER_CS, 0), ("many_msr", KERNEL_GS_BASE, 0)],
    "DESCRIPTOR": [("many_gdt", 0, 0)],
}


def _vm(lab: Lab) -> SmallVm:
    vm = lab.vm(payload="system")
    vm.write(FREE, vm.read(PML4, 8))
    vm.run()
    return vm


def _intercepted(vm: SmallVm) -> set[str]:
    """Which of the instructions make the guest exit; it gets over all of them."""
    found = set()
    faults = vm.word("faults") + MANY
    for name, calls in ROUTINES.items():
        each = [vm.count_exits(*call) >= MANY for call in calls]
        assert len(set(each)) == 1, f"{name}: some are intercepted, and some are not"
        if each[0]:
            found.add(name)
    words = vm.finish()
    assert (words["faults"], words["vector"]) == (faults, BREAKPOINT)
    return found


def _hook(lab: Lab, vm: SmallVm, profile: Profile) -> tuple[Session, set[str]]:
    """Hook a guest and enable each of the events; answers those that are there."""
    session = lab.hook(vm)
    requires(session, command="VM_CONTROL_CLEANUP")
    names = set(ROUTINES) & supported_events(session, profile)
    for name in names:
        enable(session, name)
    if "CR" in names:
        select_cr(session, 3)
    if "MSR" in names:
        select_msr(session, SYSENTER_CS)
        select_msr(session, KERNEL_GS_BASE)
    return session, names


def _untouched(vm: SmallVm) -> None:
    """The instructions must cost nothing by themselves, or the tests here tell nothing."""
    if found := _intercepted(vm):
        skip_clause(f"this host intercepts {', '.join(sorted(found))} by itself")


@pytest.mark.clause("UNHOOK-INTERCEPT-RESTORED", "CLEANUP-DEFAULT", "CLEANUP-OK")
@pytest.mark.parametrize("commands", [[], [1], [0, 1]], ids=str)
def test_restored(lab: Lab, profile: Profile, commands: list[int]) -> None:
    """With cleanup on, as it is by default, UNHOOK takes back what was intercepted for the tool."""
    vm = _vm(lab)
    _untouched(vm)
    session, _ = _hook(lab, vm, profile)
    for value in commands:
        session.command("VM_CONTROL_CLEANUP", enable=value).ok()
    vm.order("breakpoint")
    session.answer(next_event_of(session, "BREAKPOINT"))
    vm.finish()
    assert vm.unhook() == "OK"
    assert _intercepted(vm) == set()
    vm.stop()
    assert vm.guest_debug(breakpoints=True) == "OK"


@pytest.mark.clause("UNHOOK-INTERCEPT-KEPT", "CLEANUP-OK")
@pytest.mark.parametrize("close", [False, True])
def test_kept(lab: Lab, profile: Profile, close: bool) -> None:
    """With cleanup off UNHOOK leaves them; the guest runs on, and user space finds them taken."""
    vm = _vm(lab)
    _untouched(vm)
    session, names = _hook(lab, vm, profile)
    session.command("VM_CONTROL_CLEANUP", enable=0).ok()
    if close:
        session.close()
        ends_dead(lab.manager, vm)
    assert vm.unhook() == "OK"
    assert _intercepted(vm) == names
    vm.stop()
    assert vm.guest_debug(breakpoints=True) == "EBUSY"


@pytest.mark.clause("MSG-CLEANUP", "CLEANUP-DEFAULT")
def test_restored_at_disconnect(lab: Lab, profile: Profile) -> None:
    """When the tool just closes its socket, they are taken back as well, before any UNHOOK."""
    vm = _vm(lab)
    _untouched(vm)
    session, _ = _hook(lab, vm, profile)
    vm.order("breakpoint")
    next_event_of(session, "BREAKPOINT")
    session.close()
    ends_dead(lab.manager, vm)
    vm.finish()
    assert _intercepted(vm) == set()
    assert vm.preunhook() == "ENOENT"


@pytest.mark.clause("CLEANUP-DEFAULT", "HOOK-REHOOK")
def test_on_again_after_rehook(lab: Lab, profile: Profile) -> None:
    """Each hook starts with cleanup on, whatever the session before had chosen."""
    vm = _vm(lab)
    _untouched(vm)
    session, _ = _hook(lab, vm, profile)
    session.command("VM_CONTROL_CLEANUP", enable=0).ok()
    assert vm.unhook() == "OK"
    _hook(lab, vm, profile)
    assert vm.unhook() == "OK"
    assert _intercepted(vm) == set()


@pytest.mark.clause("UNHOOK-INTERCEPT-RESTORED", "HOOK-REHOOK")
def test_restored_though_hooked_again(lab: Lab, profile: Profile) -> None:
    """They are taken back also where the next session begins before the guest runs again."""
    vm = _vm(lab)
    _untouched(vm)
    _hook(lab, vm, profile)
    vm.stop()
    assert vm.unhook() == "OK"
    lab.hook(vm)
    vm.run()
    assert _intercepted(vm) == set()


@pytest.mark.clause("UNHOOK-INTERCEPT-RESTORED", "MSG-CLEANUP")
@pytest.mark.parametrize("how", ["unhook", "close"])
def test_restored_on_each_vcpu(lab: Lab, profile: Profile, how: str) -> None:
    """Every vCPU gives back what it intercepted, also one that does not run just then."""
    vm, session = lab.pair(vcpus=4)
    if "BREAKPOINT" not in supported_events(session, profile):
        skip_clause("this kernel has no BREAKPOINT event")
    for vcpu in range(4):
        enable(session, "BREAKPOINT", vcpu=vcpu)
    vm.stop(3)
    lab.end(vm, session, how)
    ends_dead(lab.manager, vm)
    for vcpu in range(4):
        if vcpu < 3:
            vm.progresses(vcpu=vcpu)
            vm.stop(vcpu)
        assert vm.guest_debug(breakpoints=True, vcpu=vcpu) == "OK", f"vCPU {vcpu}"


@pytest.mark.clause("HOOK-REHOOK", "UNHOOK-PERMS-LOST", "CTLCR-OK", "CTLMSR-OK")
def test_next_session_has_selected_nothing(lab: Lab, profile: Profile) -> None:
    """What stays intercepted for a tool that is gone is no event of the next one."""
    vm = _vm(lab)
    session, names = _hook(lab, vm, profile)
    session.command("VM_CONTROL_CLEANUP", enable=0).ok()
    assert vm.unhook() == "OK"
    again = lab.hook(vm)
    for name in names & {"CR", "MSR"}:
        enable(again, name)
    vm.perform_all(
        ("set_cr3", FREE, 0), ("set_msr", SYSENTER_CS, 5), ("set_msr", KERNEL_GS_BASE, 5)
    )
    silent(again, vcpus=[0])
    if "CR" in names:
        select_cr(again, 3)
        vm.order("set_cr3", PML4)
        event = next_event_of(again, "CR")
        assert (event.fields.old_value, event.fields.new_value) == (FREE, PML4)
        again.answer(event)
        vm.finish()


@pytest.mark.clause("VCPUCTLEVT-DISABLE", "CTLCR-OFF", "CTLMSR-OFF")
def test_given_up_when_disabled(lab: Lab, profile: Profile) -> None:
    """What the tool disables or deselects costs the guest nothing any more."""
    vm = _vm(lab)
    _untouched(vm)
    session, names = _hook(lab, vm, profile)
    if "CR" in names:
        select_cr(session, 3, on=False)
    if "MSR" in names:
        select_msr(session, SYSENTER_CS, on=False)
        select_msr(session, KERNEL_GS_BASE, on=False)
    for name in names - {"CR", "MSR"}:
        enable(session, name, on=False)
    assert _intercepted(vm) == set()
    silent(session, vcpus=[0])


@pytest.mark.clause("CLEANUP-EINVAL-ENABLE", "CLEANUP-EINVAL-PADDING")
def test_wrong_arguments(lab: Lab, profile: Profile) -> None:
    """enable above 1 and any byte of padding answer KVM_EINVAL, and leave cleanup as it was."""
    vm = _vm(lab)
    _untouched(vm)
    session, _ = _hook(lab, vm, profile)
    values: list[dict[str, Any]] = [{"enable": value} for value in (2, 3, 0x80, 0xFF)]
    values += [{"enable": 0, **wrong}
               for wrong in session.codec.wrong_paddings("VM_CONTROL_CLEANUP")]  # fmt: skip
    all_fail(session, "VM_CONTROL_CLEANUP", "KVM_EINVAL", values)
    continues(session)
    assert vm.unhook() == "OK"
    assert _intercepted(vm) == set()
