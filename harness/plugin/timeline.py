# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of a sequence, written as they happen, for the report's timelines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from harness.errors import UsageError

__all__ = ["Step", "Timeline", "load_timeline"]

_encode = msgspec.json.Encoder().encode


class Step(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One line of ``timeline.jsonl``. Times are seconds since the sequence's first step.

    ``state`` is ``begin`` when a step starts, ``ok`` or ``failed`` when it ends, and
    ``mark`` for something that takes no time. A step that only ever began was cut short.
    """

    number: int
    step: str
    state: str
    at_s: float
    depth: int = 0
    detail: str = ""


class Timeline:
    """Writes a test's steps; each line reaches the file at once.

    Steps may be nested. One thread writes; the file appears with the first step.

    A step may name the clauses that it checks. When the test fails in a step, these are the
    ones to blame (:attr:`blamed`); those of steps that came to a good end held
    (:attr:`held`), whatever happens later; what was not reached was not checked.

    :param clauses: the clauses that steps may name: those of the test.
    :param on_step: told the step's name as it begins (the live view shows it).
    """

    def __init__(
        self,
        path: Path,
        *,
        clauses: Collection[str] = (),
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        self._clauses = frozenset(clauses)
        self.held: set[str] = set()
        self.blamed: tuple[str, ...] = ()
        self.failed_step = ""
        self._path = path
        self._on_step = on_step
        self._zero: float | None = None
        self._count = 0
        self._open: list[str] = []

    @contextlib.contextmanager
    def step(self, name: str, *, clauses: Sequence[str] = (), detail: str = "") -> Iterator[None]:
        """Bracket one step of the sequence; an exception marks it failed and goes on up.

        :param clauses: what the step checks, of the clauses that the test names.
        :param detail: shown below the step when it came to a good end.
        :raises UsageError: a clause that the test does not name.
        """
        if not self._clauses.issuperset(clauses):
            unknown = ", ".join(sorted(set(clauses) - self._clauses))
            raise UsageError(f"step {name!r}: the test's marker does not name {unknown}")
        self._count += 1
        number = self._count
        depth = len(self._open)
        self._write(Step(number=number, step=name, state="begin", at_s=self._now(), depth=depth))
        self._open.append(name)
        self._tell(name)
        try:
            yield
        except BaseException as error:
            if clauses and not self.blamed:
                self.blamed, self.failed_step = tuple(clauses), name
            words = str(error).splitlines() or [type(error).__name__]
            self._end(number, name, "failed", depth, words[0])
            raise
        self.held.update(clauses)
        self._end(number, name, "ok", depth, detail)

    def mark(self, name: str, *, detail: str = "") -> None:
        """Note something that happened now and takes no time of its own."""
        self._count += 1
        self._write(
            Step(
                number=self._count,
                step=name,
                state="mark",
                at_s=self._now(),
                depth=len(self._open),
                detail=detail,
            )
        )

    def _end(self, number: int, name: str, state: str, depth: int, detail: str) -> None:
        self._open.pop()
        self._write(
            Step(
                number=number, step=name, state=state, at_s=self._now(), depth=depth, detail=detail
            )
        )
        self._tell(self._open[-1] if self._open else "")

    def _tell(self, name: str) -> None:
        if self._on_step is not None:
            self._on_step(name)

    def _now(self) -> float:
        now = time.monotonic()
        if self._zero is None:
            self._zero = now
        return round(now - self._zero, 4)

    def _write(self, step: Step) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(_encode(step) + b"\n")


def load_timeline(path: Path) -> list[Step]:
    """The steps of a ``timeline.jsonl``; lines that cannot be read are left out."""
    decode = msgspec.json.Decoder(Step).decode
    steps = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(msgspec.MsgspecError):
            steps.append(decode(line))
    return steps
