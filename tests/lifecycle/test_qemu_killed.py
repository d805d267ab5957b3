# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that dies while its guest is introspected."""

from __future__ import annotations

import pytest

from harness.plugin.timeline import Timeline

from .footprint import footprint, wait_for_footprint
from .inguest import Background
from .stage import HYPERCALL, Stage


@pytest.mark.lifecycle
@pytest.mark.clause("LIFE-VMDESTROY", "UNHOOK-FREES", "UNHOOK-SHUTDOWN")
def test_qemu_killed_while_hooked(stage: Stage, timeline: Timeline) -> None:
    """QEMU is killed while a vCPU waits for an answer: the host's kernel frees everything."""
    with timeline.step("look at what the host's kernel holds without a guest"):
        before = footprint(stage.host)
    with timeline.step("start, hook and watch a guest"):
        tool = stage.tool()
        guest = stage.linux(tool)
        _, session = tool.hook()
        shell = guest.wait_booted()
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=5)
        during = footprint(stage.host)
        assert during.machines == before.machines + 1
        assert during.threads > before.threads, "no kernel thread receives the tool's commands"
    with timeline.step("leave a vCPU waiting for an answer, with a pause behind it"):
        session.handle(HYPERCALL, None)
        call = Background(shell, "kvmi-guest hypercall 1")
        stage.keep(call.close)
        session.next_event(HYPERCALL, timeout_s=5)
        session.command("VM_PAUSE_VCPU", vcpu=0, wait=0).ok()
    with timeline.step("kill -9 QEMU: the tool sees the end of the stream"):
        guest.kill()
        session.expect_close(timeout_s=5)
        session.close()
    with timeline.step("the host's kernel has freed everything"):
        call.close()
        guest.close()
        wait_for_footprint(stage.host, before)
    with timeline.step("a new guest can be hooked"):
        guest = stage.linux(tool, name="next")
        _, session = tool.hook()
        shell = guest.wait_booted()
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=5)
        session.close()
        guest.quit()
