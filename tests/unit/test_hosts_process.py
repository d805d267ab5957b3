# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that must not outlive ours: real ones, ended in every way."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.hosts import process


def _gone(pid: int, *, within_s: float = 5.0) -> bool:
    """Whether the process ends in time; one that nobody collected counts as ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within_s)[0])
    finally:
        os.close(descriptor)


def test_output_and_status_are_ours_to_read(tmp_path: Path) -> None:
    """Both outputs go to the log; standard input is empty; the status is the program's."""
    log = tmp_path / "log"
    child = process.start(["sh", "-c", "cat; echo out; echo err >&2; exit 3"], stderr=log)
    assert child.wait(5) == 3
    assert log.read_text() == "out\nerr\n"


def test_the_pid_is_the_programs(tmp_path: Path) -> None:
    """What helps on the way replaces itself, so signals reach the program."""
    child = process.start(["sh", "-c", "echo $$"], stderr=tmp_path / "log")
    child.wait(5)
    assert int((tmp_path / "log").read_text()) == child.pid


def test_only_named_descriptors_are_inherited(tmp_path: Path) -> None:
    """A descriptor that is passed keeps its number; another one is closed."""
    kept, closed = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    try:
        script = f"[ -e /proc/self/fd/{kept} ] && [ ! -e /proc/self/fd/{closed} ]"
        child = process.start(["sh", "-c", script], stderr=tmp_path / "log", pass_fds=[kept])
        assert child.wait(5) == 0
    finally:
        os.close(kept)
        os.close(closed)


def test_it_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    """The parent-death signal belongs to a thread; ours must not be one that ends."""
    children: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(
        target=lambda: children.append(process.start(["sleep", "60"], stderr=tmp_path / "log"))
    )
    thread.start()
    thread.join()
    with pytest.raises(subprocess.TimeoutExpired):
        children[0].wait(0.2)
    assert process.end(children[0]) == -signal.SIGKILL


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_dies_with_our_process(tmp_path: Path, how: signal.Signals) -> None:
    """However our process ends, its child ends too."""
    program = (
        "import pathlib, time; from harness.hosts import process;"
        f"child = process.start(['sleep', '60'], stderr=pathlib.Path({str(tmp_path / 'log')!r}));"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(how)
    assert _gone(pid)


def test_it_does_not_begin_when_we_die_on_the_way(tmp_path: Path) -> None:
    """Whoever is born while its parent dies gets no signal; but nobody lets it begin."""
    witness = tmp_path / "begun"
    ours, theirs = socket.socketpair()
    with theirs:
        gate = subprocess.Popen(
            ["sh", "-c", process._GATE, "sh", "touch", str(witness)], stdin=theirs.fileno()
        )
    assert ours.recv(16) == b"ready\n"
    ours.close()
    assert gate.wait(5) != 0
    assert not witness.exists()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """No process is made for a program that is not there."""
    with pytest.raises(UsageError, match="no-such-emulator is not installed"):
        process.start(["no-such-emulator"], stderr=tmp_path / "log")


def test_end_waits_for_a_process_that_ends_by_itself(tmp_path: Path) -> None:
    """With a grace it is collected, not killed."""
    child = process.start(["sleep", "0.1"], stderr=tmp_path / "log")
    assert process.end(child, grace_s=5) == 0
