# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that ends badly, or resets itself, while the tool holds one of its vCPUs."""

from __future__ import annotations

import pytest

from harness.plugin.timeline import Timeline

from .footprint import footprint, wait_for_footprint
from .inguest import Background
from .stage import HYPERCALL, Stage

#: Kinds of end, and what brings them about in Linux. With reboot=t, as our guests have it,
#: every restart is a triple fault.
ENDS = {"triple-fault": "b", "panic": "c"}


@pytest.mark.lifecycle
@pytest.mark.clause(
    "LIFE-RESET", "QEMU-RESET-RECONNECT", "MSG-BLOCKING", "EVT-DISCONNECT-CONTINUE", "UNHOOK-FREES"
)
@pytest.mark.parametrize("end", list(ENDS))
def test_end_while_an_event_waits(stage: Stage, timeline: Timeline, end: str) -> None:
    """One vCPU waits for the tool, the other brings the guest down: all is set free."""
    before = footprint(stage.host)
    with timeline.step("start, hook and watch a guest with two vCPUs"):
        tool = stage.tool()
        guest = stage.linux(tool, cpus=2)
        hello, session = tool.hook()
        shell = guest.wait_booted()
        stage.watch(session, vcpus=2)
        stage.exchange(shell, calls=3)
    with timeline.step(f"vCPU 0 is held in an event; vCPU 1 causes a {end}"):
        doom = f"taskset 2 sh -c 'sleep 2; echo {ENDS[end]} >/proc/sysrq-trigger'"
        session.handle(HYPERCALL, None)
        # In one command: a second one would have to log in first, which may take the doom's time.
        call = Background(shell, f"{doom} & taskset 1 kvmi-guest hypercall 1")
        event = session.next_event(HYPERCALL, timeout_s=5)
        assert event.vcpu == 0
        reset = guest.link.event("RESET", timeout_s=30, where=lambda data: bool(data.get("guest")))
        assert reset["data"]["reason"] in {"guest-reset", "guest-panic"}
        session.expect_close(timeout_s=10)
        call.close()
    with timeline.step("the guest boots again, and is watched again"):
        again, session = tool.hook_restarted(guest)
        shell = guest.wait_booted()
        assert again.start_time > hello.start_time
        stage.watch(session, vcpus=2)
        stage.exchange(shell, calls=5)
    with timeline.step("the host's kernel has freed everything"):
        session.close()
        guest.quit()
        guest.close()
        wait_for_footprint(stage.host, before)


@pytest.mark.lifecycle
@pytest.mark.clause("LIFE-RESET", "QEMU-RESET-RECONNECT", "HOOK-REHOOK")
def test_guest_restarts_itself(stage: Stage, timeline: Timeline) -> None:
    """The guest's own restart ends the session; the tool meets it again, with a new start time."""
    with timeline.step("start, hook and watch a guest"):
        tool = stage.tool()
        guest = stage.linux(tool)
        hello, session = tool.hook()
        shell = guest.wait_booted()
        stage.watch(session, vcpus=1)
        stage.exchange(shell, calls=3)
    with timeline.step("reboot, in the guest"):
        restart = Background(shell, "reboot -f")
        session.expect_close(timeout_s=15)
        restart.close()
        assert session.count("UNHOOK") == 0
    with timeline.step("the guest is watched from its first instruction on"):
        again, session = tool.hook_restarted(guest)
        assert again.start_time > hello.start_time
        assert again.uuid == hello.uuid
        shell = guest.wait_booted()
        stage.watch(session, vcpus=1)
        stage.exchange(shell, calls=5)
