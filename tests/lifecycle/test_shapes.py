# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of several shapes: how many vCPUs, which code they run, when they come."""

from __future__ import annotations

from typing import Any

import pytest

from harness.manager.qemu import QemuGuest
from harness.plugin.timeline import Timeline

from .inguest import Background
from .stage import HYPERCALL, Stage, wait_until
from .test_object import add

#: What the wait for events of one vCPU alone does not forgive: the hypercalls of another.
CALLS = 5


@pytest.mark.clause("VMINFO-COUNT", "PAUSE-OK", "VCPUHDR-EINVAL-INDEX")
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_vcpus(stage: Stage, cpus: int) -> None:
    """A tool knows and holds all vCPUs of a machine, whether they were ever started or not."""
    tool = stage.tool()
    stage.idle(tool, cpus=cpus)
    _, session = tool.hook()
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == cpus
    session.command("VM_PAUSE_VCPU", vcpu=0, wait=1).ok()
    event = session.next_event("PAUSE", vcpu=0, timeout_s=5)
    session.answer(event)
    session.command("VM_PAUSE_VCPU", vcpu=cpus, wait=0).fails("KVM_EINVAL")


@pytest.mark.lifecycle
@pytest.mark.clause("EVT-OTHER-VCPU-RUN", "PAUSE-OK", "EV-HYPERCALL-RET0", "VMINFO-COUNT")
def test_four_vcpus(stage: Stage, timeline: Timeline) -> None:
    """Each vCPU of a Linux guest with four is watched, held and let go by itself."""
    with timeline.step("start, hook and watch a guest with four vCPUs"):
        tool = stage.tool()
        guest = stage.linux(tool, cpus=4)
        _, session = tool.hook()
        shell = guest.wait_booted()
        stage.watch(session, vcpus=4)
    for vcpu in range(4):
        with timeline.step(f"events of vCPU {vcpu} name it"):
            session.handle(HYPERCALL, None)
            program = Background(shell, f"taskset {1 << vcpu:x} kvmi-guest hypercall 1")
            event = session.next_event(HYPERCALL, timeout_s=15)
            assert event.vcpu == vcpu
            # The others are not held: each of them takes a pause, and lets go again.
            for other in set(range(4)) - {vcpu}:
                session.command("VM_PAUSE_VCPU", vcpu=other, wait=1).ok()
                session.answer(session.next_event("PAUSE", vcpu=other, timeout_s=5))
            session.answer(event, "CONTINUE")
            assert program.account(timeout_s=10).returned == {0: 1}
            program.close()
    with timeline.step("all four are held at once, and let go"):
        for event in stage.pause(session, 4):
            session.answer(event)
        session.handle(HYPERCALL, lambda event: "CONTINUE")
        stage.exchange(shell, calls=8)


def plug(guest: QemuGuest, number: int) -> None:
    """Give the machine one more vCPU."""
    model = guest.qmp("query-hotpluggable-cpus")[0]["type"]
    guest.qmp(
        "device_add", driver=model, id=f"cpu{number}", socket_id=number, core_id=0, thread_id=0
    )


@pytest.mark.clause("VMINFO-COUNT", "VCPUHDR-EINVAL-INDEX", "QEMU-OBJ-QMP-CREATE")
def test_vcpu_plugged_before_and_after_the_hook(stage: Stage) -> None:
    """A vCPU that is plugged counts from then on, hooked or not."""
    tool = stage.tool()
    guest = stage.idle(None, extra=("-smp", "maxcpus=3,sockets=3"))
    plug(guest, 1)
    add(guest, tool)
    _, session = tool.hook()
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == 2
    session.command("VCPU_GET_REGISTERS", vcpu=2).fails("KVM_EINVAL")
    plug(guest, 2)
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == 3
    # It has not been started, so it may be too early to look into it.
    reply = session.command("VCPU_GET_REGISTERS", vcpu=2)
    assert reply.err == 0 or reply.error == "KVM_EAGAIN"
    session.close()
    _, session = tool.hook()
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == 3


@pytest.mark.lifecycle
@pytest.mark.clause("VCPUCTLEVT-ENABLE", "EV-HYPERCALL-TRIGGER", "VMINFO-COUNT")
def test_plugged_vcpu_is_watched(stage: Stage, timeline: Timeline) -> None:
    """A Linux guest that gets a vCPU while it is hooked uses it, and the tool sees that."""
    with timeline.step("start, hook and watch a guest with one vCPU and room for another"):
        tool = stage.tool()
        guest = stage.linux(tool, extra=("-smp", "maxcpus=2,sockets=2"))
        _, session = tool.hook()
        shell = guest.wait_booted()
        stage.watch(session, vcpus=1)
        stage.exchange(shell, calls=CALLS)
    with timeline.step("plug a vCPU, and have the guest use it"):
        plug(guest, 1)
        online = "/sys/devices/system/cpu/cpu1/online"
        wait_until(
            "the guest knows its new processor",
            lambda: shell.run(f"test -e {online}", check=False).returncode == 0,
            timeout_s=10,
        )
        shell.run(f"echo 1 >{online}")
    with timeline.step("its events come once they are enabled for it"):
        stage.watch(session, vcpus=2)
        before = stage.counted()[HYPERCALL]
        shell.run(f"taskset 2 kvmi-guest hypercall {CALLS}")
        assert stage.counted()[HYPERCALL] - before == CALLS
        for event in stage.pause(session, 2):
            session.answer(event)
        stage.exchange(shell, calls=CALLS)


@pytest.mark.clause("GETREGS-MODE", "GETREGS-OK")
@pytest.mark.parametrize(("code", "mode"), [("pulse", 2), ("flat32", 4)], ids=["16-bit", "32-bit"])
def test_code(stage: Stage, code: str, mode: int) -> None:
    """16-bit and 32-bit code are told apart; the 64-bit code is that of Linux."""
    tool = stage.tool()
    options: dict[str, Any] = {"code": stage.payload(code).code}
    stage.idle(tool, **options)
    _, session = tool.hook()
    wait_until(
        f"the guest runs code of {8 * mode} bits",
        lambda: session.command("VCPU_GET_REGISTERS", vcpu=0).ok().fields.mode == mode,
        timeout_s=5,
    )


@pytest.mark.clause("QEMU-OBJ-QMP-CREATE", "QEMU-HSK-QEMU-CLIENT")
def test_tool_comes_while_the_machine_is_paused(stage: Stage) -> None:
    """The object can be made while the user has paused the machine; cont changes nothing."""
    tool = stage.tool()
    guest = stage.idle(None)
    guest.qmp("stop")
    add(guest, tool)
    _, session = tool.hook()
    assert session.command("VM_GET_INFO").ok().fields.vcpu_count == 1
    assert guest.status() == "paused"
    guest.qmp("cont")
    session.command("VM_PAUSE_VCPU", vcpu=0, wait=1).ok()
    session.answer(session.next_event("PAUSE", timeout_s=5))
    assert guest.status() == "running"
