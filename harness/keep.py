# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that is kept for a person to log in to, with a guest on it if asked for.

A process of its own, the keeper, owns the host; host and guest die with it. It leaves
a record in the cache of how to log in and which process it is. There is one kept host
per cache.

::

    <cache>/kept/record.json    the keeper's process, the logins, or why it failed
    <cache>/kept/keeper.log     what the keeper said
    <cache>/kept/evidence/      consoles and logs of host and guest
    <cache>/kept/counters       the events that the guest's tool met, in shared memory
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.build.progress import step
from harness.errors import DeadlineError, HarnessError, InfraError, UsageError
from harness.settings import Settings, load_settings

if TYPE_CHECKING:
    from harness.hosts import Host
    from harness.manager.qemu import QemuGuest

__all__ = ["Record", "counters_path", "down", "guest_up", "kept", "up"]

_UP_TIMEOUT_S = 300.0
_DOWN_TIMEOUT_S = 30.0
_POLL_S = 0.2
_QMP_PORT = 4444
_GUEST_SSH_PORT = 2222


class Record(msgspec.Struct, kw_only=True):
    """What the keeper tells."""

    pid: int
    started: str
    """The keeper's start time as the kernel has it: tells it from a later process."""
    host: list[str] = msgspec.field(default_factory=list)
    """The command that logs in to the host; empty until it is up."""
    guest: list[str] = msgspec.field(default_factory=list)
    """The command that logs in to the guest; empty while there is none."""
    tool_port: int = 0
    """Where the guest's QEMU looks for its introspection tool on our loopback; 0: nowhere."""
    failure: str = ""
    """Why host or guest did not come up."""


def _place(settings: Settings) -> Path:
    return settings.cache / "kept"


