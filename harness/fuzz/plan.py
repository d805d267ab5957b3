# SPDX-License-Identifier: GPL-2.0-or-later
"""What one run of the fuzzer does: how much, and from which seed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from harness.errors import UsageError

__all__ = ["MESSAGES_PER_CASE", "PLAN", "Batch", "Plan", "load_plan", "parse_cases", "save_plan"]

PLAN = "fuzz.json"
"""The plan's file in the run's directory, for the workers."""

MESSAGES_PER_CASE = 200

_BATCH = {"messages": 10, "calls": 250}
"""Cases of one test: some seconds under emulation."""

WhatKind = Literal["messages", "calls"]


@dataclass(frozen=True)
class Batch:
    """Cases that one test runs."""

    kind: WhatKind
    first: int
    count: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.first}" + (f"+{self.count}" if self.count > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of what."""

    seed: str
    messages: int = 200_000
    """So many messages, at least."""
    sequences: int = 20_000
    """So many sequences of ioctls, at least."""
    cases: str = ""
    """Just this case, such as ``messages-17``, or some from there on: ``calls-25+5``."""

    def batches(self) -> list[Batch]:
        """What the tests run, the two kinds in turn: each finds other defects."""
        if self.cases:
            return parse_cases(self.cases)
        wanted: dict[WhatKind, int] = {
            "messages": -(-self.messages // MESSAGES_PER_CASE),
            "calls": self.sequences,
        }
        found: list[tuple[float, Batch]] = []
        for kind, cases in wanted.items():
            for first in range(0, cases, _BATCH[kind]):
                count = min(_BATCH[kind], cases - first)
                found.append((first / cases, Batch(kind, first, count)))
        return [batch for _, batch in sorted(found, key=lambda one: one[0])]


def parse_cases(text: str) -> list[Batch]:
    """The cases whose names are in a text, such as names of tests.

    :raises UsageError: there is none.
    """
    found = re.findall(r"\b(messages|calls)-(\d+)(?:\+(\d+))?", text)
    if not found:
        raise UsageError(
            f"{text!r} names no case of the fuzzer",
            hint="a case is called messages-17 or calls-17, ten of them calls-17+10",
        )
    return [
        Batch("messages" if kind == "messages" else "calls", int(first), int(count or 1))
        for kind, first, count in found
    ]


def save_plan(run_dir: Path, plan: Plan) -> None:
    """Leave the plan for the workers."""
    (run_dir / PLAN).write_bytes(msgspec.json.encode(plan))


def load_plan(run_dir: Path) -> Plan:
    """The run's plan; a short one if the run was not started as one of the fuzzer."""
    path = run_dir / PLAN
    if path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=Plan)
    return Plan(seed="by hand", messages=4000, sequences=500)
