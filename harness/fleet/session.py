# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest-xdist with machines that may be lost: a part of the controller.

What is to be known of the machines is in a file of the run, written before pytest begins;
what becomes of them is appended to another. A machine that is lost is not replaced: its share
goes to the others, and when these are done the run goes on in another round (see
:mod:`harness.fleet.run`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.fleet.schedule import HERE, MachineScheduling
from harness.plugin.options import Session
from harness.plugin.worker import WorkerLeft
from harness.report.model import Outcome
from harness.report.store import load_run, read_plan

__all__ = ["FLEET", "LOSSES", "Fleet", "Loss", "read_losses", "settled_tests"]

FLEET = "fleet.json"
"""In the run's directory: the words of each worker's machine."""
LOSSES = "losses.jsonl"

Words = Mapping[str, frozenset[str]]
"""What the machine of each worker has."""


class Loss(msgspec.Struct, kw_only=True, frozen=True):
    """A worker that ended before its time."""

    machine: str
    test: str = ""
    """What it ran then; empty if nothing."""
    error: str = ""
    left: bool = False
    """It ended by itself, when its machine turned out to be of no use: no test is to blame."""


def read_losses(run_dir: Path) -> list[Loss]:
    """All losses of a run, in order."""
    try:
        lines = (run_dir / LOSSES).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [msgspec.json.decode(line, type=Loss) for line in lines]


def skips_of(run_dir: Path, words: Words) -> dict[str, set[frozenset[str]]]:
    """The tests of a run that were skipped wherever they ran, and on which kinds of machine."""
    found: dict[str, set[frozenset[str]]] = {}
    ran = set()
    for verdict in load_run(run_dir).verdicts:
        kinds = found.setdefault(verdict.test, set())
        if verdict.worker in words:
            kinds.add(words[verdict.worker])
        if verdict.verdict is not Outcome.SKIP:
            ran.add(verdict.test)
    return {test: kinds for test, kinds in found.items() if test not in ran}


def settled_tests(run_dir: Path, words: Words) -> frozenset[str]:
    """The tests of a run that these machines have nothing to add to.

    That is what has a verdict, but for tests that were skipped and have not been tried on a
    machine of each kind.
    """
    skipped = skips_of(run_dir, words)
    needs = {one.test: frozenset(one.needs) for one in read_plan(run_dir)}
    kinds = {kind for name, kind in words.items() if name != HERE}

    def open_to(test: str) -> bool:
        wanted = needs.get(test, frozenset())
        return any(wanted <= kind and kind not in skipped[test] for kind in kinds)

    return frozenset(
        verdict.test
        for verdict in load_run(run_dir).verdicts
        if verdict.test not in skipped or not open_to(verdict.test)
    )


class Fleet:
    """The plugin's part in a run on many machines."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scheduling: MachineScheduling | None = None
        self._distribution: Any = None
        self._left: dict[str, str] = {}

    def pytest_xdist_setupnodes(self, config: pytest.Config) -> None:
        """Take over from pytest-xdist what it does with lost workers; copying is done."""
        self._distribution = config.pluginmanager.getplugin("dsession")
        self._distribution.nodemanager.roots = []
        self._distribution.worker_errordown = self._lost

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_make_scheduler(self) -> MachineScheduling:
        """Our own scheduler."""
        run_dir = self._session.run_dir
        told = msgspec.json.decode((run_dir / FLEET).read_bytes(), type=dict[str, frozenset[str]])
        lost_in: dict[str, set[str]] = {}
        for loss in (one for one in read_losses(run_dir) if not one.left):
            lost_in.setdefault(loss.test, set()).add(loss.machine)
        self._scheduling = MachineScheduling(
            told,
            # The worker here writes the plan when it has collected.
            lambda: {one.test: frozenset(one.needs) for one in read_plan(run_dir)},
            settled_tests(run_dir, told),
            skips_of(run_dir, told),
            lost_in,
        )
        return self._scheduling

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notice skipped tests."""
        data = getattr(report, "kvmi", None)
        node = getattr(report, "node", None)
        if data and node and self._scheduling and data["outcome"] == Outcome.SKIP:
            self._scheduling.skipped(node, report.nodeid)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        """Hear why a worker leaves."""
        if isinstance(warning_message.message, WorkerLeft):
            worker, why = warning_message.message.args
            self._left[worker] = why

    def _lost(self, node: Any, error: object) -> None:
        """In place of pytest-xdist's own, which would start another worker there."""
        node.config.hook.pytest_testnodedown(node=node, error=error)
        assert self._scheduling is not None
        test = self._scheduling.remove_node(node)
        name = node.gateway.id
        left = self._left.get(name)
        loss = Loss(machine=name, test=test or "", error=left or str(error), left=bool(left))
        with (self._session.run_dir / LOSSES).open("ab") as file:
            file.write(msgspec.json.encode(loss) + b"\n")
        self._distribution.report_line(f"\n{loss.machine} is lost: {loss.error}")
        self._distribution._active_nodes.discard(node)
        if not self._distribution._active_nodes:
            self._distribution.shuttingdown = True
