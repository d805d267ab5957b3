# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_CONTROL_EVENTS."""

from __future__ import annotations

import pytest
from causes import CR4_DE, CR4_OSXSAVE, CR4_PAE, LSTAR, cause, pair_for
from checks import (
    continues,
    enable,
    ends_dead,
    next_event_of,
    requires,
    silent,
    supported_events,
    unwanted,
)
from lab import Lab
from userspace import debug

from harness.abi import Profile
from harness.hosts import Target
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.tool import Session

KINDS = {"HYPERCALL": 0, "BREAKPOINT": 1}
OTHERS = ("CR", "XSETBV", "DESCRIPTOR", "MSR")


@pytest.mark.clause("VCPUCTLEVT-ENABLE")
@pytest.mark.parametrize("name", KINDS)
def test_enable(lab: Lab, name: str) -> None:
    """After enabling, each occurrence on that vCPU sends one event, and none on another."""
    vm, session = lab.pair(vcpus=2)
    enable(session, name, vcpu=1)
    vm.wait_word("done", vm.call_out(3, kind=KINDS[name], vcpu=0), vcpu=0)
    silent(session, vcpus=[0, 1])
    vm.call_out(3, kind=KINDS[name], vcpu=1)
    for _ in range(3):
        session.answer(next_event_of(session, name, vcpu=1))
    vm.wait_word("done", 3, vcpu=1)
    silent(session, vcpus=[0, 1])
    # Of one event only: the other one stays off.
    other = next(kind for kind in KINDS if kind != name)
    vm.wait_word("done", vm.call_out(1, kind=KINDS[other], vcpu=1), vcpu=1)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("VCPUCTLEVT-ENABLE")
@pytest.mark.parametrize("name", KINDS)
def test_enable_twice(vm: SmallVm, session: Session, name: str) -> None:
    """Enabling twice is a success and still yields one event each time."""
    vm.run()
    enable(session, name)
    enable(session, name)
    vm.call_out(1, kind=KINDS[name])
    session.answer(next_event_of(session, name))
    vm.wait_word("done", 1)
    silent(session, vcpus=[0])


@pytest.mark.clause("VCPUCTLEVT-DISABLE")
@pytest.mark.parametrize("name", KINDS)
def test_disable(lab: Lab, name: str) -> None:
    """After disabling the event is not sent any more, on that vCPU; others keep theirs."""
    vm, session = lab.pair(vcpus=2)
    for vcpu in (0, 1):
        enable(session, name, vcpu=vcpu)
    vm.call_out(1, kind=KINDS[name])
    session.answer(next_event_of(session, name))
    vm.wait_word("done", 1)
    for _ in range(2):
        enable(session, name, on=False)
    vm.wait_word("done", vm.call_out(3, kind=KINDS[name]))
    silent(session, vcpus=[0, 1])
    vm.call_out(1, kind=KINDS[name], vcpu=1)
    session.answer(next_event_of(session, name, vcpu=1))
    enable(session, name)
    vm.call_out(1, kind=KINDS[name])
    session.answer(next_event_of(session, name))
    vm.wait_word("done", 5)


@pytest.mark.clause("VCPUCTLEVT-ENABLE", "VCPUCTLEVT-DISABLE", "EVT-NOTENABLED-NOTSENT")
@pytest.mark.parametrize("name", OTHERS)
def test_enable_and_disable(lab: Lab, name: str) -> None:
    """The same for the events of control registers, MSRs, XCR0 and descriptor tables."""
    vm, session = pair_for(lab, name, vcpus=2)
    session.answer(cause(vm, session, name, vcpu=1))
    vm.finish(vcpu=1)
    # What caused it goes on being selected, where that matters; only the event is off.
    enable(session, name, vcpu=1, on=False)
    calls = [("set_cr4", CR4_PAE | CR4_DE | CR4_OSXSAVE, 0), ("set_xcr", 0, 1),
             ("set_msr", LSTAR, 0x3000), ("store_idt", 0, 0)]  # fmt: skip
    for vcpu in (0, 1):
        assert vm.perform_all(*calls, vcpu=vcpu)[-1]["faults"] == 0
    silent(session, vcpus=[0, 1])
    session.answer(cause(vm, session, name, vcpu=1))
    vm.finish(vcpu=1)
    silent(session, vcpus=[0, 1])


@pytest.mark.clause("VCPUCTLEVT-DISABLE")
def test_disable_during_event(vm: SmallVm, session: Session) -> None:
    """An event may be disabled while one waits for its reply: that one is still answered."""
    vm.run()
    enable(session, "HYPERCALL")
    vm.call_out(3)
    event = next_event_of(session, "HYPERCALL")
    enable(session, "HYPERCALL", on=False)
    session.answer(event)
    vm.wait_word("done", 3)
    silent(session, vcpus=[0])


