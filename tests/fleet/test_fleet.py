# SPDX-License-Identifier: GPL-2.0-or-later
"""Nights on three emulated machines; on request: ``pytest tests/fleet`` (a quarter of an hour).

Two machines run the kernel under test, the third a kernel without introspection, which starts
the kernel under test by kexec. The first night is killed in the middle; the second loses a
machine in the middle, and goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from harness.build.builds import build_all
from harness.build.kernel import KernelBuild, build_kernel
from harness.errors import InfraError
from harness.fleet.inventory import Machine, load_inventory
from harness.fleet.switch import PLACE, switch
from harness.hosts import Host
from harness.hosts.remote import Control
from harness.hosts.ssh import Keys
from harness.hosts.tcg import TcgTarget
from harness.paths import ROOT
from harness.report.model import Outcome
from harness.report.store import VERDICTS, Run, load_run
from harness.settings import Settings, load_settings, with_series

SELECT = "PAUSE-* KCONFIG-DEFAULT-N"
NIGHT_S = 1500.0

pytestmark = pytest.mark.timeout(3600)


@dataclasses.dataclass
class Fleet:
    """The machines, and the directory with all that a night is told."""

    place: Path
    hosts: dict[str, Host]
    kernel: KernelBuild

    @property
    def nights(self) -> list[Path]:
        """The runs so far."""
        return sorted(path.parent for path in self.place.glob(f"nights/*T*Z-*/{VERDICTS}"))

    def start(self) -> subprocess.Popen[bytes]:
        """A night, as a timer starts it."""
        with (self.place / "night.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "invoke", "nightly", str(self.place / "nightly.toml")],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, condition: Callable[[Run], bool], nights: int, what: str) -> None:
        """Wait until the newest of so many nights is so far."""

        def far() -> bool:
            return len(self.nights) == nights and condition(load_run(self.nights[-1]))

        _until(far, what, timeout_s=NIGHT_S)

    def machine(self, name: str) -> Machine:
        """A machine as in the inventory."""
        (found,) = (m for m in load_inventory(self.place / "inventory.toml") if m.name == name)
        return found

    def ask(self, name: str, command: str) -> str:
        """What a shell command prints on a machine, by a connection of its own: a machine that
        was started anew does not tell the old ones."""
        with contextlib.closing(Control(self.machine(name).where(), timeout_s=60)) as control:
            return control.run(command, check=False).text

    def workers_on(self, name: str) -> str:
        """What runs of ours on a machine: the guards of workers."""
        return self.ask(name, f"cd /proc && grep -lzx {PLACE}/run/guard.py [0-9]*/cmdline")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three machines and a night's file."""
    place = tmp_path_factory.mktemp("fleet")
    settings = with_series(load_settings(target="tcg", flavour="kexec"))
    (place / "none").mkdir()
    without = dataclasses.replace(settings, flavour="base", kernel_series=place / "none")
    with contextlib.ExitStack() as stack:
        hosts = {}
        inventory, known = [], []
        for name, which in (("steady", settings), ("doomed", settings), ("started", without)):
            target, keys = _prepared(which)
            host = stack.enter_context(target.start(name=name, evidence=place / "hosts" / name))
            hosts[name] = host
            command = host.login_command()
            port = command[command.index("-p") + 1]
            known.append(f"[127.0.0.1]:{port} ecdsa-sha2-nistp256 {keys.host_public}\n")
            return_s = 20 if name == "doomed" else 300
            switch = "kexec" if which is without else "boots-itself"
            inventory.append(
                f'[[machine]]\nname = "{name}"\naddress = "root@127.0.0.1:{port}"\n'
                f'identity = "{keys.client_path}"\nknown_hosts = "known_hosts"\n'
                f'switch = "{switch}"\nreturn_s = {return_s}\n'
            )
        (place / "known_hosts").write_text("".join(known))
        (place / "inventory.toml").write_text("".join(inventory))
        (place / "kvmi-harness.toml").write_text('target = "tcg"\nflavour = "kexec"\n')
        (place / "nightly.toml").write_text(
            f'select = "{SELECT}"\nhours = 1\n'
            f"send = 'cat >{place}/mail.txt; echo \"$KVMI_SUBJECT\" >{place}/subject.txt; false'\n"
        )
        yield Fleet(place, hosts, build_kernel(settings))


