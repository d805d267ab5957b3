# SPDX-License-Identifier: GPL-2.0-or-later
"""No verdict is lost and nothing stays behind, whichever process of a run dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from plugin_suite import Suite, wait_until

from harness.report.model import Outcome
from harness.report.store import load_run

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """A fresh suite."""
    return Suite(pytester)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_dies(suite: Suite) -> None:
    """Its test is MISS, all others run on another worker."""
    suite.run(
        """
        import os, signal
        pytestmark = pytest.mark.clause("HOOK-OK")
        def test_a(): pass
        def test_b(): pass
        def test_dies(): os.kill(os.getpid(), signal.SIGKILL)
        def test_c(): pass
        def test_d(): pass
        """,
        "-n2",
    )
    verdicts = suite.verdicts()
    assert verdicts.pop("test_dies") == "MISS"
    assert verdicts == {f"test_{n}": "PASS" for n in "abcd"}
    assert "died" in suite.record("test_dies")["reason"]


def test_too_many_workers_die(suite: Suite) -> None:
    """When pytest-xdist stops replacing workers, the rest is MISS and says why."""
    suite.run(
        """
        import os, signal
        pytestmark = pytest.mark.clause("HOOK-OK")
        @pytest.mark.parametrize("n", range(5))
        def test_dies(n): os.kill(os.getpid(), signal.SIGKILL)
        """,
        "-n1",
        "--max-worker-restart=1",
    )
    assert set(suite.verdicts().values()) == {"MISS"}
    assert len(suite.verdicts()) == 5
    (end,) = suite.records("end")
    assert "2 workers died" in end["reason"]


def test_stopped_after_the_first_failure(suite: Suite) -> None:
    """-x: what did not run is MISS, with the reason."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")
        def test_a(): assert False
        def test_b(): pass
        """,
        "-x",
    )
    assert suite.verdicts() == {"test_a": "FAIL", "test_b": "MISS"}
    assert "stopping after 1 failures" in suite.record("test_b")["reason"]


def test_a_stuck_worker_is_ended(suite: Suite) -> None:
    """A test that does not even react to its limit costs its worker, not the run."""
    suite.run(
        """
        import signal, threading
        from harness.plugin import worker
        worker.STUCK_GRACE_S = 1
        pytestmark = pytest.mark.clause("HOOK-OK")

        @pytest.mark.timeout(1)
        def test_stuck():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            threading.Event().wait(60)
        def test_after(): pass
        """,
        "-n1",
    )
    assert suite.verdicts() == {"test_stuck": "MISS", "test_after": "PASS"}
    assert "test_stuck" in suite.evidence("test_stuck", "stacks")


SLOW = """
    import os, pathlib, threading
    pytestmark = pytest.mark.clause("HOOK-OK")
    def test_quick(): pass
    @pytest.mark.parametrize("n", range(4))
    def test_slow(n):
        name = pathlib.Path(f"pid{os.getpid()}")
        name.touch()
        threading.Event().wait(60)
"""


def start_slow(suite: Suite) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A run whose two workers are in the middle of slow tests; gives their process ids."""
    suite.write(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *suite.options("-n2")],
        cwd=suite.pytester.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(list(suite.pytester.path.glob("pid*"))) == 2, "two slow tests")
    return process, [int(p.name.removeprefix("pid")) for p in suite.pytester.path.glob("pid*")]


def test_the_controller_is_killed(suite: Suite) -> None:
    """kill -9: verdicts written so far stay, the rest is MISS, the workers are gone."""
    process, workers = start_slow(suite)
    wait_until(suite.records, "the first verdict")
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, workers)), "workers end with their controller")
    run = load_run(suite.run_dir)
    assert [v.verdict for v in run.verdicts] == [Outcome.PASS]
    assert run.end is None
    assert run.notes
    outcomes = [v.verdict for v in run.all_verdicts()]
    assert outcomes == [Outcome.PASS] + [Outcome.MISS] * 4
