# SPDX-License-Identifier: GPL-2.0-or-later
"""Reset, shutdown, save and restore: what they mean to the tool's session."""

from __future__ import annotations

import time

import pytest

from harness.manager.qemu import QemuGuest
from harness.tool import Session

from .stage import Stage, wait_until

STATE_FILE = "/run/kvmi-saved"

#: Waits for the byte at 0x500, takes it back, and resets the machine by its reset control register:
#: xorw %ax,%ax; movw %ax,%ds; 1: pause; cmpb $0,0x500; je 1b; movb %al,0x500;
#: movw $0xcf9,%dx; movb $6,%al; outb %al,%dx; 2: hlt; jmp 2b
RESET_WHEN_TOLD = bytes.fromhex(
    "31 c0 8e d8  f3 90 80 3e 00 05 00 74 f7  a2 00 05  ba f9 0c b0 06 ee  f4 eb fd"
)


def leave_second(start_time: int, stage: Stage) -> None:
    """Wait until the host's clock shows another second than ``start_time``."""
    wait_until(
        "the host's clock goes on",
        lambda: int(stage.host.run("date +%s").stdout) > start_time,
        timeout_s=5,
    )


@pytest.mark.clause("QEMU-RESET-RECONNECT", "QEMU-FORCERESET-RFC", "LIFE-RESET")
def test_reset(stage: Stage) -> None:
    """A reset ends the session without asking; QEMU returns with a newer start time."""
    tool = stage.tool()
    guest = stage.idle(tool)
    before, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    leave_second(before.start_time, stage)
    guest.qmp("system_reset")
    session.expect_close(timeout_s=5)
    assert session.count("UNHOOK") == 0
    after, session = tool.hook()
    assert after.start_time > before.start_time
    assert after.uuid == before.uuid
    session.command("VCPU_GET_REGISTERS", vcpu=0).ok()


@pytest.mark.clause("QEMU-RESET-RECONNECT", "LIFE-RESET", "MSG-BLOCKING", "EVT-DISCONNECT-CONTINUE")
def test_reset_while_a_vcpu_is_held(stage: Stage) -> None:
    """A reset comes through although a vCPU waits for the tool's answer."""
    tool = stage.tool()
    guest = stage.idle(tool)
    _, session = tool.hook()
    session.command("VM_PAUSE_VCPU", vcpu=0, wait=0).ok()
    session.next_event("PAUSE", timeout_s=5)
    guest.qmp("system_reset")
    session.expect_close(timeout_s=10)
    _, session = tool.hook()
    session.command("VCPU_GET_REGISTERS", vcpu=0).ok()
    assert guest.status() == "running"


@pytest.mark.clause("QEMU-RESET-RECONNECT", "LIFE-RESET", "HOOK-REHOOK")
def test_guest_resets_itself_over_and_over(stage: Stage) -> None:
    """A guest that resets itself in a loop is hooked anew each time."""
    tool = stage.tool()
    guest = stage.idle(tool, code=RESET_WHEN_TOLD)
    last = 0
    for _ in range(3):
        hello, session = tool.hook()
        assert hello.start_time >= last, "the start time went back"
        last = hello.start_time
        # The reset may be faster than the reply.
        session.send("VM_WRITE_PHYSICAL", gpa=0x500, data=b"\1")
        session.expect_close(timeout_s=30)
    assert guest.status() == "running"


@pytest.mark.clause("QEMU-SHUTDOWN-V12")
def test_quit(stage: Stage) -> None:
    """When QEMU ends the tool sees the end of the stream; it is not asked before."""
    tool = stage.tool()
    guest = stage.idle(tool)
    _, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    began = time.monotonic()
    guest.quit()
    assert time.monotonic() - began < 5
    session.expect_close(timeout_s=2)
    assert session.count("UNHOOK") == 0


@pytest.mark.clause("QEMU-STARTTIME-SAVED")
def test_saved_and_restored(stage: Stage) -> None:
    """A machine that is saved to a file and restored later shows the tool its old start time."""
    tool = stage.tool()
    guest = stage.idle(tool, label="saved")
    before, session = tool.hook()
    _release(guest, session)
    guest.migrate(f"file:{STATE_FILE}")
    guest.wait_migration("completed")
    guest.quit()
    leave_second(before.start_time, stage)
    restored = stage.idle(
        tool, label="restored", uuid=guest.uuid, incoming=f"file:{STATE_FILE}", paused=True
    )
    restored.wait_status("paused")
    assert tool.silent(), "QEMU connected before the restored machine was continued"
    restored.qmp("cont")
    after, _ = tool.hook()
    assert after.start_time == before.start_time


def _release(guest: QemuGuest, session: Session) -> None:
    """Stop a machine with its tool's consent."""
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    stop = guest.send("stop")
    session.next_event("UNHOOK", timeout_s=5)
    session.close()
    stop.value(timeout_s=5)
