# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run leaves behind: its facts, its verdicts, and what they add up to.

This module is data only: records (msgspec structs, one JSON object each), the way several
verdicts of a clause become one, and the exit code of a run. Reading and writing them is
:mod:`harness.report.store`.

A run's ``verdicts.jsonl`` holds one record per line, told apart by ``kind``:

==========  ==========================================================================
``run``     the first line: facts of machine, kernel, QEMU and CPU (:class:`RunFacts`)
``verdict`` one per (test, clause) as soon as it is known (:class:`Verdict`)
``end``     the last line of a run that came to its end (:class:`End`)
==========  ==========================================================================

How the verdicts of one clause add up (:func:`combine`): FAIL beats ERROR beats MISS, which
beat the others. A clause with PASS and SKIP only is PASS, since a skipped test says nothing
about the promise and the other test showed that it holds; the skip stays visible as
``partial``. A clause is SKIP only when all of its tests were skipped.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

__all__ = [
    "ClauseResult",
    "End",
    "MachineRecord",
    "Outcome",
    "Planned",
    "RunFacts",
    "Verdict",
    "clauses_or_none",
    "combine",
    "count",
    "exit_code",
    "missing",
    "results_by_clause",
]


class Outcome(enum.StrEnum):
    """A verdict on one clause; the order of the members is the order of the legend."""

    PASS = "PASS"
    FAIL = "FAIL"
    ERROR = "ERROR"
    MISS = "MISS"
    SKIP = "SKIP"

    @property
    def meaning(self) -> str:
        """One line for legends."""
        return _MEANING[self]

    @property
    def bad(self) -> bool:
        """Whether this verdict keeps a run from exit code 0."""
        return self in (Outcome.FAIL, Outcome.ERROR, Outcome.MISS)


_MEANING = {
    Outcome.PASS: "the promise held",
    Outcome.FAIL: "the kernel or QEMU broke the promise",
    Outcome.ERROR: "our own side or the machine failed",
    Outcome.MISS: "should have run and did not",
    Outcome.SKIP: "does not apply here, with the reason",
}

_WORST_FIRST = (Outcome.FAIL, Outcome.ERROR, Outcome.MISS, Outcome.PASS, Outcome.SKIP)


class MachineRecord(msgspec.Struct, kw_only=True, frozen=True):
    """The host that the run used, as its target describes it.

    ``machine`` is what all this ran on; ``cpus`` and ``memory_mb`` are those of one host.
    ``extra`` has what a target says beyond this.

    ``emulated`` is the fact that matters most to a reader: true when the CPU that runs the
    nested guests is a program (QEMU's TCG, Bochs). ``hypervisor`` names what a machine runs
    on that cannot be looked below: it may run in an emulator. Only without both of them was
    something seen on hardware.
    """

    target: str = ""
    emulated: bool = True
    hypervisor: str = ""
    vendor: str = ""
    cpu_model: str = ""
    virtualisation: str = ""
    nested_paging: bool = False
    kernel_release: str = ""
    kernel_series: str = ""
    guest_qemu: str = ""
    cpus: int = 0
    memory_mb: int = 0
    machine: str = ""
    extra: dict[str, str] = {}

    @property
    def caution(self) -> str:
        """Why nothing was seen on hardware, for people; empty where it was."""
        if self.emulated:
            return "The CPU is emulated: nothing here was seen on hardware."
        if self.hypervisor:
            return (
                f"The CPU is that of a virtual machine on {self.hypervisor}. What is below it "
                "cannot be seen from inside, so nothing here counts as seen on hardware."
            )
        return ""


class RunFacts(
    msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True, tag_field="kind", tag="run"
):
    """The first line of a run: where and on what it ran. Times are UTC, ISO 8601.

    ``chosen`` says why it is this target.
    ``select`` and ``repeat`` repeat the call's choice of tests, so that the page can say that
    a run was partial on purpose. ``rerun`` is the command that started it, to which
    ``--select`` can be added. ``prepare_s`` is how long building and booting took before.
    ``shard`` is the part that it ran, as ``1/3``. ``left_out`` says what of the suite was not
    run, and why. ``unclaimed`` is what ``abi`` has and the series
    does not claim: commands, events and ioctls.
    ``kernel`` and ``qemu`` hold the build's ``key``, ``release`` or ``version``, and of its
    series ``series`` (the id), ``title``, ``patches`` (how many), ``base``, ``message_id`` and
    ``patchset_hash`` (as KCIDB defines it), as far as they are known.
    """

    run: str
    started: str
    target: str = ""
    chosen: str = ""
    series: str = ""
    abi: str = ""
    unclaimed: list[str] = []
    workers: int = 0
    select: str = ""
    repeat: int = 1
    shard: str = ""
    left_out: str = ""
    rerun: str = ""
    harness: str = ""
    python: str = ""
    system: str = ""
    controller: str = ""
    prepare_s: float = 0.0
    kernel: dict[str, str] = {}
    qemu: dict[str, str] = {}
    machine: MachineRecord | None = None


