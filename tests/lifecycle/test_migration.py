# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration to a second QEMU, with a tool that gives way and with one that does not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from harness.errors import SilenceError
from harness.manager.qemu import QemuGuest
from harness.plugin.timeline import Timeline

from .inguest import start_ticking, ticks
from .stage import Stage, Tool

CHANNEL = "unix:/run/kvmi-migration"


def receiver(
    stage: Stage,
    guest: QemuGuest,
    tool: Tool,
    *,
    channel: str = CHANNEL,
    suffix: str = "",
    **options: Any,
) -> QemuGuest:
    """A QEMU of the same shape as ``guest`` that waits for its migration."""
    return stage.linux(
        tool, label=f"receiver{suffix}", uuid=guest.uuid, incoming=channel,
        cpus=guest.cpus, **options,
    )  # fmt: skip


@pytest.mark.lifecycle
@pytest.mark.clause(
    "LIFE-MIGRATE-BEFORE",
    "LIFE-MIGRATE-DEST",
    "EV-UNHOOK-SENT",
    "PREUNHOOK-SENDS",
    "QEMU-MIGRATE-WAIT",
    "QEMU-STARTTIME-SAVED",
)
def test_migrated_with_the_tools_consent(stage: Stage, timeline: Timeline) -> None:
    """The tool is told before a live migration starts, and meets the same guest after it."""
    with timeline.step("start and hook a guest"):
        tool = stage.tool("tool-source")
        guest = stage.linux(tool, cpus=2)
        hello, session = tool.hook()
        shell = guest.wait_booted()
    with timeline.step("events of the running guest are handled and counted"):
        start_ticking(shell)
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=20, traps=10)
    with timeline.step("a second QEMU waits for the guest"):
        other_tool = stage.tool("tool-receiver")
        other = receiver(stage, guest, other_tool)
        # The handshake's start time counts whole seconds: from here on a new one differs.
        assert other.status() == "inmigrate"

    with timeline.step("migrate: the tool is told, and migration waits for it"):
        guest.migrate(CHANNEL)
        session.next_event("UNHOOK", timeout_s=5)
        assert guest.migration_status() in {"setup", "wait-unplug"}
        stage.exchange(shell, calls=3)  # the guest runs, and is still watched
        session.no_event("UNHOOK", within_s=0.6)
        assert guest.migration_status() in {"setup", "wait-unplug"}, "migration did not wait"
        last = ticks(shell)
    with timeline.step("the tool closes: the guest moves"):
        stage.unwatch(session, vcpus=guest.cpus)
        session.close()
        guest.wait_migration("completed")
        assert guest.status() == "postmigrate"
        other.wait_status("running")
    with timeline.step("the receiving QEMU connects and shows the same start time"):
        there, session = other_tool.hook()
        assert there.start_time == hello.start_time
        assert there.uuid == hello.uuid
        assert tool.silent(), "the QEMU that gave the guest away connected again"
    with timeline.step("events flow again, and the guest lost nothing"):
        shell = other.wait_booted()
        now = ticks(shell)
        assert now.ticks > last.ticks
        assert now.wrong == 0
        stage.watch(session, vcpus=other.cpus)
        stage.exchange(shell, calls=20, traps=10)
    with timeline.step("the end: both QEMUs quit"):
        session.close()
        guest.quit()
        other.quit()


@pytest.mark.lifecycle
@pytest.mark.clause(
    "QEMU-MIGRATE-WAIT",
    "PREUNHOOK-DELAY",
    "PREUNHOOK-NOTUNHOOKED",
    "QEMU-STARTTIME-SAVED",
    "LIFE-MIGRATE-DEST",
)
def test_migrated_against_the_tools_will(stage: Stage, timeline: Timeline) -> None:
    """A tool that refuses to close delays a migration by unhook_timeout, and no more."""
    timeout_s = 2
    with timeline.step("start and hook a guest", detail=f"unhook_timeout {timeout_s} s"):
        tool = stage.tool("tool-source")
        guest = stage.linux(tool, unhook_timeout_s=timeout_s)
        hello, session = tool.hook()
        shell = guest.wait_booted()
        start_ticking(shell)
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=5)
    with timeline.step("a second QEMU waits for the guest"):
        other_tool = stage.tool("tool-receiver")
        other = receiver(stage, guest, other_tool)
    with timeline.step("migrate: the tool is told, and does nothing"):
        asked = time.monotonic()
        guest.migrate(CHANNEL)
        session.next_event("UNHOOK", timeout_s=5)
    with timeline.step("after unhook_timeout QEMU closes the socket and goes on"):
        session.expect_close(timeout_s=timeout_s + 5)
        waited_s = time.monotonic() - asked
        assert waited_s > timeout_s - 0.2, f"QEMU lost its patience after {waited_s:.1f} s"
        guest.wait_migration("completed")
        other.wait_status("running")
    with timeline.step("the receiving QEMU connects, and the guest lost nothing"):
        there, session = other_tool.hook()
        assert there.start_time == hello.start_time
        shell = other.wait_booted()
        first = ticks(shell)
        stage.watch(session, vcpus=other.cpus)
        stage.exchange(shell, calls=5)
        later = ticks(shell)
        assert first.wrong == later.wrong == 0
        assert later.ticks > first.ticks
    with timeline.step("the end: both QEMUs quit"):
        session.close()
        guest.quit()
        other.quit()


@pytest.mark.clause("QEMU-TOOEARLY")
def test_receiver_does_not_introduce_itself_early(stage: Stage) -> None:
    """A QEMU that waits for a migration sends no handshake record: it is not the guest yet."""
    tool = stage.tool()
    waiting = stage.idle(tool, incoming=CHANNEL)
    assert waiting.status() == "inmigrate"
    with pytest.raises(SilenceError):
        tool.hello(timeout_s=2)