def _until(condition: Callable[[], object], what: str, *, timeout_s: float) -> None:
    """Wait for a condition; the test fails when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.5)


def _prepared(settings: Settings) -> tuple[TcgTarget, Keys]:
    builds = build_all(settings)
    target = TcgTarget(settings)
    target.prepare(builds.kernel, builds.images)
    return target, Keys(builds.images.keys)


def _by_worker(run: Run, name: str) -> int:
    return len({verdict.test for verdict in run.verdicts if verdict.worker == name})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"switch": "boots-itself"}, "runs kernel .*-kvmi-base instead of"),
        ({"switch": "boots-itself", "command": "echo no; exit 3"}, "ended with status 3"),
        ({"switch": "boots-itself", "command": "true", "return_s": 3.0}, "did not come back"),
        ({"cmdline": "x" * 4096}, "kexec: Invalid argument"),
    ],
)
def test_a_machine_that_does_not_get_the_kernel(
    fleet: Fleet, change: dict[str, object], said: str
) -> None:
    """It is said why, and it goes on as it was."""
    machine = msgspec.structs.replace(fleet.machine("started"), **change)
    before = fleet.ask("started", "cat /proc/sys/kernel/random/boot_id")
    with pytest.raises(InfraError) as caught:
        switch(machine, fleet.kernel)
    assert re.search(said, f"{caught.value.message}\n{caught.value.details}")
    assert "machine started" in caught.value.message
    assert fleet.ask("started", "cat /proc/sys/kernel/random/boot_id") == before


def test_a_killed_night_leaves_nothing_on_its_machines(fleet: Fleet) -> None:
    night = fleet.start()
    try:
        fleet.wait_for(lambda run: _by_worker(run, "steady") >= 2, 1, "verdicts of a machine")
        assert fleet.workers_on("steady")
    finally:
        night.kill()
        night.wait(60)
    everywhere = "the end of the workers"
    _until(lambda: not any(map(fleet.workers_on, fleet.hosts)), everywhere, timeout_s=200)
    _until(lambda: not _ours(fleet.place), "the end of the connections", timeout_s=60)


def test_a_night_outlives_a_machine(fleet: Fleet) -> None:
    night = fleet.start()
    try:
        fleet.wait_for(lambda run: _by_worker(run, "doomed") >= 2, 2, "verdicts of a machine")
        fleet.hosts["doomed"].close()
        code = night.wait(NIGHT_S)
    finally:
        if night.poll() is None:
            night.send_signal(signal.SIGTERM)
            night.wait(120)
    log = (fleet.place / "night.log").read_text()
    assert code == 4, log  # nothing broke, but a machine is lost
    _killed, after = fleet.nights
    run = load_run(after)
    assert run.end is not None
    assert not run.end.reason
    assert set(run.end.lost) == {"doomed"}

    # All that was owed was done, by the others where need be.
    assert {verdict.verdict for verdict in run.verdicts} <= {Outcome.PASS, Outcome.SKIP}
    assert {one.test for one in run.plan} == {verdict.test for verdict in run.verdicts}
    workers = {verdict.worker for verdict in run.verdicts}
    assert workers == {"here", "steady", "doomed", "started"}

    # The one that was started by kexec runs the kernel under test.
    assert run.facts.kernel["release"] in fleet.ask("started", "uname -r")
    assert "kvmi_harness.boot=" in fleet.ask("started", "cat /proc/cmdline")
    assert run.facts.machine is not None
    assert run.facts.machine.emulated
    assert {f"machine {name}" for name in fleet.hosts} == set(run.facts.machine.extra)

    # It is told everywhere.
    assert "lost: doomed" in (fleet.place / "subject.txt").read_text()
    mail = (fleet.place / "mail.txt").read_text()
    assert "machine doomed was lost" in mail
    assert "against" not in mail  # a night that was killed is no measure
    assert "machine doomed was lost" in (after / "report.html").read_text()
    assert "The summary was not sent" in log  # and it did not matter
    assert json.loads((after / "kcidb.json").read_text())

    # Evidence was brought here, of all machines.
    for worker in workers - {"here"}:
        found = [v for v in run.verdicts if v.worker == worker and "transcript" in v.evidence]
        assert found
        assert all((after / path).is_file() for v in found for path in v.evidence.values())

    for name in ("steady", "started"):
        assert not fleet.workers_on(name)
        assert fleet.ask(name, f"ls {PLACE}").startswith("site-")
    _until(lambda: not _ours(fleet.place), "the end of the connections", timeout_s=60)


def _ours(place: Path) -> list[str]:
    """Processes here that a night has left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            cmdline = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"{place}/nights" in cmdline and int(path.parent.name) != os.getpid():
                found.append(cmdline)
    return found