@pytest.mark.clause("VCPUCTLEVT-EINVAL-PADDING")
def test_padding(vm: SmallVm, session: Session) -> None:
    """Each byte of padding, of header and command, answers KVM_EINVAL and enables nothing."""
    vm.run()
    for wrong in session.codec.wrong_paddings("VCPU_CONTROL_EVENTS"):
        session.command("VCPU_CONTROL_EVENTS", event_id="HYPERCALL", enable=1, **wrong).fails(
            "KVM_EINVAL"
        )
    vm.wait_word("done", vm.call_out(1))
    silent(session, vcpus=[0])


@pytest.mark.clause("VCPUCTLEVT-EINVAL-ENABLE")
def test_enable_above_one(vm: SmallVm, session: Session) -> None:
    """enable above 1 answers KVM_EINVAL, and neither enables nor disables."""
    vm.run()
    for value in (2, 3, 0x80, 0xFF):
        session.command("VCPU_CONTROL_EVENTS", event_id="HYPERCALL", enable=value).fails(
            "KVM_EINVAL"
        )
    vm.wait_word("done", vm.call_out(1))
    silent(session, vcpus=[0])
    enable(session, "HYPERCALL")
    session.command("VCPU_CONTROL_EVENTS", event_id="HYPERCALL", enable=2).fails("KVM_EINVAL")
    vm.call_out(1)
    session.answer(next_event_of(session, "HYPERCALL"))


@pytest.mark.clause("VCPUCTLEVT-EINVAL-UNKNOWN")
@pytest.mark.parametrize("event", [21, 23, 31, 33, 63, 65, 0x101, 0x8001, 0xFFFF, 2, 4, 0xFFFE])
def test_unknown(vm: SmallVm, session: Session, event: int) -> None:
    """An event id that is not known answers KVM_EINVAL, for enabling and disabling."""
    if event in session.profile.event_by_id:
        skip_clause(f"{session.profile.name} has an event {event}")
    vm.run()
    for value in (1, 0):
        session.command("VCPU_CONTROL_EVENTS", event_id=event, enable=value).fails("KVM_EINVAL")
    continues(session)


@pytest.mark.clause("VCPUCTLEVT-EINVAL-VMEVENT")
def test_vm_event(vm: SmallVm, session: Session) -> None:
    """The id of the UNHOOK event answers KVM_EINVAL, allowed or not, and enables nothing."""
    vm.run()
    for allow in (1, 0):
        assert vm.event("UNHOOK", allow) == "OK"
        for value in (1, 0):
            session.command("VCPU_CONTROL_EVENTS", event_id="UNHOOK", enable=value).fails(
                "KVM_EINVAL"
            )
    assert vm.event("UNHOOK", 1) == "OK"
    assert vm.preunhook() == unwanted(vm)
    silent(session)


@pytest.mark.clause("VCPUCTLEVT-EPERM")
def test_disallowed(vm: SmallVm, session: Session, profile: Profile) -> None:
    """A disallowed event answers KVM_EPERM for enabling and disabling, and stays off."""
    vm.run()
    for name in sorted(supported_events(session, profile) - {"UNHOOK"}):
        assert vm.event(name, 0) == "OK"
        for value in (1, 0):
            session.command("VCPU_CONTROL_EVENTS", event_id=name, enable=value).fails("KVM_EPERM")
        assert vm.event(name, 1) == "OK"
    vm.wait_word("done", vm.call_out(1))
    vm.wait_word("done", vm.call_out(1, kind=1))
    silent(session, vcpus=[0])


@pytest.mark.clause("VCPUCTLEVT-EOPNOTSUPP", "SSTEP-EOPNOTSUPP")
@pytest.mark.processor("core2_penryn_t9600")
def test_cannot_be_intercepted(other_lab: Lab) -> None:
    """What the first processors with VMX cannot intercept answers KVM_EOPNOTSUPP."""
    vm, session = other_lab.pair()
    requires(session, command="VCPU_CONTROL_SINGLESTEP", event="DESCRIPTOR")
    for _ in range(2):
        session.command("VCPU_CONTROL_EVENTS", event_id="DESCRIPTOR", enable=1).fails(
            "KVM_EOPNOTSUPP"
        )
        session.command("VCPU_CONTROL_SINGLESTEP", enable=1).fails("KVM_EOPNOTSUPP")
    vm.progresses()
    enable(session, "HYPERCALL")


