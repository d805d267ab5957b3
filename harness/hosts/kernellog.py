# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel log of a machine without a serial console: followed over SSH, kept as one.

A small program in the machine reads ``/dev/kmsg``, as ``dmesg`` and the journal do, and
hands on record after record. Here they become lines as a console shows them. What the
kernel said before we came is no business of a host that begins now, and is kept apart.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import HarnessError, InfraError
from harness.hosts.console import Complaint, Console, crash_in

if TYPE_CHECKING:
    from harness.hosts.ssh import RemoteProcess, Shell

__all__ = ["KernelLog", "line_of"]

_SYNC_TIMEOUT_S = 10.0

# Answers each line on its standard input by "=" and that line, once all that the kernel
# said before is written out. EPIPE: records were overwritten before we came to read them.
_FOLLOW = """\
import os, select
log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
def drain():
    while True:
        try:
            os.write(1, os.read(log, 8192))
        except BrokenPipeError:
            continue
        except BlockingIOError:
            return
while True:
    ready = select.select([log, 0], [], [])[0]
    asked = os.read(0, 64) if 0 in ready else None
    if asked == b"":
        break
    drain()
    if asked:
        os.write(1, b"".join(b"=%s\\n" % word for word in asked.split()))
"""

# Documentation/ABI/testing/dev-kmsg: "priority,sequence,microseconds,flags;text", and
# lines with a blank in front that describe the record.
_RECORD = re.compile(rb"^(\d+),(\d+),(\d+),[^;]*;(.*)$", re.DOTALL)


def line_of(record: bytes) -> tuple[int, str] | None:
    """A record's sequence number and the line that a console shows; None for other lines."""
    found = _RECORD.match(record.rstrip(b"\n"))
    if found is None:
        return None
    seconds, microseconds = divmod(int(found[3]), 1_000_000)
    text = re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), found[4])
    said = text.decode(errors="replace").replace("\n", " ")
    return int(found[2]), f"[{seconds:5}.{microseconds:06}] {said}"


class KernelLog(Console):
    """The console of a host that has none.

    :meth:`mark`, :meth:`since` and :meth:`complaints` first wait for what the kernel has
    said until now: it comes later over a network than over a serial line.
    """

    def __init__(self, shell: Shell, path: Path) -> None:
        """Begin to follow.

        :param shell: commands in the machine; the connection is not closed with this.
        :param path: the file for the lines, made anew.
        :raises InfraError: the log cannot be read there.
        """
        super().__init__(path)
        path.write_bytes(b"")
        self.before: Complaint | None = None
        """The report of its death before we came, for a kernel that went on nevertheless."""
        self._history: list[str] | None = []
        self._next = 0
        self._answers: set[str] = set()
        self._ended = False
        self._news = threading.Condition()
        self._count = 0
        self._process: RemoteProcess = shell.spawn(f"exec python3 -c {shlex.quote(_FOLLOW)}")
        threading.Thread(target=self._follow, name="host-kernel-log", daemon=True).start()
        if not self.settle():
            said = self._process.read_stderr().decode(errors="replace").strip()
            self.close()
            raise InfraError(
                f"{shell.what}: its kernel log cannot be followed: {said or 'no answer'}",
                hint="it needs python3, and /dev/kmsg that root can read",
            )
        self.before = crash_in("\n".join(self._history or []))
        self._history = None

    def _follow(self) -> None:
        with (
            contextlib.suppress(OSError, HarnessError),
            self.path.open("a", encoding="utf-8", buffering=1) as file,
        ):
            for raw in self._process.stdout:
                if raw.startswith(b"="):
                    with self._news:
                        self._answers.add(raw[1:].strip().decode())
                        self._news.notify_all()
                elif (record := line_of(raw)) is not None:
                    number, line = record
                    lost = number - self._next if self._next else 0
                    self._next = number + 1
                    if self._history is not None:
                        self._history.append(line)
                        continue
                    if lost > 0:
                        file.write(f"({lost} lines of the kernel log were lost)\n")
                    file.write(line + "\n")
        with self._news:
            self._ended = True
            self._news.notify_all()

    def settle(self) -> bool:
        """Wait for all that the kernel has said until now; False if the way to it broke."""
        with self._news:
            if self._ended:
                return False
            self._count += 1
            word = str(self._count)
        try:
            self._process.write(f"{word}\n".encode())
        except OSError:
            return False
        with self._news:
            came = self._news.wait_for(
                lambda: word in self._answers or self._ended, _SYNC_TIMEOUT_S
            )
            return bool(came) and word in self._answers

    def mark(self) -> int:
        """See :class:`Console`."""
        self.settle()
        return super().mark()

    def since(self, mark: int = 0) -> str:
        """See :class:`Console`."""
        self.settle()
        return super().since(mark)

    def tail(self, lines: int = 40) -> str:
        """See :class:`Console`. Does not wait: asked when the machine may be gone."""
        return "\n".join(super().since().splitlines()[-lines:])

    def crash(self) -> Complaint | None:
        """See :class:`Console`. Does not wait, as it is asked all the time."""
        return crash_in(super().since())

    def close(self) -> None:
        """Stop following. Idempotent."""
        self._process.close()
