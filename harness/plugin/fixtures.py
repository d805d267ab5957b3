# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests ask for.

Goals: a test says what it needs and nothing of where it comes from; it never sees a broken
host; whatever it used is watched, and what was seen becomes evidence without the test's
doing. Session-scoped things live as long as their worker. All may be overridden in a
``conftest.py``, which is how this plugin is tested with a target that boots nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import InfraError
from harness.hosts.base import Boot
from harness.plugin.options import Session
from harness.plugin.worker import TestState, current, leave

if TYPE_CHECKING:
    from harness.abi import Profile
    from harness.counters import SlotWriter
    from harness.hosts import Host, Target
    from harness.plugin.pool import HostPool, Lease, PerHost
    from harness.plugin.timeline import Timeline
    from harness.settings import Settings


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    """The settings of the run: those that the run was started with, or the user's file."""
    from harness.plugin.inputs import load_run_settings

    return load_run_settings(
        Session.of(pytestconfig).run_dir, target=pytestconfig.getoption("--kvmi-target")
    )


@pytest.fixture(scope="session")
def profile(settings: Settings) -> Profile:
    """The interface that the kernel under test is held to."""
    from harness.series import interface

    return interface(settings)


@pytest.fixture(scope="session")
def target(settings: Settings, pytestconfig: pytest.Config) -> Target:
    """What provides hosts, prepared: built kernel and images are in it."""
    from harness.plugin.inputs import prepared_target

    return prepared_target(settings, Session.of(pytestconfig).run_dir)


@pytest.fixture(scope="session")
def kvmi_pool(target: Target, pytestconfig: pytest.Config) -> Iterator[HostPool]:
    """This worker's hosts; tests ask for ``host`` or ``fresh_host`` instead."""
    from harness.plugin.pool import HostPool

    session = Session.of(pytestconfig)
    worker = pytestconfig.pluginmanager.getplugin("kvmi-worker")
    again = session.worker_input.get("kvmi_start", "1")
    name = session.worker if again == "1" else f"{session.worker}.{again}"
    pool = HostPool(target, run_dir=session.run_dir, worker=name, on_phase=worker.phase)
    yield pool
    pool.close()


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Path:
    """The test's directory for evidence; what lies in it at the end is in the report.

    A file's name without its suffix is its name in the verdict: ``transcript.jsonl`` is
    shown as messages, ``kernel_log.txt`` and ``*.txt``/``*.log`` as text.
    """
    state = current(request.node)
    state.evidence.mkdir(parents=True, exist_ok=True)
    return state.evidence


@pytest.fixture
def host(request: pytest.FixtureRequest, kvmi_pool: HostPool, settings: Settings) -> Iterator[Host]:
    """This worker's host. It serves many tests, is watched during each, replaced when broken.

    Leave it as you found it. What the kernel complains about during the test, its set-up
    and its tear-down makes the test FAIL.
    """
    yield from _lend(request, kvmi_pool, settings)


@pytest.fixture
def fresh_host(
    request: pytest.FixtureRequest, kvmi_pool: HostPool, settings: Settings, target: Target
) -> Iterator[Host]:
    """A host for this test alone, just restored; for tests that leave one changed or dead.

    With ``@pytest.mark.boot_without("kvm.introspection=1")`` it is booted from nothing,
    without these options of the usual kernel command line; with
    ``@pytest.mark.boot_with("kvm.tdp_mmu=0")`` these are added to it, and with
    ``@pytest.mark.processor("name")`` it has that processor. Where the target cannot do so, the
    test is skipped.
    """

    def marked(name: str) -> tuple[str, ...]:
        return tuple(word for mark in request.node.iter_markers(name) for word in mark.args)

    processor = "".join(marked("processor"))
    boot = Boot(without=marked("boot_without"), options=marked("boot_with"), processor=processor)
    if processor and processor not in target.processors:
        pytest.skip(f"target {target.name} has no processor {processor}")
    if boot and not target.boots:
        pytest.skip(f"a machine of target {target.name} is not booted with other kernel options")
    yield from _lend(request, kvmi_pool, settings, boot=boot)


