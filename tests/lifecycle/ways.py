# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a tool can be: in the host, or in another guest of it; and the road between hosts.

The worker that plays the tool is in neither. There, a small program listens in its place and
passes one connection on, by its standard input and output and SSH. What QEMU connects to, and
what the kernel is given, is the UNIX or vsock socket.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import threading

from harness.errors import HarnessError, SilenceError
from harness.hosts import Host
from harness.hosts.host import join
from harness.hosts.ssh import RemoteProcess, Shell
from harness.manager.introspection import UnixAddress, VsockAddress
from harness.tool import Listener

__all__ = ["Relay", "Road"]

_UNIX = """\
import os, select, socket, sys
path = sys.argv[1]
if os.path.exists(path):
    os.unlink(path)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen(1)
if 0 in select.select([0, listener], [], [])[0]:
    sys.exit()
peer = listener.accept()[0]
listener.close()
while True:
    for ready in select.select([0, peer], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else peer.recv(65536)
        if not data:
            sys.exit()
        peer.sendall(data) if ready == 0 else sys.stdout.buffer.raw.write(data)
"""


class Relay:
    """Listens somewhere else; one connection at a time."""

    def __init__(self, shell: Shell, command: str, address: UnixAddress | VsockAddress) -> None:
        """Describe it; it listens from the first :meth:`accept` on.

        :param command: a program that listens, passes on one connection, and ends with it.
        """
        self.address = address
        self._shell = shell
        self._command = command
        self._process: RemoteProcess | None = None

    @classmethod
    def unix(cls, host: Shell, path: str) -> Relay:
        """On a UNIX socket of a host."""
        command = shlex.join(["python3", "-c", _UNIX, path])
        return cls(host, command, UnixAddress(path))

    @classmethod
    def vsock(cls, guest: Shell, *, cid: int, port: int) -> Relay:
        """On a vsock port of a guest that has the context id ``cid``."""
        return cls(guest, f"kvmi-guest vsock {port}", VsockAddress(cid, port))

    @property
    def port(self) -> int:
        """The vsock port.

        :raises AttributeError: a UNIX socket has none.
        """
        return self.address.port  # type: ignore[union-attr]

    def accept(
        self, timeout_s: float = 10, *, error: type[HarnessError] = SilenceError
    ) -> socket.socket:
        """The next connection; it may not be made yet, and is silent until then.

        The previous one is ended.
        """
        self.close()
        self._process = self._shell.spawn(self._command)
        ours, theirs = socket.socketpair()
        join(theirs, self._process.channel, name=f"relay {self.address}")
        return ours

    def close(self) -> None:
        """Stop listening, and end the connection. Idempotent."""
        if self._process is not None:
            with contextlib.suppress(Exception):
                self._process.close()
            self._process = None


class Road:
    """Leads connections from one host to a port of another host's loopback, through us."""

    def __init__(self, origin: Host, destination: Host, port: int) -> None:
        self._destination = destination
        self._port = port
        self._listener = Listener()
        host, near = origin.tool_address(self._listener.port)
        #: where a QEMU of the origin sends its migration
        self.uri = f"tcp:{host}:{near}"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._lead, name="road", daemon=True)
        self._thread.start()

    def _lead(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(HarnessError, OSError):
                sock = self._listener.accept(0.5)
                join(sock, self._destination.tunnel(self._port), name="road")

    def close(self) -> None:
        """Close the road for new connections. Idempotent."""
        self._closed.set()
        self._thread.join(5)
        self._listener.close()
