# SPDX-License-Identifier: GPL-2.0-or-later
"""HOOK ioctl."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from checks import (
    ALWAYS_ALLOWED,
    allowed_commands,
    allowed_events,
    continues,
    enable,
    ends_dead,
    near_misses,
    reply_size,
    silent,
    supported_commands,
    supported_events,
    unwanted,
)
from lab import Lab

from harness.abi import Profile
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.tool import Session

NOT_HOOKED = "EFAULT"


@pytest.mark.clause("HOOK-ABI")
def test_abi(lab: Lab, vm: SmallVm) -> None:
    """Its request takes fd, padding and uuid at offsets 0, 4 and 8 of 24 bytes."""
    request = lab.profile.ioctl("HOOK").request
    fd, sock = lab.connect(vm)
    argument = struct.pack("<iI16s", fd, 0, bytes(range(16)))
    for near_miss in near_misses(request):
        result = vm.request(near_miss, {"hex": argument.hex()}, what=f"{near_miss:#x}")
        assert result == "ENOTTY"
    assert vm.command(-1) == NOT_HOOKED
    assert vm.request(request, {"hex": argument.hex()}, what="HOOK") == "OK"
    continues(lab.session(sock))


@pytest.mark.clause("HOOK-OK")
def test_ok(lab: Lab, vm: SmallVm) -> None:
    """HOOK with a TCP socket returns 0, and commands on the socket are answered."""
    session = lab.hook(vm, allow=False)
    continues(session)


@pytest.mark.clause("HOOK-OK")
def test_ok_local_socket(lab: Lab, vm: SmallVm) -> None:
    """HOOK with a UNIX stream socket returns 0, and commands on its other end are answered."""
    name, fd = lab.manager.socketpair()
    assert vm.hook(fd) == "OK"
    link = lab.manager.link
    link.call("send", name=name + ".peer", hex=struct.pack("<HHI", 2, 0, 77).hex())
    size = reply_size(lab.profile, "GET_VERSION")
    reply = link.call("receive", name=name + ".peer", size=8 + size, timeout_s=5)
    assert bytes.fromhex(reply["hex"])[:20] == struct.pack("<HHIiIi", 2, size, 77, 0, 0, 1)


@pytest.mark.clause("HOOK-EPERM-DISABLED")
def test_disabled(lab: Lab, vm: SmallVm) -> None:
    """HOOK answers EPERM while introspection is off, before it looks at its argument."""
    fd, sock = lab.connect(vm)
    with lab.introspection_off():
        assert vm.hook(fd) == "EPERM"
        assert vm.hook(fd, bad="unmapped") == "EPERM"
        assert vm.hook(fd, padding=1) == "EPERM"
        assert vm.hook(-1) == "EPERM"
    assert vm.hook(fd) == "OK"
    continues(lab.session(sock))


@pytest.mark.clause("HOOK-EFAULT-ARG")
@pytest.mark.parametrize("bad", ["null", "unmapped", "edge", "kernel"])
def test_unreadable_argument(lab: Lab, vm: SmallVm, bad: str) -> None:
    """HOOK answers EFAULT when its argument cannot be read, in whole or in part."""
    fd, _ = lab.connect(vm)
    assert vm.hook(fd, bad=bad) == "EFAULT"
    assert vm.command(-1) == NOT_HOOKED


@pytest.mark.clause("HOOK-EINVAL-PADDING")
def test_padding(lab: Lab, vm: SmallVm) -> None:
    """HOOK answers EINVAL when any byte of the padding is set, also on a hooked VM."""
    fd, sock = lab.connect(vm)
    for byte in range(4):
        assert vm.hook(fd, padding=1 << 8 * byte) == "EINVAL"
        assert vm.hook(fd, padding=0x80 << 8 * byte) == "EINVAL"
    assert vm.command(-1) == NOT_HOOKED
    assert vm.hook(fd) == "OK"
    assert vm.hook(fd, padding=1) == "EINVAL"
    continues(lab.session(sock))


@pytest.mark.clause("HOOK-EEXIST-HOOKED")
def test_hooked_twice(lab: Lab, vm: SmallVm, session: Session) -> None:
    """HOOK on a hooked VM answers EEXIST; the session goes on and the new socket is let be."""
    fd, sock = lab.connect(vm)
    assert vm.hook(fd) == "EEXIST"
    assert vm.hook(-1) == "EEXIST"
    continues(session)
    other = lab.vm()
    assert other.hook(fd) == "OK"
    continues(lab.session(sock))


@pytest.mark.clause("HOOK-EEXIST-DEADSOCK")
def test_dead_socket(lab: Lab, vm: SmallVm, session: Session) -> None:
    """After the tool closed the socket HOOK still answers EEXIST, until UNHOOK was issued."""
    session.close()
    ends_dead(lab.manager, vm)
    fd, sock = lab.connect(vm)
    assert vm.hook(fd) == "EEXIST"
    assert vm.unhook() == "OK"
    assert vm.hook(fd) == "OK"
    continues(lab.session(sock))


@pytest.mark.clause("HOOK-ENOMEM")
def test_no_memory() -> None:
    """HOOK answers ENOMEM when an allocation fails."""
    skip_clause("user space cannot make just these allocations fail; it needs fault injection")


@pytest.mark.clause("HOOK-EINVAL-BADFD")
def test_bad_descriptor(lab: Lab, vm: SmallVm) -> None:
    """HOOK answers EINVAL when fd is no open descriptor."""
    closed_name, closed = lab.manager.socketpair()
    lab.manager.close_fd(closed_name)
    for fd in (-1, -100, 1_000_000, 0x7FFF_FFFF, -0x8000_0000, closed):
        assert vm.hook(fd) == "EINVAL", f"fd {fd}"
    assert vm.command(-1) == NOT_HOOKED


@pytest.mark.clause("HOOK-EINVAL-NOTSOCK")
def test_not_a_socket(lab: Lab, vm: SmallVm) -> None:
    """HOOK answers EINVAL for descriptors of a device, a pipe and a VM."""
    link, name = lab.manager.link, lab.manager.new_name
    device = link.call("open", name=name("file"), path="/dev/null")
    pipe = link.call("pipe", name=name("pipe"))[0]
    for fd in (device, pipe, vm.fd):
        assert vm.hook(fd) == "EINVAL", f"fd {fd}"
    assert vm.command(-1) == NOT_HOOKED


@pytest.mark.clause("HOOK-FD-OWNREF")
def test_own_reference(lab: Lab, vm: SmallVm) -> None:
    """The session goes on after the device manager closed its descriptor, until UNHOOK."""
    session = lab.hook(vm)
    lab.manager.close_fd(vm.socket)
    session.command("VM_GET_INFO").ok()
    # The number is free: what gets it next must not be taken for the session's socket.
    lab.manager.socketpair()
    session.command("VM_GET_INFO").ok()
    if lab.profile.has("ioctl UNHOOK"):
        assert vm.unhook() == "OK"
        session.expect_close(timeout_s=5)


@pytest.mark.clause("HOOK-UUID-LOGONLY")
def test_uuid(lab: Lab) -> None:
    """Any uuid will do, also one that another hooked VM has, and changes nothing else."""
    seen = []
    for uuid in (bytes(16), b"\xff" * 16, b"\xff" * 16, bytes(range(16))):
        vm = lab.vm()
        fd, sock = lab.connect(vm)
        assert vm.hook(fd, uuid=uuid) == "OK"
        session = lab.session(sock)
        version = session.command("GET_VERSION").ok()
        seen.append((version.raw, allowed_commands(session, lab.profile)))
    assert all(item == seen[0] for item in seen)


@pytest.mark.clause("HOOK-DEFAULT-DENY")
def test_default_deny(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """Right after HOOK every event is disallowed, and every command but the query ones."""
    session = lab.hook(vm, allow=False)
    vm.run()
    assert allowed_commands(session, profile) == ALWAYS_ALLOWED
    assert allowed_events(session, profile) == set()
    for name in supported_commands(session, profile) - ALWAYS_ALLOWED:
        session.command(name).fails("KVM_EPERM")
    continues(session)


@pytest.mark.clause("HOOK-EVENTS-DISABLED")
def test_no_event_enabled(vm: SmallVm, session: Session) -> None:
    """Right after HOOK no event is sent, although all are allowed and the guest causes some."""
    vm.run()
    for kind in (0, 1):
        vm.wait_word("done", vm.call_out(3, kind=kind))
    assert vm.word("traps") == 3
    assert vm.preunhook() == unwanted(vm)
    silent(session, vcpus=[0])


@pytest.mark.clause("HOOK-CLEANUP-ON", "UNHOOK-INTERCEPT-RESTORED")
def test_cleanup_is_on(lab: Lab, vm: SmallVm, session: Session) -> None:
    """By default UNHOOK gives breakpoints back: the guest has its own, user space may take them."""
    vm.run()
    enable(session, "BREAKPOINT")
    vm.call_out(1, kind=1)
    event = session.next_event("BREAKPOINT", timeout_s=5)
    session.answer(event, "CONTINUE")
    vm.wait_word("traps", 1)
    assert vm.unhook() == "OK"
    vm.wait_word("done", vm.call_out(2, kind=1))
    assert vm.word("traps") == 3
    # Nobody owns breakpoints now: int3 must not leave KVM_RUN, and user space may claim it.
    assert vm.stop().reason == "STOPPED"
    assert vm.guest_debug(breakpoints=True) == "OK"


@pytest.mark.clause("HOOK-REHOOK", "UNHOOK-PERMS-LOST")
def test_hook_again(lab: Lab, vm: SmallVm, session: Session, profile: Profile) -> None:
    """After UNHOOK a VM can be hooked again, and permissions and events are the defaults."""
    vm.run()
    enable(session, "HYPERCALL")
    enable(session, "BREAKPOINT")
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    commands, events = supported_commands(session, profile), supported_events(session, profile)
    assert vm.unhook() == "OK"
    session.expect_close(timeout_s=5)

    again = lab.hook(vm, allow=False)
    assert allowed_commands(again, profile) == ALWAYS_ALLOWED
    assert allowed_events(again, profile) == set()
    assert vm.preunhook() == unwanted(vm)
    assert vm.command(-1) == "OK"
    assert vm.event(-1) == "OK"
    assert allowed_commands(again, profile) == commands
    assert allowed_events(again, profile) == events
    # Allowed again is not enabled again.
    assert vm.preunhook() == unwanted(vm)
    vm.wait_word("done", vm.call_out(2, kind=0))
    vm.wait_word("done", vm.call_out(2, kind=1))
    assert vm.word("traps") == 2
    silent(again, vcpus=[0])


@pytest.mark.clause("HOOK-FAIL-NOSTATE")
def test_failed_hook(lab: Lab, vm: SmallVm) -> None:
    """After a HOOK that failed, the VM is not hooked, and the right HOOK succeeds."""
    device = lab.manager.link.call("open", name=lab.manager.new_name("file"), path="/dev/null")
    fd, sock = lab.connect(vm)
    wrong: list[dict[str, Any]] = [
        {"fd": fd, "padding": 1},
        {"fd": fd, "bad": "unmapped"},
        {"fd": -1},
        {"fd": device},
    ]
    for argument in wrong:
        assert vm.hook(**argument) != "OK"
        assert vm.command(-1) == NOT_HOOKED
        assert vm.event(-1) == NOT_HOOKED
        assert vm.preunhook() == NOT_HOOKED
    assert vm.hook(fd) == "OK"
    continues(lab.session(sock))
