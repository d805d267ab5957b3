# SPDX-License-Identifier: GPL-2.0-or-later
"""What comes between the order to stop and the stop: other orders, and the guest's own doings."""

from __future__ import annotations

import pytest

from harness.manager.qemu import QemuGuest
from harness.tool import Session

from .human import HumanMonitor
from .stage import Stage, Tool, wait_until
from .test_object import introspection_off
from .test_snapshot import give_disk, snapshot
from .test_stop import ask_to_stop, hooked, paused_and_back

#: Waits for the byte at 0x500, and tells the panic device then:
#: 1: pause; cmpb $0,0x500; je 1b; movw $0x505,%dx; movb $1,%al; outb %al,%dx; cli; 2: hlt; jmp 2b
PANIC_WHEN_TOLD = bytes.fromhex(
    "31 c0 8e d8  f3 90 80 3e 00 05 00 74 f7  ba 05 05 b0 01 ee  fa f4 eb fd"
)
PANIC = ("-device", "pvpanic", "-action", "panic=pause")

#: Goes to sleep (ACPI S3), and halts when it was woken up: the byte at 0x500 tells. Sets the
#: base and the enable bit of the power management's ports first (00:01.3, registers 0x40, 0x80),
#: and then writes SLP_EN and SLP_TYP 1 to PM1a_CNT at 0x604.
SLEEP = bytes.fromhex(
    "31 c0 8e d8  80 3e 00 05 01 74 33  c6 06 00 05 01"
    "ba f8 0c 66 b8 40 0b 00 80 66 ef  ba fc 0c 66 b8 01 06 00 00 66 ef"
    "ba f8 0c 66 b8 80 0b 00 80 66 ef  ba fc 0c b0 01 ee"
    "ba 04 06 b8 00 24 ef  fa f4 eb fd"
)


def with_human(stage: Stage, tool: Tool) -> tuple[QemuGuest, Session, HumanMonitor]:
    """A machine that waits within stop, its tool's session, and its human monitor."""
    monitor = HumanMonitor(stage)
    guest, session = hooked(stage, tool, async_unhook=False, extra=monitor.arguments)
    monitor.connect(guest)
    return guest, session, monitor


@pytest.mark.clause("QEMU-STOP-SYNC")
def test_stop_of_a_human_waits_inside(stage: Stage) -> None:
    """With async_unhook off stop blocks the human monitor, and QMP goes on meanwhile."""
    tool = stage.tool()
    guest, session, monitor = with_human(stage, tool)
    monitor.order("stop")
    session.next_event("UNHOOK", timeout_s=5)
    for _ in range(3):
        assert guest.status() == "running"
    session.close()
    monitor.answer()
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-SYNC", "QEMU-CONT-RECONNECT")
def test_cont_overtakes_a_stop_inside(stage: Stage) -> None:
    """A cont of another monitor while QEMU waits within stop: the machine runs on, stop fails."""
    tool = stage.tool()
    guest, session, monitor = with_human(stage, tool)
    stop = ask_to_stop(guest, session)
    monitor.order("cont")
    monitor.answer()
    assert "cont" in stop.refusal(timeout_s=5)
    assert guest.status() == "running"
    session.close()
    tool.hook()


@pytest.mark.clause("QEMU-STOP-SYNC", "QEMU-STOP-BUSY")
def test_second_stop_while_one_waits_inside(stage: Stage) -> None:
    """A second stop, of another monitor, stops the machine at once, and the first one is done."""
    tool = stage.tool()
    guest, session, monitor = with_human(stage, tool)
    stop = ask_to_stop(guest, session)
    monitor.order("stop")
    monitor.answer()
    stop.value(timeout_s=5)
    assert guest.status() == "paused"
    session.close()
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-SYNC", "QEMU-RESET-RECONNECT")
def test_reset_while_stop_waits_inside(stage: Stage) -> None:
    """A reset ends the session, and with it the wait within stop."""
    tool = stage.tool()
    guest, session, monitor = with_human(stage, tool)
    stop = ask_to_stop(guest, session)
    monitor.order("system_reset")
    session.expect_close(timeout_s=5)
    stop.value(timeout_s=5)
    guest.link.event("RESET", timeout_s=5)
    assert guest.status() != "running"
    guest.qmp("cont")
    tool.hook()


@pytest.mark.clause("QEMU-STOP-SYNC", "QEMU-STOP-ASYNC")
@pytest.mark.parametrize("async_unhook", [True, False], ids=["async", "sync"])
def test_guest_panics_while_stop_waits(stage: Stage, async_unhook: bool) -> None:
    """A panic stops the machine at once, its state tells why, and stop is answered in the end."""
    tool = stage.tool()
    guest, session = hooked(
        stage, tool, async_unhook=async_unhook, code=PANIC_WHEN_TOLD, extra=PANIC
    )
    stop = ask_to_stop(guest, session)
    session.command("VM_WRITE_PHYSICAL", gpa=0x500, data=b"\1").ok()
    guest.link.event("GUEST_PANICKED", timeout_s=5)
    guest.link.event("STOP", timeout_s=5)
    if async_unhook:
        guest.wait_status("guest-panicked", timeout_s=5)
        session.close()
    stop.value(timeout_s=5)
    assert guest.status() == "guest-panicked"


