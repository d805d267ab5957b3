# SPDX-License-Identifier: GPL-2.0-or-later
"""Hooks in the process that writes verdicts: the controller, or pytest itself without workers.

A verdict is written when a test's tear-down was reported, and at once. Should the worker die
before, the test is MISS, whatever its phases had shown so far: the rest of it never ran.
What was collected and never came to its turn is MISS too, written at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from harness.errors import HarnessError
from harness.plugin.collect import USAGE
from harness.plugin.evidence import evidence_name, files_in
from harness.plugin.options import Session
from harness.plugin.parcel import unpack
from harness.plugin.processes import die_with_parent, parent_of
from harness.report.model import (
    End,
    Outcome,
    Planned,
    RunFacts,
    Verdict,
    clauses_or_none,
    combine,
    count,
    exit_code,
    missing,
)
from harness.report.store import VerdictFile, load_run, point_latest, read_plan, utc_now

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["PARENT_VARIABLE", "Controller", "Nodes"]

PARENT_VARIABLE = "KVMI_PARENT_PID"
"""Set by :func:`harness.conform.conform`: the process with which pytest is to end."""


@dataclass
class _Phases:
    """What is known of a test whose tear-down was not reported yet."""

    reports: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)


class Controller:
    """Turns reports into verdicts."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._running: dict[str, _Phases] = {}
        self._file: VerdictFile | None = None
        self._facts = RunFacts(run=session.run_dir.name, started=utc_now())
        self._start = time.monotonic()
        self._usage_error = False
        self._collect_errors: list[str] = []
        self._deaths = 0
        self._verdicts: list[Verdict] = []
        parent = os.environ.get(PARENT_VARIABLE)
        if parent and session.given_run_dir:
            die_with_parent(int(parent))

    # -- writing

    def _write(self, verdict: Verdict) -> None:
        """Hand a verdict to the file at once.

        A run whose verdicts cannot be written any more is ended: going on would lose them.
        """
        try:
            self._opened().write(verdict)
        except OSError as error:
            pytest.exit(
                f"verdicts cannot be written to {self._session.run_dir}: {error.strerror}",
                returncode=pytest.ExitCode.INTERNAL_ERROR,
            )
        self._verdicts.append(verdict)

    def _opened(self) -> VerdictFile:
        if self._file is None:
            self._file = self._open()
        return self._file

    def _open(self) -> VerdictFile:
        run_dir = self._session.run_dir
        file = VerdictFile(run_dir)
        if file.empty:
            from harness.plugin.inputs import load_run_settings
            from harness.series import interface

            settings = load_run_settings(
                run_dir, target=self._session.config.getoption("--kvmi-target")
            )
            self._facts = RunFacts(
                run=run_dir.name,
                started=utc_now(),
                target=settings.target,
                series=_series(settings),
                abi=interface(settings).name,
                rerun="inv conform",
            )
            file.write(self._facts)
            point_latest(run_dir)
        else:
            self._facts = load_run(run_dir).facts
        return file

    # -- pytest's hooks

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember what could not be collected."""
        if report.failed:
            self._usage_error = self._usage_error or bool(getattr(report, USAGE, False))
            self._collect_errors.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather the phases of each test; its tear-down completes it."""
        if report.when not in ("setup", "call", "teardown"):
            self._crashed(report)
            return
        data: dict[str, Any] | None = getattr(report, "kvmi", None)
        if data is None:
            return
        phases = self._running.setdefault(report.nodeid, _Phases())
        phases.reports.append((report.when, data))
        if files := data.pop("files", None):
            with contextlib.suppress(OSError):  # a full disk costs evidence, but no verdict
                unpack(self._session.run_dir, files)
        if report.when == "teardown":
            del self._running[report.nodeid]
            self._complete(report.nodeid, phases)

    def _complete(self, test: str, phases: _Phases) -> None:
        last = phases.reports[-1][1]
        outcome = combine(Outcome(data["outcome"]) for _when, data in phases.reports)
        if outcome is Outcome.PASS and any(
            data["outcome"] == Outcome.SKIP for _when, data in phases.reports
        ):
            outcome = Outcome.SKIP  # set-up and tear-down of a skipped test pass
        told = [
            (when, data["reason"])
            for when, data in phases.reports
            if data["outcome"] != Outcome.PASS and data["reason"]
        ]
        deciding = [
            (when, data["reason"]) for when, data in phases.reports if data["outcome"] == outcome
        ]
        phase, reason = deciding[0] if outcome is not Outcome.PASS else ("", "")
        notes = [*last["notes"]] + [
            f"{when}: {text}" for when, text in told if text != reason and text
        ]
        for clause in clauses_or_none(last["clauses"]):
            verdict, why = _clause_verdict(clause, outcome, reason, last)
            self._write(
                Verdict(
                    clause=clause,
                    verdict=verdict,
                    test=test,
                    target=self._target(),
                    series=self._series(),
                    duration_s=last["duration_s"],
                    reason=why,
                    phase=phase if verdict is outcome else "",
                    seen=last["seen"].get(clause, ""),
                    notes=notes,
                    description=last["description"],
                    worker=last["worker"],
                    started=last["started"],
                    evidence=last["evidence"],
                    counts=last["counts"],
                )
            )

    def _target(self) -> str:
        self._opened()
        return self._facts.target

    def _series(self) -> str:
        self._opened()
        return self._facts.series

    def _crashed(self, report: pytest.TestReport) -> None:
        """A worker died while it ran this test; pytest-xdist starts another worker."""
        self._deaths += 1
        phases = self._running.pop(report.nodeid, None)
        planned = next(
            (p for p in read_plan(self._session.run_dir) if p.test == report.nodeid), None
        )
        if planned is None:
            return
        worker = getattr(getattr(report, "node", None), "gateway", None)
        name = worker.id if worker is not None else ""
        stacks = self._session.run_dir / "workers" / f"{name}.stacks.txt"
        folder = self._session.run_dir / "evidence" / evidence_name(report.nodeid)
        evidence = files_in(folder, self._session.run_dir)
        stuck = False
        if stacks.is_file() and stacks.stat().st_size:
            evidence["stacks"] = self._session.relative(stacks)
            stuck = True
        for clause in clauses_or_none(planned.clauses):
            self._write(
                Verdict(
                    clause=clause,
                    verdict=Outcome.MISS,
                    test=report.nodeid,
                    target=self._target(),
                    series=self._series(),
                    duration_s=round(time.monotonic() - phases.start, 3) if phases else 0.0,
                    reason=f"the worker {name} died during this test"
                    + ("; it was stuck past its limit" if stuck else ""),
                    description=planned.description,
                    worker=name,
                    evidence=evidence,
                )
            )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Account for everything that was collected, and close the run."""
        if self._usage_error:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        plan = read_plan(self._session.run_dir) if self._session.run_dir.is_dir() else []
        if not plan and self._file is None:
            return
        if self._session.in_fleet:
            # Another round may do what is left; whoever began them ends the run.
            if self._file is not None:
                self._file.close()
            return
        # Where the disk is full, whoever reads the run finds out what it owes from the plan.
        with contextlib.suppress(OSError):
            self._finish(plan, self._why(session, exitstatus))

    def _finish(self, plan: list[Planned], why: str) -> None:
        lost = missing(plan, self._verdicts, reason=why or "it never came to its turn")
        for verdict in lost:
            placed = msgspec.structs.replace(verdict, target=self._target(), series=self._series())
            self._opened().write(placed)
            self._verdicts.append(placed)
        self._opened().write(
            End(
                finished=utc_now(),
                duration_s=round(time.monotonic() - self._start, 3),
                exit_code=exit_code(self._verdicts),
                reason=why if lost else "",
            )
        )
        self._opened().close()

    def _why(self, session: pytest.Session, exitstatus: int) -> str:
        """Why a run ended before all of its tests ran, if it did."""
        if self._collect_errors:
            return f"tests could not be collected: {', '.join(self._collect_errors[:3])}"
        for stop in (session.shouldstop, session.shouldfail):
            if stop:
                return f"the run was stopped: {stop}"
        if exitstatus == pytest.ExitCode.INTERRUPTED:
            return "the run was interrupted"
        if exitstatus == pytest.ExitCode.INTERNAL_ERROR:
            return "pytest had an internal error"
        if self._deaths > 1:
            return f"{self._deaths} workers died, so no more were started"
        return ""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what the verdicts are and where they lie."""
        if not self._verdicts:
            return
        totals = count(v.verdict for v in self._verdicts)
        text = ", ".join(f"{number} {outcome}" for outcome, number in totals.items() if number)
        terminalreporter.write_line(f"kvmi: {text} -> {self._session.run_dir}")


