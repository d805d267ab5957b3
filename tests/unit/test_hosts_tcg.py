# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulator's command line and control connection, without a host in it."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import time
from pathlib import Path

import pytest

from harness.build.images import Images
from harness.build.kernel import KernelBuild
from harness.errors import InfraError, LostHostError, UsageError
from harness.hosts import kvm, process, target_for, tcg, template
from harness.hosts.emulator import Place
from harness.hosts.monitor import Monitor
from harness.hosts.tsc import tsc_khz
from harness.settings import Settings


@pytest.fixture
def target(tmp_path: Path) -> tcg.TcgTarget:
    """A target that knows a kernel and images which do not exist."""
    one = tcg.TcgTarget(Settings(cache=tmp_path, host_memory_mb=768, host_cpus=3))
    one._kernel = KernelBuild(
        bzimage=Path("/k/bzImage"), config=Path("/k/config"), release="6", key="k", series="linux@0"
    )
    one._images = Images(
        host_disk=Path("/i/host,disk"),
        guest_disk=Path("/i/guest"),
        guest_kernel=Path("/k/bzImage"),
        guest_initrd=Path("/i/initrd"),
        keys=Path("/i/keys"),
        key="i",
    )
    return one


def _place(**changes: object) -> Place:
    given: dict[str, object] = {
        "name": "w0",
        "memory": Path("/t/memory"),
        "share": False,
        "console": Path("/e/console.log"),
        "log": Path("/e/emulator.log"),
    }
    return Place(**(given | changes))  # type: ignore[arg-type]


def _after(argv: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(argv) if name == option]


def test_settings_reach_the_emulator(target: tcg.TcgTarget) -> None:
    """Memory, CPUs, kernel, name and options are where QEMU looks for them."""
    argv = target._arguments(_place(), ["a=1", "b"])
    assert _after(argv, "-m") == ["768M"]
    assert _after(argv, "-smp") == ["3"]
    assert _after(argv, "-kernel") == ["/k/bzImage"]
    assert _after(argv, "-append") == ["a=1 b"]
    assert _after(argv, "-name") == ["kvmi-host-w0"]


def test_only_the_template_may_write_its_memory(target: tcg.TcgTarget) -> None:
    """Hosts map the memory file copy-on-write; a cold host has memory of its own."""
    (saved,) = _after(target._arguments(_place(share=True), []), "-object")
    assert saved == "memory-backend-file,id=memory,size=768M,share=on,mem-path=/t/memory"
    (clone,) = _after(target._arguments(_place(), []), "-object")
    assert "share=off" in clone
    (cold,) = _after(target._arguments(_place(memory=None), []), "-object")
    assert cold == "memory-backend-ram,id=memory,size=768M"


def test_images_are_read_only_and_paths_may_have_commas(target: tcg.TcgTarget) -> None:
    """No host can change what others read; a comma in a path does not end it."""
    drives = _after(target._arguments(_place(), []), "-drive")
    assert all("readonly=on" in drive for drive in drives)
    assert drives[0].startswith("file=/i/host,,disk,")


def test_the_machine_has_no_files_but_those_named(target: tcg.TcgTarget) -> None:
    """Nothing listens on a path, and SSH's port is the system's choice."""
    argv = target._arguments(_place(), [])
    assert not [word for word in argv if "unix:" in word or word.startswith("/tmp")]
    (net,) = _after(argv, "-netdev")
    assert "hostfwd=tcp:127.0.0.1:0-" in net


def test_an_option_can_be_left_out(target: tcg.TcgTarget) -> None:
    """A host without introspection keeps all other options, and knows its counter's rate."""
    with_it, without = target._options(), target._options(["kvm.introspection=1"])
    assert set(with_it) - set(without) == {"kvm.introspection=1"}
    assert f"tsc_early_khz={tsc_khz()}" in without


