# SPDX-License-Identifier: GPL-2.0-or-later
"""PREUNHOOK ioctl, and the UNHOOK event that it sends."""

from __future__ import annotations

import errno
import struct
import time
from typing import Any

import pytest
from checks import RawTool, continues, ends_dead, event_size, near_misses, silent
from lab import Lab

from harness.errors import DeadlineError, SessionClosed, SilenceError
from harness.manager.smallvm import SmallVm
from harness.tool import Session


def _subscribe(session: Session, enable: int = 1) -> None:
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=enable).ok()


@pytest.mark.clause("PREUNHOOK-ABI")
def test_abi(vm: SmallVm, session: Session) -> None:
    """Its request takes no argument: whatever stands there is not looked at."""
    request = session.profile.ioctl("PREUNHOOK").request
    _subscribe(session)
    for argument in ({}, {"value": 0xDEAD_BEEF}, {"bad": "unmapped"}):
        for near_miss in near_misses(request):
            assert vm.request(near_miss, argument, what=f"{near_miss:#x}") == "ENOTTY"
        assert vm.request(request, argument, what="PREUNHOOK") == "OK"
        session.next_event("UNHOOK", timeout_s=5)
    silent(session)


@pytest.mark.clause("PREUNHOOK-EPERM-DISABLED")
def test_disabled(lab: Lab, vm: SmallVm, session: Session) -> None:
    """PREUNHOOK answers EPERM while introspection is off, and sends nothing."""
    _subscribe(session)
    with lab.introspection_off():
        assert vm.preunhook() == "EPERM"
        assert lab.vm().preunhook() == "EPERM"
    silent(session)
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)


@pytest.mark.clause("PREUNHOOK-EFAULT-NOTHOOKED")
def test_not_hooked(lab: Lab, vm: SmallVm) -> None:
    """PREUNHOOK answers EFAULT before HOOK and after UNHOOK."""
    assert vm.preunhook() == "EFAULT"
    _subscribe(lab.hook(vm))
    assert vm.preunhook() == "OK"
    assert vm.unhook() == "OK"
    assert vm.preunhook() == "EFAULT"


@pytest.mark.clause("PREUNHOOK-ENOENT-SOCKERR", "LIFE-TOOLCLOSE-PREUNHOOK-ENOENT")
def test_tool_is_gone(lab: Lab, vm: SmallVm, session: Session) -> None:
    """PREUNHOOK answers ENOENT once the tool closed the socket, however often it is asked."""
    _subscribe(session)
    session.close()
    ends_dead(lab.manager, vm)
    for _ in range(3):
        assert vm.preunhook() == "ENOENT"
    assert vm.unhook() == "OK"


@pytest.mark.clause("PREUNHOOK-ENOENT-SOCKERR")
def test_socket_was_shut_down(lab: Lab, vm: SmallVm, session: Session) -> None:
    """PREUNHOOK answers ENOENT after the device manager itself shut the socket down."""
    _subscribe(session)
    assert lab.manager.shutdown(vm.socket) == "OK"
    session.expect_close(timeout_s=5)
    assert vm.preunhook() == "ENOENT"


@pytest.mark.clause("PREUNHOOK-ENOENT-NOTSUBSCRIBED")
def test_not_subscribed(lab: Lab, vm: SmallVm) -> None:
    """PREUNHOOK answers ENOENT and sends nothing unless the tool has enabled the event."""
    session = lab.hook(vm, allow=False)
    assert vm.preunhook() == "ENOENT"
    assert vm.command(-1) == "OK"
    assert vm.event("UNHOOK") == "OK"
    assert vm.preunhook() == "ENOENT"
    _subscribe(session)
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)
    _subscribe(session, 0)
    assert vm.preunhook() == "ENOENT"
    silent(session)


@pytest.mark.clause("PREUNHOOK-SENDS", "EV-UNHOOK-SENT")
def test_sends_one_event(lab: Lab, vm: SmallVm) -> None:
    """Each successful PREUNHOOK puts exactly one UNHOOK event on the socket."""
    tool = lab.raw(vm)
    assert tool.command("VM_CONTROL_EVENTS", seq=1, event_id="UNHOOK", enable=1) == bytes(8)
    numbers = []
    for _ in range(3):
        assert vm.preunhook() == "OK"
        event = tool.receive()
        assert event.id == lab.profile.vm_event
        assert lab.codec.decode_event(event.id, event.payload).name == "UNHOOK"
        numbers.append(event.seq)
    assert tool.ask(2, seq=2)[:4] == bytes(4)
    assert numbers == sorted(set(numbers))


def _silent_tool(lab: Lab, vm: SmallVm) -> tuple[str, dict[str, Any]]:
    """Hook a guest to a socket in the host, with the event enabled, that nobody reads from.

    Answers the name of its other end, and PREUNHOOK as a request to the agent.
    """
    name, fd = lab.manager.socketpair()
    assert vm.hook_and_allow(fd) == ["OK", "OK", "OK"]
    link, peer = lab.manager.link, name + ".peer"
    frame = lab.codec.frame(*lab.codec.encode_command("VM_CONTROL_EVENTS", enable=1), 1)
    link.call("send", name=peer, hex=frame.hex())
    assert link.call("receive", name=peer, size=16, timeout_s=5)["hex"][16:] == bytes(8).hex()
    request, _ = lab.codec.encode_ioctl("PREUNHOOK")
    return peer, {"op": "ioctl", "on": f"vm:{vm.name}", "request": request}


