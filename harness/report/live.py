# SPDX-License-Identifier: GPL-2.0-or-later
"""A run while it runs: what each worker is at, and the verdicts so far.

On a terminal a small table that renews itself; elsewhere a line now and then, so that a log
shows that the run lives. A bad verdict is told at once in both. It reads the run's files only,
so it may be started and stopped at any time, by anybody.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.counters import Counters, SlotSnapshot, attach
from harness.report.charts import duration
from harness.report.model import Outcome, Verdict, combine, count
from harness.report.store import VERDICTS, read_plan
from harness.report.summary import STYLES

__all__ = ["LiveView", "Progress"]

LINE_EVERY_S = 15.0

NAMES = 3
"""How many clauses of a bad test are named at once."""

ALIKE = 5
"""So many bad tests are told that say the same, as where a kernel lacks what they all need."""


@dataclass
class Progress:
    """The verdicts of a run that is being written, read piece by piece."""

    run_dir: Path
    verdicts: list[Verdict] = field(default_factory=list)
    planned: int = 0
    _offset: int = 0
    _rest: bytes = b""

    def update(self) -> list[Verdict]:
        """Read what was written since the last call; gives the new verdicts."""
        if not self.planned:
            self.planned = len(read_plan(self.run_dir))
        try:
            with (self.run_dir / VERDICTS).open("rb") as file:
                file.seek(self._offset)
                data = self._rest + file.read()
                self._offset = file.tell()
        except FileNotFoundError:
            return []
        *lines, self._rest = data.split(b"\n")
        new = []
        for line in lines:
            try:
                new.append(msgspec.json.decode(line, type=Verdict))
            except msgspec.MsgspecError:
                continue  # the run's facts, its end, or a line that the loader will tell of
        self.verdicts += new
        return new

    @property
    def tests_done(self) -> int:
        """Tests that have a verdict."""
        return len({verdict.test for verdict in self.verdicts})

    @property
    def counts(self) -> dict[Outcome, int]:
        """Verdicts by kind."""
        return count(verdict.verdict for verdict in self.verdicts)


class LiveView:
    """Shows a run; :meth:`update` it often. A context manager, for the terminal's sake.

    :param console: where to; standard error by default, as results go to standard output.
    """

    def __init__(self, run_dir: Path, *, console: Console | None = None) -> None:
        self.progress = Progress(run_dir)
        self._console = console or Console(stderr=True, highlight=False)
        self._counters: Counters | None = None
        self._start = time.monotonic()
        self._last_line = self._start
        self._since: dict[int, tuple[str, float]] = {}
        self._slots: list[SlotSnapshot] = []
        self._told: Counter[str] = Counter()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._counters is not None:
            self._counters.close()

    def update(self) -> object:
        """Look again, and show. Gives something that changes whenever the run moves on."""
        bad: dict[str, list[Verdict]] = {}
        for verdict in self.progress.update():
            if verdict.verdict.bad:
                bad.setdefault(verdict.test, []).append(verdict)
        for verdicts in bad.values():
            self._tell(verdicts)
        self._slots = self._read_slots()
        now = time.monotonic()
        for slot in self._slots:
            if self._since.get(slot.index, ("", 0.0))[0] != slot.test:
                self._since[slot.index] = (slot.test, now)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._console.print(self._line(), soft_wrap=True, markup=False)
        return (
            len(self.progress.verdicts),
            [(slot.test, slot.phase, slot.commands, slot.event_count) for slot in self._slots],
        )

    def _read_slots(self) -> list[SlotSnapshot]:
        if self._counters is None:
            path = self.progress.run_dir / "counters"
            if not path.exists():
                return []
            self._counters = attach(path)
        return [slot for slot in self._counters.read() if slot.used]

    def _tell(self, verdicts: list[Verdict]) -> None:
        """One line for one bad test, whatever the number of its clauses."""
        worst = combine(verdict.verdict for verdict in verdicts)
        blamed = [verdict for verdict in verdicts if verdict.verdict is worst]
        names = [verdict.clause or verdict.test for verdict in blamed]
        alike = re.sub(r"\bgw\d+-\d+\b", "", blamed[0].reason)  # whatever the host
        self._told[alike] += 1
        if self._told[alike] == ALIKE + 1:
            self._console.print(f"{worst:<5} more that say the same: only counted from here on")
        if self._told[alike] > ALIKE:
            return
        more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
        text = Text.assemble(
            (f"{worst:<5} ", STYLES[worst]),
            (" ".join(names[:NAMES]) + more, "bold"),
            f"  {blamed[0].reason}",
        )
        self._console.print(text, soft_wrap=True)

    def _done(self) -> str:
        of = f" of {self.progress.planned}" if self.progress.planned else ""
        return f"{self.progress.tests_done}{of} tests"

    def _line(self) -> str:
        """One line for logs."""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in self.progress.counts.items() if n)
        elapsed = duration(time.monotonic() - self._start)
        parts = [f"{elapsed}: {self._done()}" + (f", {counts}" if counts else "")]
        parts += [f"worker {slot.index}: {self._at(slot)}" for slot in self._slots if slot.pid]
        return "; ".join(parts)

    def _at(self, slot: SlotSnapshot) -> str:
        if not slot.test:
            return slot.phase or "between tests"
        name = slot.test.rpartition("::")[2]
        return f"{name} ({slot.phase}, {duration(self._for_s(slot))})"

    def _for_s(self, slot: SlotSnapshot) -> float:
        return time.monotonic() - self._since.get(slot.index, ("", time.monotonic()))[1]

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        table.add_column("worker", width=6)
        table.add_column("test", ratio=3, no_wrap=True, overflow="ellipsis")
        table.add_column("phase", ratio=2, no_wrap=True, overflow="ellipsis")
        for name in ("for", "events", "commands"):
            table.add_column(name, justify="right", width=9)
        for slot in self._slots:
            age_s = (time.monotonic_ns() - slot.heartbeat_ns) / 1e9
            silent = slot.pid and age_s > 5
            table.add_row(
                str(slot.index),
                Text(slot.test.removeprefix("tests/") or "-"),
                Text(f"no sign of life for {duration(age_s)}", "red")
                if silent
                else Text(slot.phase if slot.pid else "ended", "dim"),
                duration(self._for_s(slot)) if slot.test else "",
                str(slot.event_count),
                str(slot.commands),
            )
        totals = Text.assemble(
            (f"{duration(time.monotonic() - self._start)}  ", "dim"), (self._done(), "bold"), "  "
        )
        for outcome, number in self.progress.counts.items():
            if number:
                totals.append(f"{number} {outcome}  ", STYLES[outcome])
        return Group(table, totals)
