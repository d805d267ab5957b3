# SPDX-License-Identifier: GPL-2.0-or-later
"""Stopping a machine: the tool is asked first, and QEMU neither forgets nor waits too long."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from harness.abi import Codec, frame
from harness.manager.qemu import QemuGuest
from harness.manager.qmp import PendingAnswer, QmpLink
from harness.tool import Session

from .stage import Stage, Tool, ended, next_port, wait_until


def hooked(stage: Stage, tool: Tool, **options: Any) -> tuple[QemuGuest, Session]:
    """A machine whose tool wants to be told before it is unhooked."""
    guest = stage.idle(tool, **options)
    _, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    return guest, session


def ask_to_stop(guest: QemuGuest, session: Session) -> PendingAnswer:
    """Order a stop, and wait until the tool has been told of it."""
    stop = guest.send("stop")
    session.next_event("UNHOOK", timeout_s=5)
    return stop


def paused_and_back(guest: QemuGuest, tool: Tool) -> Session:
    """The machine is paused and keeps to itself; after cont it is introspected again."""
    assert guest.status() == "paused"
    assert tool.silent(), "QEMU connected although the machine is paused"
    guest.qmp("cont")
    _, session = tool.hook()
    assert guest.status() == "running"
    return session


@pytest.mark.clause(
    "QEMU-STOP-PREUNHOOK",
    "QEMU-STOP-ASYNC",
    "QEMU-STOP-NORECONNECT",
    "QEMU-CONT-RECONNECT",
    "PREUNHOOK-DELAY",
)
def test_stop_waits_for_the_tool(stage: Stage) -> None:
    """stop sends the event, and pauses and answers when the tool has closed, not before."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    stop = ask_to_stop(guest, session)
    session.no_event(within_s=0.5)
    assert guest.status() == "running"
    assert not stop.arrived
    assert session.command("GET_VERSION").ok(), "the session goes on until the tool closes"
    session.close()
    stop.value(timeout_s=5)
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-ASYNC")
def test_other_answers_are_not_held_back(stage: Stage) -> None:
    """While stop waits, every other command is answered, each with its own answer, none lost."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    stop = ask_to_stop(guest, session)
    for _ in range(3):
        assert guest.qmp("query-name", timeout_s=3) == {"name": guest.name}
        assert guest.qmp("query-status", timeout_s=3)["status"] == "running"
    assert "nonsense" in guest.refusal("nonsense")
    assert not stop.arrived
    session.close()
    assert stop.value(timeout_s=5) == {}


@pytest.mark.clause("QEMU-STOP-ASYNC")
@pytest.mark.parametrize("async_unhook", [True, False], ids=["async", "sync"])
def test_other_monitors_go_on(stage: Stage, async_unhook: bool) -> None:
    """While stop waits on one monitor, out-of-band commands run, and other monitors too.

    With async_unhook off, QEMU is busy with stop: its one dispatcher of QMP commands has to
    wait. Out-of-band commands do not go through it.
    """
    port = next_port()
    tool = stage.tool()
    guest, session = hooked(
        stage,
        tool,
        async_unhook=async_unhook,
        extra=("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"),
    )
    other = QmpLink(
        stage.host.connect(port), name="other", transcript=stage.evidence / "qmp_other.jsonl"
    )
    stage.keep(other.close)
    stop = ask_to_stop(guest, session)
    assert isinstance(guest.link.send("query-yank", oob=True).value(timeout_s=3), list)
    assert isinstance(other.send("query-yank", oob=True).value(timeout_s=3), list)
    if async_unhook:
        assert other.execute("query-status", timeout_s=3)["status"] == "running"
        assert "nonsense" in other.refusal("nonsense", timeout_s=3)
    assert not stop.arrived
    session.close()
    assert stop.value(timeout_s=5) == {}
    assert other.execute("query-status", timeout_s=3)["status"] == "paused"
    assert [event["event"] for event in other.events()] == ["STOP"]


@pytest.mark.clause("QEMU-STOP-ASYNC", "QEMU-CONT-RECONNECT")
def test_stop_of_the_human_monitor(stage: Stage) -> None:
    """stop by the human monitor asks the tool, too; it returns before the machine is paused."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    assert guest.qmp("human-monitor-command", command_line="stop") == ""
    session.next_event("UNHOOK", timeout_s=5)
    assert guest.status() == "running"
    session.close()
    guest.link.event("STOP", timeout_s=5)
    paused_and_back(guest, tool)


