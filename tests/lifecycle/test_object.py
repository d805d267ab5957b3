# SPDX-License-Identifier: GPL-2.0-or-later
"""Making and deleting the introspection object, right and wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from harness.manager.introspection import CHARDEV_ID, OBJECT_ID
from harness.manager.qemu import QemuGuest

from .stage import Stage, Tool, refused_start, wait_until

PARAMETER = "/sys/module/kvm/parameters/introspection"


@contextlib.contextmanager
def introspection_off(stage: Stage) -> Iterator[None]:
    """Switch the kernel's module parameter off for a while."""
    stage.host.run(f"echo N >{PARAMETER}")
    try:
        yield
    finally:
        stage.host.run(f"echo Y >{PARAMETER}")


def add(guest: QemuGuest, tool: Tool, **options: Any) -> None:
    """Give a running machine a chardev and an introspection object."""
    introspection = tool.introspection(**options)
    guest.qmp("chardev-add", **introspection.chardev_add())
    guest.link.execute("object-add", introspection.object_add())


@pytest.mark.clause("QEMU-OBJ-CHARDEV-REQ", "QEMU-OBJ-CMDLINE-EXIT")
def test_without_chardev(stage: Stage) -> None:
    """QEMU does not start with an introspection object that has no chardev."""
    said = refused_start(stage, None, extra=("-object", f"introspection,id={OBJECT_ID}"))
    assert "chardev" in said


@pytest.mark.clause("QEMU-OBJ-CHARDEV-REQ", "QEMU-OBJ-CMDLINE-EXIT")
def test_with_unknown_chardev(stage: Stage) -> None:
    """Nor with one whose chardev does not exist."""
    extra = ("-object", f"introspection,id={OBJECT_ID},chardev=nowhere")
    assert "nowhere" in refused_start(stage, None, extra=extra)


@pytest.mark.clause("QEMU-OBJ-CMDLINE-EXIT", "QEMU-HSK-COOKIE")
def test_with_unknown_key(stage: Stage) -> None:
    """Nor with one whose key does not exist: it would let any tool in."""
    tool = stage.tool()
    extra = (
        *("-chardev", tool.introspection().chardev_option()),
        *("-object", f"introspection,id={OBJECT_ID},chardev={CHARDEV_ID},key=nowhere"),
    )
    assert "nowhere" in refused_start(stage, None, extra=extra)


@pytest.mark.clause("QEMU-OBJ-RECONNECT-REQ", "QEMU-OBJ-CMDLINE-EXIT")
def test_with_chardev_that_does_not_reconnect(stage: Stage) -> None:
    """The chardev has to come back by itself, so it needs a reconnect time."""
    assert "reconnect" in refused_start(stage, stage.tool(), reconnect_ms=0)


@pytest.mark.clause("QEMU-OBJ-RECONNECT-REQ", "QEMU-OBJ-CMDLINE-EXIT")
def test_with_chardev_that_is_no_socket(stage: Stage) -> None:
    """Any other kind of chardev is refused."""
    extra = (
        *("-chardev", f"null,id={CHARDEV_ID}"),
        *("-object", f"introspection,id={OBJECT_ID},chardev={CHARDEV_ID}"),
    )
    assert "socket" in refused_start(stage, None, extra=extra)


@pytest.mark.clause("QEMU-OBJ-RECONNECT-REQ", "QEMU-OBJ-CMDLINE-EXIT")
def test_with_chardev_that_listens(stage: Stage) -> None:
    """It is the tool that listens: a chardev that does is refused."""
    extra = (
        *("-chardev", f"socket,id={CHARDEV_ID},path=/run/kvmi-server,server=on,wait=off"),
        *("-object", f"introspection,id={OBJECT_ID},chardev={CHARDEV_ID}"),
    )
    assert "server" in refused_start(stage, None, extra=extra)


@pytest.mark.clause("QEMU-OBJ-CMDLINE-EXIT")
def test_with_chardev_in_use(stage: Stage) -> None:
    """A chardev that is somebody else's, here a monitor's, is refused."""
    extra = ("-mon", f"chardev={CHARDEV_ID},mode=control")
    assert CHARDEV_ID in refused_start(stage, stage.tool(), extra=extra)


@pytest.mark.clause("QEMU-OBJ-NODELETE", "QEMU-OBJ-QMP-CREATE")
def test_changed(stage: Stage) -> None:
    """Of an object in use the times can be changed, and nothing else; its chardev stays."""
    tool = stage.tool()
    guest = stage.idle(tool)
    tool.hook()
    path = f"/objects/{OBJECT_ID}"
    for name, value in (("chardev", "other"), ("key", "other"), ("command", [8]), ("event", [1])):
        assert name in guest.refusal("qom-set", path=path, property=name, value=value)
    for name in ("handshake_timeout", "unhook_timeout"):
        guest.qmp("qom-set", path=path, property=name, value=3)
        assert guest.qmp("qom-get", path=path, property=name) == 3
    assert guest.refusal("chardev-remove", id=CHARDEV_ID)


