# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's life with a tool beside it: watched, paused by the tool, stopped, continued."""

from __future__ import annotations

import pytest

from harness.hosts.ssh import GuestShell
from harness.manager.qemu import QemuGuest
from harness.plugin.timeline import Timeline
from harness.tool import Session

from .inguest import Background, Page, hypercalls
from .stage import FIRST_COMMANDS, FIRST_EVENTS, Stage

KEY = b"correct horse, battery staple"


def ask_first(session: Session, stage: Stage) -> None:
    """What a tool asks before anything else: version and permissions."""
    assert session.command("GET_VERSION").ok().fields.version == stage.profile.version
    for command in FIRST_COMMANDS:
        session.command("VM_CHECK_COMMAND", id=command).ok()
    for event in FIRST_EVENTS:
        session.command("VM_CHECK_EVENT", id=event).ok()


def find_breakpoint(session: Session, shell: GuestShell) -> None:
    """Look at one breakpoint of a program more closely: its address is that of an INT3."""
    session.handle("BREAKPOINT", None)
    program = Background(shell, "kvmi-guest breakpoint 1")
    event = session.next_event("BREAKPOINT", timeout_s=10)
    assert event.fields.insn_len == 1
    reply = session.command("VM_READ_PHYSICAL", gpa=event.fields.gpa, size=1).ok()
    assert reply.data == b"\xcc", f"there is no INT3 at {event.fields.gpa:#x}"
    assert not program.finished(within_s=0.2)
    session.answer(event, "CONTINUE")
    assert program.finished(within_s=10)
    program.close()
    session.handle("BREAKPOINT", lambda event: "CONTINUE")


def pause_and_resume(stage: Stage, session: Session, guest: QemuGuest) -> None:
    """Hold all vCPUs: none moves, nothing runs in the guest until the tool says so."""
    paused = stage.pause(session, guest.cpus)
    echo = Background(guest.shell(), "echo alive")
    first = stage.instruction_pointers(session, guest.cpus)
    assert not echo.finished(within_s=0.5), "the guest ran although all its vCPUs are held"
    assert stage.instruction_pointers(session, guest.cpus) == first
    for event in paused:
        session.answer(event)
    assert echo.finished(within_s=10), "the guest did not go on"
    echo.close()


def read_and_write(session: Session, shell: GuestShell) -> None:
    """What the tool reads and writes is what a program of the guest sees in its own page."""
    with Page(shell) as page:
        reply = session.command("VM_READ_PHYSICAL", gpa=page.gpa, size=4096).ok()
        assert reply.data == page.contents
        greeting = b"hello, guest!"
        session.command("VM_WRITE_PHYSICAL", gpa=page.gpa + 1000, data=greeting).ok()
        assert page.look() == page.contents[:1000] + greeting + page.contents[1013:]


@pytest.mark.lifecycle
@pytest.mark.clause(
    "LIFE-QUERY-FIRST",
    "LIFE-UNHOOK-SEQUENCE",
    "PREUNHOOK-SENDS",
    "PREUNHOOK-NOWAIT",
    "PREUNHOOK-NOTUNHOOKED",
    "PREUNHOOK-DELAY",
    "EV-UNHOOK-SENT",
    "EV-UNHOOK-NOREPLY",
    "HOOK-REHOOK",
    "EV-BP-PAYLOAD",
    "EVT-VCPU-HELD",
    "READPHYS-OK",
    "WRITEPHYS-OK",
    "QEMU-HSK-COOKIE",
    "QEMU-PERM-DEFAULT-ALL",
    "QEMU-STOP-PREUNHOOK",
    "QEMU-STOP-ASYNC",
    "QEMU-STOP-NORECONNECT",
    "QEMU-CONT-RECONNECT",
)
def test_watched_stopped_and_continued(stage: Stage, timeline: Timeline) -> None:
    """A tool with the right key watches a guest, lets go when it is stopped, and comes back.

    Each hypercall and breakpoint that the guest says it made is in the event counter, once.
    """
    with timeline.step("start a guest whose introspection object has a key"):
        tool = stage.tool(key=KEY)
        guest = stage.linux(tool, cpus=2)
    with timeline.step("QEMU connects, the tool shows the key, QEMU hooks"):
        hello, session = tool.hook()
        assert hello.uuid == guest.uuid
        assert hello.name == guest.name
    with timeline.step("ask for version and permissions"):
        ask_first(session, stage)
    with timeline.step("the guest boots while hooked"):
        shell = guest.wait_booted()
        assert session.command("VM_GET_INFO").ok().fields.vcpu_count == guest.cpus

    with timeline.step("events of the running guest are handled and counted"):
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=40, traps=25)
    with timeline.step("a breakpoint's event tells where its instruction lies"):
        find_breakpoint(session, shell)
    with timeline.step("pause every vCPU, look twice, resume"):
        pause_and_resume(stage, session, guest)
    with timeline.step("memory of the guest is read, written, and read back inside it"):
        read_and_write(session, shell)

    with timeline.step("QMP stop: the tool is told, the guest runs on, the answer waits"):
        stop = guest.send("stop")
        session.next_event("UNHOOK", timeout_s=5)
        session.no_event("UNHOOK", within_s=0.5)
        assert not stop.arrived, "QEMU answered 'stop' before the tool had closed"
        assert session.command("GET_VERSION").ok()
        stage.exchange(shell, calls=3)  # the guest runs, and is still watched
        assert guest.status() == "running"
        assert not stop.arrived
    with timeline.step("the tool closes: the guest is paused"):
        stage.unwatch(session, vcpus=guest.cpus)
        session.close()
        stop.value(timeout_s=5)
        assert guest.status() == "paused"
        assert tool.silent(), "QEMU connected although the guest is paused"
    with timeline.step("QMP cont: hooked again, from the defaults"):
        guest.qmp("cont")
        again, session = tool.hook()
        assert guest.status() == "running"
        assert again.start_time == hello.start_time
        before = stage.counted()
        assert hypercalls(shell, 2).made == 2
        assert stage.counted() == before, "events were enabled although nobody enabled them"
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=5, traps=5)
    with timeline.step("the end: the tool closes, QEMU quits"):
        session.close()
        guest.quit()
