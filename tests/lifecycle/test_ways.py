# SPDX-License-Identifier: GPL-2.0-or-later
"""The tool on another machine, on the host, and in another guest: the same sequence passes."""

from __future__ import annotations

import pytest

from harness.plugin.timeline import Timeline

from .inguest import start_ticking, ticks
from .stage import Stage, Tool
from .test_stop_and_cont import pause_and_resume, read_and_write
from .ways import Relay

KEY = b"open, sesame"
CID, PORT = 42, 1042


def tool_on(stage: Stage, way: str) -> Tool:
    """A tool that is reached in this way; its own guest is started where it needs one."""
    if way == "tcp":
        return stage.tool(key=KEY)
    if way == "unix":
        relay = Relay.unix(stage.host, "/run/kvmi-tool")
    else:
        home = stage.linux(
            None, name="the tool's", label="tool-guest",
            extra=("-device", f"vhost-vsock-pci,guest-cid={CID}"),
        )  # fmt: skip
        relay = Relay.vsock(home.wait_booted(), cid=CID, port=PORT)
    return stage.tool(key=KEY, way=relay)


@pytest.mark.lifecycle
@pytest.mark.clause(
    "QEMU-HSK-QEMU-CLIENT",
    "QEMU-CHARDEV-VSOCK",
    "QEMU-HSK-COOKIE",
    "QEMU-STOP-ASYNC",
    "QEMU-CONT-RECONNECT",
    "QEMU-DISC-UNHOOK",
    "LIFE-UNHOOK-SEQUENCE",
    "MSG-ONE-SOCKET",
)
@pytest.mark.parametrize("way", ["tcp", "unix", "vsock"])
def test_tool_by(stage: Stage, timeline: Timeline, way: str) -> None:
    """Watched, paused, stopped, continued, deserted: by TCP, by a UNIX socket, by vsock."""
    with timeline.step(f"a tool that is reached by {way}"):
        tool = tool_on(stage, way)
    with timeline.step("start, hook and watch a guest"):
        guest = stage.linux(tool)
        hello, session = tool.hook()
        assert hello.uuid == guest.uuid
        shell = guest.wait_booted()
        start_ticking(shell)
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=10, traps=5)
    with timeline.step("hold it, read and write its memory"):
        pause_and_resume(stage, session, guest)
        read_and_write(session, shell)
    with timeline.step("stop: the tool is told, and closes"):
        stop = guest.send("stop")
        session.next_event("UNHOOK", timeout_s=5)
        assert not stop.arrived
        stage.unwatch(session, vcpus=guest.cpus)
        session.close()
        stop.value(timeout_s=5)
        assert guest.status() == "paused"
    with timeline.step("cont: hooked again"):
        guest.qmp("cont")
        again, session = tool.hook()
        assert again.start_time == hello.start_time
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=5)
    with timeline.step("the tool leaves by itself, and comes back"):
        session.close()
        _, session = tool.hook()
        stage.watch(session, vcpus=guest.cpus)
        stage.exchange(shell, calls=5)
        assert ticks(shell).wrong == 0
