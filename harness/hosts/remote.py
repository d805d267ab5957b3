# SPDX-License-Identifier: GPL-2.0-or-later
"""Target ``ssh``: one machine that runs a KVMI kernel already, reached by its address.

Such a machine is not ours: it cannot be restored or booted, so a host on it begins and
ends with a cleaning. Every program that is started there has a mark in its environment,
by which those that an earlier host left behind are found and ended. What the machine
lacks (our QEMU, its libraries, firmware, guest kernel and initrd) is copied to it.

The introspection tool is reached from there through the SSH connection.
"""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko

from harness.build.bundle import build_bundle
from harness.build.progress import step
from harness.errors import HarnessError, InfraError, UsageError
from harness.hosts.address import Address
from harness.hosts.base import AS_USUAL, Boot, MachineFacts
from harness.hosts.facts import facts_of
from harness.hosts.host import Host
from harness.hosts.kernellog import KernelLog
from harness.hosts.seen import Seen, look_at
from harness.hosts.ssh import Keys, RemoteProcess, Shell, login_until
from harness.hosts.wayback import WayBack
from harness.series import interface

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.build.kernel import KernelBuild
    from harness.settings import Settings

__all__ = ["Control", "RemoteMachine", "SshTarget", "hold"]

_STEP_S = 15.0
_ANSWER_TIMEOUT_S = 60.0
# A machine of metal takes minutes to restart.
_RETURN_TIMEOUT_S = 600.0
_COPY_TIMEOUT_S = 600.0
_PLACE = "/var/tmp/kvmi-harness"
_MARK = "KVMI_HARNESS"
_PARAMETER = "/sys/module/kvm/parameters/introspection"

# Ends all programs that have our mark in their environment, and prints those that stay.
_CLEAN = """\
import os, signal, time
def marked():
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/environ", "rb").read().split(b"\\0")
            if any(word.startswith(b"KVMI_HARNESS=") for word in words):
                yield int(pid)
        except OSError:
            pass
end = time.monotonic() + 10
while (left := list(marked())) and time.monotonic() < end:
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    time.sleep(0.05)
print(*left)
"""

# Holds the machine for as long as its standard input is open.
_HOLD = f"""\
import fcntl, os, sys
os.makedirs("{_PLACE}", exist_ok=True)
file = open("{_PLACE}/lock", "w")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held", flush=True)
    sys.stdin.read()
except BlockingIOError:
    print("busy", flush=True)
"""


def _python(program: str) -> str:
    return f"exec python3 -c {shlex.quote(program)}"


def hold(control: Control) -> RemoteProcess:
    """Keep other runs from a machine until the process that this gives, or ours, ends.

    :raises UsageError: another run uses it.
    """
    holder = control.spawn(_python(_HOLD))
    answer = holder.stdout.readline(timeout_s=_ANSWER_TIMEOUT_S).strip()
    if answer != b"held":
        holder.close()
        raise UsageError(f"another run uses {control.what}", hint="wait until it has ended")
    return holder


class Control(Shell):
    """Our own commands on the machine, apart from those of tests.

    :raises UsageError: it does not let us in.
    :raises DeadlineError: it does not answer in ``timeout_s``.
    """

    def __init__(self, address: Address, *, timeout_s: float) -> None:
        super().__init__(f"machine {address.text}")
        self.connection = login_until(
            lambda step_s: address.connect(timeout_s=max(step_s, _STEP_S)),
            timeout_s=timeout_s,
            check=lambda: None,
        )

    def _transport(self) -> paramiko.Transport:
        return self.connection

    def check(self) -> None:
        """Nothing is known of the machine but what this connection tells."""

    def boot_id(self) -> str:
        """What tells this run of its kernel from all others."""
        return self.run("cat /proc/sys/kernel/random/boot_id").text

    def close(self) -> None:
        """Log out. Idempotent."""
        self.connection.close()


