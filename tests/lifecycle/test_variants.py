# SPDX-License-Identifier: GPL-2.0-or-later
"""Promises that only some QEMU series make, and how each is described."""

from __future__ import annotations

import time
from typing import Any

import pytest

from harness.manager.introspection import CHARDEV_ID
from harness.manager.qemu import QemuGuest
from harness.plugin import skip_clause
from harness.tool import Session

from .stage import Stage, Tool, refused_start


def properties(guest: QemuGuest, typename: str) -> dict[str, dict[str, Any]]:
    """The properties of a type of object, by name, as QEMU describes them."""
    listed = guest.qmp("qom-list-properties", typename=typename)
    return {entry["name"]: entry for entry in listed}


@pytest.mark.clause("QEMU-CHARDEV-VSOCK")
def test_vsock_options(stage: Stage) -> None:
    """A socket chardev takes cid and port, and exactly one of path, fd, cid and host."""
    said = refused_start(stage, None, extra=("-chardev", "socket,id=c,cid=2,host=127.0.0.1,port=1"))
    if "Invalid parameter 'cid'" in said:
        skip_clause("this QEMU has no vsock options on its command line; QMP reaches vsock anyway")
    for one_too_many in ("path=/run/x,cid=2,port=1", "fd=0,cid=2,port=1", ""):
        said = refused_start(stage, None, extra=("-chardev", f"socket,id=c,{one_too_many}"))
        assert "cid" in said
    assert "port" in refused_start(stage, None, extra=("-chardev", "socket,id=c,cid=2"))
    guest = stage.idle(None, extra=("-chardev", "socket,id=c,cid=2,port=9,reconnect-ms=60000"))
    address = guest.qmp("qom-get", path="/chardevs/c", property="addr")
    assert address == {"type": "vsock", "cid": "2", "port": "9"}


@pytest.mark.clause("QEMU-CHARDEV-VSOCK", "QEMU-CHARDEV-FD", "QEMU-OBJ-QMP-CREATE")
def test_described(stage: Stage) -> None:
    """QMP's introspection shows the object, its defaults, and the properties of its channel."""
    guest = stage.idle(None)
    found = properties(guest, "introspection")
    assert {"chardev", "key", "command", "event"} <= set(found)
    defaults = {name: entry.get("default-value") for name, entry in found.items()}
    if defaults["handshake_timeout"] is None:
        skip_clause("this QEMU's object does not tell its defaults")
    assert defaults["handshake_timeout"] == 10
    assert defaults["unhook_timeout"] == 60
    assert defaults["async_unhook"] is True
    assert defaults["unhook_on_shutdown"] is True
    assert all(entry.get("description") for name, entry in found.items() if name != "type")
    channel = properties(guest, "chardev-socket")
    assert channel["fd"]["type"] == "int32"
    assert channel["reconnecting"]["type"] == "bool"

    schema = guest.qmp("query-qmp-schema")
    members = [
        {member["name"] for member in entry["members"]}
        for entry in schema
        if entry["meta-type"] == "object"
    ]
    ours = [names for names in members if "unhook_timeout" in names]
    assert len(ours) == 1, "object-add does not describe the properties of the object"
    assert ours[0] == set(found) - {"type"}


@pytest.mark.clause("QEMU-HSK-QEMU-CLIENT", "QEMU-OBJ-QMP-CREATE")
def test_client_by_default(stage: Stage) -> None:
    """A socket chardev made through QMP is a client if nothing is said about it."""
    tool = stage.tool()
    guest = stage.idle(None)
    arguments = tool.introspection().chardev_add()
    del arguments["backend"]["data"]["server"]
    guest.qmp("chardev-add", **arguments)
    guest.qmp("object-add", qom_type="introspection", id="i", chardev=CHARDEV_ID)
    tool.hook()


def hooked(stage: Stage, tool: Tool, **options: Any) -> tuple[QemuGuest, Session]:
    """A machine whose tool wants to be told; skips where powerdown is not intercepted."""
    guest = stage.idle(None, label="asked")
    if "unhook_on_shutdown" not in properties(guest, "introspection"):
        skip_clause("v12's QEMU does not intercept powerdown; the RFC's does")
    guest.quit()
    guest = stage.idle(tool, **options)
    _, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    return guest, session


@pytest.mark.clause("QEMU-POWERDOWN-RFC", "PREUNHOOK-DELAY")
def test_powerdown_waits_for_the_tool(stage: Stage) -> None:
    """system_powerdown is answered at once; the guest is told when the tool has left."""
    tool = stage.tool()
    guest, session = hooked(stage, tool)
    guest.qmp("system_powerdown", timeout_s=5)
    session.next_event("UNHOOK", timeout_s=5)
    session.no_event("UNHOOK", within_s=0.5)
    assert session.command("VCPU_GET_REGISTERS", vcpu=0).ok(), "the guest runs on meanwhile"
    assert guest.status() == "running"
    assert not [event for event in guest.link.events() if event["event"] == "POWERDOWN"]
    session.close()
    guest.link.event("POWERDOWN", timeout_s=5)
    # A guest need not obey, so that the tool can come back.
    _, session = tool.hook()
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
    guest.qmp("system_powerdown")
    session.next_event("UNHOOK", timeout_s=5)


@pytest.mark.clause("QEMU-POWERDOWN-RFC", "QEMU-STOP-TIMEOUT")
@pytest.mark.parametrize("async_unhook", [True, False], ids=["async", "sync"])
def test_powerdown_runs_out_of_patience(stage: Stage, async_unhook: bool) -> None:
    """After unhook_timeout the guest is told to power down whether the tool likes it or not."""
    tool = stage.tool()
    guest, session = hooked(stage, tool, unhook_timeout_s=1, async_unhook=async_unhook)
    began = time.monotonic()
    guest.qmp("system_powerdown", timeout_s=5)
    session.expect_close(timeout_s=5)
    guest.link.event("POWERDOWN", timeout_s=5)
    assert time.monotonic() - began > 0.8


@pytest.mark.clause("QEMU-POWERDOWN-RFC")
def test_powerdown_does_not_wait(stage: Stage) -> None:
    """It does not wait with unhook_on_shutdown=off, nor for a tool that is not subscribed."""
    tool = stage.tool()
    guest, session = hooked(stage, tool, unhook_on_shutdown=False)
    guest.qmp("system_powerdown")
    guest.link.event("POWERDOWN", timeout_s=2)
    assert session.command("GET_VERSION").ok()
    assert session.count("UNHOOK") == 0
    guest.qmp("qom-set", path="/objects/introspection0", property="unhook_on_shutdown", value=True)
    session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=0).ok()
    seen = guest.link.mark()
    guest.qmp("system_powerdown")
    guest.link.event("POWERDOWN", since=seen, timeout_s=2)
    session.expect_close(timeout_s=5)
