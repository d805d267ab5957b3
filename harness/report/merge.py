# SPDX-License-Identifier: GPL-2.0-or-later
"""Several runs made one: the parts that ``inv conform --shard`` ran on different machines."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from harness.errors import InfraError, UsageError
from harness.report.known import FILE_NAME as KNOWN
from harness.report.model import End, MachineRecord, RunFacts, Verdict, exit_code
from harness.report.store import Run, VerdictFile, load_run, new_run_dir, write_plan

__all__ = ["merge"]

_PARTS = "parts"

_TOLD = (
    "target", "hypervisor", "vendor", "cpu_model", "virtualisation", "kernel_release", "machine",
)  # fmt: skip
"""What is said of a machine in words."""


def merge(runs: Sequence[Path], *, reports: Path) -> Path:
    """Make one run of several, with all that they left behind.

    A clause that several of them tested has the verdicts of all. A part that is missing makes
    the merged run end early, and so does one that did so itself.

    :param reports: where the new run's directory is made.
    :returns: that directory.
    :raises UsageError: fewer than two runs, the same one twice, runs of different software, or
        parts of different wholes.
    :raises InfraError: the new directory cannot be written.
    """
    parts = [load_run(path) for path in runs]
    if len(parts) < 2:
        raise UsageError("there is nothing to merge", hint="name the directories of two runs")
    names = [part.facts.run for part in parts]
    if len(set(names)) < len(names):
        raise UsageError(f"a run is named twice: {' '.join(names)}")
    for part in parts[1:]:
        _require_same(parts[0], part)
    if len({part.facts.shard.partition("/")[2] for part in parts if part.facts.shard}) > 1:
        raise UsageError(
            "these are parts of different wholes: "
            + ", ".join(part.facts.shard for part in parts if part.facts.shard),
            hint="run all parts with the same number of parts in --shard",
        )
    place = new_run_dir(reports)
    try:
        _write(place, parts)
    except OSError as error:
        raise InfraError(f"{place} cannot be written: {error.strerror}") from error
    return place


def _require_same(one: Run, other: Run) -> None:
    for what in ("series", "abi", "select"):
        ours, theirs = getattr(one.facts, what), getattr(other.facts, what)
        if ours != theirs:
            raise UsageError(
                f"{one.path.name} and {other.path.name} cannot be merged: "
                f"{what} {ours or 'none'} is not {theirs or 'none'}",
                hint="`inv report.compare` compares runs of different software",
            )


def _write(place: Path, parts: Sequence[Run]) -> None:
    first = parts[0].facts
    verdicts = [_moved(verdict, part) for part in parts for verdict in part.all_verdicts()]
    notes = [f"{part.path.name}: {note}" for part in parts for note in part.notes]
    notes += [f"{p.path.name}: {p.end.reason}" for p in parts if p.end and p.end.reason]
    targets = dict.fromkeys(part.facts.target for part in parts)
    if lost := _lost([part.facts.shard for part in parts if part.facts.shard]):
        notes.append(f"missing: shard {', '.join(lost)}")
    for part in parts:
        shutil.copytree(part.path, place / _PARTS / part.facts.run, symlinks=True)
        if (part.path / KNOWN).is_file():
            shutil.copyfile(part.path / KNOWN, place / KNOWN)
    write_plan(place, {p.test: p for part in parts for p in part.plan}.values())
    with VerdictFile(place) as file:
        file.write(
            msgspec.structs.replace(
                first,
                run=place.name,
                started=min(part.facts.started for part in parts),
                target=" ".join(targets),
                chosen=f"merged from {' '.join(part.facts.run for part in parts)}",
                workers=sum(part.facts.workers for part in parts),
                shard="",
                machine=_machine([part.facts for part in parts]),
            )
        )
        for verdict in verdicts:
            file.write(verdict)
        ends = [part.end for part in parts if part.end]
        file.write(
            End(
                finished=max((end.finished for end in ends), default=first.started),
                duration_s=max((end.duration_s for end in ends), default=0.0),
                # A part of which nothing is known must not look like a good one.
                exit_code=exit_code(verdicts) or (4 if lost else 0),
                reason="; ".join(notes),
            )
        )


def _moved(verdict: Verdict, part: Run) -> Verdict:
    """The verdict with its evidence where it is in the merged run."""
    prefix = f"{_PARTS}/{part.facts.run}"
    evidence = {
        name: path if Path(path).is_absolute() else f"{prefix}/{path}"
        for name, path in verdict.evidence.items()
    }
    return msgspec.structs.replace(verdict, evidence=evidence)


def _machine(facts: Sequence[RunFacts]) -> MachineRecord | None:
    """All machines as one; nothing counts as seen on hardware unless all of it was."""
    machines = [one.machine for one in facts if one.machine]
    if not machines:
        return None
    told = {
        name: ", ".join(dict.fromkeys(filter(None, (getattr(one, name) for one in machines))))
        for name in _TOLD
    }
    emulated = any(one.emulated for one in machines)
    return msgspec.structs.replace(machines[0], emulated=emulated, **told)


def _lost(shards: Sequence[str]) -> list[str]:
    """Parts that are not there."""
    if not shards:
        return []
    total = shards[0].partition("/")[2]
    return [f"{n}/{total}" for n in range(1, int(total) + 1) if f"{n}/{total}" not in shards]
