# SPDX-License-Identifier: GPL-2.0-or-later
"""Options, markers, and what each process of a run knows about it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Session", "add_markers", "add_options"]

MARKERS = (
    "clause(id, ...): the clauses (harness/abi/clauses.toml) whose promise this test checks",
    "boot_without(option, ...): fresh_host is booted without these kernel options",
    "boot_with(option, ...): fresh_host is booted with these kernel options added",
    "processor(name): fresh_host has this processor, where the target can have it",
    "needs(word, ...): what a machine of a fleet has to have to be given this test, such as vmx",
    "on_request: runs only where it is asked for by name (of the test or its file)",
    "lifecycle: a long sequence with a real guest; starts first, and its host stays under "
    "watch for a while after it",
)


def add_options(parser: pytest.Parser) -> None:
    """The plugin's own command line."""
    group = parser.getgroup("kvmi", "KVMI conformance")
    group.addoption(
        "--kvmi-target",
        metavar="NAME",
        help="what provides the hosts (default: the setting 'target')",
    )
    group.addoption(
        "--kvmi-run",
        metavar="DIR",
        type=Path,
        help="the run's directory (default: a new one under the setting 'reports')",
    )
    group.addoption(
        "--kvmi-clause",
        metavar="ID",
        action="append",
        default=[],
        help="run only tests of this clause; may end in * and may be repeated",
    )
    group.addoption(
        "--kvmi-shard",
        metavar="I/N",
        help="run only the part I of N",
    )
    group.addoption(
        "--kvmi-fleet",
        action="store_true",
        help="the run is one of many machines; see harness.fleet",
    )
    group.addoption(
        "--kvmi-unfinished",
        action="store_true",
        help="the series is not whole: what the kernel says it lacks is not tested, and hosts "
        "serve on after failures that left no trace",
    )
    group.addoption(
        "--kvmi-repeat",
        metavar="N",
        type=int,
        default=1,
        help="run each test N times",
    )


def add_markers(config: pytest.Config) -> None:
    """Tell pytest about the markers, so that --strict-markers and --markers know them."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)


@dataclass
class Session:
    """What one process (controller, worker, or both in one) knows about the run.

    :ivar run_dir: the run's directory; made by whoever first writes into it.
    :ivar worker: xdist's name of this worker, or "main" where tests run in the controller.
    :ivar slot: this process's slot of the event counter.
    :ivar runs_tests: false only in the controller of several workers.
    :ivar own: set once a test of ours was collected; until then nothing is written.
    """

    config: pytest.Config
    run_dir: Path
    worker: str
    slot: int
    is_controller: bool
    runs_tests: bool
    own: bool = False
    given_run_dir: bool = False
    worker_input: dict[str, Any] = field(default_factory=dict)

    @property
    def in_fleet(self) -> bool:
        """Whether this is the controller of a run on many machines."""
        return self.is_controller and bool(self.config.getoption("--kvmi-fleet"))

    @property
    def away(self) -> bool:
        """Whether this is a worker on another machine than the controller's."""
        return bool(self.worker_input.get("kvmi_away"))

    @classmethod
    def of(cls, config: pytest.Config) -> Session:
        """The session of this process, made at first use."""
        known = config.stash.get(_SESSION, None)
        if known is None:
            known = config.stash[_SESSION] = _make(config)
        return known

    def relative(self, path: Path) -> str:
        """A path as evidence names it: relative to the run's directory where it lies in it."""
        try:
            return path.relative_to(self.run_dir).as_posix()
        except ValueError:
            return str(path)


_SESSION = pytest.StashKey[Session]()


def _make(config: pytest.Config) -> Session:
    worker_input: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker_input is not None:
        return Session(
            config=config,
            run_dir=Path(worker_input["kvmi_run_dir"]),
            worker=worker_input["workerid"],
            slot=worker_input["kvmi_slot"],
            is_controller=False,
            runs_tests=True,
            given_run_dir=True,
            worker_input=worker_input,
        )
    given: Path | None = config.getoption("--kvmi-run")
    if given is None:
        from harness.report.store import new_run_dir

        run_dir = new_run_dir(Path(os.environ.get("KVMI_REPORTS", config.rootpath / "reports")))
    else:
        run_dir = given.absolute()
    distributed = bool(config.getoption("tx", None)) or bool(config.getoption("numprocesses", None))
    return Session(
        config=config,
        run_dir=run_dir,
        worker="main",
        slot=0,
        is_controller=True,
        runs_tests=not distributed,
        given_run_dir=given is not None,
    )
