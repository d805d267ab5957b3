# SPDX-License-Identifier: GPL-2.0-or-later
"""Hooks in the process that runs tests: phases, limits, leaks, evidence.

Each phase's judgement travels to the controller on pytest's own report, as the attribute
``kvmi`` (plain dictionaries and strings, which pytest-xdist can carry); the controller makes
verdicts of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from harness.errors import DeadlineError, InfraError
from harness.plugin.classify import Judgement, classify
from harness.plugin.collect import TestFacts, facts_of
from harness.plugin.evidence import evidence_name, files_in
from harness.plugin.options import Session
from harness.plugin.parcel import Parcels
from harness.plugin.processes import die_with_parent
from harness.report.model import Outcome

if TYPE_CHECKING:
    from harness.plugin.beat import Beat
    from harness.plugin.pool import Lease, PooledHost
    from harness.plugin.timeline import Timeline

__all__ = ["TestState", "Worker", "WorkerLeft", "current", "leave"]

STUCK_GRACE_S = 60
"""How long past its limit a test may take to tear down before the worker is ended."""

THREAD_GRACE_S = 2.0
"""How long threads of a test may take to end after its tear-down."""


@dataclass
class TestState:
    """What is gathered about one test while it runs."""

    test: str
    facts: TestFacts
    evidence: Path
    started: str
    start: float = field(default_factory=time.monotonic)
    failed: bool = False
    leases: list[Lease] = field(default_factory=list)
    hosts: list[PooledHost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    skips: dict[str, str] = field(default_factory=dict)
    extra_evidence: dict[str, str] = field(default_factory=dict)
    last: bool = False
    """No test comes after this one in this process."""
    threads: frozenset[threading.Thread] = frozenset()
    run_dir: Path = Path()
    tellers: dict[str, Callable[[], str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    timeline: Timeline | None = None
    keep: bool = False
    """A failure that is the kernel's, and that the tear-down coped with, does not cost the host."""

    def save(self, name: str, text: str) -> None:
        """Save a piece of evidence as text; nothing is made of nothing.

        A full disk costs the evidence, which is noted, but not the verdict.
        """
        if not text.strip():
            return
        try:
            self.evidence.mkdir(parents=True, exist_ok=True)
            (self.evidence / name).write_text(text, encoding="utf-8")
        except OSError as error:
            self.notes.append(f"{name} could not be saved: {error.strerror}")

    def tell(self) -> None:
        """Save what the fixtures have to say about a failure, while all of them are alive."""
        for name, teller in self.tellers.items():
            try:
                text = teller()
            except Exception as error:
                text = f"cannot be told: {type(error).__name__}: {error}"
            self.save(f"{name}.txt", text)

    def settle(self, lease: Lease, *, quiet_s: float, leaks: bool = False) -> None:
        """End the use of a host: keep its kernel's words, and judge it.

        :param quiet_s: how long one that will be used again stays under watch.
        :param leaks: ask its kernel for memory that it lost; after a good test, that is.
        """
        __tracebackhide__ = True
        try:
            watched = self.facts.lifecycle and not lease.pooled.spoilt
            lease.finish(watch_s=quiet_s if watched else 0.0, leaks=leaks and not self.failed)
        finally:
            with contextlib.suppress(Exception):
                self.save("kernel_log.txt", lease.kernel_log())
            self.extra_evidence |= files_in(lease.pooled.host.evidence, self.run_dir, "host_")


_STATE = pytest.StashKey[TestState]()


def current(item: pytest.Item) -> TestState:
    """The state of a running test of ours.

    :raises UsageError: for a test that is not ours: it needs a clause marker.
    """
    state = item.stash.get(_STATE, None)
    if state is None:
        raise pytest.UsageError(f'{item.nodeid} needs @pytest.mark.clause("...")')
    return state


class WorkerLeft(UserWarning):
    """A worker ended by itself; arguments: its name, and why.

    A warning, since these are what a worker can tell its controller at any time.
    """