def _lend(
    request: pytest.FixtureRequest,
    pool: HostPool,
    settings: Settings,
    *,
    boot: Boot | None = None,
) -> Iterator[Host]:
    __tracebackhide__ = True
    state = current(request.node)
    try:
        lease = pool.lend(test=state.test, fresh=boot is not None, boot=boot)
    except InfraError as error:
        session = Session.of(request.config)
        if session.away:
            # It has this one host: the others can do its share, and this test.
            leave(session, error)
        raise
    state.leases.append(lease)
    state.hosts.append(lease.pooled)
    yield lease.pooled.host
    try:
        # Takes seconds, so once: at the end of all that this worker does.
        leaks = state.last and settings.flavour == "debug"
        state.settle(lease, quiet_s=settings.quiet_s, leaks=leaks)
    finally:
        state.leases.remove(lease)


@pytest.fixture
def per_host(request: pytest.FixtureRequest) -> PerHost:
    """Things that live as long as this test's host: ``per_host.get("manager", make)``.

    For what is slow to start and can serve many tests. Ask for ``host`` or ``fresh_host``
    too (whichever the test uses); things are closed before their host is.
    """
    for name in ("fresh_host", "host"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
            leases: list[Lease] = current(request.node).leases
            return leases[-1].pooled.per_host
    raise pytest.UsageError(f"{request.node.nodeid}: per_host needs host or fresh_host")


@pytest.fixture
def counters(request: pytest.FixtureRequest) -> SlotWriter:
    """This worker's slot of the run's event counter, for sessions to count into."""
    slot: SlotWriter = _worker(request).beat().slot
    return slot


@pytest.fixture
def timeline(request: pytest.FixtureRequest) -> Timeline:
    """Brackets the steps of a sequence: ``with timeline.step("hook", clauses=[...]): ...``."""
    from harness.plugin.timeline import Timeline

    state = current(request.node)
    state.timeline = Timeline(
        state.evidence / "timeline.jsonl",
        clauses=(*state.facts.clauses, *state.facts.foreign),
        on_step=_worker(request).phase,
    )
    return state.timeline


class ClauseNotes:
    """What a test has to say on single clauses beyond passing or failing."""

    def __init__(self, state: TestState) -> None:
        self._state = state

    def skip(self, clause: str, reason: str) -> None:
        """This clause does not apply here; the test goes on with its others."""
        if self._own(clause):
            self._state.skips[clause] = reason

    def seen(self, clause: str, reading: str) -> None:
        """Say which of several accepted readings was seen, where text and code disagree.

        :param reading: one of the clause's ``readings``.
        """
        from harness.abi import all_clauses

        if not self._own(clause):
            return
        known = all_clauses()[clause].readings
        if reading not in known:
            raise pytest.UsageError(
                f"{clause} has no reading {reading!r}; it has: {', '.join(known) or 'none'}"
            )
        self._state.seen[clause] = reading

    def note(self, text: str) -> None:
        """Add a line to the test's verdicts, for readers of the report."""
        self._state.notes.append(text)

    def _own(self, clause: str) -> bool:
        """Whether it gets a verdict: another version of the interface may have it."""
        facts = self._state.facts
        if clause not in (*facts.clauses, *facts.foreign):
            raise pytest.UsageError(
                f"{self._state.test} does not name the clause {clause} in its marker"
            )
        return clause in facts.clauses


OnFailure = Callable[[str, Callable[[], str]], None]
"""What the fixture ``on_failure`` is."""


@pytest.fixture
def on_failure(request: pytest.FixtureRequest) -> OnFailure:
    """Have something told if the test fails: ``on_failure("guests", lab.guests)``.

    The function is called before anything is torn down; its text becomes a file of the
    evidence, with that name. What it raises becomes the text.
    """
    state = current(request.node)

    def register(name: str, tell: Callable[[], str]) -> None:
        state.tellers[name] = tell

    return register


@pytest.fixture
def clauses(request: pytest.FixtureRequest) -> ClauseNotes:
    """Say something on single clauses: ``skip(id, reason)``, ``seen(id, reading)``, ``note``."""
    return ClauseNotes(current(request.node))


def _worker(request: pytest.FixtureRequest) -> Any:
    return request.config.pluginmanager.getplugin("kvmi-worker")
