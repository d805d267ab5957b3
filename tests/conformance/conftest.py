# SPDX-License-Identifier: GPL-2.0-or-later
"""What the conformance tests share.

Goals of the fixtures:

- A test says which guest it wants and gets it in a few milliseconds: one agent of the
  small device manager runs in the host and serves test after test.
- Nothing of a test reaches the next: sessions are closed, every VM is unhooked and
  closed, the module parameter is on again; a vCPU that cannot be got out of the kernel
  is a failure of the kernel, reported by the test that caused it.
- Every message of every session is in the test's evidence.

A test's own words for the usual: ``lab.vm()`` makes a guest, ``lab.hook(vm)`` connects
and hooks it and allows everything, ``lab.pair()`` does both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks import known_commands, supported_commands, supported_events
from lab import Lab

from harness.abi import Profile, load_clauses
from harness.counters import SlotWriter
from harness.errors import HarnessError
from harness.hosts import Host, Target
from harness.manager.small import SmallManager
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.plugin.fixtures import OnFailure
from harness.plugin.pool import PerHost
from harness.settings import Settings
from harness.tool import Session

# Under emulation a test takes some hundred milliseconds; one that needs this long hangs.
TEST_TIMEOUT_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this directory a time limit that fits them."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))


@pytest.fixture
def manager(host: Host, per_host: PerHost, profile: Profile, settings: Settings) -> SmallManager:
    """The small device manager of this worker's host, with no guest in it."""
    made: SmallManager = per_host.get(
        "small",
        lambda host: SmallManager(host, profile=profile, cache=settings.cache),
        usable=lambda thing: thing.alive,
    )
    return made


@pytest.fixture(scope="session")
def seen() -> dict[str, Profile | None]:
    """What this worker saw of the kernel, which is the same on each of its hosts."""
    return {}


@pytest.fixture(scope="session")
def hung() -> dict[object, str]:
    """The test functions after which a guest of this worker could not be ended, and the case."""
    return {}


@pytest.fixture(autouse=True)
def not_there_yet(
    request: pytest.FixtureRequest, seen: dict[str, Profile | None], hung: dict[object, str]
) -> None:
    """Of a series that is not whole: skip, before it takes time, what can tell nothing new.

    That is what the kernel says it lacks, and further cases of a test that hung a guest: each
    would cost half a minute and a host, and its clauses are broken already.
    """
    asked = {"lab", "other_lab", "fuzzer"} & set(request.fixturenames)
    if not request.config.getoption("--kvmi-unfinished") or not asked:
        return
    if request.function in hung:
        skip_clause(f"{hung[request.function]} hung a guest")
    if "there" not in seen:
        manager: SmallManager = request.getfixturevalue("manager")
        scratch: Path = request.getfixturevalue("tmp_path")
        seen["there"] = _what_is_there(manager, scratch)
    there = seen["there"]
    if "fuzzer" in asked and (there is None or there.unclaimed):
        skip_clause("random messages and calls are for a kernel that has all there is")
    if there is None:
        return
    known = load_clauses(there.name)
    named = [one for mark in request.node.iter_markers("clause") for one in mark.args]
    lacks = [known[one].unclaimed(there) for one in named if one in known]
    # Tests that are repeated for several commands or events are given the names of these.
    given = getattr(request.node, "callspec", None)
    values = [one for one in given.params.values() if isinstance(one, str)] if given else []
    absent = [one for one in there.unclaimed if one.removeprefix("event ") in values]
    if (named and all(lacks)) or absent:
        skip_clause(f"this kernel says that it lacks what is tested ({[*absent, *lacks][0]})")


def _what_is_there(manager: SmallManager, scratch: Path) -> Profile | None:
    """The interface as far as the host's kernel has it; None if it does not say."""
    profile = manager.profile
    with contextlib.suppress(HarnessError, AssertionError):
        lab = Lab(manager, evidence=scratch, counters=None)
        try:
            session = lab.hook(lab.vm(), allow=False)
            commands = known_commands(session, profile)
            events = {one.common for one in profile.events.values()}
            if "VCPU_CONTROL_EVENTS" not in commands:
                events = set()
            if {"VM_CHECK_COMMAND", "VM_CHECK_EVENT"} <= commands:
                commands = supported_commands(session, profile)
                events = supported_events(session, profile)
        finally:
            lab.close()
        return profile.claimed(
            capability=profile.capability,
            commands=[name for name, one in profile.commands.items() if one.common in commands],
            events=[name for name, one in profile.events.items() if one.common in events],
            requests={name: one.request for name, one in profile.ioctls.items()},
        )
    return None


@pytest.fixture
def lab(
    *,
    request: pytest.FixtureRequest,
    manager: SmallManager,
    evidence: Path,
    counters: SlotWriter,
    on_failure: OnFailure,
    hung: dict[object, str],
) -> Iterator[Lab]:
    """Guests and sessions for one test; everything ends with it."""
    manager.requires("HOOK")
    lab = Lab(manager, evidence=evidence, counters=counters)
    on_failure("guests", lab.guests)
    yield lab
    try:
        lab.close()
    except HarnessError:
        hung.setdefault(request.function, request.node.name)
        raise


@pytest.fixture
def other_lab(
    fresh_host: Host, profile: Profile, settings: Settings, evidence: Path, counters: SlotWriter
) -> Iterator[Lab]:
    """A lab on a host of its own."""
    manager = SmallManager(fresh_host, profile=profile, cache=settings.cache)
    lab = Lab(manager, evidence=evidence, counters=counters)
    yield lab
    lab.close()
    manager.close()


@pytest.fixture
def vm(lab: Lab) -> SmallVm:
    """A guest with one vCPU, neither hooked nor running."""
    return lab.vm()


@pytest.fixture
def session(lab: Lab, vm: SmallVm) -> Session:
    """The guest of the test (``vm``) hooked, everything allowed, nothing enabled."""
    return lab.hook(vm)


@pytest.fixture
def exact(target: Target) -> None:
    """For tests in which one instruction is to be executed, and not several."""
    if "Bochs 2." in target.facts().virtualisation:
        skip_clause(
            "Bochs 2 misses exits by the monitor trap flag; Bochs 3 does not: "
            'bochs = "built" in kvmi-harness.toml'
        )
