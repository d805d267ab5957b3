# SPDX-License-Identifier: GPL-2.0-or-later
"""An introspection tool in a process of its own, made to be killed.

The process gets the connection that QEMU opened and from there on is the tool, all by
itself: it shakes hands, enables hypercall events, and never answers the first one. What
it does it says in JSON lines on its standard output.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.abi import load_profile
from harness.counters import create
from harness.errors import SilenceError
from harness.tool import Session, Transcript, send_answer

__all__ = ["DoomedTool"]


class DoomedTool:
    """The process, seen from the test."""

    def __init__(self, sock: socket.socket, *, directory: Path, profile: str) -> None:
        """Start it on ``sock``, which is no longer ours afterwards.

        :param directory: gets its transcript and its event counter.
        """
        self.counters = directory / "doomed.counters"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(sock.fileno()), str(directory), profile],
            pass_fds=[sock.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        sock.close()
        self._buffer = b""

    def expect(self, state: str, *, timeout_s: float = 15.0) -> dict[str, Any]:
        """Wait until it says that it is in this state; return all it says about it.

        :raises SilenceError: it does not within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        output = self._process.stdout
        assert output is not None
        while True:
            while b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                said: dict[str, Any] = json.loads(line)
                if said["state"] == state:
                    return said
            ready, _, _ = select.select([output], [], [], max(deadline - time.monotonic(), 0))
            chunk = os.read(output.fileno(), 4096) if ready else b""
            if not chunk:
                raise SilenceError(f"the tool that is to be killed did not reach '{state}'")
            self._buffer += chunk

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it if it still runs. Idempotent."""
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()


def main(fd: int, directory: Path, profile_name: str) -> None:
    """Be the tool until killed."""

    def say(**what: object) -> None:
        print(json.dumps(what), flush=True)

    slot = create(directory / "doomed.counters", slots=1).slot(0)
    sock = socket.socket(fileno=fd)
    send_answer(sock)
    session = Session(
        sock,
        profile=load_profile(profile_name),
        transcript=Transcript(directory / "transcript_doomed.jsonl"),
        counters_slot=slot,
    )
    event = session.profile.events["HYPERCALL"]
    deadline = time.monotonic() + 5
    while session.command("VM_CHECK_EVENT", id=event.id).err and time.monotonic() < deadline:
        time.sleep(0.05)  # until QEMU has set its permissions
    session.command("VCPU_CONTROL_EVENTS", vcpu=0, event_id=event.id, enable=1).ok()
    say(state="watching")
    session.next_event("HYPERCALL", timeout_s=60)
    say(state="event", event="HYPERCALL")
    time.sleep(60)  # being killed is what it waits for
    raise SystemExit("nobody killed this tool")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