@pytest.mark.clause("VCPUCTLEVT-EBUSY-BP")
def test_user_space_owns_breakpoints(vm: SmallVm, session: Session) -> None:
    """While user space debugs with breakpoints, enabling BREAKPOINT answers KVM_EBUSY."""
    assert vm.guest_debug(breakpoints=True) == "OK"
    vm.run()
    session.command("VCPU_CONTROL_EVENTS", event_id="BREAKPOINT", enable=1).fails("KVM_EBUSY")
    # Just that event, and just as long as user space has them.
    enable(session, "HYPERCALL")
    vm.stop()
    assert vm.guest_debug(breakpoints=False) == "OK"
    vm.run()
    enable(session, "BREAKPOINT")
    vm.call_out(1, kind=1)
    session.answer(next_event_of(session, "BREAKPOINT"))
    vm.wait_word("traps", 1)


@pytest.mark.clause("VCPUCTLEVT-BP-EXCLUSIVE")
def test_tool_owns_breakpoints(vm: SmallVm, session: Session) -> None:
    """While the tool has BREAKPOINT enabled, user space's guest-debug for them answers EBUSY."""
    vm.run()
    enable(session, "BREAKPOINT")
    vm.stop()
    assert vm.guest_debug(breakpoints=True) == "EBUSY"
    vm.run()
    vm.call_out(1, kind=1)
    session.answer(next_event_of(session, "BREAKPOINT"))
    vm.wait_word("traps", 1)
    enable(session, "BREAKPOINT", on=False)
    vm.stop()
    assert vm.guest_debug(breakpoints=True) == "OK"


@pytest.mark.clause("VCPUCTLEVT-BP-EXCLUSIVE", "UNHOOK-INTERCEPT-RESTORED")
@pytest.mark.parametrize("how", ["unhook", "close"])
def test_given_back_at_once(lab: Lab, vm: SmallVm, session: Session, how: str) -> None:
    """When the session is over user space can claim breakpoints before the guest runs again."""
    vm.run()
    enable(session, "BREAKPOINT")
    vm.stop()
    assert vm.guest_debug(breakpoints=True) == "EBUSY"
    lab.end(vm, session, how)
    ends_dead(lab.manager, vm)
    assert vm.guest_debug(breakpoints=True) == "OK"


@pytest.mark.clause("VCPUCTLEVT-BP-EXCLUSIVE")
def test_other_debugging(lab: Lab, vm: SmallVm, target: Target) -> None:
    """User space may use debug registers all the while, and gets what they stop at."""
    if "QEMU TCG" in target.facts().virtualisation:
        # It also forgets to take them back: later guests would stop there now and then.
        skip_clause("QEMU's TCG overlooks the debug registers of guests")
    vm.run()
    vm.progresses()
    session = lab.hook(vm)
    enable(session, "BREAKPOINT")
    vm.stop()
    assert debug(vm, at=vm.machine.linear("done")) == "OK"
    vm.run()
    vm.call_out(1, kind=1)
    session.answer(next_event_of(session, "BREAKPOINT"))
    assert vm.wait_exit().reason == "DEBUG"
    assert (vm.word("traps"), vm.word("done")) == (1, 0)
    assert debug(vm) == "OK"
    vm.run()
    vm.wait_word("done", 1)
    silent(session, vcpus=[0])


@pytest.mark.clause("VCPUCTLEVT-EBUSY-BP")
def test_user_space_debugs_otherwise(vm: SmallVm, session: Session) -> None:
    """User space that single-steps has no use for breakpoints: the tool can have them."""
    assert debug(vm, step=True) == "OK"
    pending = session.send("VCPU_CONTROL_EVENTS", event_id="BREAKPOINT", enable=1)
    continues(session)
    vm.run()
    assert vm.wait_exit().reason == "DEBUG"
    pending.reply(5).ok()
    assert debug(vm) == "OK"
    vm.run()
    vm.call_out(1, kind=1)
    session.answer(next_event_of(session, "BREAKPOINT"))
    vm.wait_word("traps", 1)


@pytest.mark.clause("VCPUCTLEVT-IMPLICIT")
def test_implicit_events(vm: SmallVm, session: Session, profile: Profile) -> None:
    """PAUSE, SINGLESTEP and TRAP are accepted for enabling and disabling, with no effect."""
    vm.run()
    implicit = {"PAUSE", "SINGLESTEP", "TRAP"} & supported_events(session, profile)
    for name in sorted(implicit):
        for on in (True, False, False):
            enable(session, name, on=on)
    vm.progresses()
    silent(session, vcpus=[0])
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    session.answer(next_event_of(session, "PAUSE"))
    vm.progresses()


@pytest.mark.clause("VCPUCTLEVT-IMPLICIT")
def test_implicit_trap(lab: Lab) -> None:
    """A TRAP event comes although it was never enabled, or was disabled."""
    vm, session = pair_for(lab, "TRAP")
    for on in (None, False):
        if on is not None:
            enable(session, "TRAP", on=on)
        session.answer(cause(vm, session, "TRAP"))
    vm.wait_word("faults", 2)
