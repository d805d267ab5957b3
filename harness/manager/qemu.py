# SPDX-License-Identifier: GPL-2.0-or-later
"""The device manager that users have: QEMU in a host, with a guest of its own.

:class:`QemuGuest` is one QEMU process in a host. It is started over SSH, driven
over QMP, and its Linux is reached over SSH; all three ways go through the host,
so this module is the same for every target. The process ends with the guest
object, with the SSH session that started it, and with the host.

Evidence of a guest called ``NAME``: ``argv_NAME.txt`` (the command line),
``qmp_NAME.jsonl`` (all of QMP), ``qemu_NAME.log`` (QEMU's own messages) and
``console_NAME.log`` (the guest's serial console).
"""

from __future__ import annotations

import contextlib
import shlex
import time
import uuid as uuids
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

from harness.errors import ConformanceError, DeadlineError, HarnessError, InfraError, SilenceError
from harness.hosts import Host
from harness.hosts.ssh import GuestShell
from harness.manager.introspection import Introspection
from harness.manager.process import HostProgram
from harness.manager.qmp import COMMAND_TIMEOUT_S, PendingAnswer, QmpLink

__all__ = ["IDLE", "QemuGuest", "reconnects_in_s"]

# Below the host's directory of our files.
QEMU = "qemu/bin/qemu-system-x86_64"
FIRMWARE = "qemu/share"
GUEST_KERNEL = "guest/bzImage"
GUEST_INITRD = "guest/initrd"

#: A directory of the host in memory; each guest has a subdirectory with its files.
RUN_DIRECTORY = "/run/kvmi-guests"

#: How long QEMU may take until its QMP socket listens, two emulations deep.
START_TIMEOUT_S = 20.0
#: How long the small Linux may take from QEMU's start to an SSH login.
BOOT_TIMEOUT_S = 60.0
_LOGIN_SLICE_S = 5.0

#: A firmware that only waits for interrupts that never come: a machine that runs, costs no
#: time, and has no operating system. `cli; 1: hlt; jmp 1b`
IDLE = bytes.fromhex("fa f4 eb fd")

#: Makes a firmware of 64 KiB. The processor starts at its last 16 bytes, where `jmp 0xff00`
#: stands.
_CODE_ROOM = 0xF0
_MAKE_FIRMWARE = (
    "{{ head -c $((0xff00)) /dev/zero; printf %b '{code}'; head -c {rest} /dev/zero;"
    " printf %b '\\0351\\0015\\0377'; head -c 13 /dev/zero; }} >{directory}/firmware.bin"
)


#: What a look into a host's QEMU told.
_reconnects_in_s: WeakKeyDictionary[Host, bool] = WeakKeyDictionary()


def reconnects_in_s(host: Host) -> bool:
    """True if the host's QEMU is older than 9.2 and knows reconnect times in seconds only."""
    if host not in _reconnects_in_s:
        look = host.run(f"grep -q reconnect-ms {host.files}/{QEMU}", check=False)
        _reconnects_in_s[host] = look.returncode == 1
    return _reconnects_in_s[host]


