# SPDX-License-Identifier: GPL-2.0-or-later
"""The counters in shared memory, with real processes that are really killed."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.counters import Counters, attach, create, quantile_ns, total
from harness.counters.view import main, watch_rates
from harness.errors import InfraError, UsageError

WRITER = """
    import os, signal, sys, time
    from pathlib import Path
    from harness.counters import attach
    path, index, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    slot = attach(path).slot(index)
    slot.test(f"test of {index}")
"""


def writer(path: Path, index: int, count: int, body: str) -> subprocess.Popen[str]:
    """A process that has slot ``index`` and runs ``body``."""
    program = textwrap.dedent(WRITER) + textwrap.dedent(body)
    arguments = [sys.executable, "-c", program, str(path), str(index), str(count)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of four slots."""
    file = tmp_path / "counters"
    create(file, slots=4).close()
    return file


@pytest.fixture
def counters(path: Path) -> Iterator[Counters]:
    """The file, attached."""
    with attach(path) as attached:
        yield attached


def test_all_counts(counters: Counters) -> None:
    """What a session reports is read back, by name."""
    slot = counters.slot(2)
    slot.test("tests/x.py::test_y")
    slot.phase("hooked")
    for _ in range(3):
        slot.event(3, 560)
    slot.event(0, 16)
    slot.event_reply(24, 20_000)
    slot.command(24)
    slot.command(24)
    slot.reply(32, 1500)
    slot.reply(16, 3000, failed=True)
    slot.problem()
    got = counters.read_slot(2)
    assert got.events == {"HYPERCALL": 3, "UNHOOK": 1}
    assert (got.event_count, got.event_replies, got.commands) == (4, 1, 2)
    assert (got.replies, got.failed_replies, got.problems) == (2, 1, 1)
    assert (got.bytes_in, got.bytes_out) == (3 * 560 + 16 + 32 + 16, 24 + 48)
    assert (got.test, got.phase, got.pid) == ("tests/x.py::test_y", "hooked", os.getpid())
    assert got.event_latency[14] == 1  # 16384..32767 ns
    assert (got.command_latency[10], got.command_latency[11]) == (1, 1)
    assert not got.torn
    assert 0 <= time.monotonic_ns() - got.heartbeat_ns < 60e9
    assert [s.used for s in counters.read()] == [False, False, True, False]


def test_texts_are_cut_between_characters(counters: Counters) -> None:
    """A long name keeps its beginning, and stays valid text."""
    slot = counters.slot(0)
    slot.test("é" * 500)
    assert counters.read_slot(0).test == "é" * 127
    slot.test("")
    assert counters.read_slot(0).test == ""


def test_extreme_values(counters: Counters) -> None:
    """Unknown events and absurd latencies land at the edges."""
    slot = counters.slot(0)
    slot.event(65535, 1)
    slot.event_reply(1, 0)
    slot.event_reply(1, -5)
    slot.event_reply(1, 1 << 62)
    got = counters.read_slot(0)
    assert got.events == {"event 31": 1}
    assert (got.event_latency[0], got.event_latency[39]) == (2, 1)


def test_several_processes(path: Path, counters: Counters) -> None:
    """Each has its slot, readers see consistent ones meanwhile, and no update is lost."""
    body = """
        for i in range(count):
            slot.event(3, 560)
            slot.event_reply(24, 1000)
        print("done")
    """
    writers = [writer(path, i, 20_000, body) for i in range(3)]
    looks = 0
    while any(w.poll() is None for w in writers):
        for slot in counters.read()[:3]:
            if slot.torn:  # the machine is so busy that a writer stood still in mid-update
                continue
            assert slot.bytes_in == slot.event_count * 560
            assert slot.event_count - slot.event_replies in (0, 1)
        looks += 1
    for one in writers:
        assert one.communicate()[0] == "done\n"
    assert looks > 3
    sums = total(counters.read())
    assert (sums.events, sums.event_replies) == ({"HYPERCALL": 60_000}, 60_000)
    assert sum(sums.event_latency) == 60_000


def test_killed_at_any_moment(path: Path, counters: Counters) -> None:
    """After kill -9 the slot can be read, and holds what the writer had reported."""
    body = """
        for i in range(10**9):
            slot.event(3, 560)
            if i % 1000 == 999:
                print(i + 1, flush=True)
    """
    lacking_before = 0
    for attempt in range(5):
        before = counters.read_slot(1).event_count
        one = writer(path, 1, 0, body)
        assert one.stdout is not None
        for _ in range(3 + attempt):
            reported = int(one.stdout.readline())
        one.kill()
        reported = int(([str(reported), *one.communicate()[0].split()])[-1])
        started = time.monotonic()
        got = counters.read_slot(1)
        assert time.monotonic() - started < 1
        # Up to 1000 further events are not reported yet.
        assert reported <= got.event_count - before < reported + 1000
        # A torn slot may lack the bytes of its last event, and keeps lacking them.
        lacking = got.event_count * 560 - got.bytes_in
        assert lacking == lacking_before or (got.torn and lacking == lacking_before + 560)
        lacking_before = lacking
        assert (got.test, got.pid) == ("test of 1", one.pid)


