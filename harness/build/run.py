# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the programs that build: logged, watched, limited in time, gone when we are gone."""

from __future__ import annotations

import errno
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from harness.errors import BuildError, CompileError

__all__ = ["bound_to_us", "output_of", "refuse_full_disk", "run_logged", "without_space"]

_KEPT_LINES = 60
_ERROR_LINE = re.compile(
    r"(error:|: \*\*\*|^E: |^FAILED:|undefined reference|No space left|^ERROR|^fatal:)"
)
_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")
_GRACE_S = 10.0
# Less than a compiler's next file: what failed on such a disk failed because of it.
_FULL_BYTES = 4 << 20


def bound_to_us(argv: Sequence[str]) -> list[str]:
    """``argv`` so that the program gets SIGTERM when our process dies, even by SIGKILL.

    ``make`` and ``ninja`` hand the signal on to their children and remove the file they
    were writing, which a pipe that merely breaks would not make them do.
    """
    # setpriv is in util-linux, which every Debian has; preexec_fn is unsafe beside threads.
    if (setpriv := shutil.which("setpriv")) is None:
        return list(argv)
    return [setpriv, "--pdeathsig", "TERM", "--", *argv]


def run_logged(
    argv: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    what: str = "",
    on_line: Callable[[str], None] | None = None,
    hold: Sequence[int] = (),
) -> None:
    """Run ``argv`` in ``cwd``; its output is appended to ``log``.

    :param timeout_s: after so many seconds it is ended, with all its children.
    :param env: the whole environment; None hands on ours.
    :param what: the work's name in messages, such as ``kernel build``.
    :param on_line: called with each line of output as it comes.
    :param hold: descriptors that the program inherits. A lock's descriptor here keeps
        the lock until the last child is gone, should we be killed before it.
    :raises BuildError: it could not start, failed, or ran out of time. The message has
        the first line that reads like an error, ``details`` the end of the output, the
        hint the log. Nothing of it still runs then.
    """
    name = what or shlex.join(argv[:2])
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    telling: list[str] = []

    def take(line: str) -> None:
        last.append(line)
        if len(telling) < 5 and _ERROR_LINE.search(line):
            telling.append(line.strip())
        if on_line is not None:
            on_line(line)

    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as sink:
            sink.write(f"\n$ cd {cwd} && {shlex.join(argv)}\n".encode())
            status = _run(
                argv, cwd=cwd, sink=sink, timeout_s=timeout_s, env=env, take=take, hold=hold
            )
    except OSError as error:
        if without_space(error):
            raise
        raise BuildError(f"{name} could not start: {error}", hint=f"see {log}") from error
    if status == 0:
        return
    details = "\n".join(last)
    if any(_NO_SPACE.search(line) for line in telling):
        details = telling[0] + "\n" + details
    refuse_full_disk(details, log.parent, what=name)
    if status is None:
        raise BuildError(
            f"{name} was ended: not done after {timeout_s:.0f} s",
            hint=f"is the machine very busy? The log is {log}",
            details=details,
        )
    cause = f": {telling[0]}" if telling else ""
    ended = f"signal {-status}" if status < 0 else f"exit code {status}"
    # A compiler that the kernel killed, for memory mostly, says nothing about what it compiled.
    refused = status > 0 and "Killed signal terminated program" not in details
    kind = CompileError if refused else BuildError
    raise kind(f"{name} failed ({ended}){cause}", hint=f"log: {log}", details=details)


def _run(
    argv: Sequence[str],
    *,
    cwd: Path,
    sink: BinaryIO,
    timeout_s: float,
    env: Mapping[str, str] | None,
    take: Callable[[str], None],
    hold: Sequence[int],
) -> int | None:
    """The exit status, or None if the time ran out."""
    deadline = time.monotonic() + timeout_s
    process = subprocess.Popen(
        bound_to_us(argv),
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=hold,
        # A group of its own: the children end together, and Ctrl-C reaches us first.
        start_new_session=True,
    )
    assert process.stdout is not None
    rest = b""
    try:
        with process.stdout as output, selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = os.read(output.fileno(), 65536)
                if not chunk:
                    break
                sink.write(chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    take(line.decode(errors="replace"))
        if rest:
            take(rest.decode(errors="replace"))
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program's group if it still runs."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def output_of(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    timeout_s: float = 60,
    env: Mapping[str, str] | None = None,
    data: bytes | None = None,
) -> str:
    """The standard output of a short command.

    :raises BuildError: it is not installed, failed, or took longer than ``timeout_s``.
    """
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, input=data, capture_output=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError as error:
        raise BuildError(
            f"{argv[0]} cannot be run: {error.strerror}", hint="`inv doctor` says what to install"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{shlex.join(argv)}: not done after {timeout_s:.0f} s") from error
    if done.returncode != 0:
        complaint = done.stderr.decode(errors="replace").strip()
        refuse_full_disk(complaint, cwd or Path.cwd(), what=argv[0])
        raise BuildError(
            f"{shlex.join(argv[:6])} failed with exit code {done.returncode}", details=complaint
        )
    return done.stdout.decode(errors="replace")


def refuse_full_disk(complaint: str, place: Path, *, what: str) -> None:
    """Raise if a program failed because a disk is full: it says so, or ``place`` is full.

    Not every program says so, and the log that would have it may be on the same disk.

    :raises OSError: ENOSPC; so that whoever knows which directory is meant can name it.
    """
    if _NO_SPACE.search(complaint) or shutil.disk_usage(place).free < _FULL_BYTES:
        raise OSError(errno.ENOSPC, f"no space left during {what}", str(place))


def without_space(error: OSError) -> bool:
    """Whether ``error`` says that a disk or quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
