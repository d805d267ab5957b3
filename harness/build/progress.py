# SPDX-License-Identifier: GPL-2.0-or-later
"""Signs of life of long work, and how long each part took.

On a terminal every running step has a line with a bar or a spinner; elsewhere (a
log, a nightly job) there is a line when it begins, one every half minute, and one
when it ends. Everything goes to standard error: standard output is for results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Step", "duration", "note", "step"]

_SIGN_OF_LIFE_S = 30.0
_LONGEST_NOTE = 60


def duration(seconds: float) -> str:
    """``seconds`` for people: ``0.4 s``, ``12 s``, ``3 min 05 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"


class Step:
    """One running piece of work; made by :func:`step`, safe to update from any thread."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.doing = ""
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._began

    def update(
        self, *, done: int | None = None, total: int | None = None, doing: str | None = None
    ) -> None:
        """Say how far the work is (of ``total`` units) and what it is at (a few words)."""
        if done is not None:
            self.done = done
        if total is not None:
            self.total = total
        if doing is not None:
            self.doing = doing[:_LONGEST_NOTE]

    def advance(self, units: int = 1) -> None:
        """Say that ``units`` more of the work are done."""
        self.done += units

    def state(self) -> str:
        """How far the step is, as a few words."""
        parts = []
        if self.total:
            parts.append(f"{min(99, 100 * self.done // self.total)} %")
        elif self.done:
            parts.append(str(self.done))
        if self.doing:
            parts.append(self.doing)
        return ", ".join(parts)


class _Display:
    """What shows the running steps; steps may nest, so one display serves them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: list[Step] = []
        self._live: Progress | None = None
        self._stop = threading.Event()

    def begin(self, one: Step) -> None:
        with self._lock:
            self._steps.append(one)
            if not sys.stderr.isatty():
                self._say(f"{one.title} ...")
            if len(self._steps) == 1:
                self._stop = threading.Event()
                threading.Thread(target=self._run, args=(self._stop,), daemon=True).start()

    def end(self, one: Step, outcome: str) -> None:
        with self._lock:
            self._steps.remove(one)
            if self._live is not None:
                self._draw()
            self._say(f"{one.title}: {outcome} {duration(one.elapsed_s)}")
            if not self._steps:
                self._stop.set()
                if self._live is not None:
                    self._live.stop()
                    self._live = None

    def say(self, text: str) -> None:
        with self._lock:
            self._say(text)

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _run(self, stop: threading.Event) -> None:
        """Redraw the bars, or say now and then that the newest step still runs."""
        terminal = sys.stderr.isatty()
        while not stop.wait(0.2 if terminal else _SIGN_OF_LIFE_S):
            with self._lock:
                if stop.is_set() or not self._steps:
                    return
                if terminal:
                    self._draw()
                    continue
                one = self._steps[-1]
                state = one.state()
                self._say(f"{one.title}: {duration(one.elapsed_s)}{', ' + state if state else ''}")

    def _draw(self) -> None:
        if self._live is None:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._live.start()
        known = {task.fields["step"]: task.id for task in self._live.tasks}
        for one in self._steps:
            if one not in known:
                known[one] = self._live.add_task(one.title, total=one.total, step=one, state="")
            self._live.update(
                known[one], completed=one.done, total=one.total, state=one.doing, refresh=False
            )
        for one, task in known.items():
            if one not in self._steps:
                self._live.remove_task(task)


_display = _Display()


def note(text: str) -> None:
    """One line for the person who watches, without disturbing the bars."""
    _display.say(text)


@contextmanager
def step(title: str, *, total: int | None = None) -> Iterator[Step]:
    """Show ``title`` as running until the block ends, then say how long it took.

    :param total: units of work, if known beforehand; the block tells how many are done.
    """
    one = Step(title, total)
    _display.begin(one)
    outcome = "failed after"
    try:
        yield one
        outcome = "done in"
    except KeyboardInterrupt:
        outcome = "interrupted after"
        raise
    finally:
        _display.end(one, outcome)
