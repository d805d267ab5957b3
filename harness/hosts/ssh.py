# SPDX-License-Identifier: GPL-2.0-or-later
"""SSH to hosts and guests: log in, run commands, keep one running, reach a port.

Hosts and guests are emulated, some of them twice, so the algorithms are the cheapest
that both ends have: on an emulated CPU a key exchange on curve P-256 takes two thirds
of the time of the one on Curve25519, and checking an ECDSA signature a seventh of the
time of an RSA one. Nothing secret is at stake: both ends are ours, on one machine.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import paramiko

from harness.errors import DeadlineError, InfraError
from harness.hosts.base import Completed
from harness.hosts.stacks import stacks_in_kvm

if TYPE_CHECKING:
    from harness.hosts.host import Host

__all__ = [
    "GuestShell",
    "Keys",
    "NotYet",
    "RemoteOutput",
    "RemoteProcess",
    "Shell",
    "login",
    "login_until",
]

_KEX = "ecdh-sha2-nistp256"
_HOST_KEY = "ecdsa-sha2-nistp256"
_CIPHER = "aes128-ctr"
_MAC = "hmac-sha2-256"

_FIRST_BANNER_S = 0.6
_LONGEST_BANNER_S = 5.0
_RETRY_PAUSE_S = 0.1
_LOGIN_S = 30.0
"""For one more connection to a guest that has answered before."""

_WINDOW = 1 << 30
"""What a command may print before anybody reads it, in bytes, without being held up."""

# paramiko logs every broken connection with a traceback; to us that is an exception with
# a message of its own, or one more try with a machine that is still booting.
_LOG_CHANNEL = "harness.ssh"
logging.getLogger(_LOG_CHANNEL).setLevel(logging.CRITICAL + 1)


class Keys:
    """The key that opens hosts and guests, and those that they show.

    :param directory: as made by :func:`harness.build.images.build_keys`.
    """

    def __init__(self, directory: Path) -> None:
        self.client_path = directory / "client"
        self.client = paramiko.ECDSAKey.from_private_key_file(str(self.client_path))
        fields = (directory / "host.pub").read_text().split()
        self.host_public = fields[1]


class NotYet(Exception):
    """No SSH server answered; the machine may still be booting."""


def login(
    sock: socket.socket | paramiko.Channel, keys: Keys, *, timeout_s: float
) -> paramiko.Transport:
    """Log in as root over a connected socket or channel, which is closed on failure.

    :param timeout_s: for each step: the banner, the key exchange, the authentication.
    :raises NotYet: nobody answered on the other end.
    :raises InfraError: somebody answered who is not what we expect.
    """
    try:
        transport = paramiko.Transport(sock)
    except (paramiko.SSHException, OSError) as error:
        sock.close()
        raise NotYet(str(error)) from error
    transport.name = "host-ssh"  # of the thread; it lives as long as the connection
    transport.daemon = True
    transport.set_log_channel(_LOG_CHANNEL)
    transport.banner_timeout = timeout_s
    transport.handshake_timeout = max(timeout_s, _LONGEST_BANNER_S)
    transport.auth_timeout = max(timeout_s, _LONGEST_BANNER_S)
    options = transport.get_security_options()
    options.kex, options.key_types = [_KEX], [_HOST_KEY]
    options.ciphers, options.digests = [_CIPHER], [_MAC]
    try:
        transport.start_client(timeout=timeout_s + _LONGEST_BANNER_S)
        if transport.get_remote_server_key().get_base64() != keys.host_public:
            raise InfraError(
                "an SSH server answered that is not ours",
                hint="does another program listen on that port?",
            )
        transport.auth_publickey("root", keys.client)
    except paramiko.AuthenticationException as error:
        transport.close()
        raise InfraError(
            f"the SSH server does not accept our key: {error}",
            hint="image and keys in the cache do not fit; delete its `keys` and build again",
        ) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        raise NotYet(str(error) or type(error).__name__) from error
    except BaseException:
        transport.close()
        raise
    return transport


def login_until(
    attempt: Callable[[float], paramiko.Transport],
    *,
    timeout_s: float,
    check: Callable[[], None],
) -> paramiko.Transport:
    """Try to log in again and again until it works.

    QEMU's user network accepts a connection before the machine behind it listens, and
    then repeats its own attempts more and more slowly. A new connection is tried at
    once, so tries are short at first and grow with the machine's slowness.

    :param attempt: makes a connection and logs in, with so many seconds for each step; an
        OSError or NotYet means "not yet".
    :param check: raises if the machine is gone, which ends the tries.
    :raises DeadlineError: nobody answered in ``timeout_s``; says what the last try met.
    """
    deadline = time.monotonic() + timeout_s
    banner_s = _FIRST_BANNER_S
    while True:
        try:
            return attempt(banner_s)
        except (NotYet, OSError) as error:
            reason = error
        check()
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"no SSH login within {timeout_s:g} s: {reason}",
                hint="its console says how far it came",
            ) from reason
        banner_s = min(banner_s * 1.3, _LONGEST_BANNER_S)
        # A refused connection fails at once; do not spin while the machine boots.
        time.sleep(_RETRY_PAUSE_S)


class RemoteOutput:
    """The standard output of a :class:`RemoteProcess`, as a reader of bytes.

    It ends (empty reads) when the program closed it and when the way to it broke. One
    thread may read while others write.
    """

    def __init__(self, channel: paramiko.Channel, what: str) -> None:
        self._channel = channel
        self._what = what
        self._rest = b""

    def _more(self, deadline: float | None) -> bytes:
        left = None if deadline is None else max(0.01, deadline - time.monotonic())
        self._channel.settimeout(left)
        try:
            return self._channel.recv(65536)
        except TimeoutError:
            raise DeadlineError(f"no output in time from: {self._what}") from None

    def readline(self, *, timeout_s: float | None = None) -> bytes:
        """The next line with its newline; without one at the end, ``b""`` after it.

        :raises DeadlineError: it did not come in ``timeout_s``. What came is kept.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            chunk = self._more(deadline)
            if not chunk:
                line, self._rest = self._rest, b""
                return line
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"

    def read(self, *, timeout_s: float | None = None) -> bytes:
        """All that comes until the end.

        :raises DeadlineError: the end did not come in ``timeout_s``. What came is kept.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while chunk := self._more(deadline):
            self._rest += chunk
        data, self._rest = self._rest, b""
        return data

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line


class RemoteProcess:
    """A program that runs at the other end while we do other things.

    Closing it closes its standard input. That ends a program that reads it; sshd sends
    no signal to a program without a terminal.
    """

    def __init__(self, channel: paramiko.Channel, command: str) -> None:
        self.command = command
        self._channel = channel
        self._write_lock = threading.Lock()
        self.stdout = RemoteOutput(channel, command)

    @property
    def channel(self) -> paramiko.Channel:
        """Its standard input and output, for :func:`harness.hosts.host.join`."""
        return self._channel

    def write(self, data: bytes) -> None:
        """Write to its standard input; may block while it does not read.

        :raises OSError: the program or the way to it has ended.
        """
        with self._write_lock:
            while data:
                # A channel has one time limit for both directions, and it is the reader's.
                with contextlib.suppress(TimeoutError):
                    if (sent := self._channel.send(data)) == 0:
                        raise BrokenPipeError(f"its standard input is closed: {self.command}")
                    data = data[sent:]

    def close_stdin(self) -> None:
        """End its standard input; output can still be read."""
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.shutdown_write()

    def read_stderr(self) -> bytes:
        """What it wrote to its standard error so far and nobody read yet; never blocks."""
        data = b""
        while self._channel.recv_stderr_ready():
            data += self._channel.recv_stderr(65536)
        return data

    def status(self, *, timeout_s: float) -> int | None:
        """Its exit status, or None if it still runs after ``timeout_s``.

        -1 if a signal ended it or the way to it broke.
        """
        if not self._channel.status_event.wait(timeout_s):
            return None
        return int(self._channel.exit_status)

    def close(self) -> None:
        """Close the way to it, and with it its standard input. Idempotent."""
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()


class Shell:
    """Commands over one SSH connection. Thread-safe; commands may run at the same time."""

    def __init__(self, what: str) -> None:
        self.what = what
        """What it reaches, for messages."""
        self.preamble = ""
        """Shell commands that are run before each command."""

    def _transport(self) -> paramiko.Transport:
        """The connection, made again if it broke and that makes sense."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _free_connection(self) -> Iterator[paramiko.Transport]:
        """The connection on which a command is started within the block."""
        yield self._transport()

    def check(self) -> None:
        """Raise what is wrong with the machine at the other end, if anything is."""
        raise NotImplementedError

    def stuck(self) -> str:
        """What can be told of where the machine at the other end is stuck; never raises."""
        raise NotImplementedError

    def _broken(self, doing: str, error: BaseException) -> NoReturn:
        """The best error for a connection that failed: the machine's own comes first."""
        self.check()
        text = str(error) or type(error).__name__
        raise InfraError(f"{self.what}: the SSH connection failed during `{doing}`: {text}")

    def _open(self, command: str, timeout_s: float) -> paramiko.Channel:
        for last in (False, False, True):
            transport: paramiko.Transport | None = None
            try:
                with self._free_connection() as transport:
                    channel = transport.open_session(_WINDOW, timeout=timeout_s)
                    channel.exec_command(self.preamble + command)
                return channel
            except (paramiko.SSHException, EOFError, OSError) as error:
                # dropbear (see GuestShell) refuses a command now and then, without having
                # started it, and takes the next one on the same connection.
                refused = isinstance(error, paramiko.SSHException) and (
                    transport is not None and transport.is_active()
                )
                if last or not refused:
                    self._broken(command, error)
        raise AssertionError("the last try returns or raises")

    def run(
        self, command: str, *, timeout_s: float = 30.0, check: bool = True, input: bytes = b""
    ) -> Completed:
        """Run a shell command to its end.

        :param timeout_s: real seconds, for all of it.
        :param check: whether a status other than 0 is an error.
        :param input: its standard input, which ends after that.
        :raises InfraError: it failed (with its messages in ``details``), or the way to it.
        :raises DeadlineError: it did not end in time. It may still run.
        :raises HostCrashedError: the host's kernel died.
        :raises LostHostError: the host went away.
        """
        deadline = time.monotonic() + timeout_s
        channel = self._open(command, timeout_s)
        with contextlib.closing(channel):
            try:
                stdout, stderr = self._converse(channel, input, deadline)
                ended = channel.status_event.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                ended = False
            except (OSError, EOFError) as error:
                self._broken(command, error)
            if not ended:
                self.check()
                raise DeadlineError(
                    f"{self.what}: `{command}` did not end within {timeout_s:g} s",
                    hint="the host's console may say why",
                    details=self.stuck(),
                )
        status = int(channel.exit_status)
        if status == -1 and not channel.get_transport().is_active():
            self._broken(command, EOFError("connection lost"))
        done = Completed(command, status, stdout, stderr)
        if check and status != 0:
            self.check()
            messages = (stderr or stdout).decode(errors="replace").strip()
            raise InfraError(
                f"{self.what}: `{command}` ended with status {status}", details=messages
            )
        return done

    def _converse(
        self, channel: paramiko.Channel, data: bytes, deadline: float
    ) -> tuple[bytes, bytes]:
        """Feed and drain a command until it closed both outputs."""

        def drained(receive: Callable[[int], bytes]) -> bytes:
            output = bytearray()
            while True:
                channel.settimeout(max(0.01, deadline - time.monotonic()))
                if not (chunk := receive(65536)):
                    return bytes(output)
                output += chunk

        if data:
            channel.settimeout(max(0.01, deadline - time.monotonic()))
            channel.sendall(data)
        channel.shutdown_write()
        # One after the other: the window is so large that neither stream ever waits.
        return drained(channel.recv), drained(channel.recv_stderr)

    def spawn(self, command: str, *, timeout_s: float = 30.0) -> RemoteProcess:
        """Start a shell command and leave it running; see :class:`RemoteProcess`.

        :param timeout_s: until it is started.
        :raises InfraError: the connection failed.
        """
        return RemoteProcess(self._open(command, timeout_s), command)

    def put(self, path: str, data: bytes, *, mode: int = 0o644, timeout_s: float = 60.0) -> None:
        """Write a file; the directory must exist.

        A program of that name may be running: it goes on as it was.

        :raises InfraError: it cannot be written, or the connection failed.
        """
        there, new = shlex.quote(path), shlex.quote(f"{path}.new")
        self.run(
            f"cat >{new} && chmod {mode:o} {new} && mv -f {new} {there}",
            input=data,
            timeout_s=timeout_s,
        )


