# SPDX-License-Identifier: GPL-2.0-or-later
"""The answer to a series: plain text to be sent to the list where it was posted."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Iterator

from harness import __version__
from harness.report.compare import Change, Comparison
from harness.report.evidence import evidence_files, kind_of, messages_of, text_of
from harness.report.model import MachineRecord, Outcome, RunFacts, Verdict
from harness.report.view import RunView, TestView

__all__ = ["mail_of", "who_tests", "whole"]

WIDTH = 76
EVIDENCE_LINES = 5
_ARROWS = {"in": "<-", "out": "->"}
_ALARMS = ("BUG:", "WARNING:", "Oops", "panic", "KASAN", "UBSAN", "general protection")


def mail_of(view: RunView, *, against: Comparison | None = None, tester: str = "") -> str:
    """The text.

    :param against: what differs from an earlier run, if there is one.
    :param tester: ``Name <address>`` for the Tested-by line; without it there is none.
    """
    return "\n".join(_lines(view, against, tester)).rstrip() + "\n"


def who_tests() -> str:
    """``Name <address>`` from git's settings; empty if there are none."""
    said = []
    for name in ("user.name", "user.email"):
        try:
            done = subprocess.run(
                ["git", "config", "--get", name], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return ""
        said.append(done.stdout.strip())
    return f"{said[0]} <{said[1]}>" if all(said) else ""


def whole(view: RunView) -> bool:
    """Whether everything that the suite checks of what the series claims was tested, and held.

    Known failures count as what they are, and what was chosen to run as a part.
    """
    end = view.run.end
    complete = end is not None and not end.reason and not view.run.notes
    partial = view.facts.select or view.facts.shard or view.facts.left_out
    held = bool(view.counts[Outcome.PASS]) and not any(v.verdict.bad for v in view.verdicts)
    return complete and not partial and held


def _lines(view: RunView, against: Comparison | None, tester: str) -> Iterator[str]:
    facts = view.facts
    if title := facts.kernel.get("title"):
        yield f"Subject: Re: {title}"
        if message := facts.kernel.get("message_id"):
            yield f"In-Reply-To: {message}"
        yield ""
    yield from _wrapped(
        f"The series was held to the conformance suite of kvmi-harness "
        f"{facts.harness or __version__}. {view.headline}."
    )
    yield ""
    yield from _what(view)
    if against is not None:
        yield from _against(against)
    yield from _groups(view)
    yield from _failures(view)
    if tester and whole(view):
        yield f"Tested-by: {tester}{_remark(facts.machine, claims=_claims(facts))}"


def _what(view: RunView) -> Iterator[str]:
    facts = view.facts
    yield "What was tested"
    for label, build in (("kernel", facts.kernel), ("QEMU", facts.qemu)):
        if build:
            number = f", {build['patches']} patches" if "patches" in build else ""
            base = f" on {build['base']}" if "base" in build else ""
            version = build.get("release") or build.get("version", "")
            yield from _fact(label, f"{version}, {build.get('series', '')}{number}{base}")
    yield from _fact("interface", facts.abi)
    if facts.unclaimed:
        left_out = ", ".join(facts.unclaimed)
        yield from _fact("", f"but for what the series does not claim: {left_out}")
    machine = facts.machine
    where = ", ".join(
        part for part in (facts.target, machine.virtualisation if machine else "") if part
    )
    yield from _fact("on", where)
    if machine is not None and machine.caution:
        yield from _fact("", machine.caution)
    tests = len(view.tests)
    yield from _fact("when", f"{facts.started}, {tests} test{'' if tests == 1 else 's'}")
    if facts.select:
        yield from _fact("only", f"what matches {facts.select}")
    yield from _fact("not", facts.left_out)
    for note in [*view.run.notes, *([view.run.end.reason] if view.run.end else [])]:
        if note:
            yield from _fact("note", note)
    yield ""


def _fact(label: str, text: str) -> Iterator[str]:
    if text.strip(", "):
        yield from textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"  {label:<10}",
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )


def _against(against: Comparison) -> Iterator[str]:
    for change, title in (
        (Change.BROKE, "Regressions against the run before"),
        (Change.VANISHED, "Not tested any more"),
        (Change.MENDED, "Mended"),
    ):
        if members := against.of(change):
            yield title
            yield from (f"  {one}"[:200] for one in members)
            yield ""
    if slower := [one for one in against.speeds if one.slower]:
        yield "Slower"
        if caution := against.measured.caution:
            yield from _wrapped_item(caution)
        yield from (f"  {one}" for one in slower)
        yield ""