class RemoteMachine:
    """The machine while it is a host's; see :class:`harness.hosts.host.Machine`."""

    def __init__(self, address: Address, control: Control) -> None:
        self.address = address
        self.control = control
        self.log: KernelLog | None = None
        self._boot_id = control.boot_id()
        self._end = ""
        self._restarted = False
        self._usual = ""
        self._way_back = WayBack(control.connection, what=control.what)
        self._lock = threading.Lock()
        self._closed = False

    def ended(self, *, within_s: float = 0.0) -> str | None:
        with self._lock:
            if not self._end and not self._closed:
                self._end = self._look(within_s)
            return self._end or None

    def _look(self, within_s: float) -> str:
        """What became of it; empty if it is there. Waits only when the connection broke."""
        connection = self.control.connection
        deadline = time.monotonic() + within_s
        while connection.is_active() and time.monotonic() < deadline:
            time.sleep(0.05)  # paramiko has nothing to wait on
        if connection.is_active():
            return ""
        # A machine that restarts comes back; only its boot id tells that it did.
        try:
            with contextlib.closing(Control(self.address, timeout_s=_ANSWER_TIMEOUT_S)) as control:
                self._restarted = control.boot_id() != self._boot_id
        except HarnessError as error:
            return f"the machine {self.address.text} does not answer: {error.message}"
        if self._restarted:
            return f"the machine {self.address.text} restarted"
        # It goes on, but what its kernel said meanwhile may be lost.
        return f"the connection to the machine {self.address.text} broke"

    def crashed(self) -> bool:
        # Nobody but its kernel restarts it while it is ours.
        return self.ended() is not None and self._restarted

    def tool_address(self, port: int) -> tuple[str, int]:
        return "127.0.0.1", self._way_back.port_for(port)

    def login(self, keys: Keys, *, timeout_s: float) -> paramiko.Transport:
        return self.address.connect(timeout_s=max(timeout_s, _STEP_S))

    def login_command(self, keys: Keys) -> list[str]:
        return self.address.command()

    def processor_thread(self, number: int) -> int | None:
        return None

    def processors(self) -> str:
        return ""

    def ready(self) -> None:
        """Switch introspection on, and let warnings come that the kernel gives but once."""
        self._usual = self.control.run(f"cat {_PARAMETER}", check=False).text
        self.control.run(
            f"echo Y >{_PARAMETER}; echo 1 >/sys/kernel/debug/clear_warn_once", check=False
        )

    def close(self) -> None:
        self._closed = True
        if self.log is not None:
            self.log.close()
        with contextlib.suppress(HarnessError):
            clean(self.control)
            if self._usual:
                self.control.run(f"echo {self._usual} >{_PARAMETER}", check=False)
        self.control.close()


def clean(control: Control) -> None:
    """End what earlier hosts left behind on the machine.

    :raises InfraError: some of it does not end: the kernel holds it.
    """
    left = control.run(_python(_CLEAN), timeout_s=_ANSWER_TIMEOUT_S).text
    if left:
        raise InfraError(
            f"{control.what}: processes {left} of an earlier host do not end",
            hint="its kernel holds them: restart the machine",
        )


