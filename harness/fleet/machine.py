# SPDX-License-Identifier: GPL-2.0-or-later
"""One machine of the fleet: prepared, watched, looked after when it is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build.progress import note, step
from harness.errors import HarnessError, InfraError, UsageError
from harness.fleet.runtime import PYTHON, REPOSITORY, RUN, python_here, version_of
from harness.fleet.switch import PLACE, still_there, switch, wait_for_other_boot
from harness.hosts.kernellog import KernelLog
from harness.hosts.remote import Control, SshTarget, hold
from harness.hosts.seen import Seen, look_at

if TYPE_CHECKING:
    from harness.fleet.inventory import Machine
    from harness.fleet.runtime import Runtime
    from harness.hosts.base import MachineFacts
    from harness.hosts.ssh import RemoteProcess

__all__ = ["Fate", "FleetMachine", "words_of"]

_ANSWER_TIMEOUT_S = 60.0
_COPY_TIMEOUT_S = 600.0
_LET_GO_S = 20.0
_ASK_PYTHON = "import json, sys; print(json.dumps(sys.version_info[:2]))"


# A worker whose controller was killed takes some seconds to notice. Its guard ends it at once.
_END_WORKERS = f"""\
import os, signal, time
def guards():
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if b"{PLACE}/run/guard.py" in open(f"/proc/{{pid}}/cmdline", "rb").read().split(b"\\0"):
                yield int(pid)
        except OSError:
            pass
end = time.monotonic() + 40
while (left := list(guards())) and time.monotonic() < end:
    for pid in left:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
    time.sleep(0.2)
