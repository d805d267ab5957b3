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
from harness.counters import Slot
from harness.hosts import Host

from .stage import Stage


@pytest.fixture
def stage(host: Host, profile: Profile, evidence: Path, counters: Slot) -> Iterator[Stage]:
    """A host to put guests on, and tools for them; see :mod:`tests.lifecycle.stage`."""
    stage = Stage(host, profile=profile, evidence=evidence, slot=counters)
    try:
        yield stage
    finally:
        stage.close()