@pytest.mark.clause("MSG-BLOCKING", "EVT-DISCONNECT-CONTINUE")
def test_panic_while_a_vcpu_is_held(stage: Stage) -> None:
    """A panic stops the machine although the tool holds a vCPU."""
    tool = stage.tool()
    guest, session = hooked(stage, tool, extra=PANIC)
    stage.pause(session, 1)
    guest.qmp("human-monitor-command", command_line="o /b 0x505 1", timeout_s=10)
    guest.wait_status("guest-panicked", timeout_s=5)
    session.expect_close(timeout_s=5)
    # Nobody asked QEMU to stop the machine, so it comes back at once; the reset is to end that.
    _, session = tool.hook()
    guest.qmp("system_reset")
    session.expect_close(timeout_s=5)
    guest.qmp("cont")
    tool.hook()


@pytest.mark.clause("QEMU-STOP-NORECONNECT")
def test_saved_while_stop_waits(stage: Stage) -> None:
    """Saving runs the machine again, but the stop is still due, and no tool comes after it."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    give_disk(guest)
    stop = ask_to_stop(guest, session)
    snapshot(guest, "save")
    assert not stop.arrived
    session.close()
    stop.value(timeout_s=5)
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-ASYNC", "QEMU-RESET-RECONNECT")
def test_loaded_while_stop_waits(stage: Stage) -> None:
    """Loading a snapshot disconnects the tool; the machine that then runs is stopped as asked."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    give_disk(guest)
    snapshot(guest, "save")
    stop = ask_to_stop(guest, session)
    snapshot(guest, "load")
    session.expect_close(timeout_s=5)
    stop.value(timeout_s=5)
    paused_and_back(guest, tool)


@pytest.mark.clause("QEMU-STOP-ASYNC")
def test_dumped_while_stop_waits(stage: Stage) -> None:
    """A dump lets the machine run when it is done: stop fails rather than to claim success."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    fifo = "/run/kvmi-guests/idle/dump"
    # Somebody has it open and takes nothing, so that the dump goes on until we read it.
    reader = f"mkfifo {fifo}; sh -c 'exec 3<>{fifo}; touch {fifo}.open; sleep 30'"
    stage.host.run(f"{{ {reader}; }} >/dev/null 2>&1 &")
    wait_until(
        "the dump can be written",
        lambda: stage.host.run(f"test -e {fifo}.open", check=False).returncode == 0,
        timeout_s=5,
    )
    stop = ask_to_stop(guest, session)
    guest.qmp("dump-guest-memory", paging=False, protocol=f"file:{fifo}", detach=True)
    session.close()
    assert "dump" in stop.refusal(timeout_s=5)
    stage.host.run(f"timeout 30 cat {fifo} >/dev/null 2>&1 &")
    guest.link.event("DUMP_COMPLETED", timeout_s=10)
    guest.wait_status("running", timeout_s=5)
    tool.hook()


@pytest.mark.clause("QEMU-RESET-RECONNECT", "QEMU-STARTTIME-SAVED")
def test_sleep_is_no_reset(stage: Stage) -> None:
    """A guest that wakes up from ACPI S3 has its memory, and the tool its session."""
    tool = stage.tool()
    guest = stage.idle(tool, code=SLEEP)
    guest.wait_status("suspended", timeout_s=10)
    _, session = tool.hook()
    guest.qmp("system_wakeup")
    guest.link.event("WAKEUP", timeout_s=5)
    guest.wait_status("running", timeout_s=5)
    assert session.command("GET_VERSION").ok(), "waking up ended the session"
    assert session.command("VCPU_GET_REGISTERS", vcpu=0).ok()


@pytest.mark.clause("QEMU-CONT-RECONNECT")
def test_cont_overtakes_a_stop_of_a_guest_that_sleeps(stage: Stage) -> None:
    """A cont takes a stop back also where it does not start the machine, which sleeps."""
    tool = stage.tool()
    guest, session = hooked(stage, tool, code=SLEEP)
    guest.wait_status("suspended", timeout_s=10)
    stop = ask_to_stop(guest, session)
    guest.qmp("cont", timeout_s=5)
    assert "cont" in stop.refusal(timeout_s=5)
    session.close()
    tool.hook()
    assert guest.status() == "suspended", "the stop was carried out although cont came after it"


@pytest.mark.clause("QEMU-SHUTDOWN-V12")
def test_quit_while_stop_waits(stage: Stage) -> None:
    """QEMU ends at once, whatever it waits for."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    ask_to_stop(guest, session)
    guest.quit(timeout_s=5)
    session.expect_close(timeout_s=5)


@pytest.mark.clause("EVT-DISCONNECT-CONTINUE", "MSG-BLOCKING")
def test_memory_map_changes_while_a_vcpu_is_held(stage: Stage) -> None:
    """A change of memory slots that no vCPU may be in KVM for ends the session, and is made.

    The register PAM0 of the host bridge decides whether the firmware below 1 MiB is ROM or RAM.
    """
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    stage.pause(session, 1)
    for order in ("o /w 0xcf8 0x80000058", "o /b 0xcfd 0x30"):
        guest.qmp("human-monitor-command", command_line=order, timeout_s=10)
    session.expect_close(timeout_s=5)
    assert guest.status() == "running"
    tool.hook()


@pytest.mark.clause("EVT-DISCONNECT-CONTINUE", "QEMU-DISC-UNHOOK")
def test_held_vcpu_is_free_with_introspection_switched_off(stage: Stage) -> None:
    """The kernel refuses to unhook then, but the session ends, and with it the hold on the vCPU."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    stage.pause(session, 1)
    with introspection_off(stage):
        order = {"command_line": "info registers"}
        assert "IP=" in guest.qmp("human-monitor-command", timeout_s=10, **order)
        session.expect_close(timeout_s=5)
        assert guest.status() == "running"
    tool.hook()