def leave(session: Session, error: Exception) -> NoReturn:
    """End this worker on another machine at once; its controller hears why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(WorkerLeft(session.worker, str(error)), stacklevel=2)
    session.config.hook.pytest_warning_recorded.call_historic(
        kwargs={
            "warning_message": caught[0],
            "when": "runtest",
            "nodeid": "",
            "location": None,
        }
    )
    os._exit(1)


class Worker:
    """The plugin's part in running tests."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._beat: Beat | None = None
        self._stacks: Any = None
        self._target_patience: float | None = None
        self._parcels = Parcels(session.run_dir) if session.away else None

    # -- life of the process

    def pytest_collection_finish(self) -> None:
        """From here on this process may start hosts: let it never outlive its controller."""
        controller = self._session.worker_input.get("kvmi_controller_pid")
        if self._session.own and controller:
            die_with_parent(controller)

    def pytest_unconfigure(self) -> None:
        """Stop beating."""
        if self._beat is not None:
            self._beat.close()
        if self._stacks is not None:
            path = Path(self._stacks.name)
            self._stacks.close()
            if path.stat().st_size == 0:
                path.unlink()
                with contextlib.suppress(OSError):  # another worker's may be there
                    path.parent.rmdir()

    def beat(self) -> Beat:
        """This process's sign of life, started at first use."""
        if self._beat is None:
            from harness.plugin.beat import Beat

            self._beat = Beat(self._session.run_dir, self._session.slot)
        return self._beat

    def phase(self, text: str) -> None:
        """Tell the live view what the running test does."""
        self.beat().phase(text)

    # -- one test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, Any, Any]:
        """Gather a test's state from before its set-up until after its tear-down."""
        facts = facts_of(item)
        if facts is None:
            return (yield)
        from harness.report.store import utc_now

        item.stash[_STATE] = TestState(
            test=item.nodeid,
            facts=facts,
            evidence=self._session.run_dir / "evidence" / evidence_name(item.nodeid),
            started=utc_now(),
            last=nextitem is None,
            threads=frozenset(threading.enumerate()),
            run_dir=self._session.run_dir,
            counts=self.beat().counts(),
            keep=item.config.getoption("--kvmi-unfinished"),
        )
        self.beat().test(item.nodeid)
        try:
            return (yield)
        finally:
            self.beat().test("")
            del item.stash[_STATE]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Say that the test is being set up."""
        if _STATE in item.stash:
            self.phase("set-up")
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Say that the test runs."""
        if _STATE in item.stash:
            self.phase("test")
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """After everything of the test was torn down, look for threads it left behind."""
        __tracebackhide__ = True
        state = item.stash.get(_STATE, None)
        if state is None:
            return (yield)
        self.phase("tear-down")
        result = yield
        leaked = _leaked_threads(state.threads)
        if leaked:
            raise InfraError(
                f"the test left {len(leaked)} thread(s) behind: "
                + ", ".join(thread.name for thread in leaked),
                hint="end them in the tear-down of what started them",
                details=_stacks(leaked),
            )
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Judge the phase, and put on its report what the controller needs."""
        report = yield
        state = item.stash.get(_STATE, None)
        if state is None:
            return report
        judgement = classify(call.excinfo) if call.excinfo else Judgement(Outcome.PASS)
        if judgement.outcome is Outcome.SKIP and report.failed:
            # What does not apply is no failure for pytest, either, nor for its exit code.
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: {judgement.reason}")
        if judgement.outcome.bad:
            state.failed = True
            coped = judgement.outcome is Outcome.FAIL and call.when != "teardown"
            if not (state.keep and coped):
                # For what the test left on it.
                for host in state.hosts:
                    host.spoil(f"{state.test} failed on it")
            state.save(
                "failure.txt" if call.when != "teardown" else "failure_teardown.txt",
                "\n\n".join(t for t in (judgement.details, report.longreprtext) if t),
            )
            if call.when != "teardown":
                state.tell()
        data: dict[str, Any] = {
            "outcome": judgement.outcome.value,
            "reason": judgement.reason,
            "clauses": list(state.facts.clauses),
        }
        if call.when == "teardown":
            files = files_in(state.evidence, self._session.run_dir)
            data |= {
                "description": state.facts.description,
                "worker": self._session.worker,
                "started": state.started,
                "duration_s": round(time.monotonic() - state.start, 3),
                "evidence": files | state.extra_evidence,
                "notes": state.notes,
                "seen": state.seen,
                "skips": state.skips,
                "unclaimed": dict(state.facts.unclaimed),
                "held": sorted(state.timeline.held) if state.timeline else [],
                "blamed": list(state.timeline.blamed) if state.timeline else [],
                "failed_step": state.timeline.failed_step if state.timeline else "",
                "counts": {
                    name: number - state.counts.get(name, 0)
                    for name, number in self.beat().counts().items()
                    if number != state.counts.get(name, 0)
                },
            }
            if self._parcels is not None:
                data["files"] = self._parcels.pack(data["evidence"].values())
        report.kvmi = data  # type: ignore[attr-defined]
        return report

    # -- limits

    def _patience(self) -> float:
        """How many times longer than usual tests may take on the run's target."""
        if self._target_patience is None:
            from harness.hosts import target_for
            from harness.plugin.inputs import load_run_settings

            config = self._session.config
            settings = load_run_settings(
                self._session.run_dir, target=config.getoption("--kvmi-target")
            )
            self._target_patience = target_for(settings).patience
        return self._target_patience

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """Limit a test of ours by an exception in it, and end this worker if that fails.

        pytest-timeout's own methods would call a limit a failed assertion (signal), or end
        the whole worker at once (thread).
        """
        state = item.stash.get(_STATE, None)
        if state is None or threading.current_thread() is not threading.main_thread():
            return None
        limit_s: float = settings.timeout * self._patience()

        def expired(_number: int, _frame: types.FrameType | None) -> None:
            __tracebackhide__ = True
            others = [t for t in threading.enumerate() if t is not threading.main_thread()]
            raise DeadlineError(
                f"the test took longer than its limit of {limit_s:g} s",
                hint="see the trace for where it waited; a wait of its own should end earlier",
                details=_stacks(others),
            )

        signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        if self._stacks is None:
            folder = self._session.run_dir / "workers"
            folder.mkdir(parents=True, exist_ok=True)
            self._stacks = (folder / f"{self._session.worker}.stacks.txt").open("w")
        faulthandler.dump_traceback_later(limit_s + STUCK_GRACE_S, exit=True, file=self._stacks)
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self, item: pytest.Item) -> bool | None:
        """Take the limit away."""
        if item.stash.get(_STATE, None) is None:
            return None
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        return True


def _of_host(thread: threading.Thread) -> bool:
    """Whether a thread lives with something longer than a test: a host, its SSH, the beat."""
    return (
        thread.name.startswith(("kvmi-beat", "host-"))
        or type(thread).__module__.startswith("paramiko.")
        or type(thread).__module__.startswith("execnet.")
    )


def _leaked_threads(before: frozenset[threading.Thread]) -> list[threading.Thread]:
    """Threads that a test started and that did not end, after some patience with them."""
    deadline = time.monotonic() + THREAD_GRACE_S
    leaked = []
    for thread in threading.enumerate():
        if thread in before or thread is threading.current_thread() or _of_host(thread):
            continue
        thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            leaked.append(thread)
    return leaked


def _stacks(threads: list[threading.Thread]) -> str:
    """Where each of these threads is now."""
    import sys

    frames = sys._current_frames()
    parts = []
    for thread in threads:
        frame = frames.get(thread.ident or -1)
        if frame is not None:
            parts.append(f"Thread {thread.name}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)
