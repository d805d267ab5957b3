# SPDX-License-Identifier: GPL-2.0-or-later
"""Small generated suites for the plugin's tests, with a target that boots nothing."""

from __future__ import annotations

import json
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

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
    boots = True
    processors = ()
    patience = 1.0
    started = []
    fail = None

    def start(self, *, name, evidence, boot):
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
        """Run pytest on one module with this text; with workers, in a process of its own."""
        self.write(source)
        if any(option.startswith("-n") for option in options):
            return self.pytester.runpytest_subprocess(*self.options(*options))
        return self.pytester.runpytest_inprocess(*self.options(*options))

    def write(self, source: str) -> None:
        """Make the module without running it."""
        text = "import pytest\nfrom harness import errors\n" + textwrap.dedent(source)
        self.pytester.makepyfile(test_it=text)

    def options(self, *more: str) -> list[str]:
        """The command line of a run of the suite, after ``pytest``."""
        return ["-pno:cacheprovider", f"--kvmi-run={self.run_dir}", *more]

    def evidence(self, test: str, name: str) -> str:
        """The text of one piece of a test's evidence."""
        return str((self.run_dir / self.record(test)["evidence"][name]).read_text())

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


def wait_until(condition: Callable[[], object], what: str, *, timeout_s: float = 30) -> None:
    """Wait for a condition; the test fails when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        pause.wait(0.05)
