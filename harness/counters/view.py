# SPDX-License-Identifier: GPL-2.0-or-later
"""The live view: what the workers of a run are at."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from harness.counters.shared import Counters, attach, process_lives
from harness.counters.snapshot import SlotSnapshot, Totals, quantile_ns, total
from harness.errors import HarnessError

__all__ = ["main", "table", "watch_rates"]


def _errors(counts: SlotSnapshot | Totals) -> str:
    return f"{counts.failed_replies}" + (f" +{counts.problems}!" if counts.problems else "")


def _kinds(events: dict[str, int]) -> str:
    return "\n".join(f"{name} {count}" for name, count in sorted(events.items()))


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 10_000:
            return f"{count:.0f} {unit}"
        count //= 1000
    return f"{count} GB"


def _latency(histogram: tuple[int, ...]) -> str:
    median = quantile_ns(histogram, 0.5)
    if median is None:
        return "-"
    return f"{median / 1e3:.0f} us" if median < 1e7 else f"{median / 1e6:.0f} ms"


def _alive(slot: SlotSnapshot) -> str:
    if not slot.pid:
        return "done"
    if not process_lives(slot.pid):
        return "dead"
    return f"{(time.monotonic_ns() - slot.heartbeat_ns) / 1e9:.0f} s ago"


#: Columns: title, width of the terminal from which on it is shown, text of a slot.
_COLUMNS: tuple[tuple[str, int, Callable[[SlotSnapshot], str]], ...] = (
    ("slot", 0, lambda s: f"{s.index}{'~' if s.torn else ''}"),
    ("pid", 110, lambda s: str(s.pid or "-")),
    ("test", 0, lambda s: s.test.rpartition("::")[2]),
    ("phase", 90, lambda s: s.phase),
    ("events", 0, lambda s: _kinds(s.events)),
    ("replies", 0, lambda s: f"{s.replies}/{s.commands}"),
    ("errors", 0, _errors),
    ("in", 130, lambda s: _bytes(s.bytes_in)),
    ("out", 130, lambda s: _bytes(s.bytes_out)),
    ("reply", 110, lambda s: _latency(s.command_latency)),
    ("answer", 110, lambda s: _latency(s.event_latency)),
    ("alive", 0, _alive),
)
_LEFT = ("test", "phase")
#: About how much the other columns take when all are shown.
_OTHERS = 110


def table(counters: Counters, *, width: int = 160) -> Table:
    """A table of all slots that were ever used, with the sums below.

    :param width: columns of the terminal; some are left out when it is narrow.
    """
    slots = [s for s in counters.read() if s.used]
    sums = total(slots)
    out = Table(title=str(counters.path), title_justify="left", caption_justify="left")
    shown = [c for c in _COLUMNS if width >= c[1]]
    for title, _, _ in shown:
        # Names of tests are long: they get what the others leave.
        out.add_column(
            title,
            justify="left" if title in _LEFT else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=max(12, width - _OTHERS) if title == "test" else None,
        )
    for slot in slots:
        out.add_row(*(text(slot) for _, _, text in shown))
    below = {
        "slot": "all",
        "events": _kinds(sums.events),
        "replies": f"{sums.replies}/{sums.commands}",
        "errors": _errors(sums),
        "in": _bytes(sums.bytes_in),
        "out": _bytes(sums.bytes_out),
        "reply": _latency(sums.command_latency),
        "answer": _latency(sums.event_latency),
    }
    out.add_section()
    out.add_row(*(below.get(title, "") for title, _, _ in shown))
    out.caption = (
        "replies: received/commands; errors: replies with an error, +n! messages that break\n"
        "the interface; reply, answer: median times to a reply, to our answer of an event;\n"
        "~ the writer died in mid-update"
    )
    return out


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
    console = Console()
    if not watch:
        console.print(table(counters, width=console.width))
        return
    with Live(table(counters, width=console.width), console=console) as live:
        while True:
            time.sleep(0.5)  # the pace of the display; nothing is waited for
            live.update(table(counters, width=console.width))


def watch_rates(path: Path, *, seconds: float | None = None) -> None:
    """Print a line for each second: how many events came, of which kinds, and how many in all.

    :param seconds: end after so long; None: when interrupted.
    :raises UsageError: ``path`` holds no counters.
    """
    console = Console(highlight=False)
    end = None if seconds is None else time.monotonic() + seconds
    with attach(path) as counters, contextlib.suppress(KeyboardInterrupt):
        before, then_ns = total(counters.read()), time.monotonic_ns()
        while end is None or time.monotonic() < end:
            time.sleep(1.0)  # the pace of the display; nothing is waited for
            now, now_ns = total(counters.read()), time.monotonic_ns()
            elapsed_s = (now_ns - then_ns) / 1e9
            rates = [
                f"{name} {(count - before.events.get(name, 0)) / elapsed_s:.0f}/s ({count})"
                for name, count in sorted(now.events.items())
            ]
            answer = _latency(now.event_latency)
            console.print(
                f"{time.strftime('%H:%M:%S')}  {'  '.join(rates) or 'no event yet'}"
                f"  answered in {answer}"
            )
            before, then_ns = now, now_ns