class GuestShell(Shell):
    """Commands in a guest, through its host. Close it, or use it as a context manager.

    Commands that run at the same time have a connection each. dropbear, the guest's server,
    closes a session whose command has not come yet when another command of the same
    connection ends just then (``check_close()`` in its common-channel.c, as of 2022.83); when
    the command does come, it ends with the connection.
    """

    def __init__(self, host: Host, port: int, *, timeout_s: float = 60.0) -> None:
        """Log in, as soon as the guest lets us.

        :param port: of the host's loopback; QEMU forwards it to the guest's SSH server.
        :param timeout_s: how long the guest may take, which may still be booting.
        :raises DeadlineError: no login in that time.
        :raises HostCrashedError: the host's kernel died meanwhile.
        :raises LostHostError: the host went away.
        """
        super().__init__(f"guest at port {port} of host {host.name}")
        self._host = host
        self._port = port
        self._lock = threading.Lock()
        self._connections = [self._login(timeout_s)]
        # What was started last on a connection; None while it is being started.
        self._commands: dict[paramiko.Transport, paramiko.Channel | None] = {}

    def _login(self, timeout_s: float) -> paramiko.Transport:
        return login_until(
            lambda step_s: login(self._host.tunnel(self._port), self._host.keys, timeout_s=step_s),
            timeout_s=timeout_s,
            check=self._host.check,
        )

    def _idle(self, connection: paramiko.Transport) -> bool:
        if connection not in self._commands:
            return True
        command = self._commands[connection]
        # A command that we closed early may still run, or be about to end. The channel counts
        # as ended, and has no status.
        return command is not None and (command.exit_status != -1 or not connection.is_active())

    @contextlib.contextmanager
    def _free_connection(self) -> Iterator[paramiko.Transport]:
        """A connection on which nothing runs; the oldest, even if it broke meanwhile.

        To replace that would hide that the guest lost it.
        """
        with self._lock:
            connection = next(filter(self._idle, self._connections), None)
            if connection is not None:
                self._commands[connection] = None
        if connection is None:
            connection = self._login(_LOGIN_S)
            with self._lock:
                self._connections.append(connection)
                self._commands[connection] = None
        try:
            yield connection
        except BaseException:
            with self._lock:
                del self._commands[connection]
            raise

    def _open(self, command: str, timeout_s: float) -> paramiko.Channel:
        channel = super()._open(command, timeout_s)
        with self._lock:
            self._commands[channel.get_transport()] = channel
        return channel

    def check(self) -> None:
        """Raise what is wrong with the host; the guest itself is QEMU's business."""
        self._host.check()

    def stuck(self) -> str:
        """Where its host is; see :meth:`Shell.stuck`."""
        return stacks_in_kvm(self._host)

    def close(self) -> None:
        """Log out. Idempotent."""
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