def test_killed_in_mid_update(path: Path, counters: Counters) -> None:
    """The reader says that the slot is torn, soon; the next writer repairs it and goes on."""
    body = """
        from harness.counters.layout import WORD
        for i in range(count):
            slot.event(3, 560)
        slot._begin()
        slot._words[WORD["events"] + 3] += 1
        os.kill(os.getpid(), signal.SIGKILL)
    """
    one = writer(path, 0, 10, body)
    one.wait()
    assert one.returncode == -signal.SIGKILL
    started = time.monotonic()
    got = counters.read_slot(0)
    assert time.monotonic() - started < 0.5
    assert got.torn
    assert (got.event_count, got.bytes_in, got.test) == (11, 5600, "test of 0")
    assert all(not s.torn for s in counters.read()[1:])

    slot = counters.slot(0)
    slot.event(3, 560)
    got = counters.read_slot(0)
    assert (got.torn, got.event_count, got.generation, got.pid) == (False, 12, 2, os.getpid())
    assert got.test == ""


def test_stopped_in_mid_update(path: Path, counters: Counters) -> None:
    """A living writer that does not go on costs a reader a bounded time."""
    body = """
        slot._begin()
        print("odd", flush=True)
        time.sleep(60)
    """
    one = writer(path, 0, 0, body)
    assert one.stdout is not None
    one.stdout.readline()
    started = time.monotonic()
    assert counters.read_slot(0).torn
    assert time.monotonic() - started < 1
    one.kill()
    one.communicate()


def test_one_writer_per_slot(path: Path, counters: Counters) -> None:
    """A slot of a living process is refused; that of a dead one is not."""
    one = writer(path, 3, 0, 'print("ready", flush=True); time.sleep(60)')
    assert one.stdout is not None
    one.stdout.readline()
    with pytest.raises(UsageError, match=f"slot 3 is in use by process {one.pid}"):
        counters.slot(3)
    one.kill()
    one.communicate()
    slot = counters.slot(3)
    assert counters.read_slot(3).generation == 2
    slot.release()
    assert (counters.read_slot(3).pid, counters.read_slot(3).generation) == (0, 2)
    with pytest.raises(UsageError, match="has no slot 4"):
        counters.slot(4)


def test_any_program_can_parse_it(path: Path, counters: Counters) -> None:
    """The header alone, with struct and json, leads to every number."""
    counters.slot(1).event(5, 568)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, header, size, slots = struct.unpack_from("<8sIIII", data)
        (length,) = struct.unpack_from("<I", data, 40)
        text = json.loads(data[44 : 44 + length])
        assert (magic, version, slots) == (b"KVMICNTR", 1, 4)
        offsets = {name: offset for name, offset, _ in text["fields"]}
        (event_id,) = (int(i) for i, name in text["events"].items() if name == "BREAKPOINT")
        at = header + 1 * size + offsets["events"] + 8 * event_id
        assert struct.unpack_from("<Q", data, at) == (1,)


def test_wrong_files(tmp_path: Path, path: Path) -> None:
    """One clear message each."""
    with pytest.raises(UsageError, match=r"cannot read the counters .*none: No such file"):
        attach(tmp_path / "none")
    (tmp_path / "other").write_bytes(bytes(5000))
    with pytest.raises(UsageError, match="other is no file of counters"):
        attach(tmp_path / "other")
    data = path.read_bytes()
    (tmp_path / "newer").write_bytes(data[:8] + b"\2" + data[9:])
    with pytest.raises(UsageError, match="newer has counters of version 2"):
        attach(tmp_path / "newer")
    (tmp_path / "short").write_bytes(data[:5000])
    with pytest.raises(UsageError, match="short is shorter than its header says"):
        attach(tmp_path / "short")
    with pytest.raises(InfraError, match=r"cannot make the counters .*No such file"):
        create(tmp_path / "no" / "counters", slots=1)


def test_quantiles() -> None:
    """By proportion within the bucket; none of nothing."""
    assert quantile_ns([0, 0, 0], 0.5) is None
    assert quantile_ns([0, 0, 0, 4], 0.5) == 12.0
    assert quantile_ns([0, 1, 0, 1], 1.0) == 16.0
    assert quantile_ns([1, 1], 0.5) == 2.0


def test_view(path: Path, counters: Counters, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, JSON for programs, and an error for a wrong path."""
    slot = counters.slot(0)
    slot.test("test_a")
    slot.event(1, 560)
    slot.event_reply(24, 50_000)
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "PAUSE" in shown
    assert main([str(path), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["events"] == {"PAUSE": 1}
    assert main([str(path) + "x"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_rates(path: Path, counters: Counters, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each second tells how many events came in it, and how many in all."""
    slot = counters.slot(0)
    slot.event(1, 560)
    done = threading.Event()

    def count() -> None:
        while not done.wait(0.01):
            slot.event(3, 560)

    thread = threading.Thread(target=count)
    thread.start()
    watch_rates(path, seconds=1)
    done.set()
    thread.join()
    (line,) = capsys.readouterr().out.splitlines()
    assert "PAUSE 0/s (1)" in line
    found = re.search(r"HYPERCALL (\d+)/s \((\d+)\)", line)
    assert found is not None, line
    assert 0 < int(found[1]) <= int(found[2])


def test_increments_are_cheap(counters: Counters) -> None:
    """Far below what one message costs. The bound is loose: other work shares the machine."""
    slot = counters.slot(0)
    best = min(_time_events(slot.event) for _ in range(20))
    assert best < 5e-6


def _time_events(event: object, count: int = 1000) -> float:
    assert callable(event)
    started = time.perf_counter()
    for _ in range(count):
        event(3, 560)
    return (time.perf_counter() - started) / count
