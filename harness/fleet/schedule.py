# SPDX-License-Identifier: GPL-2.0-or-later
"""Which machine runs which test.

A test names what it needs by ``@pytest.mark.needs("vmx", ...)``; a machine has words
(:func:`harness.fleet.machine.words_of`). A test goes to a machine that has all of them, first
to those tests' machines that fewest others could take; among equals the order of collection
counts. Beyond what tests name, they skip what does not apply where they run: a test that was
skipped is tried on one machine of each other kind.

Each machine has two tests at most, the one that runs and the next, as pytest has to know what
comes next to keep what both use. When a machine is lost, its next test goes to another. The
one that ran is set aside: whoever looks after machines decides whether its kernel died of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

__all__ = ["HERE", "MachineScheduling", "Worker"]

HERE = "here"
"""The worker on this machine: for tests that need what only it has, and no others."""

_AT_ONCE = 2


class _Gateway(Protocol):
    @property
    def id(self) -> str: ...


class Worker(Protocol):
    """What is used of pytest-xdist's node."""

    @property
    def gateway(self) -> _Gateway: ...
    @property
    def shutting_down(self) -> bool: ...
    def send_runtest_some(self, indices: Sequence[int]) -> None: ...
    def shutdown(self) -> None: ...


class MachineScheduling:
    """A scheduler of pytest-xdist; see the module's text.

    :param words: what each worker's machine has, by the worker's name.
    :param needs: asked once, when all have collected: what a test needs, if it needs anything.
    :param done: tests that are not to run: they have a verdict already.
    :param skipped: on which kinds of machine tests were skipped before.
    :param lost_in: which workers were lost in a test before: it goes to another, if one can.
    """

    def __init__(
        self,
        words: Mapping[str, frozenset[str]],
        needs: Callable[[], Mapping[str, frozenset[str]]],
        done: frozenset[str] = frozenset(),
        skipped: Mapping[str, set[frozenset[str]]] | None = None,
        lost_in: Mapping[str, set[str]] | None = None,
    ) -> None:
        self._words = words
        self._ask_needs = needs
        self._needs: Mapping[str, frozenset[str]] = {}
        self._done = done
        self._expected = set(words)
        self._collections: dict[Worker, list[str]] = {}
        self._queues: dict[Worker, list[str]] = {}
        self._pending: list[str] | None = None
        self._closed: set[Worker] = set()
        self._ended = False
        self._lost_in = lost_in or {}
        self._skipped = {test: set(kinds) for test, kinds in (skipped or {}).items()}

    # -- what pytest-xdist asks

    @property
    def nodes(self) -> list[Worker]:
        """All workers that are up."""
        return list(self._queues)

    @property
    def collection_is_completed(self) -> bool:
        """Whether all workers that are still expected have collected."""
        return self._expected <= {node.gateway.id for node in self._collections}

    @property
    def has_pending(self) -> bool:
        """Whether tests wait or run."""
        return bool(self._pending) or any(self._queues.values())

    @property
    def tests_finished(self) -> bool:
        """Whether no more can be handed out; each worker may have one left, and run it."""
        if not self.collection_is_completed or self._pending is None:
            return False
        if any(len(queue) >= _AT_ONCE for queue in self._queues.values()):
            return False
        self._ended = self._ended or not any(
            self._suits(node, test) for node in self._open() for test in self._pending
        )
        return self._ended

    def add_node(self, node: Worker) -> None:
        """A worker is up; it collects now."""
        self._queues[node] = []

    def add_node_collection(self, node: Worker, collection: Sequence[str]) -> None:
        """A worker has collected."""
        self._collections[node] = list(collection)

    def schedule(self) -> None:
        """Begin, once all have collected."""
        if self._pending is None:
            self._needs = self._ask_needs()
            everything = dict.fromkeys(t for one in self._collections.values() for t in one)
            self._pending = [test for test in everything if test not in self._done]
        self._feed_all()

    def mark_test_complete(self, node: Worker, item_index: int, duration: float = 0) -> None:
        """A worker has done a test."""
        self._queues[node].remove(self._collections[node][item_index])
        self._feed_all()

    def mark_test_pending(self, item: str) -> None:
        """A test is to run again."""
        if self._pending is not None:
            self._pending.insert(0, item)
            self._feed_all()

    def remove_pending_tests_from_node(self, node: Worker, indices: Sequence[int]) -> None:
        """Nothing is ever taken from a worker that is up."""
        raise NotImplementedError

    def remove_node(self, node: Worker) -> str | None:
        """A worker is no more. Gives the test that it ran; what it had besides is handed out."""
        # One test alone is run when it is known that no other follows.
        queue = self._queues.get(node, [])
        runs = len(queue) >= _AT_ONCE or node in self._closed or self._ended
        running = queue[0] if queue and runs else None
        self._expected.discard(node.gateway.id)
        self._collections.pop(node, None)
        self._queues.pop(node, None)
        if self._pending is not None:
            self._pending[:0] = [test for test in queue if test != running]
        if self.collection_is_completed and self._collections:
            self.schedule()
        return running

    # -- beyond that

    def skipped(self, node: Worker, test: str) -> None:
        """A test was skipped: another kind of machine may be the one for it."""
        if node.gateway.id == HERE or self._pending is None:
            return
        tried = self._skipped.setdefault(test, set())
        tried.add(self._words[node.gateway.id])
        if test not in self._pending and any(self._suits(one, test) for one in self._open()):
            self._pending.append(test)

    def _open(self) -> list[Worker]:
        """The workers that can still be given tests."""
        return [node for node in self._queues if not node.shutting_down]

    def _suits(self, node: Worker, test: str) -> bool:
        if not self._able(node, test):
            return False
        avoided = self._lost_in.get(test, ())
        return node.gateway.id not in avoided or not any(
            one.gateway.id not in avoided and self._able(one, test) for one in self._open()
        )

    def _able(self, node: Worker, test: str) -> bool:
        words = self._words[node.gateway.id]
        needs = self._needs.get(test, frozenset())
        if node.gateway.id == HERE and not needs:
            return False
        return (
            needs <= words
            and words not in self._skipped.get(test, ())
            and test in self._collections.get(node, ())
        )

    def _feed_all(self) -> None:
        if self._pending is None:
            return
        # One for each in turn, so that the first does not get all of the long ones.
        for size in range(1, _AT_ONCE + 1):
            for node in self._open():
                if len(self._queues[node]) < size:
                    self._feed(node)
        for node in self._open():
            if not self._may_get_more(node):
                self._closed.add(node)
                node.shutdown()

    def _feed(self, node: Worker) -> None:
        assert self._pending is not None
        able = [test for test in self._pending if self._suits(node, test)]
        if not able:
            return
        others = [one for one in self._open() if one is not node]
        # The first of those with fewest other machines.
        test = min(able, key=lambda one: sum(self._suits(other, one) for other in others))
        self._pending.remove(test)
        self._queues[node].append(test)
        node.send_runtest_some([self._collections[node].index(test)])

    def _may_get_more(self, node: Worker) -> bool:
        """Whether a test may still come to the worker: from those that wait, or by a skip."""
        assert self._pending is not None
        if any(self._suits(node, test) for test in self._pending):
            return True
        return any(
            self._suits(node, test)
            for other, queue in self._queues.items()
            if self._words[other.gateway.id] != self._words[node.gateway.id]
            for test in [*queue, *self._pending]
            if other.gateway.id != HERE
        )
