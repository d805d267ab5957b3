# SPDX-License-Identifier: GPL-2.0-or-later
"""From what happens in a test to its verdict, seen from outside: whole pytest runs on small
generated suites, with a target that boots nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import pathlib
import threading
import pytest
from harness import errors


class Console:
    def __init__(self):
        self.text = ""

    def mark(self):
        return len(self.text)

    def since(self, mark):
        return self.text[mark:]

    def complaints(self, mark):
        return [line for line in self.since(mark).splitlines() if "WARNING" in line]


class Host:
    def __init__(self, name, evidence):
        self.name = name
        self.evidence = evidence
        self.console = Console()
        self.fate = None
        self.closed = False
        (evidence / "console.log").write_text("booted\\n")

    def check(self):
        if self.fate is not None:
            raise self.fate

    def crash(self):
        self.fate = errors.HostCrashedError("kernel panic on " + self.name)

    def close(self):
        self.closed = True


class Target:
    name = "fake"
    started = []
    fail = None

    def start(self, *, name, evidence):
        if Target.fail is not None:
            raise Target.fail
        host = Host(name, evidence)
        self.started.append(host)
        return host


@pytest.fixture(scope="session")
def target():
    return Target()
"""


class Suite:
    """A generated suite and its run."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.makeconftest(CONFTEST)
        self.run_dir = pytester.path / "run"

    def run(self, source: str, *options: str) -> pytest.RunResult:
        """Run pytest on one module with this text, in a process of its own."""
        self.pytester.makepyfile(test_it=f"import pytest\nfrom harness import errors\n{source}")
        return self.pytester.runpytest_subprocess(
            "-p", "no:cacheprovider", f"--kvmi-run={self.run_dir}", *options
        )

    def records(self, kind: str = "verdict") -> list[dict[str, Any]]:
        """The run's records of one kind."""
        text = (self.run_dir / "verdicts.jsonl").read_text()
        return [r for line in text.splitlines() if (r := json.loads(line))["kind"] == kind]

    def verdicts(self) -> dict[str, str]:
        """Test name (and clause, where it has several) to verdict."""
        return {r["test"].partition("::")[2]: r["verdict"] for r in self.records()}

    def record(self, test: str) -> dict[str, Any]:
        """The one record of a test."""
        (found,) = [r for r in self.records() if r["test"].endswith(f"::{test}")]
        return found


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """A fresh suite."""
    return Suite(pytester)


@pytest.mark.parametrize("options", [("-pno:xdist",), ("-n2",)], ids=["alone", "workers"])
def test_whose_fault(suite: Suite, options: tuple[str, ...]) -> None:
    """Each way a test can end has its verdict, with workers and without."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")

        def test_holds(): pass
        def test_assertion(): assert 1 == 2, "errno differs"
        def test_promise(): raise errors.MalformedMessage("padding is 7")
        def test_crash(): raise errors.HostCrashedError("panic")
        def test_ours(): raise errors.InfraError("ssh refused")
        def test_bug(): {}["x"]
        def test_skip(): pytest.skip("needs two CPUs")

        @pytest.fixture
        def broken(): raise errors.DeadlineError("no boot")
        def test_fixture(broken): pass

        @pytest.fixture
        def refused(): raise errors.ConformanceError("hook refused")
        def test_fixture_fail(refused): pass

        @pytest.fixture
        def untidy():
            yield
            raise OSError("cannot close")
        def test_teardown(untidy): pass
        """.replace("\n        ", "\n"),
        *options,
    )
    assert suite.verdicts() == {
        "test_holds": "PASS",
        "test_assertion": "FAIL",
        "test_promise": "FAIL",
        "test_crash": "FAIL",
        "test_ours": "ERROR",
        "test_bug": "ERROR",
        "test_skip": "SKIP",
        "test_fixture": "ERROR",
        "test_fixture_fail": "FAIL",
        "test_teardown": "ERROR",
    }
    assert suite.record("test_skip")["reason"] == "needs two CPUs"
    assert "padding is 7" in suite.record("test_promise")["reason"]
    assert suite.record("test_teardown")["phase"] == "teardown"
    for record in suite.records():
        assert record["verdict"] == "PASS" or record["reason"]
        for path in record.get("evidence", {}).values():
            assert (suite.run_dir / path).is_file()
    assert (
        "errno differs"
        in Path(suite.run_dir / suite.record("test_assertion")["evidence"]["failure"]).read_text()
    )