@pytest.mark.clause("PREUNHOOK-NOWAIT")
def test_does_not_wait(lab: Lab, vm: SmallVm) -> None:
    """PREUNHOOK returns although the tool neither reads the event nor closes the socket."""
    peer, preunhook = _silent_tool(lab, vm)
    vm.run()
    started = time.monotonic()
    answers = lab.manager.batch([preunhook] * 5)
    assert time.monotonic() - started < 5
    assert [(answer["ret"], answer["errno"]) for answer in answers] == [(0, 0)] * 5
    vm.progresses()
    size = 8 + event_size(lab.profile, "UNHOOK")
    answer = lab.manager.link.call("receive", name=peer, size=5 * size + 1, timeout_s=0.5)
    assert len(answer["hex"]) // 2 == 5 * size


@pytest.mark.clause("PREUNHOOK-NOWAIT", "PREUNHOOK-SENDS")
def test_does_not_wait_for_room(lab: Lab, vm: SmallVm) -> None:
    """Nor does it wait when the socket takes no more: it fails, and has written nothing."""
    peer, preunhook = _silent_tool(lab, vm)
    try:
        answers = lab.manager.batch([preunhook] * 2000, timeout_s=20)
    except DeadlineError:
        pytest.fail("PREUNHOOK waits for a tool that does not read")
    errors = [answer["errno"] for answer in answers]
    refused = errno.ENOENT if "ENOENT" in lab.profile.ioctl("PREUNHOOK").errors else errno.EFAULT
    done = errors.index(refused) if refused in errors else len(errors)
    assert errors == [0] * done + [refused] * (len(errors) - done)
    size = 8 + event_size(lab.profile, "UNHOOK")
    answer = lab.manager.link.call("receive", name=peer, size=done * size + 1, timeout_s=2)
    assert len(answer["hex"]) // 2 == done * size


@pytest.mark.clause("PREUNHOOK-NOTUNHOOKED", "EV-UNHOOK-NOREPLY")
def test_stays_hooked(lab: Lab, vm: SmallVm, session: Session) -> None:
    """After PREUNHOOK the guest runs on, the VM stays hooked and the tool can use commands."""
    vm.run()
    _subscribe(session)
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)
    vm.progresses()
    session.command("VM_GET_INFO").ok()
    session.command("VCPU_GET_REGISTERS", nmsrs=0).ok()
    session.command("VM_PAUSE_VCPU", wait=1).ok()
    session.answer(session.next_event("PAUSE", timeout_s=5))
    vm.progresses()
    fd, _ = lab.connect(vm)
    assert vm.hook(fd) == "EEXIST"
    silent(session, vcpus=[0])


@pytest.mark.clause("PREUNHOOK-DELAY", "LIFE-UNHOOK-SEQUENCE", "EV-UNHOOK-NOREPLY")
def test_tool_closes(lab: Lab, vm: SmallVm, session: Session) -> None:
    """PREUNHOOK, event, the tool undoes its changes and closes; the manager sees it, unhooks."""
    vm.run()
    session.command("VCPU_CONTROL_EVENTS", event_id="BREAKPOINT", enable=1).ok()
    _subscribe(session)
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)
    assert lab.manager.poll(vm.socket, "HUP", within_s=0.3) == []
    vm.progresses()
    session.command("VCPU_CONTROL_EVENTS", event_id="BREAKPOINT", enable=0).ok()
    session.close()
    ends_dead(lab.manager, vm)
    if lab.profile.has("ioctl UNHOOK"):
        assert vm.unhook() == "OK"
    vm.wait_word("traps", vm.call_out(1, kind=1))
    continues(lab.hook(vm))


@pytest.mark.clause("PREUNHOOK-DELAY")
def test_tool_does_not_close(vm: SmallVm, session: Session) -> None:
    """When the tool lets the time go by, the manager's UNHOOK ends the session all the same."""
    vm.run()
    _subscribe(session)
    assert vm.preunhook() == "OK"
    session.next_event("UNHOOK", timeout_s=5)
    with pytest.raises(SilenceError):
        session.expect_close(timeout_s=0.5)
    assert vm.unhook() == "OK"
    session.expect_close(timeout_s=5)
    vm.progresses()


@pytest.mark.clause("PREUNHOOK-FAIL-PROCEED")
def test_failure_means_nobody_to_wait_for(vm: SmallVm, session: Session) -> None:
    """After PREUNHOOK failed the device manager can unhook at once; the guest runs on."""
    vm.run()
    assert vm.preunhook() == "ENOENT"
    assert vm.unhook() == "OK"
    session.expect_close(timeout_s=5)
    vm.progresses()
    assert vm.preunhook() == "EFAULT"


@pytest.mark.clause("EV-UNHOOK-NOREPLY")
def test_answer_to_unhook_event(lab: Lab, vm: SmallVm) -> None:
    """The UNHOOK event has no reply: a message with its id is an unsupported command."""
    tool: RawTool = lab.raw(vm)
    assert tool.command("VM_CONTROL_EVENTS", seq=1, event_id="UNHOOK", enable=1) == bytes(8)
    assert vm.preunhook() == "OK"
    event = tool.receive()
    try:
        payload = tool.ask(event.id, bytes(16), seq=event.seq)
    except SessionClosed:
        pytest.fail("the session ended")
    unknown = lab.profile.errno[lab.profile.unknown_command]
    assert struct.unpack("<iI", payload) == (-unknown, 0)
    assert tool.ask(2, seq=2)[:4] == bytes(4)
