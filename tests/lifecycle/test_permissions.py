# SPDX-License-Identifier: GPL-2.0-or-later
"""What the introspection object allows its tool, and in which order QEMU hands over."""

from __future__ import annotations

import time
from typing import Any

import pytest

from .stage import FIRST_COMMANDS, FIRST_EVENTS, Stage, ended, refused_start

ALWAYS_ALLOWED = ("GET_VERSION", "VM_CHECK_COMMAND", "VM_CHECK_EVENT")


@pytest.mark.clause("QEMU-PERM-DEFAULT-ALL")
def test_all_by_default(stage: Stage) -> None:
    """Without command and event properties a tool may use everything."""
    tool = stage.tool()
    stage.idle(tool)
    _, session = tool.hook()
    for command in FIRST_COMMANDS:
        session.command("VM_CHECK_COMMAND", id=command).ok()
    for event in FIRST_EVENTS:
        session.command("VM_CHECK_EVENT", id=event).ok()


@pytest.mark.clause("QEMU-PERM-LIST")
def test_listed_commands_only(stage: Stage) -> None:
    """With command properties a tool may use those commands, and the three that always work."""
    allowed = ("VM_GET_INFO", "VCPU_GET_INFO", "VM_READ_PHYSICAL")
    numbers = tuple(stage.profile.commands[name].id for name in allowed)
    tool = stage.tool()
    stage.idle(tool, commands=numbers)
    _, session = tool.hook()
    for command in FIRST_COMMANDS:
        reply = session.command("VM_CHECK_COMMAND", id=command)
        if command in allowed + ALWAYS_ALLOWED:
            reply.ok()
        else:
            reply.fails("KVM_EPERM")
    session.command("VM_GET_INFO").ok()
    session.command("VM_PAUSE_VCPU", vcpu=0, wait=0).fails("KVM_EPERM")
    for event in FIRST_EVENTS:
        session.command("VM_CHECK_EVENT", id=event).ok()


@pytest.mark.clause("QEMU-PERM-LIST")
def test_listed_events_only(stage: Stage) -> None:
    """With event properties a tool may enable those events and no other."""
    allowed = ("HYPERCALL", "UNHOOK")
    numbers = tuple(stage.profile.events[name].id for name in allowed)
    tool = stage.tool()
    stage.idle(tool, events=numbers)
    _, session = tool.hook()
    for event in FIRST_EVENTS:
        reply = session.command("VM_CHECK_EVENT", id=event)
        if event in allowed:
            reply.ok()
        else:
            reply.fails("KVM_EPERM")
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    session.command("VCPU_CONTROL_EVENTS", vcpu=0, event_id="BREAKPOINT", enable=1).fails(
        "KVM_EPERM"
    )


@pytest.mark.clause("QEMU-PERM-LIST", "QEMU-DISC-UNHOOK")
def test_permissions_are_the_same_after_a_reconnect(stage: Stage) -> None:
    """A tool that returns gets what the object lists, no more and no less than before."""
    info = stage.profile.commands["VM_GET_INFO"].id
    tool = stage.tool()
    stage.idle(tool, commands=(info,))
    for _ in range(2):
        _, session = tool.hook()
        session.command("VM_GET_INFO").ok()
        session.command("VM_CHECK_COMMAND", id="VM_PAUSE_VCPU").fails("KVM_EPERM")
        session.close()


@pytest.mark.clause("QEMU-IOCTL-ORDER")
def test_commands_are_allowed_before_events(stage: Stage) -> None:
    """HOOK comes first, and once the first event is allowed every command has been.

    A tool cannot see the ioctls, but it sees each permission as it comes. The first command is
    listed over and over, so that allowing them all takes longer than a look at one event and
    at the command that is listed last.
    """
    commands = tuple(stage.profile.commands[name].id for name in FIRST_COMMANDS)
    commands = commands[:1] * 10_000 + commands
    events = tuple(stage.profile.events[name].id for name in FIRST_EVENTS)
    tool = stage.tool()
    stage.idle(tool, commands=commands, events=events)
    for _ in range(5):
        sock, _ = tool.hello()
        tool.answer(sock)
        session = stage.session(sock, tool.name)
        # Without a pause: all permissions together take no more than a few milliseconds.
        deadline = time.monotonic() + 5
        while session.command("VM_CHECK_EVENT", id=events[0]).err and time.monotonic() < deadline:
            pass
        for command in reversed(FIRST_COMMANDS):
            session.command("VM_CHECK_COMMAND", id=command).ok()
        session.command("VM_CHECK_EVENT", id=events[0]).ok()
        session.close()


@pytest.mark.clause("QEMU-PERM-NOALL")
@pytest.mark.parametrize("property", ["command", "event"])
def test_minus_one_is_refused(stage: Stage, property: str) -> None:
    """The number that means 'all' to the kernel is not a value of these properties."""
    tool = stage.tool()
    said = refused_start(stage, tool, **{f"{property}s": (0xFFFF_FFFF,)})
    assert property in said


@pytest.mark.clause("QEMU-HOOK-FAIL")
@pytest.mark.parametrize("property", ["command", "event"])
def test_unknown_id(stage: Stage, property: str) -> None:
    """When the kernel refuses a permission QEMU gives the connection up, unhooks, and retries."""
    tool = stage.tool()
    unknown: dict[str, Any] = {f"{property}s": (77,)}
    guest = stage.idle(tool, **unknown)
    for _ in range(2):
        sock, _ = tool.hello()
        tool.answer(sock)
        assert ended(sock, timeout_s=5), "QEMU went on although a permission was refused"
    assert guest.status() == "running"
