# SPDX-License-Identifier: GPL-2.0-or-later
"""One Bochs process that emulates a host: configured, started, watched, ended."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import paramiko

from harness.errors import DeadlineError, InfraError, LostHostError, UsageError
from harness.hosts import process
from harness.hosts.ssh import Keys, login

__all__ = ["BochsMachine", "BochsProgram", "Place", "find_program"]

_FIRMWARE = Path("/usr/share/bochs/BIOS-bochs-latest")
_VIDEO_FIRMWARE = Path("/usr/share/vgabios/vgabios.bin")

# How long Bochs may take until it forwards the port: it does so before its first instruction.
_START_TIMEOUT_S = 30.0
_PORT_TRIES = 3
_LOOK_EVERY_S = 0.05
_LOGIN_STEP_S = 20.0
"""The least for each step of a login: an emulated processor computes with large numbers."""


@dataclass(frozen=True)
class BochsProgram:
    """A Bochs that can be run."""

    path: str
    version: str
    """As it calls itself, such as ``2.7``."""
    debugger: bool
    """Whether the debugger is compiled in, which wants to be told to go on."""
    ticks_per_us: int
    """Instructions in a microsecond of the machine's time, about as many as it can do: with
    less a busy host would be slowed down, with more its time goes slower than ours."""


@dataclass(frozen=True)
class Place:
    """Where one Bochs has its files."""

    name: str
    directory: Path

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def log(self) -> Path:
        return self.directory / "emulator.log"


class _Port:
    """A TCP port of 127.0.0.1 that nobody else gets while we keep it.

    Bochs cannot choose one itself. A socket that is bound but does not listen keeps the port
    from those who let the system choose, and yet lets Bochs bind it, since both say that
    addresses may be reused.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


class BochsMachine:
    """One Bochs process, as the :class:`harness.hosts.host.Machine` of a host."""

    def __init__(self, child: subprocess.Popen[bytes], place: Place, port: _Port) -> None:
        self.place = place
        self._child = child
        self._port = port

    @classmethod
    def start(
        cls, program: BochsProgram, place: Place, *, medium: Path, processor: str, memory_mb: int
    ) -> BochsMachine:
        """Start a machine that boots ``medium``; it has just begun when this returns.

        :param processor: its model, as Bochs calls it.

        :raises UsageError: Bochs or its firmware is not installed.
        :raises InfraError: Bochs ended at once, or forwards no port.
        """
        for path in (_FIRMWARE, _VIDEO_FIRMWARE):
            if not path.exists():
                raise UsageError(
                    f"firmware for Bochs is missing: {path}",
                    hint="`inv doctor --target bochs` says which package has it",
                )
        for attempt in range(_PORT_TRIES):
            machine = cls._start(
                program, place, medium=medium, processor=processor, memory_mb=memory_mb
            )
            try:
                machine._wait_forwarding()
            except DeadlineError:
                machine.close()
                if attempt == _PORT_TRIES - 1:
                    raise
            except BaseException:
                machine.close()
                raise
            else:
                return machine
        raise AssertionError("the last try returns or raises")

    @classmethod
    def _start(
        cls, program: BochsProgram, place: Place, *, medium: Path, processor: str, memory_mb: int
    ) -> BochsMachine:
        port = _Port()
        try:
            place.console.write_bytes(b"")
            script = place.directory / "slirp.conf"
            script.write_text(_network(port.number))
            configuration = place.directory / "bochsrc"
            configuration.write_text(
                _configuration(
                    program,
                    place,
                    medium=medium,
                    processor=processor,
                    memory_mb=memory_mb,
                    script=script,
                )
            )
            argv = [program.path, "-q", "-f", str(configuration)]
            if program.debugger:
                commands = place.directory / "debugger"
                commands.write_text("c\n")
                argv += ["-rc", str(commands)]
            child = process.start(argv, stderr=place.log)
        except BaseException:
            port.close()
            raise
        return cls(child, place, port)

    def _wait_forwarding(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            self.check()
            with contextlib.suppress(OSError):
                self._dial().close()
                return
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"host {self.place.name}: Bochs forwards no port to SSH",
                    hint=f"its log is {self.place.log}",
                    details=self._last_words(),
                )
            time.sleep(_LOOK_EVERY_S)  # nothing tells when it listens

    def _dial(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port.number), timeout=5.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def check(self) -> None:
        """Find out whether Bochs still runs.

        :raises LostHostError: it ended; its last words are in ``details``.
        """
        if (ended := self.ended()) is not None:
            raise LostHostError(
                f"host {self.place.name} is gone: {ended}",
                hint=f"the emulator's log is {self.place.log}",
                details=self._last_words(),
            )

    # -- Machine ----------------------------------------------------------------------

    def login(self, keys: Keys, *, timeout_s: float) -> paramiko.Transport:
        return login(self._dial(), keys, timeout_s=max(timeout_s, _LOGIN_STEP_S))

    def _last_words(self) -> str:
        return process.last_words(self.place.log)

    def ended(self, *, within_s: float = 0.0) -> str | None:
        how = process.ended(self._child, within_s=within_s)
        if how is None:
            return None
        # Bochs frames its reason: [CPU0  ] exception(): 3rd (13) exception with no resolution
        reasons = re.findall(r"^\[\w+ *\] (.+)$", self._last_words(), re.MULTILINE)
        reason = ", ".join([how, *reasons[-1:]])
        return f"its emulator (process {self._child.pid}) ended with {reason}"

    def crashed(self) -> bool:
        # A restart is made a triple fault by the kernel's option reboot=t.
        return self._child.poll() is not None and "3rd (" in self._last_words()

    def tool_address(self, port: int) -> tuple[str, int]:
        return "10.0.2.2", port

    def login_command(self, keys: Keys) -> list[str]:
        return [
            "ssh", "-F", "none", "-i", str(keys.client_path), "-p", str(self._port.number),
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "LogLevel=ERROR", "root@127.0.0.1",
        ]  # fmt: skip

    def processor_thread(self, number: int) -> int | None:
        return None

    def processors(self) -> str:
        return ""

    def close(self) -> None:
        try:
            process.end(self._child)
        finally:
            self._port.close()


