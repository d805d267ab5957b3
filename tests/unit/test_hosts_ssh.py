# SPDX-License-Identifier: GPL-2.0-or-later
"""Target ssh without a machine: addresses, the kernel log, and what is refused."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import InfraError, UsageError
from harness.hosts import target_for
from harness.hosts.address import Address
from harness.hosts.kernellog import KernelLog, line_of
from harness.hosts.remote import SshTarget
from harness.hosts.ssh import NotYet
from harness.hosts.wayback import WayBack, listens
from harness.settings import load_settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with an SSH configuration."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text(
        "Host lab\n  HostName 192.0.2.7\n  Port 2222\n  User admin\n  IdentityFile /k/one\n"
        "Host open\n  StrictHostKeyChecking no\n  ProxyJump gate\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "user", "name", "port"),
    [
        ("root@metal:22", "root", "metal", 22),
        ("metal", "root", "metal", 22),
        ("me@[2001:db8::7]:23", "me", "2001:db8::7", 23),
        # Names of the user's own configuration; what is given here comes first.
        ("lab", "admin", "192.0.2.7", 2222),
        ("root@lab:24", "root", "192.0.2.7", 24),
    ],
)
def test_an_address_means_what_it_means_to_ssh(text: str, user: str, name: str, port: int) -> None:
    """User, name and port, with ~/.ssh/config for what is left out."""
    address = Address.parse(text)
    assert (address.user, address.name, address.port) == (user, name, port)


def test_the_rest_of_the_configuration_counts() -> None:
    """Keys, and whether unknown machines are logged in to."""
    lab, free = Address.parse("lab"), Address.parse("open")
    assert lab.keys == ("/k/one",)
    assert lab.command() == ["ssh", "-i", "/k/one", "-p", "2222", "admin@192.0.2.7"]
    assert (lab.strict, free.strict) == (True, False)


@pytest.mark.parametrize("text", ["", "two words", "root@", "name:port"])
def test_what_is_no_address_is_refused(text: str) -> None:
    """With an example of one."""
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    assert "root@name:22" in caught.value.hint


def test_nobody_there_is_no_mistake_of_the_user() -> None:
    """The machine may be booting; a name that does not exist never answers."""
    with pytest.raises(NotYet):
        Address.parse("root@127.0.0.1:1").connect(timeout_s=1)
    with pytest.raises(UsageError, match="no machine of that name"):
        Address.parse("root@name.invalid").connect(timeout_s=1)


def test_the_target_needs_an_address(tmp_path: Path) -> None:
    """And does nothing before it is prepared; it cannot boot."""
    with pytest.raises(UsageError, match="needs the address"):
        target_for(load_settings(target="ssh"))
    target = target_for(load_settings(target="ssh", ssh_host="lab"))
    assert isinstance(target, SshTarget)
    assert not target.boots
    with pytest.raises(UsageError, match="not prepared"):
        target.start(name="w0", evidence=tmp_path)


def test_records_become_lines_of_a_console() -> None:
    """Time stamps as on a console, so that complaints are found; the rest is no line."""
    record = b"4,1203,126046392,-,caller=T1;WARNING: CPU: 0 at kvm_main.c:7 \\x0aX\n"
    assert line_of(record) == (1203, "[  126.046392] WARNING: CPU: 0 at kvm_main.c:7  X")
    assert line_of(b" SUBSYSTEM=pci\n") is None


class _Process:
    """A program here in the place of one on a machine."""

    def __init__(self, source: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._input, self.stdout = self._child.stdin, self._child.stdout

    def write(self, data: bytes) -> None:
        self._input.write(data)

    def read_stderr(self) -> bytes:
        return b"Operation not permitted"

    def close(self) -> None:
        if self._child.poll() is None:
            self._input.close()
            self._child.wait(10)


class _Shell:
    what = "machine lab"

    def __init__(self, source: str) -> None:
        self.process = _Process(source)

    def spawn(self, _command: str) -> _Process:
        return self.process


# In place of the program that reads /dev/kmsg: says what is in a file, line by line.
_SPEAKER = """\
import os, sys
said = 0
while words := os.read(0, 64).split():
    lines = open({path!r}).read().splitlines(True)
    for line in lines[said:]:
        os.write(1, line.encode())
    said = len(lines)
    os.write(1, b"".join(b"=%s\\n" % word for word in words))
