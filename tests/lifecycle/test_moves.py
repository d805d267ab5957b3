# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest on the move: tried again after failures, to another host, with breakpoints in it."""

from __future__ import annotations

import random

import pytest

from harness.manager.qemu import QemuGuest
from harness.plugin.timeline import Timeline
from harness.tool import Session

from .inguest import Background, LastingPage, start_ticking, ticks
from .kerneltext import TRIGGER, KernelBreakpoint
from .stage import BREAKPOINT, Stage, Tool, next_port
from .test_migration import CHANNEL, let_go, receiver
from .ways import Road

CHECKPOINT = "file:/run/kvmi-checkpoint"


def come_back(stage: Stage, tool: Tool, guest: QemuGuest) -> Session:
    """The tool is connected again, and sees what the guest does."""
    _, session = tool.hook()
    stage.watch(session, vcpus=guest.cpus)
    stage.exchange(guest.shell(), calls=3)
    return session


def scribble(session: Session, page: LastingPage, dice: random.Random) -> bytes:
    """Write into the guest's page here and there; return what it holds at the end."""
    for _ in range(20):
        offset = dice.randrange(0, 4096 - 64)
        data = dice.randbytes(64)
        session.command("VM_WRITE_PHYSICAL", gpa=page.gpa + offset, data=data).ok()
    return session.command("VM_READ_PHYSICAL", gpa=page.gpa, size=4096).ok().data


@pytest.mark.lifecycle
@pytest.mark.clause(
    "QEMU-MIGRATE-WAIT", "LIFE-MIGRATE-BEFORE", "LIFE-MIGRATE-DEST", "QEMU-DISC-UNHOOK"
)
def test_tried_again(stage: Stage, timeline: Timeline) -> None:
    """A migration that is cancelled while it waits, cancelled under way, and that fails.

    Each time the guest stays and the tool comes back; then the guest moves.
    """
    with timeline.step("start, hook and watch a guest"):
        tool = stage.tool("tool-source")
        guest = stage.linux(tool)
        _, session = tool.hook()
        shell = guest.wait_booted()
        start_ticking(shell)
        stage.watch(session, vcpus=guest.cpus)
        other_tool = stage.tool("tool-receiver")
        other = receiver(stage, guest, other_tool)

    with timeline.step("cancelled while it waits for the tool"):
        guest.migrate(CHANNEL)
        session.next_event("UNHOOK", timeout_s=5)
        guest.qmp("migrate_cancel")
        guest.wait_migration("cancelled", timeout_s=5)
        stage.exchange(shell, calls=3)  # the tool has not left, so the session goes on
        session.close()
        session = come_back(stage, tool, guest)
    with timeline.step("cancelled while memory is on its way"):
        guest.qmp("migrate-set-parameters", max_bandwidth=100_000)
        other.quit()
        other = receiver(stage, guest, other_tool, suffix="2")
        guest.migrate(CHANNEL)
        let_go(stage, guest, session)
        guest.wait_migration("active", timeout_s=5)
        assert tool.silent(), "QEMU connected while the guest is on its way"
        guest.qmp("migrate_cancel")
        guest.wait_migration("cancelled", timeout_s=10)
        assert guest.status() == "running"
        session = come_back(stage, tool, guest)
    with timeline.step("failed: nobody is there to take the guest"):
        guest.migrate("exec:exit 1")
        let_go(stage, guest, session)
        guest.wait_migration("failed", timeout_s=10)
        session = come_back(stage, tool, guest)
    with timeline.step("tried again, and moved"):
        guest.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        other = receiver(stage, guest, other_tool, suffix="3")
        before = ticks(shell)
        guest.migrate(CHANNEL)
        let_go(stage, guest, session)
        guest.wait_migration("completed")
        come_back(stage, other_tool, other)
        after = ticks(other.shell())
        assert after.wrong == 0
        assert after.ticks > before.ticks


@pytest.mark.lifecycle
@pytest.mark.clause(
    "QEMU-STOP-NORECONNECT", "QEMU-CONT-RECONNECT", "QEMU-STARTTIME-SAVED", "QEMU-DISC-UNHOOK"
)
def test_saved_to_a_file_and_continued(stage: Stage, timeline: Timeline) -> None:
    """A checkpoint as libvirt makes one: stop, migrate to a file, cont, and later restored."""
    with timeline.step("start, hook and watch a guest"):
        tool = stage.tool("tool-source")
        guest = stage.linux(tool, cpus=2)
        hello, session = tool.hook()
        shell = guest.wait_booted()
        start_ticking(shell)
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=3)
    with timeline.step("stop: the tool lets go"):
        stop = guest.send("stop")
        let_go(stage, guest, session)
        stop.value(timeout_s=5)
    with timeline.step("migrate to a file"):
        guest.migrate(CHECKPOINT)
        guest.wait_migration("completed")
        guest.wait_status("postmigrate")
        assert tool.silent(), "QEMU connected although the machine is paused"
    with timeline.step("cont: the guest goes on, and the tool is back"):
        guest.qmp("cont")
        again, session = tool.hook()
        assert (again.uuid, again.start_time) == (hello.uuid, hello.start_time)
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=3, traps=3)
        now = ticks(shell)
        assert now.wrong == 0
    with timeline.step("the file, restored while the first guest runs on"):
        other_tool = stage.tool("tool-restored")
        other = receiver(stage, guest, other_tool, channel=CHECKPOINT)
        other.wait_status("paused")
        assert other_tool.silent(), "QEMU connected before the restored machine was continued"
        other.qmp("cont")
        there, session = other_tool.hook()
        assert (there.uuid, there.start_time) == (hello.uuid, hello.start_time)
        then = ticks(other.wait_booted())
        assert then.wrong == 0
        assert then.ticks > 0
        stage.watch(session, vcpus=other.cpus)
        stage.exchange(other.shell(), calls=3, traps=3)
        stage.exchange(shell, calls=3)


