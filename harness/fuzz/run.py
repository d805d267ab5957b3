# SPDX-License-Identifier: GPL-2.0-or-later
"""A run of the fuzzer: prepared, run and reported as one of the suite."""

from __future__ import annotations

import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.build.progress import note
from harness.conform import prepare_run, run_suite
from harness.fuzz.fuzzer import Figures
from harness.fuzz.plan import Plan, parse_cases, save_plan

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["FIGURES", "add_figures", "fuzz"]

SUITE = "tests/fuzz"
_AMOUNTS = {"": (200_000, 20_000), "bochs": (20_000, 2_000)}
"""Messages and sequences of ioctls by target: Bochs has a tenth of the others' speed."""
FIGURES = "fuzz.jsonl"
"""What each batch amounted to, in the run's directory."""


def fuzz(
    settings: Settings,
    *,
    seed: str | None = None,
    messages: int | None = None,
    sequences: int | None = None,
    select: str | None = None,
) -> int:
    """Attack the kernel of the settings with wrong messages and ioctls.

    :param seed: any text; the same seed makes the same cases. A new one by default.
    :param messages: at least so many; by default what a target does in some minutes.
    :param sequences: the same of sequences of ioctls.
    :param select: only this case of the seed, such as ``messages-17``, or some from there on,
        ``calls-25+25``; also as part of a test's name.
    :returns: the exit code, as of :func:`harness.conform.conform`.
    :raises UsageError: there is no such case.
    """
    seed = seed or secrets.token_hex(4)
    if select:
        parse_cases(select)
    again = f" --seed {shlex.quote(seed)}"
    settings, run_dir = prepare_run(settings, task="fuzz", options=again, select=select or "")
    many = _AMOUNTS.get(settings.target, _AMOUNTS[""])
    plan = Plan(
        seed=seed,
        messages=many[0] if messages is None else messages,
        sequences=many[1] if sequences is None else sequences,
        cases=select or "",
    )
    save_plan(run_dir, plan)
    note(f"Fuzz with seed {seed!r}, {len(plan.batches())} batches: {run_dir}")
    code = run_suite(run_dir, [f"-n{settings.workers}", SUITE])
    _sum_up(run_dir, plan)
    return code


def add_figures(run_dir: Path, figures: Figures) -> None:
    """Add what a batch amounted to; safe to call from several workers."""
    with (run_dir / FIGURES).open("ab") as file:
        file.write(msgspec.json.encode(figures) + b"\n")


def _sum_up(run_dir: Path, plan: Plan) -> None:
    path = run_dir / FIGURES
    if not path.is_file():
        return
    done = [msgspec.json.decode(line, type=Figures) for line in path.read_bytes().splitlines()]
    messages = [one for one in done if one.batch.startswith("messages")]
    calls = [one for one in done if one.batch.startswith("calls")]
    for what, batches, count in (
        ("messages", messages, sum(one.messages for one in messages)),
        ("sequences of ioctls", calls, sum(one.cases for one in calls)),
    ):
        seconds = sum(one.seconds for one in batches)
        if batches and seconds:
            print(
                f"{count} {what} in {sum(one.sessions for one in batches) or count} "
                f"{'sessions' if what == 'messages' else 'cases'}, "
                f"{sum(one.events for one in batches)} events: "
                f"{count / seconds:.0f} a second on each host"
            )
    print(f"The same again: inv fuzz --seed {shlex.quote(plan.seed)}")
