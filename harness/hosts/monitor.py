# SPDX-License-Identifier: GPL-2.0-or-later
"""The control connection to an emulator of ours: QMP, a few commands in a row.

The other end is an inherited descriptor of the emulator, so there is nothing to find,
to guard or to clean up. Guests' QEMUs are driven by :mod:`harness.manager.qmp` instead,
which follows events and keeps a transcript.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from harness.errors import DeadlineError, InfraError

__all__ = ["Monitor"]

_POLL_S = 0.005


class Monitor:
    """A connected QMP session. Not thread-safe.

    :param sock: connected to a QMP server that has not been spoken to; ours from now on.
    :param check: raises if the emulator is gone; asked before other reasons are given.
    """

    def __init__(self, sock: socket.socket, *, check: Callable[[], None]) -> None:
        self._sock = sock
        self._check = check
        self._rest = b""

    def open(self, *, timeout_s: float) -> None:
        """Greet and negotiate; the emulator may still be starting.

        :raises InfraError: it ended, or does not answer in time.
        """
        self._message(time.monotonic() + timeout_s, "its greeting")
        self.execute("qmp_capabilities", timeout_s=timeout_s)

    def _message(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\n" not in self._rest:
            self._sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                chunk = self._sock.recv(65536)
            except TimeoutError:
                self._check()
                raise DeadlineError(f"the emulator did not give {what} in time") from None
            except OSError as error:
                self._check()
                raise InfraError(f"the emulator's control connection broke: {error}") from error
            if not chunk:
                self._check()
                raise InfraError(f"the emulator closed its control connection before {what}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, *, timeout_s: float = 10.0, **arguments: Any) -> Any:
        """Perform one command; returns its result. Events meanwhile are dropped.

        :raises InfraError: the emulator refused it, ended, or did not answer in time.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): arguments[key] for key in arguments}
        deadline = time.monotonic() + timeout_s
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            self._check()
            raise InfraError(f"the emulator's control connection broke: {error}") from error
        while True:
            message = self._message(deadline, f"an answer to {command}")
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise InfraError(f"the emulator refused {command}: {message['error']['desc']}")

    def human(self, line: str) -> str:
        """Perform a command of the human monitor; returns what it prints."""
        return str(self.execute("human-monitor-command", command_line=line))

    def wait_migrated(self, *, timeout_s: float) -> None:
        """Wait until a migration, in or out, is complete.

        :raises InfraError: it failed, or takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.execute("query-migrate")
            status = state.get("status", "none")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise InfraError(
                    f"the machine could not be saved or restored: {state.get('error-desc', status)}"
                )
            if time.monotonic() > deadline:
                raise DeadlineError(f"the machine's migration is still '{status}'")
            time.sleep(_POLL_S)  # QEMU has no command that waits, and it takes milliseconds

    def close(self) -> None:
        """Close the connection; the emulator goes on. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.close()
