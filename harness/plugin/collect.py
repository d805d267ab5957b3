# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tests are ours, which clauses they name, which of them run, and in what order."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from harness.plugin.options import Session
from harness.plugin.shard import in_part
from harness.report.model import Planned

if TYPE_CHECKING:
    from harness.abi import Clause, Profile

__all__ = ["USAGE", "Collect", "TestFacts", "WrongTest", "facts_of"]

OUR_FIXTURES = frozenset({"host", "fresh_host", "target"})
"""A test that asks for one of these is ours even if it names no clause."""

USAGE = "kvmi_usage"
"""Attribute of a collection report: the tests are wrong, not the machine (exit code 2)."""


class WrongTest(pytest.Collector.CollectError):
    """A test names something that does not exist."""


@dataclass(frozen=True)
class TestFacts:
    """What a test of ours says of itself."""

    clauses: tuple[str, ...]
    description: str
    lifecycle: bool
    unclaimed: Mapping[str, str]
    """By clause: what the series does not claim, so that it is not tested."""
    foreign: frozenset[str]
    """Clauses that it names and other versions of the interface have."""


_FACTS = pytest.StashKey[TestFacts]()


def facts_of(item: pytest.Item) -> TestFacts | None:
    """What a test of ours says of itself; None for a test that is not ours."""
    return item.stash.get(_FACTS, None)


class Collect:
    """The plugin's part in collection; runs wherever tests are collected."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: frozenset[str] | None = None
        self._held_to: tuple[Profile, Mapping[str, Clause]] | None = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """``--kvmi-repeat N``: each test N times, with the number in its name."""
        repeat: int = metafunc.config.getoption("--kvmi-repeat")
        if repeat > 1 and _is_ours(metafunc.definition):
            metafunc.fixturenames.append("kvmi_repetition")
            metafunc.parametrize(
                "kvmi_repetition",
                range(repeat),
                ids=[f"{number}of{repeat}" for number in range(1, repeat + 1)],
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_pycollect_makeitem(self) -> Generator[None, Any, Any]:
        """Refuse unknown clause ids while the module is collected, naming test and near ones.

        Raised here it becomes an error of the module's collection, which pytest-xdist
        carries from a worker to the controller; a usage error raised later in a worker
        would only look like a crash of that worker.
        """
        found = yield
        if isinstance(found, list):
            for item in found:
                if isinstance(item, pytest.Item):
                    self._check(item)
        return found

    def _check(self, item: pytest.Item) -> None:
        for marker in item.iter_markers("clause"):
            if not marker.args or marker.kwargs:
                raise WrongTest(
                    f'{item.nodeid}: the clause marker takes ids: @pytest.mark.clause("HOOK-OK")'
                )
            for clause in marker.args:
                if clause not in self.known():
                    near = difflib.get_close_matches(str(clause), self.known(), n=3, cutoff=0.5)
                    hint = f"; did you mean {', '.join(near)}?" if near else ""
                    raise WrongTest(
                        f"{item.nodeid}: unknown clause {clause!r}{hint} "
                        "(harness/abi/clauses.toml lists all)"
                    )

    def known(self) -> frozenset[str]:
        """The clause ids of all versions; read when the first test of ours is met."""
        if self._known is None:
            from harness.abi import all_clauses

            self._known = frozenset(all_clauses())
        return self._known

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self,
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Mark reports of wrong tests, so that the controller can tell them from ours."""
        report = yield
        call = getattr(report, "call", None)
        if call is not None and call.excinfo is not None:
            setattr(report, USAGE, isinstance(call.excinfo.value, WrongTest))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Pick out our tests, apply the choice of clauses, and put long sequences first.

        Tests of clauses that the version of the interface does not have are none of this run;
        those of what the series does not claim are skipped.
        """
        foreign = []
        for item in items:
            if _is_ours(item):
                facts = _adopt(item, *self._interface())
                self._session.own = True
                if not facts.clauses and item.get_closest_marker("clause"):
                    foreign.append(item)
                elif facts.clauses and facts.unclaimed.keys() >= set(facts.clauses):
                    reason = "; ".join(dict.fromkeys(facts.unclaimed.values()))
                    item.add_marker(pytest.mark.skip(reason))
        _drop(config, items, foreign)
        wanted: list[str] = config.getoption("--kvmi-clause")
        if wanted:
            self._deselect(config, items, wanted)
        if not config.option.keyword and not any(".py" in arg for arg in config.args):
            _drop(config, items, [item for item in items if item.get_closest_marker("on_request")])
        shard: str | None = config.getoption("--kvmi-shard")
        if shard:
            chosen = in_part((item.nodeid for item in items), shard)
            _drop(config, items, [item for item in items if item.nodeid not in chosen])
        if self._session.own:
            # With several workers the long ones must not be the last to start.
            items.sort(key=lambda item: not ((facts := facts_of(item)) and facts.lifecycle))

    def _interface(self) -> tuple[Profile, Mapping[str, Clause]]:
        """What the kernel under test is held to; read when the first test of ours is met."""
        if self._held_to is None:
            from harness.abi import load_clauses
            from harness.plugin.inputs import load_run_settings
            from harness.series import interface

            profile = interface(load_run_settings(self._session.run_dir))
            self._held_to = profile, load_clauses(profile.name)
        return self._held_to

    def _deselect(
        self, config: pytest.Config, items: list[pytest.Item], patterns: list[str]
    ) -> None:
        def hit(item: pytest.Item) -> bool:
            facts = facts_of(item)
            clauses = facts.clauses if facts else ()
            return any(fnmatch.filter(clauses, pattern) for pattern in patterns)

        _drop(config, items, [item for item in items if not hit(item)])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Save what this run owes a verdict on, for whoever outlives this process."""
        if not self._session.own or session.config.getoption("collectonly"):
            return
        from harness.report.store import write_plan

        plan = [
            Planned(
                test=item.nodeid,
                clauses=list(facts.clauses),
                description=facts.description,
                lifecycle=facts.lifecycle,
                needs=sorted({w for mark in item.iter_markers("needs") for w in mark.args}),
            )
            for item in session.items
            if (facts := facts_of(item))
        ]
        write_plan(self._session.run_dir, plan)


