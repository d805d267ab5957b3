# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that build: their log, their failure, their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.build.progress import duration, step
from harness.build.run import output_of, run_logged
from harness.errors import BuildError


def test_the_log_has_the_command_and_its_output(tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "logs" / "echo.log"
    run_logged(
        ["sh", "-c", "echo one; echo two >&2; printf three"],
        cwd=tmp_path,
        log=log,
        timeout_s=10,
        on_line=lines.append,
    )
    assert lines == ["one", "two", "three"]
    assert "sh -c" in log.read_text()
    assert log.read_text().endswith("one\ntwo\nthree")


def test_a_failure_names_the_work_the_first_error_and_the_log(tmp_path: Path) -> None:
    log = tmp_path / "make.log"
    with pytest.raises(BuildError) as caught:
        run_logged(
            ["sh", "-c", "echo fine; echo 'a.c:3:1: error: no such thing'; echo later; exit 2"],
            cwd=tmp_path,
            log=log,
            timeout_s=10,
            what="kernel build",
        )
    assert "kernel build failed (exit code 2): a.c:3:1: error: no such thing" in str(caught.value)
    assert str(log) in caught.value.hint
    assert caught.value.details.endswith("later")


def test_what_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"not done after 1 s"):
        run_logged(
            ["sh", "-c", "sleep 1000 & echo $! > child; wait"],
            cwd=tmp_path,
            log=tmp_path / "log",
            timeout_s=0.6,
        )
    child = int((tmp_path / "child").read_text())
    assert _gone(child, within_s=5)


def test_a_program_ends_when_we_are_killed(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from harness.build.run import run_logged;"
        "run_logged(['sh', '-c', 'echo $$ > pid; exec sleep 1000'],"
        "cwd=Path('.'), log=Path('log'), timeout_s=900)"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    deadline = time.monotonic() + 10
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.02)  # a file cannot be waited for otherwise without another dependency
    ours.send_signal(signal.SIGKILL)
    ours.wait(5)
    assert _gone(int((tmp_path / "pid").read_text()), within_s=5)


def test_a_full_disk_is_no_compiler_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left") as caught:
        run_logged(
            ["sh", "-c", "cat /dev/zero > /dev/full"],
            cwd=tmp_path,
            log=tmp_path / "log",
            timeout_s=10,
        )
    assert caught.value.errno == 28


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no-such-program"):
        output_of(["no-such-program"])
    with pytest.raises(BuildError, match="no-such-program"):
        run_logged(["no-such-program"], cwd=tmp_path, log=tmp_path / "log", timeout_s=5)


def test_steps_say_how_long_they_took(capsys: pytest.CaptureFixture[str]) -> None:
    with step("Outer"), step("Inner", total=4) as inner:
        inner.update(done=3, doing="the third")
        assert inner.state() == "75 %, the third"
    with pytest.raises(ValueError, match="x"), step("Broken"):
        raise ValueError("x")
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["Outer ...", "Inner ..."]
    assert said[2].startswith("Inner: done in 0.")
    assert said[-1].startswith("Broken: failed after 0.")


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.44, 12.3, 185.2)] == ["0.4 s", "12 s", "3 min 05 s"]


def _gone(pid: int, *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead, and only its new parent has not looked yet
            return True
        time.sleep(0.02)  # not our child: there is nothing to wait on
    return False
