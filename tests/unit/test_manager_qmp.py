# SPDX-License-Identifier: GPL-2.0-or-later
"""The QMP link, tried on the QEMU of this machine with a machine that has nothing in it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import ConformanceError, InfraError, SilenceError
from harness.manager.qmp import QmpLink

QEMU = "qemu-system-x86_64"

pytestmark = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")


@pytest.fixture
def link(tmp_path: Path) -> Iterator[QmpLink]:
    """A link to a QEMU that was started for this test."""
    ours, theirs = socket.socketpair()
    argv = [QEMU, "-machine", "none", "-nodefaults", "-display", "none"]
    argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
    qemu = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        link = QmpLink(ours, name="nothing", transcript=tmp_path / "qmp.jsonl")
        yield link
        link.close()
    finally:
        qemu.kill()
        qemu.wait()


def test_answers_and_errors(link: QmpLink) -> None:
    """A command's value comes back, an error is a ConformanceError with QEMU's words."""
    assert link.execute("query-status")["running"] is True
    with pytest.raises(ConformanceError, match="nonsense has not been found"):
        link.execute("nonsense")
    assert "nonsense" in link.refusal("nonsense")
    with pytest.raises(ConformanceError, match="an error was due"):
        link.refusal("query-status")


def test_answers_overlap(link: QmpLink) -> None:
    """Commands may be sent ahead; each gets its own answer."""
    pending = [link.send("query-status"), link.send("query-name"), link.send("query-kvm")]
    values = [answer.value() for answer in pending]
    assert [sorted(value) for value in values] == [
        sorted(values[0]),
        [],
        ["enabled", "present"],
    ]
    assert all(answer.arrived for answer in pending)


def test_events(link: QmpLink) -> None:
    """An event is found whether it comes before or after the question, unless it is too old."""
    link.execute("stop")
    link.event("STOP")
    mark = link.mark()
    with pytest.raises(SilenceError, match="no QMP event STOP"):
        link.event("STOP", since=mark, timeout_s=0.1)
    link.send("cont")
    assert link.event("RESUME", since=mark, timeout_s=5)["event"] == "RESUME"


def test_end(link: QmpLink) -> None:
    """After QEMU has gone each call says so; closing twice is fine and leaves no thread."""
    before = set(threading.enumerate())
    link.execute("quit")
    with pytest.raises(InfraError):
        link.execute("query-status", timeout_s=5)
    link.close()
    link.close()
    with pytest.raises(InfraError, match="closed"):
        link.execute("query-status")
    assert set(threading.enumerate()) < before


def test_transcript(link: QmpLink, tmp_path: Path) -> None:
    """Every message of both directions is a line of the transcript."""
    link.execute("query-status")
    records = [json.loads(line) for line in (tmp_path / "qmp.jsonl").read_text().splitlines()]
    assert [record["direction"] for record in records] == ["<", ">", "<", ">", "<"]
    assert "QMP" in records[0]["message"]
    assert records[3]["message"]["execute"] == "query-status"


def test_no_greeting(tmp_path: Path) -> None:
    """A peer that closes at once is an error of ours, with nothing left behind."""
    before = set(threading.enumerate())
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(InfraError, match="no QMP greeting from nobody"):
        QmpLink(ours, name="nobody", transcript=tmp_path / "qmp.jsonl")
    assert set(threading.enumerate()) <= before
