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
from harness.fuzz.plan import Plan, save_plan

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["FIGURES", "add_figures", "fuzz"]

SUITE = "tests/fuzz"
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
    :param messages: at least so many. :param sequences: at least so many sequences of ioctls.
    :param select: only this case of the seed, such as ``messages-17``, or some from there on,
        ``calls-25+25``; also as part of a test's name.
    :returns: the exit code, as of :func:`harness.conform.conform`.
    :raises UsageError: there is no such case.
    """
    given = {"messages": messages, "sequences": sequences, "case": select}
    plan = Plan(
        seed=seed or secrets.token_hex(4),
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    batches = plan.batches()
    again = f" --seed {shlex.quote(plan.seed)}"
    settings, run_dir = prepare_run(settings, task="fuzz", options=again, select=plan.case)
    save_plan(run_dir, plan)
    note(f"Fuzz with seed {plan.seed!r}, {len(batches)} batches: {run_dir}")
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
