# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's human monitor as people have it: lines on a socket, not commands within QMP.

It is a monitor of its own. A command that takes long blocks this one, and its commands run
while another monitor's command waits in a nested main loop.
"""

from __future__ import annotations

import socket
import time

from harness.errors import SilenceError
from harness.manager.qemu import QemuGuest

from .stage import Stage, next_port

__all__ = ["HumanMonitor"]

_PROMPT = b"(qemu) "


class HumanMonitor:
    """One connection to it. A guest needs :attr:`arguments` among its own."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._port = next_port()
        self._sock: socket.socket | None = None
        #: QEMU's arguments that make this monitor
        self.arguments = ("-monitor", f"tcp:127.0.0.1:{self._port},server=on,wait=off")

    def connect(self, guest: QemuGuest) -> None:
        """Connect to the monitor of ``guest``, which runs, and read its greeting."""
        guest.host.check()
        self._sock = self._stage.host.connect(self._port)
        self._stage.keep(self._sock.close)
        self.answer()

    def order(self, command: str) -> None:
        """Send a command; :meth:`answer` waits for its end."""
        assert self._sock is not None, "connect first"
        self._sock.sendall(command.encode() + b"\n")

    def answer(self, *, timeout_s: float = 10) -> str:
        """What it says until it prompts for the next command, echoes and control codes included.

        :raises SilenceError: no prompt within ``timeout_s``.
        """
        assert self._sock is not None, "connect first"
        said = b""
        deadline = time.monotonic() + timeout_s
        while not said.endswith(_PROMPT):
            self._sock.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                chunk = self._sock.recv(4096)
            except TimeoutError:
                raise SilenceError(
                    f"the human monitor did not prompt within {timeout_s:g} s; it said {said!r}"
                ) from None
            if not chunk:
                raise SilenceError(f"the human monitor closed; it said {said!r}")
            said += chunk
        return said.decode(errors="replace")
