# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots with memory: what the tool meets when a machine goes back to an earlier time."""

from __future__ import annotations

from typing import Any

import pytest

from harness.manager.qemu import QemuGuest

from .stage import Stage, Tool, wait_until
from .test_reset import leave_second

DISK = "disk"
MIB = 1 << 20


def give_disk(guest: QemuGuest) -> None:
    """Make a disk that can hold snapshots; the host has no qemu-img, but QEMU can, too."""
    path = f"/run/kvmi-guests/{guest.label}/disk.qcow2"
    job(guest, "blockdev-create", options={"driver": "file", "filename": path, "size": 0})
    guest.qmp("blockdev-add", driver="file", filename=path, node_name="file")
    job(
        guest,
        "blockdev-create",
        options={"driver": "qcow2", "file": "file", "size": 16 * MIB},
    )
    guest.qmp("blockdev-add", driver="qcow2", file="file", node_name=DISK)


def job(guest: QemuGuest, command: str, **arguments: Any) -> None:
    """Run a command that makes a job, to the job's end.

    :raises AssertionError: the job failed; tells its words.
    """
    guest.qmp(command, job_id="job", **arguments)

    def state() -> dict[str, str]:
        (one,) = guest.qmp("query-jobs")
        return {"status": one["status"], "error": one.get("error", "")}

    wait_until(f"{command} ends", lambda: state()["status"] == "concluded", timeout_s=20)
    ended = state()
    guest.qmp("job-dismiss", id="job")
    assert not ended["error"], f"{command}: {ended['error']}"


def snapshot(guest: QemuGuest, command: str) -> None:
    """Save the machine under the one name that this test uses, or go back to that."""
    job(guest, f"snapshot-{command}", tag="before", vmstate=DISK, devices=[DISK])


def machine(stage: Stage, tool: Tool) -> QemuGuest:
    """A machine that can be saved."""
    guest = stage.idle(tool)
    give_disk(guest)
    return guest


@pytest.mark.clause("QEMU-STARTTIME-SAVED", "QEMU-RESET-RECONNECT", "QEMU-STOP-NORECONNECT")
def test_saved_and_loaded(stage: Stage) -> None:
    """A snapshot of a stopped machine brings the start time back that it was made with."""
    tool = stage.tool()
    guest = machine(stage, tool)
    before, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    stop = guest.send("stop")
    session.next_event("UNHOOK", timeout_s=5)
    session.close()
    stop.value(timeout_s=5)
    snapshot(guest, "save")
    assert tool.silent(), "QEMU connected although the machine is paused"
    guest.qmp("cont")
    _, session = tool.hook()
    leave_second(before.start_time, stage)
    guest.qmp("system_reset")
    session.expect_close(timeout_s=5)

    later, session = tool.hook()
    assert later.start_time > before.start_time
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    snapshot(guest, "load")
    session.expect_close(timeout_s=5)
    if guest.status() != "running":
        guest.qmp("cont")
    again, session = tool.hook()
    assert again.start_time == before.start_time
    assert again.uuid == before.uuid
    assert session.command("VCPU_GET_REGISTERS", vcpu=0).ok()


@pytest.mark.clause("QEMU-DISC-UNHOOK", "WRITEPHYS-OK")
def test_saved_while_hooked(stage: Stage) -> None:
    """Saving stops the machine for a moment, which is not the user's stop: the session lasts."""
    tool = stage.tool()
    guest = machine(stage, tool)
    _, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    session.command("VM_WRITE_PHYSICAL", gpa=0x1000, data=b"the tool's").ok()
    snapshot(guest, "save")
    assert guest.status() == "running"
    assert session.command("GET_VERSION").ok()
    assert session.count("UNHOOK") == 0
    session.command("VM_WRITE_PHYSICAL", gpa=0x1000, data=b"changed...").ok()
    snapshot(guest, "load")
    session.expect_close(timeout_s=5)
    if guest.status() != "running":
        guest.qmp("cont")
    _, session = tool.hook()
    found = session.command("VM_READ_PHYSICAL", gpa=0x1000, size=10).ok()
    assert found.data == b"the tool's", "what the tool wrote is part of the snapshot"
