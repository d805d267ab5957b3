# SPDX-License-Identifier: GPL-2.0-or-later
"""A short form of the fuzzer, always the same; ``inv fuzz`` is the long one."""

from __future__ import annotations

import pytest

from harness.abi import Profile
from harness.fuzz import Fuzzer
from harness.fuzz.plan import Batch
from harness.hosts import Host
from harness.plugin.pool import PerHost
from harness.settings import Settings

SEED = "short"


@pytest.fixture
def fuzzer(host: Host, per_host: PerHost, profile: Profile, settings: Settings) -> Fuzzer:
    """The fuzzer on this worker's host."""
    made: Fuzzer = per_host.get(
        "fuzzer",
        lambda host: Fuzzer(host, profile=profile, cache=settings.cache),
        usable=lambda thing: thing.alive,
    )
    return made


@pytest.mark.clause("MSG-REPLY-ALWAYS", "MSG-REPLY-ID-SEQ", "MSG-REPLY-ERR-NODATA")
def test_messages(fuzzer: Fuzzer) -> None:
    """Of some thousand messages, most of them wrong, each has its one reply or ends the session."""
    fuzzer.run(Batch("messages", 0, 12), seed=SEED)


def test_ioctls(fuzzer: Fuzzer) -> None:
    """Random sequences of ioctls, from several threads and with failures, do no harm."""
    fuzzer.run(Batch("calls", 0, 60), seed=SEED)