class QemuGuest:
    """One QEMU in a host, and the guest in it.

    States: made, :meth:`start`\\ ed, closed. A guest is started once; for another run
    make another one. Use it as a context manager: leaving it closes it.

    Every wait asks the host whether it is well before it complains about the guest,
    so that a host that went down is reported as such.
    """

    def __init__(
        self,
        host: Host,
        *,
        name: str,
        label: str | None = None,
        evidence: Path,
        qmp_port: int,
        ssh_port: int | None = None,
        introspection: Introspection | None = None,
        uuid: uuids.UUID | None = None,
        memory_mb: int = 96,
        cpus: int = 1,
        incoming: str | None = None,
        paused: bool = False,
        accelerator: str = "kvm",
        code: bytes = IDLE,
        extra: Sequence[str] = (),
    ) -> None:
        """Describe a guest; nothing happens in the host yet.

        :param name: QEMU's ``-name``, which the introspection tool is told.
        :param label: what messages and evidence call it; the name by default. Two QEMUs
            that share a guest's name need different ones.
        :param evidence: an existing directory.
        :param qmp_port: free TCP port of the host's loopback for QMP.
        :param ssh_port: free TCP port of the host's loopback that leads to the guest's
            SSH server; None makes a machine without an operating system or network,
            which runs ``code``.
        :param code: at most 240 bytes of code in segment 0xf000 at 0xff00, in ROM, where the
            processor starts, in real mode.
        :param incoming: a migration address to wait on, such as ``unix:/run/x``.
        :param paused: leave the vCPUs stopped (``-S``).
        :param extra: further arguments of QEMU.
        """
        self.host = host
        self.name = name
        self.label = label or name
        self.evidence = evidence
        self.qmp_port = qmp_port
        self.ssh_port = ssh_port
        self.introspection = introspection
        self.uuid = uuid or uuids.uuid4()
        self.memory_mb = memory_mb
        self.cpus = cpus
        self.incoming = incoming
        self.paused = paused
        self.accelerator = accelerator
        self.code = code
        self.extra = tuple(extra)
        self._program: HostProgram | None = None
        self._link: QmpLink | None = None
        self._shell: GuestShell | None = None
        self._directory = f"{RUN_DIRECTORY}/{self.label}"

    # -- command line --------------------------------------------------------------

    def arguments(self) -> list[str]:
        """QEMU's command line, in full."""
        files = self.host.files
        argv = [
            f"{files}/{QEMU}",
            # Our own firmware directory; the build has none compiled in that exists here.
            "-L", f"{files}/{FIRMWARE}",
            "-name", self.name,
            # The handshake carries both, so that a tool knows the guest again.
            "-uuid", str(self.uuid),
            # Only what is named below exists: fewer devices boot and migrate faster.
            "-no-user-config", "-nodefaults", "-display", "none",
            # i440fx rather than microvm: the kernel finds its devices by PCI, and
            # reset, powerdown and migration work as on the machines people run.
            "-machine", "pc,usb=off,vmport=off,hpet=off,graphics=off,i8042=off",
            "-accel", self.accelerator,
            "-cpu", "host" if self.accelerator == "kvm" else "max",
            "-smp", str(self.cpus),
            "-m", f"{self.memory_mb}M",
            # A file in the host's memory: one write per character costs less there than
            # a packet over SSH would.
            "-chardev", f"file,id=console,path={self._directory}/console",
            "-serial", "chardev:console",
            "-qmp", f"tcp:127.0.0.1:{self.qmp_port},server=on,wait=off",
        ]  # fmt: skip
        argv += self._system_arguments()
        if self.introspection is not None:
            argv += self.introspection.arguments()
            # Its ioctls and what it waits for, in its log beside its messages.
            argv += ["-trace", "kvm_introspection_*"]
        if self.incoming is not None:
            argv += ["-incoming", self.incoming]
        if self.paused:
            argv += ["-S"]
        return [*argv, *self.extra]

    def _system_arguments(self) -> list[str]:
        if self.ssh_port is None:
            return ["-bios", f"{self._directory}/firmware.bin"]
        return [
            "-kernel", f"{self.host.files}/{GUEST_KERNEL}",
            "-initrd", f"{self.host.files}/{GUEST_INITRD}",
            # quiet: a character on an emulated serial port is an exit to QEMU.
            "-append", "console=ttyS0 quiet panic=1 reboot=t tsc=reliable no_timer_check",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.ssh_port}-10.0.2.15:22",
            # No option ROM: the guest never boots from the network.
            "-device", "virtio-net-pci,netdev=net,romfile=",
        ]  # fmt: skip

    def preparation(self) -> str:
        """The shell commands that a host has to run before it runs :meth:`arguments`."""
        commands = f"mkdir -p {self._directory}"
        if self.ssh_port is None:
            octal = "".join(f"\\0{byte:03o}" for byte in self.code)
            make = _MAKE_FIRMWARE.format(
                code=octal, rest=_CODE_ROOM - len(self.code), directory=self._directory
            )
            commands += " && " + make
        return commands

    # -- life ----------------------------------------------------------------------

    def start(self, *, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Start QEMU and connect to its QMP; the guest may still be booting.

        :raises ConformanceError: QEMU exited at once; its words are in ``details``.
        :raises InfraError: a port is in use, or the host cannot be reached.
        :raises DeadlineError: QEMU runs, but there is no QMP within ``timeout_s``.
        State after a failure: closed, nothing of this guest runs in the host.
        """
        argv = self.arguments()
        self._file("argv", "txt").write_text(shlex.join(argv) + "\n")
        self._program = HostProgram(
            self.host,
            argv,
            name=f"QEMU of guest {self.label}",
            log=self._file("qemu", "log"),
            prepare=self.preparation(),
        )
        try:
            self._link = self._connect_qmp(self._program, time.monotonic() + timeout_s)
        except BaseException:
            self.close()
            raise
        return self

    def _connect_qmp(self, program: HostProgram, deadline: float) -> QmpLink:
        reason = "QEMU has not said its process id"
        while time.monotonic() < deadline:
            if program.exited:
                raise self._ended("did not start")
            if not program.wait_started(timeout_s=1):
                continue
            try:
                sock = self.host.connect(self.qmp_port, timeout_s=5)
                transcript = self._file("qmp", "jsonl")
                return QmpLink(
                    sock, name=self.label, transcript=transcript, lost=self._check_running
                )
            except InfraError as error:
                # Not listening yet, or QEMU is going down; the loop finds out which.
                reason = str(error)
                program.pause(0.1)
        self.host.check()
        raise DeadlineError(
            f"guest {self.label}: QEMU runs in the host but its QMP did not answer: {reason}",
            hint=f"read {self._file('qemu', 'log')}",
            details=program.text(),
        )

    def _check_running(self) -> None:
        """Say so if QEMU, or even the host, is gone.

        :raises ConformanceError: QEMU ended; its last words are in the message.
        """
        # Its connections end a moment before its process does.
        if self.program.pause(2.0):
            raise self._ended("ended unexpectedly")
        self.host.check()

    def _ended(self, how: str) -> HarnessError:
        self.host.check()
        said = self.program.text().strip()
        last = said.splitlines()[-1] if said else "it said nothing"
        message = f"guest {self.label}: QEMU {how} (exit status {self.program.status}): {last}"
        if "host forwarding rule" in said or "already in use" in said:
            return InfraError(
                message,
                hint="a port in the host is in use: end what holds it, or use a fresh host",
                details=said,
            )
        return ConformanceError(
            message, hint=f"its command line is in {self._file('argv', 'txt')}",
            details=said,
        )  # fmt: skip

    @property
    def program(self) -> HostProgram:
        """The QEMU process.

        :raises InfraError: the guest was not started, or is closed.
        """
        if self._program is None:
            raise InfraError(f"guest {self.label} does not run")
        return self._program

    def quit(self, *, timeout_s: float = 10.0) -> None:
        """Ask QEMU to end, and wait until it is gone.

        :raises SilenceError: it still runs after ``timeout_s``.
        """
        self.send("quit")
        self.program.wait_exited(timeout_s=timeout_s)

    def kill(self) -> None:
        """End QEMU as ``kill -9`` does, and wait until it is gone."""
        self.program.kill()

    def close(self) -> None:
        """End QEMU if it still runs and save the evidence. Never raises."""
        for part in (self._shell, self._link):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close()
        self._shell = None
        program, self._program = self._program, None
        if program is not None:
            program.close()
            if self.ssh_port is not None:
                with contextlib.suppress(Exception):
                    self.console()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _file(self, kind: str, suffix: str) -> Path:
        return self.evidence / f"{kind}_{self.label}.{suffix}"

    # -- what it says --------------------------------------------------------------

    def console(self) -> str:
        """The guest's serial console so far; also saved as evidence."""
        raw = self.host.run(f"cat {self._directory}/console", check=False).stdout
        self._file("console", "log").write_bytes(raw)
        return raw.decode("utf-8", "replace")

    # -- QMP -----------------------------------------------------------------------

    @property
    def link(self) -> QmpLink:
        """The QMP connection of a started guest.

        :raises InfraError: the guest was not started.
        """
        if self._link is None:
            raise InfraError(f"guest {self.label} was not started")
        return self._link

    def qmp(
        self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: object
    ) -> Any:
        """Run a QMP command and return its value.

        Underscores in argument names stand for the dashes of QMP.

        :raises ConformanceError: QEMU refused it; SilenceError: it did not answer.
        """
        return self.send(command, **arguments).value(timeout_s=timeout_s)

    def send(self, command: str, **arguments: object) -> PendingAnswer:
        """Send a QMP command without waiting for its answer."""
        return self.link.send(command, _dashed(arguments))

    def refusal(self, command: str, **arguments: object) -> str:
        """Run a QMP command that has to fail; return the description of the error."""
        return self.send(command, **arguments).refusal()

    def status(self) -> str:
        """The run state, in QEMU's words: ``running``, ``paused``, ``postmigrate``..."""
        return str(self.qmp("query-status")["status"])

    def wait_status(self, status: str, *, timeout_s: float = 10.0) -> None:
        """Wait until the run state is ``status``.

        :raises SilenceError: it is another one after ``timeout_s``.
        """
        _poll(
            lambda: self.status() == status,
            timeout_s=timeout_s,
            complaint=lambda: f"guest {self.label} is '{self.status()}', not '{status}'",
        )

    def migrate(self, uri: str) -> None:
        """Ask for a live migration and return when QEMU has taken the order."""
        self.qmp("migrate", uri=uri)

    def migration_status(self) -> str:
        """QEMU's word for how far the migration is, ``none`` before the first."""
        return str(self.qmp("query-migrate").get("status", "none"))

    def wait_migration(self, status: str, *, timeout_s: float = 30.0) -> None:
        """Wait until the migration's status is ``status``.

        :raises SilenceError: another one after ``timeout_s``; ConformanceError: it failed.
        """

        def reached() -> bool:
            now = self.migration_status()
            if now == "failed" and status != "failed":
                raise ConformanceError(
                    f"guest {self.label}: the migration failed: {self.qmp('query-migrate')}",
                    details=self.program.text(),
                )
            return now == status

        _poll(
            reached,
            timeout_s=timeout_s,
            complaint=lambda: (
                f"guest {self.label}: migration is '{self.migration_status()}', not '{status}'"
            ),
        )

    # -- the guest's Linux ---------------------------------------------------------

    def wait_booted(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> GuestShell:
        """Wait until the guest lets us log in; return the shell, which stays ours.

        :raises DeadlineError: it does not within ``timeout_s``; the end of its console
            is in ``details``.
        :raises ConformanceError: QEMU exited meanwhile.
        """
        if self.ssh_port is None:
            raise InfraError(f"guest {self.label} has no operating system to log in to")
        deadline = time.monotonic() + timeout_s
        while True:
            # In slices, to notice it soon when QEMU is gone.
            slice_s = min(_LOGIN_SLICE_S, max(deadline - time.monotonic(), 0.1))
            try:
                self._shell = GuestShell(self.host, self.ssh_port, timeout_s=slice_s)
                return self._shell
            except DeadlineError as error:
                if self.program.exited:
                    raise self._ended("ended while the guest booted") from error
                if time.monotonic() < deadline:
                    continue
                end = "\n".join(self.console().splitlines()[-30:])
                raise DeadlineError(
                    f"guest {self.label} did not boot within {timeout_s:g} s: {error.message}",
                    hint=f"its console's end is below, all of it in {self._file('console', 'log')}",
                    details=end or "(its console is empty)",
                ) from error

    def shell(self) -> GuestShell:
        """The shell in the guest; logs in first where nobody has yet."""
        return self._shell or self.wait_booted()


def _dashed(arguments: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def _poll(done: Callable[[], bool], *, timeout_s: float, complaint: Callable[[], str]) -> None:
    """Ask until ``done``; QEMU has no event for every state worth waiting for.

    :raises SilenceError: not done after ``timeout_s``; its message is ``complaint()``.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() >= deadline:
            raise SilenceError(f"{complaint()} after {timeout_s:g} s")
        time.sleep(0.05)  # between two questions, not instead of one