@pytest.mark.lifecycle
@pytest.mark.clause(
    "LIFE-MIGRATE-BEFORE",
    "LIFE-MIGRATE-DEST",
    "QEMU-MIGRATE-WAIT",
    "QEMU-STARTTIME-SAVED",
    "WRITEPHYS-OK",
    "READPHYS-OK",
)
def test_to_another_host(stage: Stage, other_stage: Stage, timeline: Timeline) -> None:
    """A guest moves to a host with a kernel of its own, introspected before and after.

    The guest and its tool write to its memory until it leaves; not a byte is lost.
    """
    dice = random.Random(4)
    with timeline.step("a guest here, hooked and watched"):
        tool = stage.tool("tool-source")
        guest = stage.linux(tool)
        hello, session = tool.hook()
        shell = guest.wait_booted()
        start_ticking(shell)
        page = LastingPage(shell)
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=10, traps=5)
    with timeline.step("a QEMU there, on the other host, waits for it"):
        other_tool = other_stage.tool("tool-receiver")
        port = next_port()
        other = receiver(other_stage, guest, other_tool, channel=f"tcp:127.0.0.1:{port}")
        road = Road(stage.host, other_stage.host, port)
        stage.keep(road.close)
    with timeline.step("migrate: the tool writes on until it has to leave"):
        scribble(session, page, dice)
        guest.migrate(road.uri)
        session.next_event("UNHOOK", timeout_s=5)
        contents = scribble(session, page, dice)
        before = ticks(shell)
        stage.unwatch(session, vcpus=guest.cpus)
        session.close()
        guest.wait_migration("completed", timeout_s=60)
        other.wait_status("running")
    with timeline.step("hooked there: the same guest, with the same memory"):
        there, session = other_tool.hook()
        assert there.start_time == hello.start_time
        assert there.uuid == hello.uuid
        found = session.command("VM_READ_PHYSICAL", gpa=page.gpa, size=4096).ok().data
        assert found == contents, "the tool's last writes did not move with the guest"
        shell = other.wait_booted()
        assert page.look(shell) == contents
        after = ticks(shell)
        assert after.wrong == 0
        assert after.ticks > before.ticks
        other_stage.watch(session, vcpus=other.cpus)
        other_stage.exchange(shell, calls=10, traps=5)
    with timeline.step("the tool writes there as well"):
        contents = scribble(session, page, dice)
        assert page.look(shell) == contents


@pytest.mark.lifecycle
@pytest.mark.clause(
    "LIFE-MIGRATE-BEFORE", "LIFE-UNHOOK-SEQUENCE", "EV-BP-PAYLOAD", "EV-BP-RETRY", "EVT-VCPU-HELD"
)
@pytest.mark.parametrize("tidy", [True, False], ids=["taken-out", "left-behind"])
def test_breakpoint_in_kernel(stage: Stage, timeline: Timeline, tidy: bool) -> None:
    """A tool has a breakpoint in the guest's kernel, and the guest moves.

    If the tool takes it out when it is told to leave, the guest does not notice. If it leaves
    the breakpoint behind, nobody else takes it out: the guest's kernel meets it, alone.
    """
    with timeline.step("put a breakpoint into the kernel of a guest"):
        tool = stage.tool("tool-source")
        guest = stage.linux(tool)
        _, session = tool.hook()
        shell = guest.wait_booted()
        stage.watch(session, vcpus=guest.cpus)
        session.handle(BREAKPOINT, None)
        breakpoint_ = KernelBreakpoint(session, shell)
        breakpoint_.put(session)
    with timeline.step("the guest meets it: the vCPU waits, and goes on when it is taken out"):
        program = Background(shell, TRIGGER.format(name="first"))
        event = session.next_event(BREAKPOINT, timeout_s=10)
        assert event.regs.rip == breakpoint_.address
        assert event.fields.gpa == breakpoint_.gpa
        assert not program.finished(within_s=0.3)
        breakpoint_.take_out(session)
        session.answer(event, "RETRY")
        assert program.finished(within_s=10)
        program.close()
        breakpoint_.put(session)
    with timeline.step("migrate"):
        other_tool = stage.tool("tool-receiver")
        other = receiver(stage, guest, other_tool)
        guest.migrate(CHANNEL)
        session.next_event("UNHOOK", timeout_s=5)
        if tidy:
            breakpoint_.take_out(session)
        stage.unwatch(session, vcpus=guest.cpus)
        session.close()
        guest.wait_migration("completed")
        _, session = other_tool.hook()
        shell = other.wait_booted()
    if tidy:
        with timeline.step("the guest does what the breakpoint was set for, and survives"):
            assert breakpoint_.read(session) == breakpoint_.original
            shell.run(TRIGGER.format(name="second"))
            assert shell.run("hostname").stdout.strip() == b"second"
            assert "int3" not in other.console()
        return
    with timeline.step("the guest does what the breakpoint was set for"):
        assert breakpoint_.read(session) != breakpoint_.original
        program = Background(shell, TRIGGER.format(name="second"))
        # A breakpoint that it did not set is the end of a kernel: ours restarts after it.
        other.link.event("RESET", timeout_s=20)
        program.close()
    met = [line for line in other.console().splitlines() if "int3:" in line or "panic" in line]
    with timeline.step("what the guest met", detail="; ".join(line.strip() for line in met)):
        assert any("int3:" in line for line in met), "the guest restarted for another reason"
