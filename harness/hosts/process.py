# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that cannot outlive ours, however ours ends.

The kernel's parent-death signal (prctl(2), PR_SET_PDEATHSIG) does it, with two catches
that this module takes care of. The signal comes when the *thread* that made the process
ends, so all processes are made by one thread that lives as long as ours. And if we die
between the child's birth and its prctl, no signal ever comes; so the child speaks up
after its prctl and waits for our answer, which a dead parent does not give.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InfraError, UsageError

__all__ = ["end", "ended", "last_words", "start"]

_GRACE_S = 5.0
_GATE_TIMEOUT_S = 20.0
# setpriv and sh exec the program in place, so its process id is the one we know.
_GATE = 'echo ready >&0 && read -r word && [ "$word" = go ] && exec "$@" </dev/null'


@dataclass(frozen=True)
class _Order:
    argv: Sequence[str]
    stderr: Path
    pass_fds: Sequence[int]
    result: Future[subprocess.Popen[bytes]]


class _Starter:
    """The thread that makes the processes. One per process of ours; a fork needs its own."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        # A daemon thread ends with the process, which is exactly when its children must.
        threading.Thread(target=self._work, name="host-process-starter", daemon=True).start()

    def start(self, order: _Order) -> subprocess.Popen[bytes]:
        self._orders.put(order)
        return order.result.result()

    def _work(self) -> None:
        while True:
            order = self._orders.get()
            try:
                order.result.set_result(_spawn(order))
            except BaseException as error:
                order.result.set_exception(error)


_lock = threading.Lock()
_starter: _Starter | None = None


def start(
    argv: Sequence[str], *, stderr: Path, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start ``argv`` so that it is killed when our process ends, even by SIGKILL.

    Its standard input is empty, its standard output and error go to ``stderr``, and of
    our descriptors it has only ``pass_fds``. It gets a session of its own: Ctrl-C reaches
    us, and we end it in order.

    :raises UsageError: the program or ``setpriv`` is not installed.
    :raises InfraError: the machine could not start a process.
    """
    global _starter  # noqa: PLW0603 - one thread per process is the point
    for program in ("setpriv", argv[0]):
        if shutil.which(program) is None:
            raise UsageError(
                f"{program} is not installed", hint="`inv doctor` says which package has it"
            )
    with _lock:
        if _starter is None or _starter.owner != os.getpid():
            _starter = _Starter()
        starter = _starter
    try:
        return starter.start(_Order(argv, stderr, pass_fds, Future()))
    except OSError as error:
        raise InfraError(
            f"{argv[0]} could not be started: {error}",
            hint="are there processes, descriptors and disk space left?",
        ) from error


def _spawn(order: _Order) -> subprocess.Popen[bytes]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with order.stderr.open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", _GATE, "sh", *order.argv],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=order.pass_fds,
                start_new_session=True,
            )
        theirs.close()
        ours.settimeout(_GATE_TIMEOUT_S)
        try:
            ours.recv(16)
            ours.sendall(b"go\n")
        except TimeoutError:
            process.kill()
            process.wait()
            raise
        except OSError:
            pass  # it ended already; whoever waits for it reads why in its log
    return process


def ended(process: subprocess.Popen[bytes], *, within_s: float = 0.0) -> str | None:
    """How a process ended: ``exit status 1``, ``signal 9``; None while it runs.

    :param within_s: how long to wait for its end.
    """
    try:
        status = process.wait(within_s)
    except subprocess.TimeoutExpired:
        return None
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def last_words(log: Path) -> str:
    """What a process has written to its log; nothing if there is none."""
    with contextlib.suppress(OSError):
        return log.read_text(errors="replace").strip()
    return ""


def end(process: subprocess.Popen[bytes], *, grace_s: float = 0.0) -> int:
    """End a process and collect it; returns its exit status.

    :param grace_s: how long it may take to end by itself before it is killed.
    """
    if grace_s:
        try:
            return process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
    if process.poll() is None:
        process.kill()
    try:
        return process.wait(_GRACE_S)
    except subprocess.TimeoutExpired as error:
        raise InfraError(
            f"process {process.pid} is still there {_GRACE_S:.0f} s after SIGKILL",
            hint="the machine's kernel holds it, as a broken disk or device makes it do",
        ) from error
