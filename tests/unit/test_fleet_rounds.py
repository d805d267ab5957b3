# SPDX-License-Identifier: GPL-2.0-or-later
"""Round after round: what becomes of tests whose machine was lost.

The rounds, pytest and its workers are real. The machines are this one: what they are asked for
in between is answered here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from harness import paths
from harness.fleet.inventory import Machine
from harness.fleet.machine import Fate, FleetMachine
from harness.fleet.rounds import Rounds
from harness.fleet.runtime import Runtime
from harness.report.model import RunFacts, Verdict
from harness.report.store import Run, VerdictFile, load_run

SUITE = """
import os, signal
import pytest

pytestmark = pytest.mark.clause("HOOK-OK")

def die(*workers):
    if os.environ["PYTEST_XDIST_WORKER"] in workers:
        os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.parametrize("n", range(3))
def test_any(n): pass

@pytest.mark.needs("vmx")
def test_panic(): die("b")

@pytest.mark.needs("vmx")
def test_after_it(): pass

def test_deadly(): die("a", "b", "c")

@pytest.mark.needs("rare")
@pytest.mark.parametrize("n", range(2))
def test_rare(n): die("c")

@pytest.mark.needs("mips")
def test_of_nobody(): pass

@pytest.mark.needs("source")
def test_of_the_source(): pass
"""


class Here(FleetMachine):
    """A machine of a fleet that is this one."""

    def __init__(self, name: str, run_dir: Path, words: str, fates: list[Fate]) -> None:
        super().__init__(Machine(name=name, address=name), run_dir)
        self.words = frozenset(words.split())
        self.prepared = 1
        self._fates = fates
        self.unreachable: set[str] = set()

    def spec(self, config: Path) -> str:
        assert f"Host kvmi-{self.name}\n" in config.read_text()
        if self.unreachable:
            return f"ssh=kvmi-nowhere.invalid//ssh_config=/dev/null//id={self.name}"
        return f"popen//chdir={paths.ROOT}//id={self.name}"

    def fate(self) -> Fate:
        fate = self._fates.pop(0) if self._fates else Fate.THERE
        if fate is Fate.GONE:
            self.lost = "it does not answer"
        return fate

    def there(self) -> bool:
        return self.name not in self.unreachable

    def prepare(self, runtime: Runtime) -> None:
        self.prepared += 1


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run of the suite above."""
    root = tmp_path / "root"
    (root / "suite").mkdir(parents=True)
    (root / "suite/test_it.py").write_text(SUITE)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    monkeypatch.setattr(paths, "ROOT", root)
    # What is imported from where this is run.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), *_python_path()]))
    run_dir = tmp_path / "run"
    with VerdictFile(run_dir) as file:
        file.write(RunFacts(run="run", started="", target="fleet"))
    return run_dir


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _runs(run: Run, test: str) -> list[Verdict]:
    return [one for one in run.verdicts if one.test.partition("::")[2] == test]


def test_what_becomes_of_lost_machines(run_dir: Path) -> None:
    a = Here("a", run_dir, "svm", [])
    b = Here("b", run_dir, "vmx", [Fate.RESTARTED])
    c = Here("c", run_dir, "rare", [Fate.GONE])
    Rounds(run_dir, [a, b, c], cast(Runtime, None)).run(["suite"])
    run = load_run(run_dir)

    # Its kernel restarted the machine: a broken promise, and the machine is made ready again.
    (panic,) = _runs(run, "test_panic")
    assert (panic.verdict, panic.worker) == ("FAIL", "b")
    assert panic.reason == "machine b restarted during this test"
    (after,) = _runs(run, "test_after_it")
    assert (after.verdict, after.worker) == ("PASS", "b")
    assert b.prepared >= 2

    # A test that two machines do not survive is not given to a third.
    (deadly,) = _runs(run, "test_deadly")
    assert deadly.verdict == "MISS"
    assert deadly.reason.startswith("lost during this test, each time: ")
    assert " and " in deadly.reason

    # Nobody else could do what the lost machine left, and nobody ever could do that.
    for n in range(2):
        (rare,) = _runs(run, f"test_rare[{n}]")
        assert (rare.verdict, rare.reason) == ("MISS", "it needs rare, and c was lost")
    (nobody,) = _runs(run, "test_of_nobody")
    assert (nobody.verdict, nobody.reason) == ("SKIP", "no machine of the fleet has mips")

    assert [_runs(run, f"test_any[{n}]")[0].verdict for n in range(3)] == ["PASS"] * 3
    assert _runs(run, "test_of_the_source")[0].worker == "here"
    assert {one.test for one in run.plan} == {one.test for one in run.verdicts}
    assert run.end is not None
    assert not run.end.reason
    assert set(run.end.lost) == {"c"}
    assert run.end.lost["c"].startswith("it does not answer; it ran ")
    assert "machine c was lost: it does not answer" in run.notes[0]


def test_a_machine_that_is_gone_before_its_worker_starts(run_dir: Path) -> None:
    """The others do all of it."""
    a = Here("a", run_dir, "svm vmx rare", [])
    gone = Here("gone", run_dir, "svm", [Fate.GONE])
    gone.unreachable = {"gone"}
    Rounds(run_dir, [gone, a], cast(Runtime, None)).run(["suite/test_it.py::test_any"])
    run = load_run(run_dir)
    assert [verdict.worker for verdict in run.verdicts] == ["a"] * 3
    assert run.end is not None
    assert not run.end.reason
    assert set(run.end.lost) == {"gone"}
