# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that runs in a host for as long as we are there.

The program ends with its :class:`HostProgram`, with the SSH session that started
it, and with the host. What it prints is followed as it comes, into a file of the
evidence and for code that waits for a certain line.
"""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError, SilenceError
from harness.hosts import Host, RemoteProcess

__all__ = ["HostProgram"]

#: Keeps the program from outliving the SSH session that started it: the standard input
#: of this script is that session, and the script kills the program when it ends. sshd
#: alone would not: it sends no signal to a command that has no terminal.
_RUN_WHILE_CONNECTED = """\
{prepare}
exec 3<&0
{command} </dev/null 2>&1 &
program=$!
echo "pid $program"
(while read -r _ <&3; do :; done; kill -KILL $program) >/dev/null 2>&1 &
watch=$!
wait $program
status=$?
kill $watch 2>/dev/null
exit $status
"""


class HostProgram:
    """One running program of a host. Thread-safe."""

    def __init__(
        self, host: Host, argv: Sequence[str], *, name: str, log: Path, prepare: str = ":"
    ) -> None:
        """Start it.

        :param name: for messages.
        :param log: the file that gets what it prints, with monotonic seconds.
        :param prepare: shell commands that run in the host before it.
        :raises InfraError: the host cannot be reached.
        """
        self.name = name
        self.host = host
        self.pid = 0
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        script = _RUN_WHILE_CONNECTED.format(prepare=prepare, command=shlex.join(argv))
        self._process: RemoteProcess = host.spawn(f"exec sh -c {shlex.quote(script)}")
        threading.Thread(target=self._follow, args=(log,), name=f"log-{name}", daemon=True).start()

    def _follow(self, log: Path) -> None:
        with log.open("w", encoding="utf-8", buffering=1) as file:
            try:
                for raw in self._process.stdout:
                    line = raw.decode("utf-8", "replace").rstrip("\n")
                    with self._news:
                        if not self.pid and line.startswith("pid "):
                            self.pid = int(line[4:])
                        else:
                            self._lines.append(line)
                            file.write(f"{time.monotonic():.3f} {line}\n")
                        self._news.notify_all()
            except (OSError, HarnessError) as error:
                file.write(f"[the way to the program ended: {error}]\n")
            finally:
                with self._news:
                    self._ended = True
                    self._news.notify_all()

    @property
    def exited(self) -> bool:
        """True once the program is gone, however it ended."""
        with self._news:
            return self._ended

    @property
    def status(self) -> int | None:
        """Its exit status, 128 and more for a signal; None while it runs or if unknown."""
        return self._process.status(timeout_s=1.0) if self.exited else None

    def text(self) -> str:
        """All that it has printed so far."""
        with self._news:
            return "\n".join(self._lines)

    def wait_started(self, *, timeout_s: float) -> bool:
        """Wait until its process id is known or it is gone again; True if it is known."""
        with self._news:
            self._news.wait_for(lambda: self.pid or self._ended, timeout_s)
            return self.pid != 0

    def wait_exited(self, *, timeout_s: float = 10.0) -> None:
        """Wait until it is gone.

        :raises SilenceError: it still runs after ``timeout_s``.
        """
        if not self.pause(timeout_s):
            self.host.check()
            raise SilenceError(f"{self.name} still runs after {timeout_s:g} s")

    def pause(self, timeout_s: float) -> bool:
        """Wait ``timeout_s``, or less when the program ends meanwhile; True if it did."""
        with self._news:
            return self._news.wait_for(lambda: self._ended, timeout_s)

    def wait_line(self, text: str, *, timeout_s: float = 10.0) -> str:
        """Wait until it prints a line that contains ``text``; return that line.

        :raises SilenceError: it does not within ``timeout_s``.
        """

        def found() -> str | None:
            return next((line for line in self._lines if text in line), None)

        with self._news:
            line = self._news.wait_for(found, timeout_s)
        if line is None:
            self.host.check()
            raise SilenceError(
                f"{self.name} did not print '{text}' within {timeout_s:g} s", details=self.text()
            )
        return line

    def kill(self) -> None:
        """End it as ``kill -9`` does, and wait until it is gone."""
        if not self.exited:
            self.host.run(f"kill -KILL {self.pid}", check=False)
            self.wait_exited()

    def close(self) -> None:
        """End it if it still runs, and wait until it is gone. Never raises."""
        with contextlib.suppress(Exception):
            # The script's standard input is what the program's life hangs on.
            self._process.close_stdin()
            self.pause(5.0)
        with contextlib.suppress(Exception):
            self._process.close()
            self.pause(1.0)
