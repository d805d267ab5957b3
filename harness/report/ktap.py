# SPDX-License-Identifier: GPL-2.0-or-later
"""KTAP: groups of clauses as subtests, a line for each clause.

The format is Documentation/dev-tools/ktap.rst of the kernel; its tools read it, such as
``tools/testing/kunit/kunit.py parse``. FAIL, ERROR and MISS are all ``not ok``, since KTAP
knows no more; the lines before such a result tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.report.model import Outcome
from harness.report.view import GroupView, Row, RunView

__all__ = ["ktap_of"]


def ktap_of(view: RunView) -> str:
    """The run as KTAP."""
    return "\n".join(_lines(view)) + "\n"


def _lines(view: RunView) -> Iterator[str]:
    facts = view.facts
    yield "KTAP version 1"
    yield f"# {_plain(f'run {facts.run}, target {facts.target}, series {facts.series}')}"
    if facts.machine is not None and facts.machine.caution:
        yield f"# {_plain(facts.machine.caution)}"
    yield f"1..{len(view.groups)}"
    for number, group in enumerate(view.groups, start=1):
        yield from (f"    {line}" for line in _group(view, group))
        yield _result(number, group.verdict, group.title)


def _group(view: RunView, group: GroupView) -> Iterator[str]:
    yield "KTAP version 1"
    yield f"# Subtest: {_plain(group.title)}"
    yield f"1..{len(group.rows)}"
    for number, row in enumerate(group.rows, start=1):
        result = row.result
        if result.verdict.bad:
            yield from (f"# {_plain(line)}" for line in _evidence(view, row))
        elif again := view.passes_again.get(result.clause):
            yield f"# {_plain(f'holds again, a known failure: {again.tracked}')}"
        reason = result.reasons[0] if result.verdict is Outcome.SKIP and result.reasons else ""
        yield _result(number, result.verdict, row.clause.id, reason)


def _evidence(view: RunView, row: Row) -> Iterator[str]:
    bad = [one for one in row.result.verdicts if one.verdict.bad]
    for one in bad:
        yield f"{one.verdict}: {one.test}: {one.reason}"
    if known := view.known.get(row.result.clause):
        yield f"known failure: {known.tracked or known.reason}"
    for target in dict.fromkeys(one.target for one in bad):
        tests = dict.fromkeys(one.test for one in bad if one.target == target)
        yield f"again: {view.rerun(tests, target=target)}"


def _result(number: int, verdict: Outcome, name: str, reason: str = "") -> str:
    state = "not ok" if verdict.bad else "ok"
    skipped = f" # SKIP {_plain(reason)}".rstrip() if verdict is Outcome.SKIP else ""
    return f"{state} {number} {_plain(name)}{skipped}"


def _plain(text: str) -> str:
    """One line in which nothing looks like a directive."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "." for c in line).replace("#", "*")