def find_program(path: str, *, debugger: bool, ticks_per_us: int) -> BochsProgram:
    """The Bochs at ``path`` (a name is looked up), and its version.

    :raises UsageError: it is not installed.
    :raises InfraError: it does not say what it is.
    """
    if shutil.which(path) is None:
        raise UsageError(
            f"{path} is not installed",
            hint="`inv doctor --target bochs` says which package has it",
        )
    # It says so on every occasion, and ends with status 0 or 1.
    done = subprocess.run(
        [path, "--help"], capture_output=True, check=False, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    found = re.search(rb"Bochs x86 Emulator (\S+)", done.stdout + done.stderr)
    if found is None:
        raise InfraError(
            f"{path} does not tell its version",
            details=(done.stdout + done.stderr).decode(errors="replace"),
        )
    return BochsProgram(path, found[1].decode(), debugger, ticks_per_us)


def _network(port: int) -> str:
    """The configuration of the user network; the first line is its file type."""
    return (
        "# slirp config\n"
        "restricted = 0\n"
        "net = 10.0.2.0\n"
        "mask = 255.255.255.0\n"
        "host = 10.0.2.2\n"
        "dhcpstart = 10.0.2.15\n"
        "dns = 10.0.2.3\n"
        f"hostfwd = tcp:127.0.0.1:{port}-10.0.2.15:22\n"
    )


def _configuration(
    program: BochsProgram,
    place: Place,
    *,
    medium: Path,
    processor: str,
    memory_mb: int,
    script: Path,
) -> str:
    """What Bochs reads: the machine, a line a device."""
    if program.debugger:
        # Debian's build. Of its displays the network one needs neither X nor a terminal.
        display = 'display_library: rfb, options="timeout=0"\n'
        # Its sound ends the whole program on a machine without a sound card.
        display += "speaker: enabled=0\n"
        display += "sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\n"
    else:
        display = "display_library: nogui\n"
    lines = (
        # One processor: Bochs emulates several in turns, in one thread.
        f"cpu: model={processor}, count=1, ips={program.ticks_per_us}000000, "
        "reset_on_triple_fault=0",
        f"memory: guest={memory_mb}, host={memory_mb}",
        f"romimage: file={_FIRMWARE}, options=fastboot",
        f"vgaromimage: file={_VIDEO_FIRMWARE}",
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
        f'ata0-master: type=cdrom, path="{medium}", status=inserted',
        "boot: cdrom",
        "pci: enabled=1, chipset=i440fx",
        # Never faster than real time, so that an idle host leaves the processor to others
        # and what waits in it does not give up early.
        "clock: sync=slowdown, time0=local",
        f'com1: enabled=1, mode=file, dev="{place.console}"',
        # What the kernel under test does wrong ends the machine, with the reason in the log.
        "panic: action=fatal",
        "error: action=ignore",
        "info: action=ignore",
        "debug: action=ignore",
        f'e1000: enabled=1, mac=52:54:00:12:34:56, ethmod=slirp, script="{script}"',
    )
    return display + "\n".join(lines) + "\n"