class Verdict(
    msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True, tag_field="kind", tag="verdict"
):
    """One clause's verdict from one test.

    :param clause: the clause's id; ``None`` when a test that used a host names none.
    :param test: pytest's node id, relative to the repository.
    :param series: short ids of the kernel and QEMU series under test.
    :param reason: one line; never empty unless the verdict is PASS.
    :param seen: which of several accepted readings was seen, where text and code disagree.
    :param phase: ``setup``, ``call`` or ``teardown`` of the test: where the reason arose.
    :param evidence: name to path, relative to the run's directory.
    :param counts: what the worker's event counter gained during the test, by name.
    """

    clause: str | None
    verdict: Outcome
    test: str
    target: str
    series: str
    duration_s: float
    reason: str = ""
    phase: str = ""
    seen: str = ""
    notes: list[str] = []
    description: str = ""
    worker: str = ""
    started: str = ""
    evidence: dict[str, str] = {}
    counts: dict[str, int] = {}


class End(
    msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True, tag_field="kind", tag="end"
):
    """The last line of a run that came to its end; ``reason`` if it ended early.

    ``lost`` names the machines of a fleet that were lost, each with how.
    """

    finished: str
    duration_s: float
    exit_code: int
    reason: str = ""
    lost: dict[str, str] = {}


class Planned(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One collected test: what a run owes a verdict on.

    ``needs`` are the words that a machine of a fleet has to have for it.
    """

    test: str
    clauses: list[str] = []
    description: str = ""
    lifecycle: bool = False
    needs: list[str] = []


class ClauseResult(msgspec.Struct, kw_only=True, frozen=True):
    """All verdicts of one clause and the one they add up to."""

    clause: str
    verdict: Outcome
    verdicts: tuple[Verdict, ...]
    partial: bool = False

    @property
    def reasons(self) -> list[str]:
        """The reasons of those verdicts that decided, without repetition."""
        wanted = {Outcome.SKIP} if self.partial else {self.verdict}
        return list(dict.fromkeys(v.reason for v in self.verdicts if v.verdict in wanted))


def combine(outcomes: Iterable[Outcome]) -> Outcome:
    """Several verdicts of one clause as one; see the top of this module for the rule.

    :raises ValueError: without any outcome, since nothing follows from nothing.
    """
    present = set(outcomes)
    if not present:
        raise ValueError("no outcomes to combine")
    return next(outcome for outcome in _WORST_FIRST if outcome in present)


def results_by_clause(verdicts: Iterable[Verdict]) -> dict[str, ClauseResult]:
    """One result for each clause that any verdict names, in order of first appearance.

    Verdicts without a clause are collected under the empty id.
    """
    grouped: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        grouped.setdefault(verdict.clause or "", []).append(verdict)
    results = {}
    for clause, members in grouped.items():
        outcomes = {member.verdict for member in members}
        results[clause] = ClauseResult(
            clause=clause,
            verdict=combine(outcomes),
            verdicts=tuple(members),
            partial=outcomes == {Outcome.PASS, Outcome.SKIP},
        )
    return results


def count(outcomes: Iterable[Outcome]) -> dict[Outcome, int]:
    """How often each outcome occurs; all five are present, in the order of the legend."""
    totals = dict.fromkeys(Outcome, 0)
    for outcome in outcomes:
        totals[outcome] += 1
    return totals


def clauses_or_none(clauses: Sequence[str]) -> Sequence[str | None]:
    """A test's clauses to give verdicts on: at least one, ``None`` when it names none."""
    return clauses or (None,)


def missing(plan: Iterable[Planned], verdicts: Iterable[Verdict], *, reason: str) -> list[Verdict]:
    """A MISS for each clause of each planned test that has no verdict.

    :param reason: what kept them from running, for all of them.
    """
    known = list(verdicts)
    seen = {(v.test, v.clause) for v in known}
    any_fact = known[0] if known else None
    lost = []
    for planned in plan:
        for clause in clauses_or_none(planned.clauses):
            if (planned.test, clause) not in seen:
                lost.append(
                    Verdict(
                        clause=clause,
                        verdict=Outcome.MISS,
                        test=planned.test,
                        target=any_fact.target if any_fact else "",
                        series=any_fact.series if any_fact else "",
                        duration_s=0.0,
                        reason=reason,
                        description=planned.description,
                    )
                )
    return lost


def exit_code(verdicts: Iterable[Verdict]) -> Literal[0, 1, 4]:
    """The exit code that verdicts alone ask for.

    0: something held and nothing was bad. 1: the kernel or QEMU broke a promise, whatever
    else happened. 4: an ERROR or a MISS, or nothing was tested at all (no verdicts, or every
    one a SKIP): a run that shows nothing must not look like a good one.
    """
    totals: Mapping[Outcome, int] = count(v.verdict for v in verdicts)
    if totals[Outcome.FAIL]:
        return 1
    if totals[Outcome.ERROR] or totals[Outcome.MISS] or not totals[Outcome.PASS]:
        return 4
    return 0
