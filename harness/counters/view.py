# SPDX-License-Identifier: GPL-2.0-or-later
"""The live view: what the workers of a run are at."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from harness.counters.shared import Counters, attach, process_lives
from harness.counters.snapshot import SlotSnapshot, quantile_ns, total
from harness.errors import HarnessError

__all__ = ["main", "table"]


def table(counters: Counters) -> Table:
    """A table of all slots that were ever used, with the sums below."""
    slots = [s for s in counters.read() if s.used]
    sums = total(slots)
    out = Table(title=str(counters.path), title_justify="left")
    for column in ("slot", "pid", "test", "phase"):
        out.add_column(column, no_wrap=True, overflow="ellipsis")
    for column in (
        "events",
        "by kind",
        "commands",
        "errors",
        "in",
        "out",
        "reply",
        "event",
        "alive",
    ):
        out.add_column(column, justify="right")
    for slot in slots:
        out.add_row(
            str(slot.index) + ("~" if slot.torn else ""),
            str(slot.pid or "-"),
            slot.test,
            slot.phase,
            str(slot.event_count),
            _kinds(slot.events),
            f"{slot.replies}/{slot.commands}",
            f"{slot.failed_replies}" + (f" +{slot.problems}!" if slot.problems else ""),
            _bytes(slot.bytes_in),
            _bytes(slot.bytes_out),
            _latency(slot.command_latency),
            _latency(slot.event_latency),
            _alive(slot),
        )
    out.add_section()
    out.add_row(
        "all", "", "", "", str(sum(sums.events.values())), _kinds(sums.events),
        f"{sums.replies}/{sums.commands}",
        f"{sums.failed_replies}" + (f" +{sums.problems}!" if sums.problems else ""),
        _bytes(sums.bytes_in), _bytes(sums.bytes_out),
        _latency(sums.command_latency), _latency(sums.event_latency), "",
    )  # fmt: skip
    out.caption = (
        "commands: answered/sent; errors: replies with an error, +n! messages that break the "
        "interface; reply, event: median latency; ~ writer died in mid-update"
    )
    return out


def _kinds(events: dict[str, int]) -> str:
    return " ".join(f"{name} {count}" for name, count in sorted(events.items()))


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 10_000:
            return f"{count:.0f} {unit}"
        count //= 1000
    return f"{count} GB"


def _latency(histogram: tuple[int, ...]) -> str:
    median = quantile_ns(histogram, 0.5) if histogram else None
    if median is None:
        return "-"
    return f"{median / 1e3:.0f} us" if median < 1e7 else f"{median / 1e6:.0f} ms"


def _alive(slot: SlotSnapshot) -> str:
    if not slot.pid:
        return "done"
    if not process_lives(slot.pid):
        return "dead"
    return f"{(time.monotonic_ns() - slot.heartbeat_ns) / 1e9:.0f} s ago"


def main(argv: list[str] | None = None) -> int:
    """Show the counters of a run: ``python -m harness.counters PATH [--watch] [--json]``."""
    parser = argparse.ArgumentParser(prog="python -m harness.counters", description=main.__doc__)
    parser.add_argument("path", type=Path, help="the run's file of counters")
    parser.add_argument("--watch", action="store_true", help="refresh until interrupted")
    parser.add_argument("--json", action="store_true", help="one JSON object per slot instead")
    options = parser.parse_args(argv)
    try:
        with attach(options.path) as counters:
            _show(counters, watch=options.watch, as_json=options.json)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


def _show(counters: Counters, *, watch: bool, as_json: bool) -> None:
    if as_json:
        for slot in counters.read():
            if slot.used:
                print(json.dumps(dataclasses.asdict(slot)))
        return
    if not watch:
        Console().print(table(counters))
        return
    with Live(table(counters), refresh_per_second=2) as live:
        while True:
            time.sleep(0.5)  # the pace of the display; nothing is waited for
            live.update(table(counters))
