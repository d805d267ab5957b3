# SPDX-License-Identifier: GPL-2.0-or-later
"""A run on many machines without machines: real workers of pytest-xdist, here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_suite import Suite, wait_until

from harness.errors import InfraError
from harness.fleet import guard
from harness.fleet.session import FLEET, read_losses, settled_tests
from harness.plugin.parcel import Parcels, unpack
from harness.report.model import RunFacts
from harness.report.store import VerdictFile

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """A fresh suite, with the first line of its verdicts."""
    suite = Suite(pytester)
    with VerdictFile(suite.run_dir) as file:
        file.write(RunFacts(run="run", started="", target="fleet"))
    return suite


def run(suite: Suite, source: str, machines: dict[str, list[str]], **more: str) -> None:
    """One round, on workers of these names."""
    (suite.run_dir / FLEET).write_text(json.dumps(machines | {"here": ["source"]}))
    suite.write(source)
    specs = [f"--tx=popen//id={name}{more.get(name, '')}" for name in ("here", *machines)]
    options = suite.options("--dist=load", "--kvmi-fleet", *specs)
    suite.pytester.runpytest_subprocess(*options)


SOURCE = """
import os, signal
pytestmark = pytest.mark.clause("HOOK-OK")

@pytest.mark.parametrize("n", range(4))
def test_any(n): pass

@pytest.mark.needs("vmx")
def test_of_intel(evidence):
    (evidence / "note.txt").write_text("seen")

@pytest.mark.needs("source")
def test_of_the_source(): pass

@pytest.mark.needs("mips")
def test_of_nobody(): pass

def test_of_either():
    if os.environ["PYTEST_XDIST_WORKER"] == "a":
        pytest.skip("not on a")
"""


def workers_of(suite: Suite) -> dict[str, list[str]]:
    """The workers that gave a verdict on each test."""
    found: dict[str, list[str]] = {}
    for record in suite.records():
        found.setdefault(record["test"].partition("::")[2], []).append(record["worker"])
    return found


def test_tests_go_where_they_can_run(suite: Suite) -> None:
    run(suite, SOURCE, {"a": ["svm"], "b": ["vmx"]})
    found = workers_of(suite)
    assert found["test_of_intel"] == ["b"]
    assert found["test_of_the_source"] == ["here"]
    kinds = {"a": frozenset({"svm"}), "b": frozenset({"vmx"})}
    if found["test_of_either"] == ["a"]:  # b had ended: it is for another round
        assert not {t for t in settled_tests(suite.run_dir, kinds) if "of_either" in t}
        run(suite, SOURCE, {"b": ["vmx"]})
    assert workers_of(suite)["test_of_either"][-1] == "b"
    assert "test_it.py::test_of_either" in settled_tests(suite.run_dir, kinds)
    assert "test_of_nobody" not in found
    assert set(suite.verdicts().values()) <= {"PASS", "SKIP"}
    # Whoever began the rounds ends the run.
    assert not suite.records("end")


def test_a_lost_machine_is_told_and_the_rest_done(suite: Suite) -> None:
    """In this round by the others; what it alone could do, in another by one like it."""
    source = """
import os, signal
pytestmark = pytest.mark.clause("HOOK-OK")
@pytest.mark.parametrize("n", range(4))
def test_any(n): pass

@pytest.mark.needs("vmx")
@pytest.mark.parametrize("n", range(3))
def test_of_intel(n):
    if os.environ["PYTEST_XDIST_WORKER"] == "b":
        os.kill(os.getpid(), signal.SIGKILL)
"""
    run(suite, source, {"a": ["svm"], "b": ["vmx"]})
    (loss,) = read_losses(suite.run_dir)
    assert (loss.machine, loss.test.partition("::")[2]) == ("b", "test_of_intel[0]")
    assert workers_of(suite) == {f"test_any[{n}]": ["a"] for n in range(4)}
    run(suite, source, {"c": ["vmx"]})
    assert workers_of(suite) == {
        **{f"test_any[{n}]": ["a"] for n in range(4)},
        **{f"test_of_intel[{n}]": ["c"] for n in range(3)},
    }


def test_a_machine_that_is_of_no_use_leaves_its_tests_to_others(suite: Suite) -> None:
    """No test is to blame for a host that cannot be had."""
    source = """
import os
from conftest import Target
if os.environ.get("PYTEST_XDIST_WORKER") == "b":
    Target.fail = errors.InfraError("its kernel died before")
pytestmark = pytest.mark.clause("HOOK-OK")
@pytest.mark.parametrize("n", range(3))
def test_with_host(host, n): pass
"""
    there = suite.pytester.path / "there"
    run(suite, source, {"a": ["svm"], "b": ["svm"]}, b=f"//kvmi_run={there}")
    (loss,) = read_losses(suite.run_dir)
    assert (loss.machine, loss.left, loss.error) == ("b", True, "its kernel died before")
    run(suite, source, {"a": ["svm"]})
    assert workers_of(suite) == {f"test_with_host[{n}]": ["a"] for n in range(3)}
    assert set(suite.verdicts().values()) == {"PASS"}


def test_evidence_comes_with_the_report(suite: Suite) -> None:
    """From a worker that writes elsewhere."""
    there = suite.pytester.path / "there"
    run(suite, SOURCE, {"b": ["vmx"]}, b=f"//kvmi_run={there}")
    assert (there / "evidence").is_dir()
    assert suite.evidence("test_of_intel", "note") == "seen"
    assert (suite.run_dir / "plan.jsonl").read_text().count('"needs":["vmx"]') == 1


def test_files_are_sent_by_what_was_added(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    parcels = Parcels(there)
    for text in ("one\n", "one\ntwo\n", "one\ntwo\n", "new\n"):
        (there / "console.log").write_text(text)
        unpack(here, parcels.pack(["console.log", "none.txt"]))
        assert (here / "console.log").read_text() == text
    assert not (here / "none.txt").exists()


def test_no_file_is_written_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(InfraError, match="outside"):
        unpack(tmp_path / "run", {"../x": (0, b"")})


def test_a_guard_leaves_nothing_behind(tmp_path: Path) -> None:
    """A worker's orphan, in a session of its own, ends with the worker."""
    told = tmp_path / "pid"
    program = (
        "import subprocess\n"
        f"child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"open({str(told)!r}, 'w').write(str(child.pid))\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, guard.__file__, "-c", program], check=False, timeout=60)
    assert done.returncode != 0
    assert not Path(f"/proc/{told.read_text()}").exists()


def test_a_guard_ends_with_its_connection(tmp_path: Path) -> None:
    """The signal by which a server ends a session's programs is passed on."""
    told = tmp_path / "pid"
    program = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    process = subprocess.Popen([sys.executable, guard.__file__, "-c", program])
    try:
        wait_until(lambda: told.exists() and told.read_text(), "the worker's start")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
    assert not Path(f"/proc/{told.read_text()}").exists()