def _clause_verdict(
    clause: str | None, outcome: Outcome, reason: str, last: dict[str, Any]
) -> tuple[Outcome, str]:
    """One clause's verdict and reason, from its test's.

    They differ when the test skipped this clause, or the series does not claim what it is about,
    and when it failed in a step of a sequence that says which clauses it checks: those of earlier
    steps held, later ones were not met.
    """
    if clause in last["unclaimed"]:
        return Outcome.SKIP, last["unclaimed"][clause]
    if outcome is Outcome.PASS:
        skipped = last["skips"].get(clause)
        return (Outcome.SKIP, skipped) if skipped else (outcome, "")
    if not outcome.bad or not last["blamed"] or clause in last["blamed"]:
        return outcome, reason
    if clause in last["held"]:
        return Outcome.PASS, ""
    return Outcome.MISS, f"the sequence ended before it, in: {last['failed_step']}: {reason}"


def _series(settings: Settings) -> str:
    """The series' short ids, as builds call them; without building anything."""
    from harness.build.series import load_series

    with contextlib.suppress(HarnessError):
        return " ".join(
            load_series(path).id for path in (settings.kernel_series, settings.qemu_series)
        )
    return ""


class Nodes:
    """What only a controller with pytest-xdist does."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._slots: dict[str, int] = {}

    def pytest_keyboard_interrupt(self) -> None:
        """End the workers in the middle of what they do.

        pytest-xdist would ask them to end and give them ten seconds to hear it. Their hosts
        end with them; what they wrote of their evidence stays readable.
        """
        from harness.counters import attach
        from harness.plugin.beat import COUNTERS

        with contextlib.suppress(HarnessError), attach(self._session.run_dir / COUNTERS) as shared:
            for slot in self._slots.values():
                pid = shared.read_slot(slot).pid
                # A process with this id that is no child of ours is not the worker any more.
                if pid and parent_of(pid) == os.getpid():
                    os.kill(pid, signal.SIGTERM)

    def pytest_configure_node(self, node: Any) -> None:
        """Tell each worker where the run's directory is, and which slot it counts in.

        A worker that replaces a dead one takes over its slot, and counts on from there.
        """
        taken = set(self._slots.values())
        slot = next(number for number in range(len(taken) + 1) if number not in taken)
        self._slots[node.gateway.id] = slot
        # A worker on another machine has a directory of its own, and sends what it writes.
        there: str | None = getattr(node.gateway.spec, "kvmi_run", None)
        node.workerinput["kvmi_run_dir"] = there or str(self._session.run_dir)
        node.workerinput["kvmi_away"] = there is not None
        # One that was started again there does not overwrite what the first one sent.
        node.workerinput["kvmi_start"] = getattr(node.gateway.spec, "kvmi_start", None) or "1"
        node.workerinput["kvmi_slot"] = slot
        if node.gateway.spec.popen:
            node.workerinput["kvmi_controller_pid"] = os.getpid()

    def pytest_testnodedown(self, node: Any) -> None:
        """Its slot is free."""
        self._slots.pop(node.gateway.id, None)
