# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU process that emulates a host: started, saved, restored, watched, ended."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import paramiko

from harness.errors import InfraError, LostHostError
from harness.hosts import process
from harness.hosts.monitor import Monitor
from harness.hosts.ssh import Keys, login

__all__ = ["Emulator", "Place", "option_value"]

_SAVE_TIMEOUT_S = 60.0
_RESTORE_TIMEOUT_S = 30.0
_REGISTERS_LEFT_OUT = ("FCW", "FPR", "XMM", "YMM", "ZMM", "Opmask", "DR")


@dataclass(frozen=True)
class Place:
    """Where one emulator has its files."""

    name: str
    memory: Path | None
    """The file that is the machine's memory; None for memory of its own."""
    share: bool
    """Whether it may write that file."""
    console: Path
    log: Path

    @classmethod
    def unnamed(cls) -> Place:
        """For the part of the command line that is the same for all."""
        nowhere = Path("/")
        return cls(name="", memory=nowhere, share=False, console=nowhere, log=nowhere)


class Emulator:
    """One QEMU process, as the :class:`harness.hosts.host.Machine` of a host."""

    def __init__(
        self, child: subprocess.Popen[bytes], place: Place, control: socket.socket
    ) -> None:
        self.place = place
        self._child = child
        self._monitor = Monitor(control, check=self._check)
        self._port = 0

    @classmethod
    def start(cls, argv: Sequence[str], place: Place) -> Emulator:
        ours, theirs = socket.socketpair()
        with theirs:
            # The control connection needs no name in any file system.
            control = ["-chardev", f"socket,id=control,fd={theirs.fileno()}"]
            control += ["-mon", "chardev=control,mode=control"]
            try:
                child = process.start(
                    [*argv, *control], stderr=place.log, pass_fds=[theirs.fileno()]
                )
            except BaseException:
                ours.close()
                raise
        return cls(child, place, ours)

    def open(self, *, timeout_s: float) -> None:
        """Wait until it obeys, and learn its SSH port."""
        self._monitor.open(timeout_s=timeout_s)
        table = self._monitor.human("info usernet")
        found = re.search(r"^ *TCP\[HOST_FORWARD\] +\d+ +127\.0\.0\.1 +(\d+) ", table, re.MULTILINE)
        if found is None:
            raise InfraError(
                f"host {self.place.name}: the emulator forwards no port to SSH", details=table
            )
        self._port = int(found[1])

    def _share_memory(self) -> None:
        # The memory file is the memory: only the rest of the machine is in the stream.
        capability = {"capability": "x-ignore-shared", "state": True}
        self._monitor.execute("migrate-set-capabilities", capabilities=[capability])

    def save(self, state: Path) -> None:
        """Stop the machine and write all of it but the memory to ``state``."""
        self._share_memory()
        self._monitor.execute("stop")
        # exec: is the one form that QEMU 7.2 and 10.0 both have for files.
        self._monitor.execute("migrate", uri=f"exec:cat >{shlex.quote(str(state))}")
        self._monitor.wait_migrated(timeout_s=_SAVE_TIMEOUT_S)
        self._monitor.execute("quit")
        process.end(self._child, grace_s=_SAVE_TIMEOUT_S)

    def restore(self, state: Path) -> None:
        """Load what :meth:`save` wrote, and let the machine run."""
        self._share_memory()
        self._monitor.execute("migrate-incoming", uri=f"exec:cat {shlex.quote(str(state))}")
        self._monitor.wait_migrated(timeout_s=_RESTORE_TIMEOUT_S)
        self._monitor.execute("cont")

    # -- Machine ----------------------------------------------------------------------

    def login(self, keys: Keys, *, timeout_s: float) -> paramiko.Transport:
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=5.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return login(sock, keys, timeout_s=timeout_s)

    def _last_words(self) -> str:
        return process.last_words(self.place.log)

    def ended(self, *, within_s: float = 0.0) -> str | None:
        how = process.ended(self._child, within_s=within_s)
        if how is None:
            return None
        last = self._last_words().splitlines()[-1:]
        return f"its emulator (process {self._child.pid}) ended with {', '.join([how, *last])}"

    def crashed(self) -> bool:
        # With -no-reboot a restart ends the emulator in peace, as does a triple fault; so
        # does SIGTERM from somebody, but that it reports.
        return self._child.poll() == 0 and "terminating on signal" not in self._last_words()

    def _check(self) -> None:
        # Asked when the control connection failed, which it does before the process is gone.
        if (ended := self.ended(within_s=1.0)) is not None:
            raise LostHostError(
                f"host {self.place.name} is gone: {ended}",
                hint=f"the emulator's log is {self.place.log}",
                details=self._last_words(),
            )

    def tool_address(self, port: int) -> tuple[str, int]:
        return "10.0.2.2", port

    def login_command(self, keys: Keys) -> list[str]:
        return [
            "ssh", "-F", "none", "-i", str(keys.client_path), "-p", str(self._port),
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "LogLevel=ERROR", "root@127.0.0.1",
        ]  # fmt: skip

    def processors(self) -> str:
        registers = self._monitor.human("info registers -a").splitlines()
        told = [line for line in registers if not line.startswith(_REGISTERS_LEFT_OUT)]
        count = sum(line.startswith("CPU#") for line in registers)
        # An interrupt that is requested there and never delivered is the emulator's fault.
        return "\n".join(told + [self._monitor.human(f"info lapic {n}") for n in range(count)])

    def processor_thread(self, number: int) -> int | None:
        found: list[dict[str, int]] = self._monitor.execute("query-cpus-fast")
        return found[number]["thread-id"]

    def close(self) -> None:
        self._monitor.close()
        process.end(self._child)


def option_value(path: Path) -> str:
    """A path as the value of a QEMU option, where a comma would end it."""
    return str(path).replace(",", ",,")
