# SPDX-License-Identifier: GPL-2.0-or-later
"""Running the suite under watch: exit codes, and reports whatever happens to pytest."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_suite import CONFTEST, wait_until

from harness.conform import run_suite, selection
from harness.errors import InfraError, UsageError
from harness.report.model import Outcome, RunFacts
from harness.report.store import VerdictFile, load_run, utc_now

HEAD = """
import os, pathlib, signal, threading
import pytest
from harness import errors
pytestmark = pytest.mark.clause("HOOK-OK")
"""


class Project:
    """A project with a suite, and a prepared run of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_dir = root / "run"
        (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
        (root / "conftest.py").write_text(CONFTEST)
        with VerdictFile(self.run_dir) as file:
            file.write(RunFacts(run="run", started=utc_now(), target="fake", series="linux@0"))

    def write(self, source: str) -> None:
        """Make the suite's one module."""
        (self.root / "test_it.py").write_text(HEAD + source)

    def run(self, source: str, *arguments: str) -> int:
        """Write and run the suite."""
        self.write(source)
        return run_suite(self.run_dir, list(arguments), root=self.root)

    def outcomes(self) -> list[str]:
        """All verdicts, as written."""
        return [v.verdict for v in load_run(self.run_dir).verdicts]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh project."""
    return Project(tmp_path)


def test_all_held(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    """0, and every document is there."""
    assert project.run("def test_a(host): pass\ndef test_b(host): pass", "-n2") == 0
    for name in ("report.html", "junit.xml", "pytest.log", "counters", "plan.jsonl"):
        assert (project.run_dir / name).is_file()
    out = capfd.readouterr()
    assert "The promise held." in out.out
    assert f"Report: {project.run_dir}/report.html" in out.out
    run = load_run(project.run_dir)
    assert run.verdicts[0].series == "linux@0"
    assert run.notes == []


def test_broken_promise(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    """1, the failure told at once and at the end, with the command to repeat it."""
    assert project.run("def test_a(): assert 1 == 2\ndef test_b(): {}['x']") == 1
    out = capfd.readouterr()
    assert "FAIL  HOOK-OK" in out.err
    assert "inv conform --select" in out.out


def test_our_own_fault(project: Project) -> None:
    """4 when something could not be judged."""
    assert project.run("def test_a(): pass\ndef test_b(): raise errors.InfraError('x')") == 4


def test_pytest_is_killed(project: Project) -> None:
    """The verdicts so far are reported, the rest is MISS, and the exit code is 4."""
    code = project.run(
        """
def test_a(): pass
def test_b(): os.kill(os.getpid(), signal.SIGKILL)
def test_c(): pass
"""
    )
    assert code == 4
    assert project.outcomes() == ["PASS", "MISS", "MISS"]
    run = load_run(project.run_dir)
    assert run.end is not None
    assert run.end.reason == "pytest was killed by SIGKILL"
    assert (project.run_dir / "report.html").is_file()


def test_wrong_test(project: Project) -> None:
    """An unknown clause is a usage error that shows what pytest said."""
    with pytest.raises(UsageError) as caught:
        project.run("@pytest.mark.clause('HOOK-OKAY')\ndef test_a(): pass", "-n1")
    assert "unknown clause 'HOOK-OKAY'; did you mean HOOK-OK" in caught.value.details


def test_nothing_matches(project: Project) -> None:
    """A choice that matches nothing is a usage error."""
    with pytest.raises(UsageError, match="no test matches -k nothing"):
        project.run("def test_a(): pass", "-k", "nothing")


def test_cannot_be_imported(project: Project) -> None:
    """A test module that does not even load is our fault."""
    with pytest.raises(InfraError) as caught:
        project.run("import no_such_module")
    assert "no_such_module" in caught.value.details


def test_a_module_that_does_not_load_costs_no_verdict(project: Project) -> None:
    """When one module fails to load, the tests of the others are MISS, not forgotten."""
    (project.root / "test_other.py").write_text("import no_such_module\n")
    assert project.run("def test_a(): pass") == 4
    assert project.outcomes() == ["MISS"]


STARTER = """
import sys, pathlib
from harness.conform import run_suite
root = pathlib.Path(sys.argv[1])
sys.exit(run_suite(root / "run", ["-n2"], root=root))
"""

SLOW = """
def test_a(): pass
@pytest.mark.parametrize("n", range(4))
def test_slow(n):
    pathlib.Path(f"pid{os.getpid()}").touch()
    threading.Event().wait(60)
"""


def start(project: Project) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A run in a process of its own, with two workers in the middle of slow tests."""
    project.write(SLOW)
    process = subprocess.Popen([sys.executable, "-c", STARTER, str(project.root)])
    wait_until(lambda: len(list(project.root.glob("pid*"))) == 2, "two slow tests")
    return process, [int(p.name.removeprefix("pid")) for p in project.root.glob("pid*")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(project: Project, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end the workers, and the report is made."""
    process, workers = start(project)
    wait_until(project.outcomes, "the first verdict")
    process.send_signal(number)
    assert process.wait(timeout=30) == 4
    assert sorted(project.outcomes()) == ["MISS"] * 4 + ["PASS"]
    assert (project.run_dir / "report.html").is_file()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers end")


def test_killed(project: Project) -> None:
    """kill -9: pytest and its workers end, and the report can be made later."""
    process, workers = start(project)
    wait_until(project.outcomes, "the first verdict")
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers end")
    outcomes = [v.verdict for v in load_run(project.run_dir).all_verdicts()]
    assert outcomes == [Outcome.PASS] + [Outcome.MISS] * 4


def test_orphans_are_ended(project: Project) -> None:
    """What a worker leaves running does not outlive the run, whatever session it is in."""
    code = project.run(
        """
import subprocess
def test_a():
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    pathlib.Path("orphan").write_text(str(process.pid))
""",
        "-n1",
    )
    assert code == 0
    pid = int((project.root / "orphan").read_text())
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("select", "arguments"),
    [
        (None, ["tests/conformance", "tests/lifecycle"]),
        ("HOOK-OK", ["--kvmi-clause=HOOK-OK", "tests/conformance", "tests/lifecycle"]),
        (
            "HOOK-* UNHOOK-ABI",
            [
                "--kvmi-clause=HOOK-*",
                "--kvmi-clause=UNHOOK-ABI",
                "tests/conformance",
                "tests/lifecycle",
            ],
        ),
        ("migration and not slow", ["-k", "migration and not slow", "tests/conformance",
                                    "tests/lifecycle"]),
        (
            "tests/unit/test_report_conform.py::test_x[a b, c] tests/unit/plugin_suite.py",
            ["tests/unit/test_report_conform.py::test_x[a b, c]", "tests/unit/plugin_suite.py"],
        ),
    ],
)  # fmt: skip
def test_selection(select: str | None, arguments: list[str]) -> None:
    """Clauses, tests, or an expression."""
    assert selection(select) == arguments


@pytest.mark.parametrize(
    ("select", "words"),
    [("HOOK-OKAY", "HOOK-OK"), ("NO-SUCH-*", "NO-SUCH"), ("tests/no.py::test_x", "tests/no.py")],
)
def test_selection_of_nothing(select: str, words: str) -> None:
    """What does not exist is a usage error, with near names."""
    with pytest.raises(UsageError) as caught:
        selection(select)
    assert words in str(caught.value)


def test_signals_are_as_before(project: Project) -> None:
    """Running the suite changes nothing for its caller."""
    before = signal.getsignal(signal.SIGTERM)
    project.run("def test_a(): pass")
    assert signal.getsignal(signal.SIGTERM) is before