class SshTarget:
    """See the module's text. :meth:`prepare` before anything else."""

    name = "ssh"
    boots = False
    processors: Sequence[str] = ()
    most_memory_mb: int | None = None
    patience = 1.0
    machine_type = RemoteMachine

    def __init__(self, settings: Settings) -> None:
        if not settings.ssh_host:
            raise UsageError(
                "target ssh needs the address of a machine",
                hint='set ssh_host = "root@name:22" in kvmi-harness.toml, or give --ssh-host',
            )
        self.address = Address.parse(settings.ssh_host)
        self._settings = settings
        self._images: Images | None = None
        self._keys: Keys | None = None
        self._facts: MachineFacts | None = None
        self._files = ""
        self._holder: RemoteProcess | None = None
        self._held: Control | None = None

    @contextlib.contextmanager
    def shell(self) -> Iterator[Shell]:
        """Commands on the machine, whatever it runs.

        :raises UsageError: it does not let us in.
        :raises DeadlineError: it does not answer.
        """
        with contextlib.closing(Control(self.address, timeout_s=_ANSWER_TIMEOUT_S)) as control:
            yield control

    def prepare(self, kernel: KernelBuild, images: Images) -> None:
        """Look at the machine, and copy to it what it lacks. See :class:`Target`."""
        self._images, self._keys = images, Keys(images.keys)
        self._files = f"{_PLACE}/{images.key}"
        with self.shell() as control:
            seen = self._look(control)
            self._copy(control)
            same = seen.release == kernel.release
            self._facts = facts_of(
                control,
                target=self.name,
                kernel_series=kernel.series if same else f"running@{seen.release}",
                qemu=f"{self._files}/qemu/bin/qemu-system-x86_64",
                machine=f"{self.address.text} ({seen.title or 'of unknown make'})",
            )

    def _look(self, control: Shell) -> Seen:
        """Look at the machine: does its kernel have introspection?"""
        number = interface(self._settings).capability
        seen = look_at(lambda command: control.run(command, check=False), [number])
        if "kvm.introspection" not in seen.modules and not seen.kvm.answers.get(str(number)):
            raise UsageError(
                f"{self.address.text} runs {seen.release}, a kernel without introspection",
                hint="boot a kernel of the series there; `inv doctor` looks at it, too",
            )
        if obstacle := seen.no_machines() or seen.no_paging():
            raise UsageError(f"{self.address.text}: {obstacle.reason}", hint=obstacle.fix)
        return seen

    def _copy(self, control: Shell) -> None:
        """Copy our programs to the machine, unless it has them."""
        files = self._files
        if control.run(f"test -e {files}/complete", check=False).returncode == 0:
            return
        assert self._images is not None
        bundle = build_bundle(self._settings, self._images)
        with step(f"Copy what {self.address.text} lacks"):
            control.run(
                f"rm -rf {files} && mkdir -p {files} && tar -xzf - -C {files} && "
                f"touch {files}/complete",
                input=bundle.read_bytes(),
                timeout_s=_COPY_TIMEOUT_S,
            )

    def _remove_others(self, control: Shell) -> None:
        """Remove what other runs copied; none of them uses it now."""
        control.run(
            f'for one in {_PLACE}/*/; do [ "$one" = {self._files}/ ] || rm -rf "$one"; done'
        )

    def facts(self) -> MachineFacts:
        """The facts of the machine. See :class:`Target`."""
        return self._prepared()[1]

    def _prepared(self) -> tuple[Keys, MachineFacts]:
        if self._keys is None or self._facts is None:
            raise UsageError("target ssh is not prepared", hint="call prepare() first")
        return self._keys, self._facts

    def start(
        self,
        *,
        name: str,
        evidence: Path,
        boot: Boot = AS_USUAL,
    ) -> Host:
        """The machine, cleaned. See :class:`Target`.

        :raises UsageError: other kernel options are wanted, or another run uses the machine.
        """
        keys, _ = self._prepared()
        if boot:
            raise UsageError("target ssh cannot boot a machine in another way than usual")
        evidence.mkdir(parents=True, exist_ok=True)
        # It may be restarting, if a test before this one brought it down.
        control = Control(self.address, timeout_s=_RETURN_TIMEOUT_S)
        try:
            self._hold()
            clean(control)
            self._copy(control)  # once more, should a restart have cost it its files
            self._remove_others(control)
            machine = self.machine_type(self.address, control)
        except BaseException:
            control.close()
            raise
        try:
            machine.ready()
            machine.log = log = KernelLog(control, evidence / "console.log")
            if log.before is not None:
                raise InfraError(
                    f"the kernel of {self.address.text} died before: {log.before.line}",
                    hint="it went on, but cannot be trusted: restart the machine",
                )
            host = Host(
                machine,
                name=name,
                evidence=evidence,
                console=log,
                keys=keys,
                files=self._files,
                patience=self.patience,
            )
        except BaseException:
            machine.close()
            raise
        host.preamble = f"export {_MARK}={shlex.quote(name)}; "
        try:
            host.wait_up(timeout_s=_ANSWER_TIMEOUT_S)
        except BaseException:
            host.close()
            raise
        return host

    def _hold(self) -> None:
        """Keep other runs from the machine until this process ends."""
        if self._held is not None and self._held.connection.is_active():
            return
        held = Control(self.address, timeout_s=_ANSWER_TIMEOUT_S)
        try:
            self._holder = hold(held)
        except BaseException:
            held.close()
            raise
        self._held = held