def kept(settings: Settings) -> Record | None:
    """The record of the keeper that runs now, if one does."""
    try:
        record = msgspec.json.decode((_place(settings) / "record.json").read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return None
    return record if _start_time(record.pid) == record.started else None


def _start_time(pid: int) -> str:
    """When that process began, in clock ticks since boot; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def up(settings: Settings) -> Record:
    """Build what is missing, start a host in the background, and wait until it answers.

    :raises UsageError: one is kept already.
    :raises InfraError: it did not come up; the keeper's words are in ``details``.
    """
    # Here, not above: whoever only asks whether a host is kept need not load all of it.
    from harness.build.builds import build_all

    if (running := kept(settings)) is not None:
        raise UsageError(
            f"a host is kept already, by process {running.pid}",
            hint="`inv host.ssh` logs in, `inv host.down` ends it",
        )
    build_all(settings)
    place = _place(settings)
    place.mkdir(parents=True, exist_ok=True)
    (place / "record.json").unlink(missing_ok=True)
    values = {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}
    with (place / "keeper.log").open("wb") as log, step("Start a host to keep"):
        keeper = subprocess.Popen(
            [sys.executable, "-m", "harness.keep", json.dumps(values)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # It outlives this command, and the terminal's Ctrl-C is not meant for it.
            start_new_session=True,
        )
        return _wait(settings, lambda record: bool(record.host), what="host", keeper=keeper)


def guest_up(settings: Settings, *, introspect: bool = False) -> Record:
    """Start a guest on the kept host (started too if need be), and wait until it answers.

    :param introspect: it looks for an introspection tool; see :mod:`harness.prompt`.
    :raises UsageError: there is a guest, but it looks for no tool.
    """
    record = kept(settings) or up(settings)
    if record.guest:
        if introspect and not record.tool_port:
            raise UsageError(
                "the kept guest was started without introspection",
                hint="`inv host.down` ends it, then `inv guest.up --introspect`",
            )
        return record
    with step("Start a guest on it"):
        os.kill(record.pid, signal.SIGUSR2 if introspect else signal.SIGUSR1)
        return _wait(settings, lambda record: bool(record.guest), what="guest")


def counters_path(settings: Settings) -> Path:
    """Where the tool of the kept guest counts events."""
    return _place(settings) / "counters"


def down(settings: Settings) -> bool:
    """End the kept host and all on it; False if there was none.

    :raises DeadlineError: the keeper does not end.
    """
    record = kept(settings)
    if record is None:
        return False
    os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + _DOWN_TIMEOUT_S
    while _start_time(record.pid) == record.started:
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"process {record.pid}, which keeps the host, did not end in "
                f"{_DOWN_TIMEOUT_S:.0f} s",
                hint=f"kill -9 {record.pid} ends it and the host",
            )
        time.sleep(_POLL_S)  # it is not our child, so there is nothing to wait on
    return True


def _wait(
    settings: Settings,
    done: Callable[[Record], bool],
    *,
    what: str,
    keeper: subprocess.Popen[bytes] | None = None,
) -> Record:
    """Wait for what the keeper writes into its record."""
    place = _place(settings)
    deadline = time.monotonic() + _UP_TIMEOUT_S
    while True:
        record = kept(settings)
        ended = record is None if keeper is None else keeper.poll() is not None
        if record is not None and done(record):
            return record
        if ended or (record is not None and record.failure):
            said = (place / "keeper.log").read_text(errors="replace").strip()
            raise InfraError(
                f"the {what} did not come up: {record.failure if record else 'see below'}",
                hint=f"its console is in {place / 'evidence'}",
                details="\n".join(said.splitlines()[-30:]),
            )
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the {what} did not come up within {_UP_TIMEOUT_S:.0f} s",
                hint=f"see {place}; `inv host.down` ends it",
            )
        time.sleep(_POLL_S)  # the record is a file, the keeper no child of ours for long


def _free_port() -> int:
    """A TCP port of our loopback that nobody uses now; whoever is the tool listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


class _Keeper:
    """The background process: one host, perhaps a guest, until it is told to end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._place = _place(settings)
        self._record = Record(pid=os.getpid(), started=_start_time(os.getpid()))
        self._told = threading.Event()
        self._end = False
        self._guest_wanted = False
        self._introspect = False

    def run(self) -> int:
        """Keep the host until SIGTERM, or until it dies; returns the exit code."""
        from harness.build.builds import build_all
        from harness.hosts import target_for

        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)
        signal.signal(signal.SIGUSR2, self._on_signal)
        self._write()
        builds = build_all(self._settings)
        target = target_for(self._settings)
        target.prepare(builds.kernel, builds.images)
        evidence = self._place / "evidence"
        evidence.mkdir(exist_ok=True)
        with target.start(name="kept", evidence=evidence) as host:
            self._record.host = host.login_command()
            self._write()
            self._serve(host, evidence)
        return 0

    def _serve(self, host: Host, evidence: Path) -> None:
        guest: QemuGuest | None = None
        try:
            while not self._end:
                host.check()
                if self._guest_wanted and guest is None:
                    guest = self._guest(host, evidence)
                self._told.wait(1.0)  # between two looks at the host
                self._told.clear()
        finally:
            if guest is not None:
                guest.close()

    def _guest(self, host: Host, evidence: Path) -> QemuGuest | None:
        from harness.manager.introspection import Introspection
        from harness.manager.qemu import QemuGuest, reconnects_in_s

        self._guest_wanted = False
        self._record.failure = ""
        introspection = None
        if self._introspect:
            self._record.tool_port = _free_port()
            introspection = Introspection(
                address=host.tool_address(self._record.tool_port),
                reconnect_in_s=reconnects_in_s(host),
            )
        guest = QemuGuest(
            host,
            name="kept",
            evidence=evidence,
            qmp_port=_QMP_PORT,
            ssh_port=_GUEST_SSH_PORT,
            introspection=introspection,
        )
        try:
            guest.start()
            guest.wait_booted()
        except HarnessError as error:
            guest.close()
            self._record.failure = str(error)
            self._write()
            return None
        login = host.login_command()
        through = shlex.join([*login[:-1], "-W", f"127.0.0.1:{_GUEST_SSH_PORT}", login[-1]])
        port = login.index("-p")
        self._record.guest = [
            *login[:port],
            "-o",
            f"ProxyCommand={through}",
            *login[port + 2 : -1],
            # Guests are ours also where the host is not.
            *("-i", str(host.keys.client_path), "-o", "StrictHostKeyChecking=no"),
            *("-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
            "root@guest",
        ]
        self._write()
        return guest

    def fail(self, error: HarnessError) -> None:
        """Leave the reason for whoever waits."""
        self._record.failure = error.message
        self._write()

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            self._end = True
        else:
            self._guest_wanted = True
            self._introspect = number == signal.SIGUSR2
        self._told.set()

    def _write(self) -> None:
        partial = self._place / "record.partial"
        partial.write_bytes(msgspec.json.encode(self._record))
        partial.rename(self._place / "record.json")


def main() -> int:
    """Be the keeper; the settings are the one argument, as JSON."""
    keeper = _Keeper(load_settings(**json.loads(sys.argv[1])))
    try:
        return keeper.run()
    except HarnessError as error:
        print(error, error.details, sep="\n", file=sys.stderr)
        keeper.fail(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
