# SPDX-License-Identifier: GPL-2.0-or-later
"""The comparison, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.selftests.outcome import BASE, OFF, ON, TITLES, Comparison, Outcome
from harness.selftests.runner import DEADLINE_S, compare

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["run", "summary"]

_LONGEST = 300


def run(settings: Settings, *, select: str | None = None) -> int:
    """Compare, print what came of it, and leave it in a directory of the reports.

    :param select: names of tests, separated by blanks; all by default.
    :returns: 0 if the series changes nothing, 1 if a test gives something else with it.
    :raises HarnessError: as of :func:`compare`.
    """
    from harness.report.store import new_run_dir

    place = new_run_dir(settings.reports / "selftests")
    comparison = compare(settings, tests=(select or "").split(), place=place)
    text = summary(comparison)
    _save(comparison, text, place)
    print(text)
    print(f"Report: {place}")
    return 1 if any(comparison.differences(kernel) for kernel in (OFF, ON)) else 0


def _save(comparison: Comparison, text: str, place: Path) -> None:
    (place / "comparison.txt").write_text(text + "\n")
    record = {
        "source": comparison.source,
        "base": comparison.base.as_dict(),
        "series": comparison.series.as_dict(),
        "left_out": comparison.left_out,
        "differences": {kernel: comparison.differences(kernel) for kernel in (OFF, ON)},
        "flaky": comparison.flaky(),
        "outcomes": {
            name: {kernel: [dataclasses.asdict(one) for one in runs] for kernel, runs in by.items()}
            for name, by in comparison.outcomes.items()
        },
    }
    (place / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")


def summary(comparison: Comparison) -> str:
    """The comparison as text: differences first, then what each verdict rests on."""
    from harness.plugin.inputs import machine_record

    facts = comparison.series
    lines = [
        f"KVM selftests of {comparison.source}",
        f"  without: {comparison.base.kernel_release}",
        f"  with:    {facts.kernel_release} ({facts.kernel_series})",
        f"  on:      {facts.virtualisation}",
        *filter(None, [machine_record(facts).caution]),
        "",
    ]
    verdicts = sorted({name for kernel in TITLES for name in comparison.count(kernel)})
    for kernel, title in TITLES.items():
        counts = comparison.count(kernel)
        lines.append(
            f"  {title:38}" + ", ".join(f"{counts[one]} {one}" for one in verdicts if one in counts)
        )
    for kernel in (OFF, ON):
        names = comparison.differences(kernel)
        lines += ["", f"Differences {TITLES[kernel]}: {len(names) or 'none'}"]
        for name in names:
            lines.append(f"  {name}")
            for one in (BASE, kernel):
                runs = comparison.outcomes[name].get(one, [])
                lines += [f"    {TITLES[one]}: {words}" for words in _counted(runs)]
    lines += _section("Not always the same, on any kernel", comparison.flaky(), comparison)
    usual = {
        name: runs[0] for name, by in comparison.outcomes.items() if (runs := by.get(BASE, []))
    }
    for verdict, title in (
        ("fail", "Failing without the series too"),
        ("signal", "Ended by a signal without the series too"),
        ("timeout", f"Not done in {DEADLINE_S:.0f} s without the series either"),
        ("lost", "Ending the host without the series too"),
        ("skip", "Skipped by themselves"),
    ):
        names = [name for name, one in usual.items() if one.verdict == verdict]
        lines += _section(title, names, comparison)
    if comparison.left_out:
        lines += ["", f"Left out where the processor is emulated: {len(comparison.left_out)}"]
        lines += [f"  {name}: {why}" for name, why in comparison.left_out.items()]
    return "\n".join(lines)


def _section(title: str, names: Sequence[str], comparison: Comparison) -> list[str]:
    if not names:
        return []
    lines = ["", f"{title}: {len(names)}"]
    for name in names:
        runs = [one for by in comparison.outcomes[name].values() for one in by]
        lines += [f"  {name}: {words}" for words in _counted(runs)]
    return lines


def _counted(runs: Sequence[Outcome]) -> list[str]:
    """Each different outcome in words, with how often it came if there are several."""
    counts = Counter(runs)
    return [
        (f"{count} of {len(runs)}: " if len(counts) > 1 else "") + one.words()[:_LONGEST]
        for one, count in counts.items()
    ]
