# SPDX-License-Identifier: GPL-2.0-or-later
"""The cases of a run of the fuzzer, in batches, as tests.

``inv fuzz`` says in the run's directory how much is to be done and from which seed; each batch
is a test, so that hosts are shared, watched and replaced, and results reported, as always.
"""

from __future__ import annotations

import pytest

from harness.abi import Profile
from harness.fuzz import Fuzzer, load_plan
from harness.hosts import Host
from harness.plugin.options import Session
from harness.plugin.pool import PerHost
from harness.settings import Settings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each batch."""
    if "batch" in metafunc.fixturenames:
        batches = load_plan(Session.of(metafunc.config).run_dir).batches()
        metafunc.parametrize("batch", batches, ids=str)


@pytest.fixture
def fuzzer(host: Host, per_host: PerHost, profile: Profile, settings: Settings) -> Fuzzer:
    """The fuzzer on this worker's host."""
    made: Fuzzer = per_host.get(
        "fuzzer",
        lambda host: Fuzzer(host, profile=profile, cache=settings.cache),
        usable=lambda thing: thing.alive,
    )
    return made
