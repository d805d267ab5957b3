# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to one agent process in a host: requests out, answers back.

Requests may be sent from any thread and overlap; answers find their request by number.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import secrets
import shlex
import socket
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DeadlineError, HarnessError, InfraError, SilenceError
from harness.hosts.stacks import stacks_in_kvm
from harness.tool import Listener

if TYPE_CHECKING:
    from harness.hosts import Host

__all__ = ["AgentLink"]

AGENT = Path(__file__).with_name("agent")
_MARGIN_S, _START_S, _DYING_S = 20.0, 60.0, 2.0

_LOADER = """\
import os, runpy, sys
archive = os.memfd_create("agent")
os.write(archive, sys.stdin.buffer.read({size}))
runpy.run_path(f"/proc/self/fd/{{archive}}", run_name="__main__")
"""
"""The modules come over standard input: nothing is left in the host's file system."""


class AgentLink:
    """An agent that runs in a host.

    :param host: where to start it; the host's own error is raised when it is gone.
    :param package: what runs there, a directory of modules that need nothing else of ours;
        ``serve`` of them has a function of this name.
    """

    def __init__(self, host: Host, *, package: Path = AGENT) -> None:
        self._host = host
        archive = _archive(package)
        loader = _LOADER.format(size=len(archive))
        self._process = host.spawn(f"exec python3 -I -c {shlex.quote(loader)}")
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._waiting: set[int] = set()
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._ended: str | None = None
        self._process.write(archive)
        with Listener() as listener:
            self._connection = self._connect(listener)
        self._reader = threading.Thread(target=self._read, name="host-agent", daemon=True)
        self._reader.start()

    def _connect(self, listener: Listener) -> socket.socket:
        """Tell the agent where we listen, and find the connection that it makes.

        :raises InfraError: it ended, or did not connect in time.
        """
        address, port = self._host.tool_address(listener.port)
        token = secrets.token_hex(16)  # others on that machine may connect, too
        wanted = json.dumps({"host": address, "port": port, "token": token})
        self._process.write(wanted.encode() + b"\n")
        deadline = time.monotonic() + _START_S * self._host.patience
        while time.monotonic() < deadline and self._process.status(timeout_s=0) is None:
            with contextlib.suppress(SilenceError):
                connection = listener.accept(1)
                if _says(connection, token):
                    return connection
                connection.close()
            self._host.check()
        error = self._gone("the agent did not connect")
        self._process.close()
        raise error

    def call(self, op: str, *, timeout_s: float = 10.0, **fields: Any) -> Any:
        """Perform one request and answer its result.

        :param timeout_s: how long the request itself may take (``limit_s`` in the request);
            the way there and back has a margin of its own.
        :raises DeadlineError: no answer came. The request may still be at work in the host.
        :raises InfraError: the agent ended, or refused the request.
        """
        number = self.send(op, limit_s=timeout_s, **fields)
        return self.wait(number, what=op, timeout_s=timeout_s + _MARGIN_S)

    def send(self, op: str, **fields: Any) -> int:
        """Send one request; answer the number to wait for."""
        number = next(self._numbers)
        line = json.dumps({"id": number, "op": op, **fields}, separators=(",", ":")) + "\n"
        with self._changed:
            self._waiting.add(number)
        try:
            with self._send_lock:
                self._connection.sendall(line.encode())
        except OSError as error:
            raise self._gone(f"cannot send {op} to the agent: {error}") from error
        return number

    def wait(self, number: int, *, what: str, timeout_s: float) -> Any:
        """Wait for the answer to a request that was sent; longer where the host is slow."""
        timeout_s *= self._host.patience
        with self._changed:
            self._changed.wait_for(
                lambda: number in self._answers or self._ended is not None, timeout_s
            )
            self._waiting.discard(number)
            answer = self._answers.pop(number, None)
            ended = self._ended
        # An answer that comes later than this finds nobody, and is dropped by the reader.
        if answer is not None:
            if "fault" in answer:
                raise InfraError(f"the agent could not do {what}", details=answer["fault"])
            return answer["ok"]
        if ended is not None:
            raise self._gone(f"the agent ended during {what}: {ended}")
        self._host.check()
        raise DeadlineError(
            f"the agent did not answer {what} in {timeout_s:.0f} s",
            details=stacks_in_kvm(self._host),
        )

    def answered(self, number: int) -> bool:
        """Tell whether the answer to a request is there, without waiting."""
        with self._changed:
            return number in self._answers

    def _gone(self, message: str) -> HarnessError:
        """The error for an agent that is gone: the host's own, if the host is gone too."""
        try:
            self._host.check()
        except HarnessError as error:
            return error
        self._process.status(timeout_s=_DYING_S)  # its last words may be on their way
        said = self._process.read_stderr().decode(errors="replace")
        return InfraError(message, details=said)

    def _read(self) -> None:
        reason = "its output ended"
        try:
            for line in self._connection.makefile():
                answer = json.loads(line)
                with self._changed:
                    if answer["id"] in self._waiting:
                        self._answers[answer["id"]] = answer
                        self._changed.notify_all()
        except (OSError, ValueError, HarnessError) as error:
            reason = str(error)
        with self._changed:
            self._ended = reason
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """Whether the agent's output is still open."""
        return self._ended is None

    def close(self) -> None:
        """End the agent by closing the connection; everything it owns goes with it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._process.close()
        self._reader.join(timeout=5)
        self._connection.close()


def _says(connection: socket.socket, token: str) -> bool:
    """Whether a new connection begins with the token."""
    connection.settimeout(_MARGIN_S)
    try:
        said = connection.recv(len(token), socket.MSG_WAITALL)
    except OSError:
        return False
    connection.settimeout(None)
    return said == token.encode()


def _archive(package: Path) -> bytes:
    """The modules of a package as a program that Python can run."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for module in sorted(package.glob("*.py")):
            archive.write(module, f"agent/{module.name}")
        archive.writestr("__main__.py", "from agent.serve import serve\n\nserve()\n")
    return buffer.getvalue()
