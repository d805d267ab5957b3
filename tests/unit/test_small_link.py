# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to an agent, with a real process of this machine at its other end."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from harness.errors import DeadlineError, InfraError
from harness.hosts import Completed, Host
from harness.manager import link
from harness.manager.link import AgentLink

PROGRAM = """
import json, socket, sys, threading

lock = threading.Lock()
wanted = json.loads(sys.stdin.readline())
connection = socket.create_connection((wanted["host"], wanted["port"]))
connection.sendall(wanted["token"].encode())

def answer(request):
    reply = {"id": request["id"]}
    if request["op"] == "fail":
        reply["fault"] = "it went wrong here"
    elif request["op"] == "late":
        threading.Event().wait(request["limit_s"])
        reply["ok"] = "late"
    else:
        reply["ok"] = request.get("what")
    with lock:
        connection.sendall(json.dumps(reply).encode() + b"\\n")

def serve():
    for line in connection.makefile():
        request = json.loads(line)
        if request["op"] == "die":
            sys.exit("dying words")
        threading.Thread(target=answer, args=(request,), daemon=True).start()
"""


class _Process:
    """A process of this machine, with as much of RemoteProcess as a link uses."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self.stdout = self._process.stdout

    def write(self, data: bytes) -> None:
        self._stdin.write(data)
        self._stdin.flush()

    def status(self, *, timeout_s: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def read_stderr(self) -> bytes:
        assert self._process.stderr is not None
        return self._process.stderr.read()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait(10)
        for stream in (self.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


class _ThisMachine:
    """This machine in the part of a host."""

    patience = 1.0

    def __init__(self) -> None:
        self.processes: list[_Process] = []

    def spawn(self, command: str) -> _Process:
        self.processes.append(_Process(command))
        return self.processes[-1]

    def run(self, command: str, *, timeout_s: float) -> Completed:
        done = subprocess.run(
            ["/bin/sh", "-c", command], capture_output=True, timeout=timeout_s, check=False
        )
        return Completed(command, done.returncode, done.stdout, done.stderr)

    def tool_address(self, port: int) -> tuple[str, int]:
        return "127.0.0.1", port

    def check(self) -> None:
        """Nothing is ever wrong with it."""

    def stuck(self) -> str:
        """Nothing of it can be seen from outside."""
        return ""


def _program(directory: Path, text: str) -> None:
    (directory / "__init__.py").touch()
    (directory / "serve.py").write_text(text)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentLink]:
    """A link to the program above."""
    _program(tmp_path, PROGRAM)
    made = AgentLink(cast(Host, cast(Any, _ThisMachine())), package=tmp_path)
    yield made
    made.close()


def test_answers_find_their_requests(agent: AgentLink) -> None:
    """A request that is answered late does not hold up the others, and gets its own answer."""
    late = agent.send("late", limit_s=0.3)
    assert [agent.call("echo", what=number) for number in range(20)] == list(range(20))
    assert not agent.answered(late)
    assert agent.wait(late, what="late", timeout_s=10) == "late"


def test_fault(agent: AgentLink) -> None:
    """A refused request is our own error, with the agent's words; the link goes on."""
    with pytest.raises(InfraError, match="could not do fail") as caught:
        agent.call("fail")
    assert caught.value.details == "it went wrong here"
    assert agent.call("echo", what="on") == "on"


def test_death(agent: AgentLink) -> None:
    """An agent that ends is our own error with its last words, for this request and the next."""
    with pytest.raises(InfraError, match="ended during die") as caught:
        agent.call("die")
    assert "dying words" in caught.value.details
    assert not agent.alive
    with pytest.raises(InfraError):
        agent.call("echo")


@pytest.mark.parametrize("abrupt", [False, True])
def test_end_of_who_started_it(abrupt: bool) -> None:
    """The agent of the small device manager ends with the connection, however that ends."""
    machine = _ThisMachine()
    agent = AgentLink(cast(Host, cast(Any, machine)))
    assert agent.call("list", path="/nowhere") == []
    connection = agent._connection
    if abrupt:  # a reset instead of an end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RD)
    agent._reader.join(10)
    connection.close()
    assert machine.processes[0].status(timeout_s=10) == 0
    agent.close()


def test_stranger(tmp_path: Path) -> None:
    """Another process that connects first is not taken for the agent."""
    _program(tmp_path, PROGRAM)
    strangers = []

    class _Watched(_ThisMachine):
        def tool_address(self, port: int) -> tuple[str, int]:
            strangers.append(socket.create_connection(("127.0.0.1", port)))
            strangers[0].sendall(b"0" * 32)
            return "127.0.0.1", port

    agent = AgentLink(cast(Host, cast(Any, _Watched())), package=tmp_path)
    assert agent.call("echo", what="on") == "on"
    assert strangers[0].recv(1) == b""
    strangers[0].close()
    agent.close()


def test_does_not_start(tmp_path: Path) -> None:
    """An agent that ends before it connects is our own error, at once and with its words."""
    _program(tmp_path, "raise SystemExit('no such module')")
    with pytest.raises(InfraError, match="did not connect") as caught:
        AgentLink(cast(Host, cast(Any, _ThisMachine())), package=tmp_path)
    assert "no such module" in caught.value.details


def test_silence(agent: AgentLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is not answered in time is a deadline error that names it."""
    monkeypatch.setattr(link, "_MARGIN_S", 0.0)
    number = agent.send("late", limit_s=5)
    with pytest.raises(DeadlineError, match="did not answer late") as caught:
        agent.wait(number, what="late", timeout_s=0.1)
    assert caught.value.details  # what is stuck in KVM, or that nothing is