@pytest.mark.clause("MSG-BLOCKING", "EVT-VCPU-HELD")
def test_queries_while_a_vcpu_is_held(stage: Stage) -> None:
    """What management asks for regularly does not wait for a vCPU that the tool holds."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    stage.pause(session, 1)
    began = time.monotonic()
    assert guest.status() == "running"
    assert len(guest.qmp("query-cpus-fast", timeout_s=3)) == 1
    assert guest.qmp("query-stats", target="vcpu", timeout_s=3)
    assert time.monotonic() - began < 2
    assert session.command("GET_VERSION").ok(), "a query ended the session"


@pytest.mark.clause("EVT-DISCONNECT-CONTINUE", "QEMU-DISC-UNHOOK")
def test_look_into_a_vcpu_that_is_held(stage: Stage) -> None:
    """A command that needs a held vCPU ends the session after a while, rather than to hang."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    stage.pause(session, 1)
    look = guest.send("human-monitor-command", command_line="info registers")
    session.expect_close(timeout_s=10)
    said = look.value(timeout_s=5)
    assert "IP=0000ff02" in said
    assert "the tool does not let the vCPUs go, unhooking" in said, "no word of why"
    tool.hook()
    assert guest.status() == "running"


@pytest.mark.clause("QEMU-STOP-NOTOOL", "PREUNHOOK-ENOENT-NOTSUBSCRIBED", "PREUNHOOK-FAIL-PROCEED")
def test_stop_with_a_tool_that_does_not_want_to_know(stage: Stage) -> None:
    """Without the unhook event enabled the tool is disconnected and the machine paused at once."""
    tool = stage.tool()
    guest = stage.idle(tool)
    _, session = tool.hook()
    began = time.monotonic()
    guest.qmp("stop", timeout_s=5)
    assert time.monotonic() - began < 3
    session.expect_close(timeout_s=2)
    assert session.count() == 0
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-NOTOOL", "PREUNHOOK-FAIL-PROCEED")
def test_stop_without_a_tool(stage: Stage) -> None:
    """With nobody connected a stop is a stop."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    tool.close()
    session.close()
    wait_until(
        "QEMU notices that its tool is gone",
        lambda: guest.qmp("qom-get", path="/chardevs/tool", property="connected") is False,
        timeout_s=5,
    )
    guest.qmp("stop", timeout_s=5)
    assert guest.status() == "paused"
    guest.qmp("cont", timeout_s=5)
    assert guest.status() == "running"


@pytest.mark.clause("QEMU-STOP-TIMEOUT", "PREUNHOOK-DELAY")
def test_stop_runs_out_of_patience(stage: Stage) -> None:
    """After unhook_timeout QEMU closes the socket itself, pauses, and answers."""
    tool = stage.tool()
    guest, session = hooked(stage, tool, unhook_timeout_s=1)
    began = time.monotonic()
    stop = ask_to_stop(guest, session)
    session.expect_close(timeout_s=5)
    stop.value(timeout_s=5)
    waited_s = time.monotonic() - began
    assert waited_s > 0.8, f"QEMU waited only {waited_s:.2f} s"
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-TIMEOUT", "QEMU-STOP-NOTOOL", "PREUNHOOK-NOWAIT")
def test_stop_with_a_tool_that_floods(stage: Stage) -> None:
    """A tool that sends and sends, and reads no answer, holds up nothing but its own session."""
    tool = stage.tool()
    guest = stage.idle(tool, unhook_timeout_s=1)
    sock, _ = tool.hello()
    tool.answer(sock)
    codec = Codec(stage.profile)
    subscribe = codec.encode_command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1)
    # What is too much in it is ignored; it fills the buffers on the way sooner.
    read = codec.encode_command("VM_READ_PHYSICAL", gpa=0, size=4096, length=8000)
    with contextlib.suppress(TimeoutError):
        sock.settimeout(1)
        sock.sendall(frame(*subscribe, 1))
        for number in range(100_000):
            sock.sendall(frame(*read, number))
        raise AssertionError("the kernel takes commands for ever, and nobody its answers")
    assert guest.qmp("query-status", timeout_s=3)["status"] == "running"
    began = time.monotonic()
    stop = guest.send("stop")
    assert guest.qmp("query-name", timeout_s=3) == {"name": guest.name}
    stop.value(timeout_s=8)
    assert time.monotonic() - began < 7
    assert guest.status() == "paused"
    sock.close()
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-DISC-UNHOOK", "MSG-TOOBIG-CLOSE")
def test_tool_that_sends_nonsense(stage: Stage) -> None:
    """Noise ends the session, in the handshake or after it; QEMU answers, and tries again."""
    tool = stage.tool()
    guest = stage.idle(tool, handshake_timeout_s=1)
    noise = bytes(range(255, -1, -1)) * 64
    sock, _ = tool.hello()
    with contextlib.suppress(OSError):
        sock.sendall(noise)
    assert ended(sock, timeout_s=5)
    # Only the noise that was taken for an endless answer was to be given up soon.
    guest.qmp("qom-set", path="/objects/introspection0", property="handshake_timeout", value=10)
    assert guest.qmp("query-status", timeout_s=3)["status"] == "running"
    sock, _ = tool.hello()
    tool.answer(sock)
    with contextlib.suppress(OSError):
        sock.sendall(noise)
    assert guest.qmp("query-status", timeout_s=3)["status"] == "running"
    sock.close()
    tool.hook()


@pytest.mark.clause("QEMU-STOP-SYNC")
def test_stop_waits_inside(stage: Stage) -> None:
    """With async_unhook off QEMU waits inside stop; the machine runs until the tool closes."""
    tool = stage.tool()
    guest, session = hooked(stage, tool, async_unhook=False)
    stop = ask_to_stop(guest, session)
    session.no_event(within_s=0.5)
    assert not stop.arrived
    assert session.command("VCPU_GET_REGISTERS", vcpu=0).ok(), "the vCPU still answers"
    session.close()
    stop.value(timeout_s=5)
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-SYNC", "QEMU-STOP-TIMEOUT")
def test_stop_runs_out_of_patience_inside(stage: Stage) -> None:
    """With async_unhook off, too, the wait ends after unhook_timeout."""
    tool = stage.tool()
    guest, session = hooked(stage, tool, async_unhook=False, unhook_timeout_s=1)
    began = time.monotonic()
    stop = ask_to_stop(guest, session)
    session.expect_close(timeout_s=5)
    stop.value(timeout_s=5)
    assert time.monotonic() - began > 0.8
    assert guest.status() == "paused"


@pytest.mark.clause("QEMU-STOP-BUSY")
def test_second_stop_does_not_wait(stage: Stage) -> None:
    """A second stop pauses at once, and with that the first one is done, too."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    first = ask_to_stop(guest, session)
    assert guest.status() == "running"
    guest.qmp("stop", timeout_s=5)
    assert guest.status() == "paused"
    assert first.value(timeout_s=5) == {}, "the machine is paused, and the first stop still waits"
    session.no_event("UNHOOK", within_s=0.3)
    session.close()
    assert guest.status() == "paused"
    guest.qmp("cont")
    tool.hook()
    assert guest.status() == "running"


