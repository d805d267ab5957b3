# SPDX-License-Identifier: GPL-2.0-or-later
"""Which machine runs which test: the scheduler, with workers that only note what they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from harness.fleet.schedule import HERE, MachineScheduling

TESTS = [f"t{number}" for number in range(10)]


@dataclass(frozen=True)
class Gateway:
    id: str


@dataclass(eq=False)
class Node:
    """A worker that runs nothing."""

    gateway: Gateway
    tests: Sequence[str]
    queue: list[str] = field(default_factory=list)
    shutting_down: bool = False

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        assert not self.shutting_down
        self.queue += [self.tests[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True


class Fleet:
    """A scheduler and its workers."""

    def __init__(
        self,
        words: Mapping[str, str],
        *,
        needs: Mapping[str, str] | None = None,
        tests: Sequence[str] = TESTS,
        done: Sequence[str] = (),
        lost_in: Mapping[str, set[str]] | None = None,
    ) -> None:
        self.ran: dict[str, list[str]] = {name: [] for name in words}
        self.scheduling = MachineScheduling(
            {name: frozenset(text.split()) for name, text in words.items()},
            lambda: {test: frozenset(text.split()) for test, text in (needs or {}).items()},
            frozenset(done),
            lost_in=lost_in,
        )
        self.nodes = {name: Node(Gateway(name), tests) for name in words}
        for node in self.nodes.values():
            self.scheduling.add_node(node)
        for node in self.nodes.values():
            assert not self.scheduling.collection_is_completed
            self.scheduling.add_node_collection(node, tests)
        self.scheduling.schedule()

    def step(self, name: str, *, skip: bool = False) -> bool:
        """Let a worker do what it can: pytest runs a test only if it knows the next."""
        node = self.nodes[name]
        if len(node.queue) < (1 if node.shutting_down else 2):
            return False
        test = node.queue.pop(0)
        self.ran[name].append(test)
        if skip:
            self.scheduling.skipped(node, test)
        self.scheduling.mark_test_complete(node, node.tests.index(test))
        if self.scheduling.tests_finished:
            for one in self.nodes.values():
                one.shutdown()
        return True

    def lose(self, name: str) -> str | None:
        """A worker is gone."""
        return self.scheduling.remove_node(self.nodes.pop(name))

    def finish(self, *, skips: Mapping[str, Sequence[str]] | None = None) -> None:
        """Run until nothing moves: one test of each worker in turn."""
        moved = True
        while moved:
            moved = False
            for name in list(self.nodes):
                queue = self.nodes[name].queue
                skip = bool(queue) and queue[0] in (skips or {}).get(name, ())
                moved = self.step(name, skip=skip) or moved
        assert self.scheduling.tests_finished
        assert all(node.shutting_down for node in self.nodes.values())


def test_each_test_runs_once() -> None:
    fleet = Fleet({"a": "svm", "b": "svm"})
    fleet.finish()
    assert sorted(fleet.ran["a"] + fleet.ran["b"]) == TESTS
    assert len(fleet.ran["a"]) == len(fleet.ran["b"]) == 5


def test_what_is_done_does_not_run_again() -> None:
    fleet = Fleet({"a": "svm"}, done=TESTS[:7])
    fleet.finish()
    assert fleet.ran["a"] == TESTS[7:]


def test_a_test_goes_where_its_needs_are_met() -> None:
    """And a machine that alone can do something does that first."""
    fleet = Fleet({"a": "svm", "b": "vmx ept"}, needs={"t7": "vmx ept", "t8": "vmx", "t9": "mips"})
    fleet.finish()
    assert fleet.ran["b"][:2] == ["t7", "t8"]
    assert sorted(fleet.ran["a"] + fleet.ran["b"]) == TESTS[:9]


def test_this_machine_does_what_only_it_can() -> None:
    fleet = Fleet({HERE: "source", "a": "svm"}, needs={"t3": "source"})
    fleet.finish()
    assert fleet.ran[HERE] == ["t3"]
    assert sorted(fleet.ran["a"]) == [test for test in TESTS if test != "t3"]


def test_a_lost_machine_leaves_its_share_to_the_others() -> None:
    """What it ran is given back to whoever asks; what was next for it runs elsewhere."""
    fleet = Fleet({"a": "svm", "b": "svm"})
    fleet.step("b")
    running = fleet.nodes["b"].queue[0]
    assert fleet.lose("b") == running
    fleet.finish()
    assert sorted([*fleet.ran["a"], *fleet.ran["b"], running]) == TESTS


def test_a_machine_may_be_lost_between_tests() -> None:
    """With one test that it was not to run before it knew the next: nothing ran then."""
    fleet = Fleet({"a": "svm", "b": "vmx"}, tests=TESTS[:4])
    fleet.step("a")
    assert len(fleet.nodes["a"].queue) == 1
    assert fleet.lose("a") is None
    fleet.finish()
    assert sorted(fleet.ran["a"] + fleet.ran["b"]) == TESTS[:4]


def test_the_last_machine_for_a_test_may_be_lost() -> None:
    """The rest goes on, and ends."""
    fleet = Fleet({"a": "svm", "b": "vmx"}, needs={"t5": "vmx", "t6": "vmx", "t7": "vmx"})
    fleet.lose("b")
    fleet.finish()
    assert sorted(fleet.ran["a"]) == [t for t in TESTS if t not in ("t5", "t6", "t7")]


def test_a_machine_may_be_lost_before_it_collected() -> None:
    """The others begin without it."""
    scheduling = MachineScheduling({"a": frozenset(), "b": frozenset()}, dict)
    a, b = (Node(Gateway(name), TESTS) for name in "ab")
    scheduling.add_node(a)
    scheduling.add_node(b)
    scheduling.add_node_collection(a, TESTS)
    scheduling.remove_node(b)
    assert scheduling.collection_is_completed
    assert a.queue == TESTS[:2]


def test_what_one_machine_skips_another_kind_may_run() -> None:
    fleet = Fleet({"a": "svm", "b": "svm", "c": "vmx"})
    fleet.finish(skips={"a": TESTS, "b": TESTS})
    assert sorted(fleet.ran["c"]) == TESTS  # nothing is skipped in the end
    assert not set(fleet.ran["a"]) & set(fleet.ran["b"])  # equals are not asked twice


def test_what_all_kinds_skip_is_skipped() -> None:
    fleet = Fleet({"a": "svm", "c": "vmx"})
    fleet.finish(skips={"a": ["t4"], "c": ["t4"]})
    assert [("t4" in ran) for ran in fleet.ran.values()] == [True, True]
    assert sorted(fleet.ran["a"] + fleet.ran["c"]) == sorted([*TESTS, "t4"])


def test_a_test_that_lost_a_machine_goes_to_another() -> None:
    """Unless that is the only one for it."""
    lost_in = {test: {"a"} for test in ("t0", "t9")}
    fleet = Fleet({"a": "svm smap", "b": "svm"}, needs={"t9": "smap"}, lost_in=lost_in)
    fleet.finish()
    assert "t0" in fleet.ran["b"]
    assert "t9" in fleet.ran["a"]


@pytest.mark.parametrize("tests", [[], ["t0"]])
def test_few_tests(tests: list[str]) -> None:
    fleet = Fleet({"a": "svm", "b": "vmx"}, tests=tests)
    fleet.finish()
    assert sorted(fleet.ran["a"] + fleet.ran["b"]) == tests