"""


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """What the kernel said before we came."""
    path = tmp_path / "kmsg"
    path.write_text("4,10,1000000,-;WARNING: of yesterday\n")
    return path


@pytest.fixture
def log(said: Path, tmp_path: Path) -> Iterator[KernelLog]:
    """A log that has begun."""
    shell = _Shell(_SPEAKER.format(path=str(said)))
    one = KernelLog(shell, tmp_path / "console.log")  # type: ignore[arg-type]
    yield one
    one.close()
    shell.process.stdout.close()


def _say(path: Path, *records: str) -> None:
    with path.open("a") as file:
        file.writelines(record + "\n" for record in records)


def test_only_what_is_said_from_now_on_counts(log: KernelLog, said: Path) -> None:
    """Yesterday's warning is no complaint of today's; a mark waits for what was said."""
    assert log.since() == ""
    assert log.before is None
    mark = log.mark()
    _say(said, "4,11,2000000,-;WARNING: of today")
    assert log.complaints(mark) == ["[    2.000000] WARNING: of today"]
    mark = log.mark()
    assert log.since(mark) == ""


def test_lost_records_are_told(log: KernelLog, said: Path) -> None:
    """The kernel's buffer is overwritten when nobody reads fast enough."""
    _say(said, "6,11,2000000,-;one", "6,15,2000001,-;two")
    assert "(3 lines of the kernel log were lost)" in log.since()


def test_a_kernel_that_died_before_is_known(said: Path, tmp_path: Path) -> None:
    """It may have gone on after an oops."""
    _say(said, "1,11,2000000,-;BUG: kernel NULL pointer dereference, address: 0")
    shell = _Shell(_SPEAKER.format(path=str(said)))
    log = KernelLog(shell, tmp_path / "console.log")  # type: ignore[arg-type]
    log.close()
    shell.process.stdout.close()
    assert log.before is not None
    assert log.crash() is None


def test_a_log_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """With what the machine said."""
    shell = _Shell("raise SystemExit(1)")
    with pytest.raises(InfraError, match="cannot be followed: Operation not permitted"):
        KernelLog(shell, tmp_path / "console.log")  # type: ignore[arg-type]
    shell.process.stdout.close()


def test_a_connection_that_broke_does_not_hold_anybody_up(log: KernelLog) -> None:
    """What came so far is still there."""
    log.close()
    assert not log.settle()
    assert log.since() == ""


class _Connection:
    """In place of a connection to an SSH server: ports that count up from 1001."""

    def __init__(self) -> None:
        self.opened: list[int] = []

    def request_port_forward(self, _address: str, _port: int, _handler: object) -> int:
        self.opened.append(1001 + len(self.opened))
        return self.opened[-1]


def test_ways_back_are_used_again_when_their_listener_is_gone() -> None:
    """No port comes or goes while few are needed at a time; each listener has its own."""
    connection = _Connection()
    way = WayBack(connection, what="machine")  # type: ignore[arg-type]
    spare = len(connection.opened)
    used = set()
    for _ in range(2 * spare):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            assert listens(port)
            used.add(way.port_for(port))
            assert way.port_for(port) in used
        assert not listens(port)
    assert used == set(connection.opened)
    assert len(connection.opened) == spare
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(spare + 1)]
    ports = {way.port_for(one.getsockname()[1]) for one in listeners}
    assert len(ports) == spare + 1
    for one in listeners:
        one.close()