def _groups(view: RunView) -> Iterator[str]:
    heading = "Clauses by group"
    width = max([len(heading), *(len(group.title) for group in view.groups)])
    yield f"{heading:<{width}}  " + " ".join(f"{one.value:>5}" for one in Outcome)
    for title, counts in [
        *((group.title, group.counts) for group in view.groups),
        ("all", view.counts),
    ]:
        numbers = " ".join(f"{counts[one] or '.':>5}" for one in Outcome)
        yield f"{title:<{width}}  {numbers}"
    yield ""


def _failures(view: RunView) -> Iterator[str]:
    known: list[TestView] = []
    unknown: list[TestView] = []
    for test in view.bad_tests:
        clauses = test.blamed
        (known if clauses and all(c in view.known for c in clauses) else unknown).append(test)
    for title, tests in (("What failed", unknown), ("Known failures", known)):
        if not tests:
            continue
        yield title
        alike: dict[tuple[str, ...], list[TestView]] = {}
        for test in tests:
            alike.setdefault(
                (test.verdict, test.target, *test.blamed, test.first.reason), []
            ).append(test)
        for first, *others in alike.values():
            yield from _failure(view, first, others=len(others))
        yield ""
    skipped: dict[str, list[str]] = {}
    for name, result in view.results.items():
        if result.verdict is Outcome.SKIP:
            skipped.setdefault(_one(result.reasons[0]), []).append(name or "-")
    if skipped:
        yield "What does not apply here"
        for reason, names in skipped.items():
            yield from _wrapped_item(f"{', '.join(names)}: {reason}")
        yield ""
    if mended := view.passes_again:
        yield "Known failures that pass again"
        yield from (f"  {clause}: {one.tracked}" for clause, one in mended.items())
        yield ""


def _failure(view: RunView, test: TestView, *, others: int) -> Iterator[str]:
    """A test that failed. :param others: how many more failed in the same way."""
    verdict = test.first
    where = f" on {test.target}" if len(view.targets) > 1 else ""
    more = f" ({others + 1} tests)" if others else ""
    what = " ".join(test.blamed) or test.name
    yield f"  {test.verdict} {what}{where}: {_one(verdict.reason)}{more}"
    for clause in test.blamed:
        if clause in view.known:
            yield f"    tracked: {view.known[clause].tracked}"
    yield from (f"    > {line}" for line in _evidence(view, verdict))


def _evidence(view: RunView, verdict: Verdict) -> list[str]:
    """At most five lines that show what happened: the kernel's alarm, then the last messages."""
    alarms: list[str] = []
    messages: list[str] = []
    words: list[str] = []
    for name, relative in evidence_files(verdict.evidence, first=("failure",)):
        path = view.path(relative)
        if kind_of(path) == "messages":
            found, _ = messages_of(path, limit=EVIDENCE_LINES)
            messages += [f"{_ARROWS.get(m.direction, '--')} {_one(m.text)}" for m in found]
        elif name == "kernel_log":
            lines = text_of(path).text.splitlines()
            alarms += [_one(line) for line in lines if any(word in line for word in _ALARMS)]
        elif name == "failure":
            lines = text_of(path).text.splitlines()
            words += [_one(line[1:]) for line in lines if line.startswith("E ")]
    first = [*alarms[:2], *words[:1]]
    return [*first, *messages[-(EVIDENCE_LINES - len(first)) :]][:EVIDENCE_LINES]


def _one(text: str) -> str:
    """One line, printable, cut where a reader of mail stops."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "." for c in line)
    return line if len(line) <= 2 * WIDTH else line[: 2 * WIDTH - 3] + "..."


def _wrapped_item(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _claims(facts: RunFacts) -> str:
    """What was tested, where that is less than the whole interface."""
    return f"what it claims of {facts.abi}" if facts.unclaimed else ""


def _remark(machine: MachineRecord | None, *, claims: str) -> str:
    """What the line must say beside the name: it was no hardware, or which; and not all."""
    where = ""
    if machine is not None and machine.emulated:
        where = machine.virtualisation.partition(" (")[0] or "emulated"
    elif machine is not None and machine.hypervisor:
        where = f"in a virtual machine on {machine.hypervisor}"
    elif machine is not None:
        where = machine.cpu_model
    said = ", ".join(part for part in (claims, where) if part)
    return f" # {said}" if said else ""