@pytest.mark.clause("QEMU-OBJ-SINGLE")
def test_two_objects(stage: Stage) -> None:
    """A second introspection object is refused, on the command line and later.

    It has a chardev of its own, so that it is not refused for want of one.
    """
    tool = stage.tool()
    option = stage.tool("other").introspection().chardev_option()
    chardev = ("-chardev", option.replace(f"id={CHARDEV_ID}", "id=other"))
    second = ("-object", "introspection,id=second,chardev=other")
    assert "already" in refused_start(stage, tool, extra=(*chardev, *second))
    guest = stage.idle(tool, extra=chardev)
    arguments = {"qom-type": "introspection", "id": "second", "chardev": "other"}
    assert "already" in guest.link.refusal("object-add", arguments)
    tool.hook()


@pytest.mark.clause("QEMU-OBJ-KVM-REQ", "CAP-DISABLED-ZERO")
def test_with_introspection_switched_off(stage: Stage) -> None:
    """Where the kernel answers 0 for the capability, the object is refused."""
    with introspection_off(stage):
        assert "introspection=1" in refused_start(stage, stage.tool())


@pytest.mark.clause("QEMU-OBJ-KVM-REQ")
def test_without_kvm(stage: Stage) -> None:
    """Without KVM the object is refused."""
    said = refused_start(stage, stage.tool(), accelerator="qtest")
    assert "kvm" in said.lower()


@pytest.mark.clause("QEMU-OBJ-QMP-CREATE", "QEMU-OBJ-CMDLINE-EXIT", "QEMU-OBJ-KVM-REQ")
def test_made_on_a_running_machine(stage: Stage) -> None:
    """Through QMP a bad object is an error and no more; a good one is connected and hooked."""
    tool = stage.tool()
    guest = stage.idle(None)
    arguments = {"qom-type": "introspection", "id": OBJECT_ID}
    assert "chardev" in guest.link.refusal("object-add", arguments)
    assert "nowhere" in guest.link.refusal("object-add", arguments | {"chardev": "nowhere"})
    guest.qmp("chardev-add", **tool.introspection().chardev_add())
    with introspection_off(stage):
        guest.link.refusal("object-add", arguments | {"chardev": CHARDEV_ID})
    assert guest.status() == "running"
    guest.link.execute("object-add", arguments | {"chardev": CHARDEV_ID})
    hello, session = tool.hook()
    assert hello.uuid == guest.uuid
    session.command("GET_VERSION").ok()


@pytest.mark.clause("QEMU-OBJ-NODELETE")
def test_deleted(stage: Stage) -> None:
    """The object cannot be deleted while its tool is connected; later it can, and be remade."""
    tool = stage.tool()
    guest = stage.idle(None)
    for _ in range(2):
        add(guest, tool)
        _, session = tool.hook()
        assert guest.refusal("object-del", id=OBJECT_ID)
        assert session.command("GET_VERSION").ok(), "the refused deletion ended the session"
        guest.qmp("stop")
        session.expect_close(timeout_s=5)
        wait_until("the object can be deleted", lambda: delete(guest), timeout_s=5)
        guest.qmp("chardev-remove", id=CHARDEV_ID)
        guest.qmp("cont")
        assert guest.status() == "running"
    assert tool.silent(), "QEMU connects although it has no introspection object any more"


@pytest.mark.clause("QEMU-OBJ-NODELETE", "QEMU-OBJ-QMP-CREATE", "QEMU-STARTTIME-SAVED")
def test_neither_made_nor_deleted_during_a_migration(stage: Stage) -> None:
    """What is migrated stays as it was when the migration began."""
    tool = stage.tool()
    guest = stage.idle(None)
    introspection = tool.introspection()
    guest.qmp("chardev-add", **introspection.chardev_add())
    pause = {"capability": "pause-before-switchover", "state": True}
    guest.qmp("migrate-set-capabilities", capabilities=[pause])
    guest.migrate("file:/run/kvmi-paused")
    guest.wait_migration("pre-switchover", timeout_s=10)
    assert "migration" in guest.link.refusal("object-add", introspection.object_add())
    guest.qmp("migrate_cancel")
    guest.wait_migration("cancelled", timeout_s=10)
    guest.wait_status("running", timeout_s=5)

    guest.link.execute("object-add", introspection.object_add())
    _, session = tool.hook()
    tool.close()
    session.close()
    guest.migrate("file:/run/kvmi-paused")
    guest.wait_migration("pre-switchover", timeout_s=10)
    assert guest.refusal("object-del", id=OBJECT_ID)
    guest.qmp("migrate_cancel")
    guest.wait_migration("cancelled", timeout_s=10)
    wait_until("the object can be deleted", lambda: delete(guest), timeout_s=5)


def delete(guest: QemuGuest) -> bool:
    """Try to delete the object; True if QEMU did."""
    answer = guest.send("object-del", id=OBJECT_ID)
    try:
        answer.refusal()
    except Exception:
        answer.value(timeout_s=0)
        return True
    return False
