# SPDX-License-Identifier: GPL-2.0-or-later
"""A host: the machine whose kernel is under test, reached over SSH on every target."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol, Self

import paramiko

from harness.errors import (
    HarnessError,
    HostCrashedError,
    InfraError,
    LostHostError,
    UsageError,
)
from harness.hosts.console import Console
from harness.hosts.freeze import frozen_thread
from harness.hosts.ssh import Keys, Shell, login_until

__all__ = ["Host", "Machine", "join"]

_TUNNEL_TIMEOUT_S = 10.0
_DYING_S = 2.0
_CHUNK = 65536


class Machine(Protocol):
    """What a host needs of the target that made it."""

    def login(self, keys: Keys, *, timeout_s: float) -> paramiko.Transport:
        """Log in once, with so much time for each step.

        :raises NotYet: nobody answers; so does an OSError.
        """

    def ended(self, *, within_s: float = 0.0) -> str | None:
        """What became of the machine, for people; None if it is still there.

        :param within_s: how long to wait for its end.
        """

    def crashed(self) -> bool:
        """Whether the machine ended in the way a dying kernel ends it, even silently."""

    def tool_address(self, port: int) -> tuple[str, int]:
        """Where a program in the host finds our listener on 127.0.0.1:``port``."""

    def login_command(self, keys: Keys) -> list[str]:
        """The command by which a person logs in."""

    def processors(self) -> str:
        """What its processors are at, seen from outside; empty where nobody sees that.

        :raises HarnessError: it cannot be found out.
        """

    def processor_thread(self, number: int) -> int | None:
        """The thread on our machine that is one of its processors; None if there is no such."""

    def close(self) -> None:
        """End the machine. Idempotent."""


class Host(Shell):
    """A running host. Made by :meth:`harness.hosts.base.Target.start`.

    All methods may be called from any thread. When the host is gone, each call says so
    by :class:`HostCrashedError` (its kernel died) or :class:`LostHostError` (anything
    else); it stays gone. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        name: str,
        evidence: Path,
        console: Console,
        keys: Keys,
        files: str = "/opt",
        patience: float = 1.0,
    ) -> None:
        """For targets. The machine belongs to the host from now on; nothing is dialled yet.

        :param name: for messages.
        :param evidence: the directory with the logs of this host.
        :param patience: of its target; see :class:`harness.hosts.base.Target`.
        :param files: where our programs are in the host: ``qemu/`` and ``guest/``.
        """
        super().__init__(f"host {name}")
        self.name = name
        self.evidence = evidence
        self.console = console
        self.keys = keys
        self.files = files
        self.patience = patience
        self._machine = machine
        self._login_lock = threading.Lock()
        self._connection: paramiko.Transport | None = None
        self._closed = False

    # -- state ------------------------------------------------------------------------

    def alive(self) -> bool:
        """Whether the machine runs and its kernel has not died."""
        return not self._closed and self._machine.ended() is None and self.console.crash() is None

    def check(self) -> None:
        """Find out whether the host is still there.

        :raises HostCrashedError: its kernel died; the console's end is in ``details``.
        :raises LostHostError: the machine is gone although the kernel had no trouble.
        """
        if self._closed:
            raise LostHostError(f"host {self.name} is closed")
        ended = self._machine.ended()
        if crash := self.console.crash():
            raise HostCrashedError(
                f"the kernel of host {self.name} died: {crash.line}",
                hint=f"the console is {self.console.path}",
                details=self.console.tail(),
            )
        if ended is None:
            return
        if self._machine.crashed():
            raise HostCrashedError(
                f"the kernel of host {self.name} ended without a word: {ended}",
                hint=f"a triple fault or a restart; the console is {self.console.path}",
                details=self.console.tail(),
            )
        raise LostHostError(
            f"host {self.name} is gone: {ended}",
            hint=f"its kernel showed no trouble; logs are in {self.evidence}",
            details=self.console.tail(),
        )

    def tool_address(self, port: int) -> tuple[str, int]:
        """Address and port by which a program in the host reaches our 127.0.0.1:``port``."""
        return self._machine.tool_address(port)

    def login_command(self) -> list[str]:
        """The command line by which a person logs in to this host."""
        return self._machine.login_command(self.keys)

    def stuck(self) -> str:
        """What its processors are at; see :meth:`Shell.stuck`."""
        try:
            return self._machine.processors()
        except HarnessError as error:
            return f"what its processors are at cannot be told: {error.message}"

    @contextlib.contextmanager
    def frozen(self, processor: int) -> Iterator[None]:
        """Keep one processor from executing anything, interrupts included, while others go on.

        :raises UsageError: its processors are not apart, or not ours to hold.
        """
        thread = self._machine.processor_thread(processor)
        if thread is None:
            raise UsageError(f"no processor of host {self.name} can be held alone")
        with frozen_thread(thread):
            yield

    # -- connections ------------------------------------------------------------------

    def wait_up(self, *, timeout_s: float) -> None:
        """Log in as soon as the host lets us.

        :raises DeadlineError: not in ``timeout_s``.
        :raises HostCrashedError: the kernel died.
        :raises LostHostError: the machine went away.
        """
        with self._login_lock:
            if self._connection is None or not self._connection.is_active():
                self._connection = login_until(
                    lambda step_s: self._machine.login(self.keys, timeout_s=step_s),
                    timeout_s=timeout_s,
                    check=self.check,
                )

    def _transport(self) -> paramiko.Transport:
        connection = self._connection
        if connection is not None and connection.is_active():
            return connection
        self.check()
        # The connection may break without harm to the host, as when a test kills sshd.
        self.wait_up(timeout_s=_TUNNEL_TIMEOUT_S)
        assert self._connection is not None
        return self._connection

    def _broken(self, doing: str, error: BaseException) -> NoReturn:
        # Its network is the first of a dying machine to go, its process the last.
        self._machine.ended(within_s=_DYING_S)
        super()._broken(doing, error)

    def tunnel(
        self, port: int, *, address: str = "127.0.0.1", timeout_s: float = _TUNNEL_TIMEOUT_S
    ) -> paramiko.Channel:
        """A connection to a TCP port, made by the host itself; as a channel of paramiko.

        :raises ConnectionRefusedError: nothing listens there.
        :raises InfraError: the way to the host failed; or the host's own error.
        """
        doing = f"connect to {address}:{port}"
        try:
            return self._transport().open_channel(
                "direct-tcpip", (address, port), ("127.0.0.1", 0), timeout=timeout_s
            )
        except paramiko.ChannelException as error:
            raise ConnectionRefusedError(
                f"host {self.name}: nothing listens on {address}:{port} ({error.text})"
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            self._broken(doing, error)

    def connect(
        self, port: int, *, address: str = "127.0.0.1", timeout_s: float = _TUNNEL_TIMEOUT_S
    ) -> socket.socket:
        """A connection to a TCP port of the host, as a real socket of ours.

        Its other end is fed by two threads until either side closes.

        :raises InfraError: nothing listens there, or the way to the host failed.
        """
        try:
            channel = self.tunnel(port, address=address, timeout_s=timeout_s)
        except ConnectionRefusedError as error:
            raise InfraError(
                str(error), hint="did the program that should listen start?"
            ) from error
        ours, theirs = socket.socketpair()
        join(theirs, channel, name=f"host-tunnel-{port}")
        return ours

    def close(self) -> None:
        """End the host and all that runs in it. Idempotent; never raises."""
        self._closed = True
        with contextlib.suppress(Exception):
            self._machine.close()
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def join(sock: socket.socket, channel: paramiko.Channel, *, name: str) -> None:
    """Feed each of them from the other, by two threads, until either side closes."""
    out = threading.Thread(target=_outwards, args=(sock, channel), name=name, daemon=True)
    out.start()
    threading.Thread(target=_inwards, args=(sock, channel, out), name=name, daemon=True).start()


def _pump(receive: Callable[[int], bytes], send: Callable[[bytes], None]) -> None:
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        while chunk := receive(_CHUNK):
            send(chunk)


def _outwards(sock: socket.socket, channel: paramiko.Channel) -> None:
    """What we write, until we shut that direction or close the socket."""
    _pump(sock.recv, channel.sendall)
    state = select.poll()
    state.register(sock, 0)
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        # A closed socket hangs up; one that was only shut for writing still wants answers.
        if any(events & select.POLLHUP for _, events in state.poll(0)):
            channel.close()
        else:
            channel.shutdown_write()


def _inwards(sock: socket.socket, channel: paramiko.Channel, out: threading.Thread) -> None:
    """What we read, until either side closes; then everything is closed."""
    _pump(channel.recv, sock.sendall)
    channel.close()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    out.join()
    sock.close()