@pytest.mark.clause("QEMU-CONT-RECONNECT", "QEMU-STOP-NORECONNECT", "HOOK-REHOOK")
def test_stop_and_cont_over_and_over(stage: Stage) -> None:
    """A machine can be stopped and continued any number of times, each time with the tool."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    start_time = None
    for _ in range(5):
        stop = ask_to_stop(guest, session)
        session.close()
        stop.value(timeout_s=5)
        guest.qmp("cont")
        hello, session = tool.hook()
        assert start_time in (None, hello.start_time)
        start_time = hello.start_time
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()


@pytest.mark.clause("QEMU-MIGRATE-WAIT", "QEMU-STOP-PREUNHOOK")
def test_cancelled_migration_is_forgotten(stage: Stage) -> None:
    """A migration that is cancelled while it waits for the tool leaves nothing behind.

    The tool reconnects if it closed, and the next stop asks it as ever.
    """
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    guest.migrate("file:/run/kvmi-cancelled")
    session.next_event("UNHOOK", timeout_s=5)
    guest.qmp("migrate_cancel")
    guest.wait_migration("cancelled", timeout_s=5)
    assert guest.status() == "running"
    session.close()
    _, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    stop = ask_to_stop(guest, session)
    assert not stop.arrived
    session.close()
    stop.value(timeout_s=5)


@pytest.mark.clause("QEMU-MIGRATE-WAIT")
def test_tool_returns_after_a_failed_migration(stage: Stage) -> None:
    """When a migration fails the machine runs on here, and so does its introspection."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    guest.migrate("exec:exit 1")
    session.next_event("UNHOOK", timeout_s=5)
    session.close()
    guest.wait_migration("failed", timeout_s=10)
    assert guest.status() == "running"
    tool.hook()


@pytest.mark.clause("QEMU-CONT-RECONNECT")
def test_cont_overtakes_a_stop(stage: Stage) -> None:
    """A cont while stop still waits for the tool: the machine runs on, and no stop is pending."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    stop = ask_to_stop(guest, session)
    guest.qmp("cont", timeout_s=5)
    wait_until("stop is answered", lambda: stop.arrived, timeout_s=5)
    assert guest.status() == "running"
    session.close()
    _, session = tool.hook()
    assert guest.status() == "running", "the stop was carried out although cont came after it"