def _drop(config: pytest.Config, items: list[pytest.Item], dropped: list[pytest.Item]) -> None:
    """Take tests out of those that run, and say so."""
    if dropped:
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=dropped)


def _is_ours(item: pytest.Item) -> bool:
    return item.get_closest_marker("clause") is not None or not OUR_FIXTURES.isdisjoint(
        getattr(item, "fixturenames", ())
    )


def _adopt(item: pytest.Item, profile: Profile, known: Mapping[str, Clause]) -> TestFacts:
    """Note the test's facts, and hold it to what we hold all of ours to."""
    named = [str(c) for marker in item.iter_markers("clause") for c in marker.args]
    clauses = [one for one in dict.fromkeys(named) if one in known]
    unclaimed = {one: known[one].unclaimed(profile) for one in clauses}
    function = getattr(item, "function", None)
    description = (getattr(function, "__doc__", None) or "").strip()
    facts = item.stash[_FACTS] = TestFacts(
        clauses=tuple(clauses),
        description=" ".join(description.partition("\n\n")[0].split()),
        lifecycle=item.get_closest_marker("lifecycle") is not None,
        unclaimed={one: why for one, why in unclaimed.items() if why},
        foreign=frozenset(named) - known.keys(),
    )
    # An exception in a finaliser or in a thread of ours would otherwise be a mere warning.
    for category in ("PytestUnraisableExceptionWarning", "PytestUnhandledThreadExceptionWarning"):
        item.add_marker(pytest.mark.filterwarnings(f"error::pytest.{category}"))
    return facts