print(*left)
"""


class Fate(enum.StrEnum):
    """What became of a machine whose worker is gone."""

    THERE = "answers"
    """It did not restart: only the worker or the connection ended."""
    RESTARTED = "restarted"
    GONE = "does not answer"


def words_of(machine: Machine, seen: Seen) -> frozenset[str]:
    """What tests may need and this machine has.

    ``svm`` or ``vmx``, ``npt`` or ``ept``, all flags of the processor as the kernel names
    them, ``hardware``, ``virtual`` or ``emulated``, ``cpus-1`` to ``cpus-N``, ``qemu``; with
    the inventory's ``has``, without its ``lacks``.
    """
    told = {*seen.flags, seen.extension.lower(), seen.paging.lower(), seen.nature.value, "qemu"}
    told |= {f"cpus-{number}" for number in range(1, seen.cpus + 1)}
    return frozenset((told | set(machine.has)) - set(machine.lacks) - {""})


class FleetMachine:
    """See the module's text. Close it."""

    def __init__(self, machine: Machine, run_dir: Path) -> None:
        """Nothing is dialled yet.

        :param run_dir: what its kernel says is kept in ``hosts/<name>`` of it.
        """
        self.machine = machine
        self.words: frozenset[str] = frozenset()
        """Empty until it was prepared once."""
        self.facts: MachineFacts | None = None
        self.lost = ""
        """Why it cannot be used any more; empty while it can."""
        self._run_dir = run_dir
        self._boot_id = ""
        self._control: Control | None = None
        self._holder: RemoteProcess | None = None
        self._log: KernelLog | None = None
        self._starts = 0

    @property
    def name(self) -> str:
        """As in the inventory."""
        return self.machine.name

    def prepare(self, runtime: Runtime) -> None:
        """Switch it to the kernel, copy what it lacks, and begin to listen to its kernel.

        :raises HarnessError: it is of no use; the message says why.
        """
        self.close()
        address = self.machine.where()
        with step(f"Prepare machine {self.name}"):
            self._take()  # nobody else is to be disturbed by a restart
            switch(self.machine, runtime.builds.kernel)
            self._drop()
            control = self._take()
            self._boot_id = control.boot_id()
            seen = look_at(lambda command: control.run(command, check=False))
            self.words = words_of(self.machine, seen)
            settings = dataclasses.replace(runtime.settings, ssh_host=self.machine.address)
            target = SshTarget(settings)
            target.address = address
            target.prepare(runtime.builds.kernel, runtime.builds.images)
            self.facts = target.facts()
            self._copy(control, runtime, vendor=self.facts.vendor)
            self._starts += 1
            number = f"-{self._starts}" if self._starts > 1 else ""
            folder = self._run_dir / "hosts" / self.name
            folder.mkdir(parents=True, exist_ok=True)
            self._log = log = KernelLog(control, folder / f"kernel{number}.log")
            if log.before is not None:
                raise InfraError(
                    f"the kernel of machine {self.name} died before: {log.before.line}",
                    hint="it went on, but cannot be trusted: restart the machine",
                )

    def _take(self) -> Control:
        """Log in, and keep other runs from it."""
        self._control = Control(self.machine.where(), timeout_s=_ANSWER_TIMEOUT_S)
        deadline = time.monotonic() + _LET_GO_S
        while True:
            try:
                self._holder = hold(self._control)
                return self._control
            except UsageError:
                # Whoever held it may have been ended just now, as a connection of ours.
                if time.monotonic() > deadline:
                    raise
            time.sleep(_LET_GO_S / 20)

    def _copy(self, control: Control, runtime: Runtime, *, vendor: str) -> None:
        python = control.run(
            f"command -v {shlex.quote(self.machine.python)}", check=False
        ).text.strip()
        if not python:
            raise UsageError(f"machine {self.name} has no {self.machine.python}")
        there = version_of(control.run(f"{python} -c {shlex.quote(_ASK_PYTHON)}").text)
        if there != python_here():
            raise UsageError(
                f"machine {self.name} has Python {there}, and this is Python {python_here()}",
                hint="name one of the same version there (python in the inventory), or use "
                f"Python {there} here",
            )
        left = control.run(
            f"{python} -c {shlex.quote(_END_WORKERS)}", timeout_s=_ANSWER_TIMEOUT_S
        ).text
        if left:
            raise InfraError(
                f"machine {self.name}: processes {left} of an earlier run do not end",
                hint="its kernel holds them: restart the machine",
            )
        site = runtime.site_name
        # What an earlier run left goes, also one that was killed.
        control.run(
            f"mkdir -p {PLACE} && cd {PLACE} && for one in *; do "
            f'[ "$one" = {site} ] || rm -rf "$one"; done',
            timeout_s=_COPY_TIMEOUT_S,
        )
        if control.run(f"test -e {PLACE}/{site}/complete", check=False).returncode:
            control.run(
                f"mkdir -p {PLACE}/{site} && cd {PLACE}/{site} && tar -xzf - && touch complete",
                input=(runtime.site / "site.tar.gz").read_bytes(),
                timeout_s=_COPY_TIMEOUT_S,
            )
        control.run(
            f"mkdir -p {PLACE}/run && cd {PLACE}/run && tar -xzf -",
            input=runtime.pack(vendor=vendor, python=python),
            timeout_s=_COPY_TIMEOUT_S,
        )

    def there(self) -> bool:
        """Whether it answers, and has not restarted."""
        return still_there(self.machine) == self._boot_id

    def fate(self) -> Fate:
        """Look what became of it when its worker was lost.

        A machine that restarts gets the time to come back that the inventory gives it.
        """
        self._drop()
        now = still_there(self.machine)
        if now == self._boot_id:
            return Fate.THERE
        if not now:
            try:
                wait_for_other_boot(self.machine, self._boot_id)
            except HarnessError as error:
                self.lost = error.message
                return Fate.GONE
        return Fate.RESTARTED

    def crash(self) -> str:
        """What its kernel said when it died, since it was prepared; empty if it did not."""
        found = self._log.crash() if self._log is not None else None
        return found.line if found is not None else ""

    @property
    def kernel_log_path(self) -> Path | None:
        """The file of it."""
        return self._log.path if self._log is not None else None

    def ssh_config(self) -> str:
        """Its part of a configuration for ``ssh``, as ``Host kvmi-<name>``."""
        address = self.machine.where()
        lines = {
            "HostName": address.name,
            "Port": str(address.port),
            "User": address.user,
            "ProxyCommand": address.proxy,
            "StrictHostKeyChecking": "yes" if address.strict else "no",
            "UserKnownHostsFile": " ".join(
                _quoted(path) for path in (*address.known_hosts, "~/.ssh/known_hosts")
            ),
            "IdentitiesOnly": "yes" if self.machine.identity else "",
            # Nobody is there to answer; a machine that is gone is to be noticed.
            "BatchMode": "yes",
            "ConnectTimeout": "20",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "6",
            "ForwardAgent": "no",
            "LogLevel": "ERROR",
        }
        told = [f"  {key} {value}" for key, value in lines.items() if value]
        told += [f"  IdentityFile {_quoted(key)}" for key in address.keys]
        return "\n".join([f"Host kvmi-{self.name}", *told, ""])

    def spec(self, config: Path) -> str:
        """The worker on it, as pytest-xdist's ``--tx`` has it.

        :param config: the file with :meth:`ssh_config`.
        """
        assert "//" not in str(config)
        return (
            f"ssh=kvmi-{self.name}//ssh_config={config}//python={PYTHON}//chdir={REPOSITORY}"
            f"//id={self.name}//kvmi_run={RUN}//kvmi_start={self._starts}"
        )

    def _drop(self) -> None:
        """Log out, if the connection did not break before."""
        if self._log is not None:
            self._log.close()
        if self._control is not None:
            self._control.close()
        self._control = self._holder = None

    def sweep(self) -> None:
        """Leave nothing there but what the next run would copy again."""
        if self._control is None or self.lost:
            return
        with contextlib.suppress(HarnessError):
            self._control.run(f"rm -rf {PLACE}/run", timeout_s=_COPY_TIMEOUT_S)

    def give_up(self, reason: str | HarnessError) -> None:
        """It is lost to this run."""
        if isinstance(reason, HarnessError):
            last = reason.details.strip().splitlines()[-1:]
            reason = ": ".join([reason.message, *last])
        self.lost = " ".join(reason.split())
        note(f"Machine {self.name} is lost: {self.lost}")
        self._drop()

    def close(self) -> None:
        """Log out. Idempotent."""
        self._drop()


def _quoted(path: str) -> str:
    return f'"{path}"' if re.search(r"\s", path) else path
