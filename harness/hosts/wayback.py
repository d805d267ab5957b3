# SPDX-License-Identifier: GPL-2.0-or-later
"""The way from a machine back to listeners of ours, through an SSH connection to it.

The machine's SSH server listens for us on some of its ports, on its own loopback only. The
ports are opened beforehand and used again, so that none comes or goes during a test that
counts the machine's sockets. Other than on a direct way, a connection to a listener that
has gone is accepted and then closed, instead of refused.
"""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path

import paramiko

from harness.errors import InfraError
from harness.hosts.host import join

__all__ = ["WayBack", "listens"]

_SPARE = 4
_CONNECT_TIMEOUT_S = 5.0


def listens(port: int) -> bool:
    """Whether some program of ours listens on 127.0.0.1:``port``, without calling it."""
    # /proc/net/tcp: addresses in hexadecimal, in the byte order of the machine; 0A: LISTEN.
    entry = rf"^ *\d+: (0100007F|00000000):{port:04X} \S+ 0A "
    return bool(re.search(entry, Path("/proc/net/tcp").read_text(), re.MULTILINE))


class WayBack:
    """The ports of one connection. Thread-safe.

    :param what: the machine, for messages.
    :raises InfraError: the machine's SSH server does not allow it.
    """

    def __init__(self, connection: paramiko.Transport, *, what: str) -> None:
        self._connection = connection
        self._what = what
        self._lock = threading.Lock()
        # Ours by theirs; 0 while nobody uses it. The order is that of the last use.
        self._ports: dict[int, int] = {}
        for _ in range(_SPARE):
            self._open()

    def _open(self) -> int:
        try:
            port = self._connection.request_port_forward("127.0.0.1", 0, self._connected)
        except paramiko.SSHException as error:
            raise InfraError(
                f"{self._what}: its SSH server opens no way back to us",
                hint="allow it: AllowTcpForwarding yes in its sshd_config",
                details=str(error),
            ) from error
        self._ports[port] = 0
        return port

    def port_for(self, ours: int) -> int:
        """The machine's port that leads to our 127.0.0.1:``ours``.

        :raises InfraError: no further port can be opened.
        """
        with self._lock:
            theirs = next((port for port, used in self._ports.items() if used == ours), 0)
            if not theirs:
                free = (port for port, used in self._ports.items() if not listens(used))
                theirs = next(free, 0) or self._open()
            del self._ports[theirs]
            self._ports[theirs] = ours
            return theirs

    def _connected(
        self, channel: paramiko.Channel, _origin: object, server: tuple[str, int]
    ) -> None:
        """Somebody on the machine connected; called for all of the ports."""
        ours = self._ports.get(server[1], 0)
        try:
            sock = socket.create_connection(("127.0.0.1", ours), timeout=_CONNECT_TIMEOUT_S)
        except OSError:
            channel.close()
            return
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        join(sock, channel, name=f"host-tool-{ours}")