def test_an_unprepared_target_says_so(target: tcg.TcgTarget, tmp_path: Path) -> None:
    """Hosts come from a template."""
    with pytest.raises(UsageError, match="not prepared"):
        target.start(name="w0", evidence=tmp_path)


def test_an_unknown_target_is_named() -> None:
    """The message lists those that there are."""
    with pytest.raises(UsageError, match=r"no target 'vax'.*tcg"):
        target_for(Settings(target="vax"))


def test_the_counter_is_a_processors() -> None:
    """Measured twice, the rate differs by less than what KVM in a host tolerates."""
    first = tsc_khz()
    tsc_khz.cache_clear()
    assert 500_000 < first < 10_000_000
    assert abs(tsc_khz() / first - 1) < 250e-6


class _Machine:
    """A QEMU without a machine in it, started as hosts' are."""

    def __init__(self, tmp_path: Path, *extra: str) -> None:
        ours, theirs = socket.socketpair()
        self.log = tmp_path / "log"
        with theirs:
            self.child = process.start(
                [
                    template.EMULATOR, "-nodefaults", "-display", "none", "-machine", "none",
                    "-chardev", f"socket,id=control,fd={theirs.fileno()}",
                    "-mon", "chardev=control,mode=control", *extra,
                ],
                stderr=self.log,
                pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self.monitor = Monitor(ours, check=self.check)

    def check(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(1)
            raise LostHostError("gone", details=self.log.read_text())

    def __enter__(self) -> _Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.monitor.close()
        process.end(self.child)


def test_the_monitor_obeys_and_refuses(tmp_path: Path) -> None:
    """Answers come back, underscores become dashes, a refusal has QEMU's reason."""
    with _Machine(tmp_path) as machine:
        machine.monitor.open(timeout_s=20)
        assert machine.monitor.execute("query-status")["status"] == "running"
        assert machine.monitor.human("info version").strip()
        with pytest.raises(InfraError, match="refused no-such-command"):
            machine.monitor.execute("no-such-command")


def test_an_emulator_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The log's text is in the error, and no deadline has to pass for it."""
    began = time.monotonic()
    machine = _Machine(tmp_path, "-device", "no-such-device")
    with machine, pytest.raises(LostHostError) as caught:
        machine.monitor.open(timeout_s=20)
    assert "no-such-device" in caught.value.details
    assert time.monotonic() - began < 15


def test_a_silent_emulator_meets_a_deadline() -> None:
    """A control connection that says nothing is given up."""
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(InfraError, match="greeting in time"):
        Monitor(ours, check=lambda: None).open(timeout_s=0.1)
    ours.close()


def test_a_machine_that_cannot_be_restored_is_booted_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where that is no error: the facts stay, the saved machine goes."""
    for name in ("memory", "state", "facts.json"):
        (tmp_path / name).write_text("{}")
    saved = template._Template(tmp_path)
    target = kvm.KvmTarget(Settings(cache=tmp_path))

    def refuse(**_: object) -> None:
        raise InfraError("nested state is not supported")

    monkeypatch.setattr(target, "start", refuse)
    assert saved.usable
    target._try_restoring(saved)
    assert not saved.usable
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    assert "nested state is not supported" in capsys.readouterr().err
    with pytest.raises(UsageError, match="not prepared"):
        target.facts()


def test_kvm_and_tcg_have_one_machine_and_another_processor(target: tcg.TcgTarget) -> None:
    """All that differs is the accelerator and the processor."""
    other = kvm.KvmTarget(target.settings)
    other._kernel, other._images = target._kernel, target._images
    emulated, nested = (one._arguments(_place(), ["a"]) for one in (target, other))
    assert _after(nested, "-accel") == ["kvm"]
    assert _after(nested, "-cpu") == ["host"]
    for option in ("-accel", "-cpu"):
        for argv in (emulated, nested):
            index = argv.index(option)
            del argv[index : index + 2]
    assert emulated == nested
