# SPDX-License-Identifier: GPL-2.0-or-later
"""From an exception to a verdict: whose fault was it?

=====================================================  =======
what ended the phase                                   verdict
=====================================================  =======
``ConformanceError`` (with HostCrashedError, ...)      FAIL
an assertion of the tests (``assert``, pytest.fail)    FAIL
an assertion inside this package                       ERROR
any other error of ours, or any other exception        ERROR
``HostsGivenUp``: no host could be had                 MISS
``pytest.skip``, ``AbsentError``                       SKIP
=====================================================  =======

The same holds in set-up, call and tear-down: a kernel that refuses to hook in a fixture
broke its promise all the same. Of several exceptions (a group), the worst counts.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

import harness
from harness.errors import AbsentError, ConformanceError, HarnessError, InfraError
from harness.report.model import Outcome, combine

__all__ = ["HostsGivenUp", "Judgement", "classify"]

_PACKAGE = Path(harness.__file__).resolve().parent
_PYTEST = Path(pytest.__file__).resolve().parent.parent / "_pytest"


class HostsGivenUp(InfraError):
    """No host can be had any more; the test that met the cause has told it already."""


@dataclass(frozen=True)
class Judgement:
    """A verdict on one phase of one test.

    :param reason: one line, with the place where it was noticed.
    :param details: longer text for the failure's evidence file.
    """

    outcome: Outcome
    reason: str = ""
    details: str = ""


def classify(error: pytest.ExceptionInfo[BaseException]) -> Judgement:
    """Judge one exception that ended a phase."""
    if isinstance(error.value, BaseExceptionGroup):
        return _judge_group(error.value)
    outcome = _outcome(error)
    return Judgement(outcome, _reason(error, outcome), _details(error.value))


def _judge_group(group: BaseExceptionGroup[BaseException]) -> Judgement:
    members = [classify(pytest.ExceptionInfo.from_exception(member)) for member in group.exceptions]
    worst = combine(member.outcome for member in members)
    first = next(member for member in members if member.outcome is worst)
    others = len(members) - 1
    more = f" (and {others} more error{'s' if others > 1 else ''})" if others else ""
    return Judgement(
        worst, first.reason + more, "\n\n".join(m.details for m in members if m.details)
    )


def _outcome(error: pytest.ExceptionInfo[BaseException]) -> Outcome:
    match error.value:
        case pytest.skip.Exception() | AbsentError():
            return Outcome.SKIP
        case ConformanceError():
            return Outcome.FAIL
        case HostsGivenUp():
            return Outcome.MISS
        case AssertionError() | pytest.fail.Exception():
            frames = _frames(error)
            inside = bool(frames) and frames[0][0].is_relative_to(_PACKAGE)
            return Outcome.ERROR if inside else Outcome.FAIL
        case _:
            return Outcome.ERROR


def _frames(error: pytest.ExceptionInfo[BaseException]) -> list[tuple[Path, int]]:
    """Files and lines of the exception's frames without pytest's own, the innermost first."""
    frames = [(Path(str(entry.path)), entry.lineno + 1) for entry in reversed(error.traceback)]
    return [frame for frame in frames if not frame[0].is_relative_to(_PYTEST)]


def _reason(error: pytest.ExceptionInfo[BaseException], outcome: Outcome) -> str:
    value = error.value
    if isinstance(value, pytest.skip.Exception):
        return value.msg or "skipped without a reason"
    if isinstance(value, AbsentError):
        return value.message
    text = value.message if isinstance(value, HarnessError) else str(value)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if isinstance(value, AssertionError | pytest.fail.Exception):
        first = first or "an assertion failed"
    elif type(value) is not ConformanceError:
        first = f"{type(value).__name__}: {first}" if first else type(value).__name__
    # The line of the test or its fixtures says more than one in this package.
    foreign = (_PACKAGE, Path(sys.prefix), Path(threading.__file__).parent)
    for path, line in _frames(error) if outcome is not Outcome.MISS else []:
        if not any(path.is_relative_to(root) for root in foreign):
            return f"{first} [{path.name}:{line}]"
    return first


def _details(value: BaseException) -> str:
    if not isinstance(value, HarnessError):
        return ""
    parts = [value.message, f"What to do: {value.hint}" if value.hint else "", value.details]
    return "\n\n".join(part for part in parts if part)
