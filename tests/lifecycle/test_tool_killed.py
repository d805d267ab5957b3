# SPDX-License-Identifier: GPL-2.0-or-later
"""A tool that dies at the worst moment."""

from __future__ import annotations

import json

import pytest

from harness.counters import attach
from harness.plugin.timeline import Timeline

from .doomed import DoomedTool
from .inguest import Background
from .stage import HYPERCALL, Stage


@pytest.mark.lifecycle
@pytest.mark.clause(
    "EVT-VCPU-HELD",
    "EVT-DISCONNECT-CONTINUE",
    "MSG-CLEANUP",
    "LIFE-TOOLCLOSE-HUP",
    "QEMU-DISC-UNHOOK",
    "HOOK-REHOOK",
)
def test_tool_killed_in_an_event(stage: Stage, timeline: Timeline) -> None:
    """The tool is killed while a vCPU waits for its answer: the guest goes on, a new tool hooks."""
    with timeline.step("start a guest, and a tool in a process of its own"):
        tool = stage.tool()
        guest = stage.linux(tool)
        sock, hello = tool.hello()
        doomed = DoomedTool(sock, directory=stage.evidence, profile=stage.profile.name)
        stage.keep(doomed.close)
        doomed.expect("watching")
        shell = guest.wait_booted()
    with timeline.step("the guest calls the tool, which does not answer"):
        call = Background(shell, "kvmi-guest hypercall 1")
        stage.keep(call.close)
        assert doomed.expect("event")["event"] == HYPERCALL
        assert not call.finished(within_s=0.5), "the vCPU ran on before its event was answered"
    with timeline.step("kill -9 the tool: the guest goes on"):
        doomed.kill()
        made = call.account(timeout_s=5)
        assert made.made == 1
        assert shell.run("echo alive").stdout == b"alive\n"
    with timeline.step("what the dead tool counted can still be read"):
        slot = attach(doomed.counters).read()[0]
        assert slot.events[HYPERCALL] == 1
    with timeline.step("QEMU reconnects, a new tool hooks"):
        again, session = tool.hook()
        assert again.start_time == hello.start_time
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=5)
    with timeline.step("the end: the tool closes, QEMU quits"):
        session.close()
        guest.quit()
    timeline.mark("the guest's account of the call", detail=json.dumps(made.returned))
