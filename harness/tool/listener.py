# SPDX-License-Identifier: GPL-2.0-or-later
"""The tool's listening socket: the device manager (QEMU, or the small one) is the client."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.errors import ConformanceError, HarnessError, InfraError, SilenceError

__all__ = ["Listener"]


class Listener:
    """Listens from construction on, until :meth:`close`.

    TCP by default; :meth:`unix` and :meth:`vsock` make the other kinds.

    :param port: 0 takes any free one, see :attr:`port`.
    :raises InfraError: the address cannot be had.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._path: Path | None = None
        self._listen(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port))

    @classmethod
    def unix(cls, path: Path) -> Listener:
        """Listens on a UNIX socket; ``close`` removes it."""
        self = cls.__new__(cls)
        self._path = path
        self._listen(socket.AF_UNIX, str(path))
        return self

    @classmethod
    def vsock(
        cls, *, cid: int = socket.VMADDR_CID_ANY, port: int = socket.VMADDR_PORT_ANY
    ) -> Listener:
        """Listens on AF_VSOCK, for a device manager in a virtual machine."""
        self = cls.__new__(cls)
        self._path = None
        self._listen(socket.AF_VSOCK, (cid, port))
        return self

    def _listen(self, family: socket.AddressFamily, address: Any) -> None:
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family in (socket.AF_INET, socket.AF_INET6):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(16)
            self._socket.setblocking(False)
        except OSError as error:
            self._socket.close()
            hint = "port 0 takes any free one; `ss -ltnp` shows who has it"
            raise InfraError(
                f"cannot listen on {_text(address)}: {error.strerror}",
                hint=hint if error.errno == errno.EADDRINUSE and family != socket.AF_UNIX else "",
            ) from error

    @property
    def address(self) -> str:
        """Where it listens, for people."""
        return _text(self._socket.getsockname())

    @property
    def port(self) -> int:
        """The TCP or vsock port."""
        return int(self._socket.getsockname()[1])

    def accept(
        self, timeout_s: float = 10, *, error: type[HarnessError] = SilenceError
    ) -> socket.socket:
        """The next connection, blocking, with Nagle's algorithm off.

        :param error: what is raised when nobody connects in time: by default a fault of the
            software under test, since a device manager has to connect and to reconnect.
        """
        connection = self._accept(timeout_s)
        if connection is None:
            raise error(f"nobody connected to {self.address} within {timeout_s:g} s")
        return connection

    def no_connection(self, within_s: float) -> None:
        """Watch for a while that nobody connects.

        :raises ConformanceError: somebody did; the connection is closed.
        """
        connection = self._accept(within_s)
        if connection is not None:
            connection.close()
            raise ConformanceError(f"a connection to {self.address} came, and none was due")

    def _accept(self, timeout_s: float) -> socket.socket | None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            return None
        try:
            connection, _ = self._socket.accept()
        except OSError as failure:
            raise InfraError(f"cannot accept on {self.address}: {failure.strerror}") from failure
        connection.setblocking(True)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            # Commands are small and answered one by one; waiting for more bytes only adds delay.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def close(self) -> None:
        """Stop listening. Idempotent; accepted connections live on."""
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _text(address: Any) -> str:
    if isinstance(address, tuple):
        return ":".join(str(part) for part in address[:2])
    return str(address)
