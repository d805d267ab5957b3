# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's commands share a connection one after another, and have one each at one time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import paramiko
import pytest

from harness.errors import InfraError
from harness.hosts import Host, ssh
from harness.hosts.ssh import GuestShell


class _Channel:
    def __init__(self, transport: _Transport) -> None:
        self._transport = transport
        self.exit_status = -1

    def get_transport(self) -> _Transport:
        return self._transport

    def close(self) -> None:
        pass

    def exec_command(self, _command: str) -> None:
        if self._transport.refuses:
            raise paramiko.SSHException("refused")


class _Transport:
    """As much of a connection as a shell needs to start commands."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.alive = True
        self.refuses = refuses

    def is_active(self) -> bool:
        return self.alive

    def open_session(self, _window: int, *, timeout: float) -> _Channel:
        if not self.alive:
            raise EOFError
        return _Channel(self)

    def close(self) -> None:
        self.alive = False


@pytest.fixture
def logins(monkeypatch: pytest.MonkeyPatch) -> list[_Transport]:
    """All connections that were made."""
    made: list[_Transport] = []

    def login(*_arguments: object, **_options: object) -> _Transport:
        made.append(_Transport())
        return made[-1]

    monkeypatch.setattr(ssh, "login", login)
    return made


@pytest.fixture
def shell(logins: list[_Transport]) -> GuestShell:
    """A shell of a guest behind a host that is always well."""
    host = SimpleNamespace(name="h", keys=None, tunnel=lambda port: None, check=lambda: None)
    return GuestShell(cast(Host, host), 22)


def _start(shell: GuestShell) -> Any:
    return shell.spawn("true").channel


def test_one_after_another(shell: GuestShell, logins: list[_Transport]) -> None:
    """A command that comes when the one before has ended goes the same way."""
    for _ in range(3):
        _start(shell).exit_status = 0
    assert len(logins) == 1


def test_at_one_time(shell: GuestShell, logins: list[_Transport]) -> None:
    """One that comes while others run has a way of its own; the first way is used first again."""
    first, second = _start(shell), _start(shell)
    assert [first.get_transport(), second.get_transport()] == logins
    second.exit_status = 0
    assert _start(shell).get_transport() is logins[1]
    first.exit_status = 0
    assert _start(shell).get_transport() is logins[0]
    shell.close()
    assert not any(connection.alive for connection in logins)


def test_closed_early(shell: GuestShell, logins: list[_Transport]) -> None:
    """A command that we left may end at any time, and another must not be in its way."""
    left = shell.spawn("true")
    left.close()
    assert _start(shell).get_transport() is logins[1]
    logins[0].alive = False
    with pytest.raises(InfraError, match="EOFError"):
        _start(shell)


def test_lost_connection_is_not_replaced(shell: GuestShell, logins: list[_Transport]) -> None:
    """That the guest lost a connection is for the test to see."""
    logins[0].alive = False
    for _ in range(2):
        with pytest.raises(InfraError, match="EOFError"):
            _start(shell)
    assert len(logins) == 1


def test_refused_command_leaves_the_connection_free(
    shell: GuestShell, logins: list[_Transport]
) -> None:
    """Nothing runs there, so that the next command may."""
    logins[0].refuses = True
    with pytest.raises(InfraError, match="refused"):
        _start(shell)
    logins[0].refuses = False
    assert _start(shell).get_transport() is logins[0]
    assert len(logins) == 1
