# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration to a second QEMU, with a tool that gives way and with one that does not."""

from __future__ import annotations

import shlex
import time
from typing import Any

import pytest

from harness.errors import SilenceError
from harness.manager.qemu import QemuGuest
from harness.plugin.timeline import Timeline
from harness.tool import Session

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


def let_go(stage: Stage, guest: QemuGuest, session: Session) -> None:
    """The tool is told that the guest leaves, undoes its changes and closes."""
    session.next_event("UNHOOK", timeout_s=5)
    stage.unwatch(session, vcpus=guest.cpus)
    session.close()


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
        guest.wait_status("postmigrate")
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


_DIFFERENT_PAGES = """\
import sys
with open(sys.argv[1], "rb") as one, open(sys.argv[2], "rb") as other:
    clock_page, clock = divmod(int(sys.argv[4]), 4096)
    for page in range(int(sys.argv[3])):
        here, there = bytearray(one.read(4096)), bytearray(other.read(4096))
        if page == clock_page:
            here[clock:clock + 12] = there[clock:clock + 12] = bytes(12)
        if here != there:
            at = [n for n in range(4096) if here[n] != there[n]]
            both = here[at[0]:at[-1] + 1].hex(), there[at[0]:at[-1] + 1].hex()
            print(f"{page + 256:#x}+{at[0]:#x}:", *(one[:64] for one in both))
"""

#: Processes come and go, on all CPUs: the guest changes its page tables all the time.
_BUSY = "for cpu in 1 2; do (while :; do (true); done) >/dev/null 2>&1 & done"

#: MSR_KVM_WALL_CLOCK_NEW: where the guest has 12 bytes that KVM writes when a guest is received
#: (Documentation/virt/kvm/x86/msr.rst).
_WALL_CLOCK = 0x4B564D00


def different_pages(
    stage: Stage, guest: QemuGuest, other: QemuGuest, *, wall_clock: int
) -> list[str]:
    """The pages above 1 MiB that two paused guests do not have in common, and what they hold.

    :param wall_clock: the guest physical address of the 12 bytes that may differ.
    """
    size = (guest.memory_mb - 1) << 20
    files = [f"/run/kvmi-guests/{one.label}/memory" for one in (guest, other)]
    for one, file in zip((guest, other), files, strict=True):
        one.qmp("pmemsave", val=1 << 20, size=size, filename=file, timeout_s=20)
    numbers = str(size >> 12), str(wall_clock - (1 << 20))
    compare = shlex.join(["python3", "-c", _DIFFERENT_PAGES, *files, *numbers])
    return stage.host.run(compare, timeout_s=30).text.splitlines()


@pytest.mark.lifecycle
@pytest.mark.clause("LIFE-MIGRATE-BEFORE", "PREUNHOOK-SENDS")
def test_memory_arrives(stage: Stage) -> None:
    """All that a busy guest writes while it moves arrives, though it was watched until then."""
    tool, other_tool = stage.tool("tool-source"), stage.tool("tool-receiver")
    guest = stage.linux(tool, cpus=2)
    _, session = tool.hook()
    shell = guest.wait_booted()
    stage.watch(session, vcpus=guest.cpus)
    shell.run(_BUSY)
    stage.exchange(shell, calls=3, traps=3)
    msrs = session.command("VCPU_GET_REGISTERS", vcpu=0, msrs_idx=[_WALL_CLOCK]).ok()
    other = receiver(stage, guest, other_tool, paused=True)
    guest.migrate(CHANNEL)
    let_go(stage, guest, session)
    guest.wait_migration("completed")
    other.wait_status("paused")
    wall_clock = int.from_bytes(msrs.raw[-8:], "little")
    different = different_pages(stage, guest, other, wall_clock=wall_clock)
    assert not different, f"{len(different)} pages: {'; '.join(different[:20])}"
    other.qmp("cont")
    _, session = other_tool.hook()
    stage.watch(session, vcpus=other.cpus)
    stage.exchange(other.wait_booted(), calls=3, traps=3)


@pytest.mark.clause("QEMU-TOOEARLY")
def test_receiver_does_not_introduce_itself_early(stage: Stage) -> None:
    """A QEMU that waits for a migration sends no handshake record: it is not the guest yet."""
    tool = stage.tool()
    waiting = stage.idle(tool, incoming=CHANNEL)
    assert waiting.status() == "inmigrate"
    with pytest.raises(SilenceError):
        tool.hello(timeout_s=2)
