# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that measures, compiled and run here: without a guest it takes no KVM."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from harness.abi import load_profile
from harness.bench.kinds import KINDS, OWN
from harness.bench.program import Block, Facts, Program, Stopped, build
from harness.bench.rounds import Options, Side, measure_rounds
from harness.build.progress import Step
from harness.counters import attach, create, quantile_ns
from harness.errors import DeadlineError, InfraError

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")

PROFILE = load_profile("v12")


class Local:
    """The program's pipes, on this machine."""

    def __init__(self, *argv: str | Path) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def write(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def readline(self, timeout_s: float) -> bytes:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            raise DeadlineError("silence")
        return self.process.stdout.readline()

    def last_words(self) -> str:
        return ""

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled."""
    return build(tmp_path_factory.mktemp("cache"), PROFILE)


@pytest.fixture
def start(program: Path) -> Iterator[Callable[..., Program]]:
    """Starts it without a guest; all are gone in the end."""
    pipes: list[Local] = []

    def run(*options: str | Path, limit_s: int = 20) -> Program:
        pipe = Local(program, "--no-guest", "--limit", str(limit_s), *options)
        pipes.append(pipe)
        return Program(pipe, limit_s=limit_s)

    yield run
    for pipe in pipes:
        pipe.process.kill()
        pipe.process.communicate()


def test_it_knows_what_we_describe(start: Callable[..., Program]) -> None:
    """Each kind is described, and its events are those of the interface."""
    with start() as running:
        kinds = running.facts.kinds
    assert {name for name in kinds if kinds[name].events} == set(KINDS)
    for name in KINDS:
        names = [PROFILE.event(one).name for one in kinds[name].events]
        assert all(one in KINDS[name] for one in names)
    measured = {PROFILE.event(one).name for name in KINDS for one in kinds[name].events}
    assert measured == {event.name for event in PROFILE.events.values() if event.is_vcpu}


@pytest.mark.parametrize("kind", KINDS)
def test_share_of_our_own(start: Callable[..., Program], kind: str) -> None:
    """Without a guest all messages of each kind are exchanged; the parts make up the whole."""
    with start() as running:
        block = running.measure(OWN + kind, samples=30, warm=5)
        events = len(running.facts.kinds[kind].events)
    (v,) = block.vcpus
    assert v.events == 35 * events
    assert len(v.hold) == 30
    for hold, out, answer in zip(v.hold, v.out, v.answer, strict=True):
        assert out > 0
        assert answer >= 0
        assert out + answer < hold


def test_counters_are_those_of_the_package(start: Callable[..., Program], tmp_path: Path) -> None:
    """What the program counts in shared memory is what the package reads, field by field."""
    create(tmp_path / "counters", slots=2).close()
    with attach(tmp_path / "counters") as counters:
        with start("--counters", tmp_path / "counters") as running:
            running.measure("own:hypercall", samples=40, warm=10)
            running.measure("own:pf-retry", samples=20, warm=0)
            slot = counters.read_slot(1)
            assert slot.pid > 0
            assert slot.test == "pf-retry"
        counted = counters.read_slot(1)
        assert not counters.read_slot(0).used
    assert counted.generation == 1
    assert counted.pid == 0  # released
    assert counted.events == {"HYPERCALL": 50, "PF": 20}
    assert (counted.event_replies, sum(counted.event_latency)) == (70, 70)
    assert (counted.commands, counted.replies, counted.failed_replies) == (20, 20, 0)
    assert sum(counted.command_latency) == 20
    header, common = PROFILE.structs["kvmi_msg_hdr"].size, 8 + 544
    assert counted.bytes_in == 50 * (header + common) + 20 * (header + common + 24 + header + 8)
    assert counted.bytes_out == 70 * (header + 16) + 20 * (header + 8 + 16)
    assert slot.heartbeat_ns >= slot.started_ns > 0
    median = quantile_ns(counted.event_latency, 0.5)
    assert median is not None
    assert median < 1e9


def test_counters_of_another_machine(start: Callable[..., Program], tmp_path: Path) -> None:
    """A copy of the file shows the same counts, by a process that lives here."""
    for name in ("there", "here"):
        create(tmp_path / name, slots=2).close()
    with start("--counters", tmp_path / "there") as running:
        running.measure("own:msr", samples=9, warm=0)
        with attach(tmp_path / "here") as copy:
            copy.copy((tmp_path / "there").read_bytes())
            slot = copy.read_slot(1)
            assert (slot.events, slot.pid, slot.torn) == ({"MSR": 9}, os.getpid(), False)


def test_other_counters_are_refused(start: Callable[..., Program], tmp_path: Path) -> None:
    """A file of another layout is not written to."""
    (tmp_path / "counters").write_bytes(bytes(10000))
    with pytest.raises(Stopped, match="no counters of this program's layout"):
        start("--counters", tmp_path / "counters")


def test_it_says_why_it_stops(start: Callable[..., Program]) -> None:
    """A kind that takes a guest is refused in words, and the program has ended."""
    running = start()
    with pytest.raises(Stopped, match="cannot be measured with a guest"):
        running.measure("hypercall", samples=1, warm=0)
    with pytest.raises(InfraError, match="ended in the middle"):
        running.measure("own:hypercall", samples=1, warm=0)


def repeat(running: Program, kind: str) -> None:
    """Measure until the program ends, a minute at most."""
    for _ in range(100):
        running.measure(kind, samples=60_000, warm=0)


def test_it_stops_at_its_limit(start: Callable[..., Program]) -> None:
    """More than fits in the time is given up."""
    running = start(limit_s=1)
    pipe = running._pipe
    assert isinstance(pipe, Local)
    # However fast the machine is: the time goes on while the program stands still.
    threading.Timer(0.1, pipe.process.send_signal, [signal.SIGSTOP]).start()
    threading.Timer(1.5, pipe.process.send_signal, [signal.SIGCONT]).start()
    with pytest.raises(Stopped, match="not done within 1 s"):
        repeat(running, "own:pf-write")


def test_killed_in_the_middle(start: Callable[..., Program]) -> None:
    """A program that is killed is told from one that stopped."""
    running = start()
    pipe = running._pipe
    assert isinstance(pipe, Local)
    threading.Timer(0.3, pipe.process.kill).start()
    with pytest.raises((InfraError, DeadlineError)):
        repeat(running, "own:msr")


def test_silence(start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose own clock does not end it is ended by ours."""
    running = start()
    pipe = running._pipe
    assert isinstance(pipe, Local)
    monkeypatch.setattr("harness.bench.program._PATIENCE_S", -19.5)
    os.kill(running.facts.pid, signal.SIGSTOP)
    with pytest.raises(Stopped, match="silent"):
        running.measure("own:msr", samples=1, warm=0)
    assert pipe.process.wait(timeout=20) == -signal.SIGKILL


def test_it_ends_with_its_standard_input(program: Path) -> None:
    """When we are killed, the program ends after the block that it is at."""
    reader, writer = os.pipe()
    with subprocess.Popen([program, "--no-guest"], stdin=reader, stdout=subprocess.PIPE) as alone:
        os.close(reader)
        os.write(writer, b"own:cr3 2000 0\n")
        os.close(writer)
        assert alone.wait(timeout=20) == 0


def test_rounds_go_on_after_a_failure(start: Callable[..., Program]) -> None:
    """What cannot be measured is dropped with its reason; the rest has its blocks."""
    kept: list[Facts | Block] = []
    options = Options(rounds=2, samples=5, warm=1, only=("hypercall", "trap"))
    side = Side(start, keep=kept.append)
    measure_rounds([side], options, progress=Step("Measure", None))
    done = side.done
    assert set(done.failed) == {"clock", "exit", "exit-kernel", "hypercall", "trap"}
    assert [set(blocks) for blocks in done.blocks] == [{"own:hypercall", "own:trap"}] * 2
    assert len(kept) == 1 + 4
    again = [msgspec.json.decode(msgspec.json.encode(one), type=Block) for one in kept[1:]]
    assert {block.kind for block in again} == {"own:hypercall", "own:trap"}


def test_order_is_random_and_repeats() -> None:
    """Each round has another order; the same seed gives the same ones."""
    from harness.bench.program import KindFacts
    from harness.bench.rounds import order_of

    facts = Facts(
        pid=7, vendor="AMD", cpus=2, vcpus=1, tsc_khz=1, tsc_compares=True, apart=False,
        kernel_threads=1, version=1, singlestep=0,
        kinds={
            name: KindFacts(events=[3], samples=9, error=-2 * (name == "cr3")) for name in KINDS
        },
    )  # fmt: skip
    orders = list(order_of(facts, Options(rounds=4, seed=random.Random().randrange(99))))
    assert len({tuple(order) for order in orders}) == 4
    assert all(len(order) == 3 + 2 * (len(KINDS) - 1) and "cr3" not in order for order in orders)
    assert list(order_of(facts, Options(seed=5))) == list(order_of(facts, Options(seed=5)))
