# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the lifecycle tests.

The goals: a test reads as the life of a guest and nothing else; what it leaves open
is closed after it, in the order that keeps the evidence; a host serves many tests, so
that a test costs little more than its guests do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.abi import Profile
from harness.counters import SlotWriter, attach
from harness.hosts import Host, Target
from harness.hosts.facts import NO_QEMU
from harness.plugin import skip_clause
from harness.plugin.beat import COUNTERS
from harness.plugin.options import Session
from harness.settings import Settings

from .stage import Stage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell a fleet what the tests of this directory need."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.needs("qemu"))


@pytest.fixture(autouse=True)
def _guests(target: Target) -> None:
    """Skip the tests on targets whose hosts cannot run guests of this kind."""
    if target.facts().guest_qemu == NO_QEMU:
        skip_clause(f"hosts of target {target.name} have no QEMU; the other targets show it")


@pytest.fixture
def stage(
    host: Host,
    profile: Profile,
    evidence: Path,
    counters: SlotWriter,
    request: pytest.FixtureRequest,
) -> Iterator[Stage]:
    """A host to put guests on, and tools for them; see the module ``stage``."""
    # Attached anew: what a test reads of the counter, it reads as any other process does.
    with attach(Session.of(request.config).run_dir / COUNTERS) as seen:
        settings: Settings = request.getfixturevalue("settings")
        stage = Stage(
            host,
            profile=profile,
            evidence=evidence,
            slot=counters,
            seen=seen,
            cache=settings.cache,
        )
        request.getfixturevalue("on_failure")("guests", stage.guests)
        try:
            yield stage
        finally:
            stage.close()


@pytest.fixture
def other_stage(fresh_host: Host, stage: Stage) -> Iterator[Stage]:
    """A second host beside that of ``stage``; guests can move from one to the other."""
    other = stage.beside(fresh_host, transcript="transcript_other-host")
    try:
        yield other
    finally:
        other.close()
