# SPDX-License-Identifier: GPL-2.0-or-later
"""What went over the sockets of a run: how often events came, how fast they were answered.

Made from the transcripts that tests leave as evidence, since these have a time for each message.
What they know is the tool's side: from an event's arrival to its answer the tool is at work,
which may be a test that waits on purpose; from a command to its reply, the kernel. How long the
kernel holds a vCPU for an event is measured by ``inv bench.events``.
"""

from __future__ import annotations

import contextlib
import datetime
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from harness.report.figures import Distribution, distribution
from harness.report.model import Verdict

__all__ = ["Kind", "Traffic", "traffic_of"]

_EVENT, _REPLY, _ANSWER = "event", "reply", "event-reply"


class _Entry(msgspec.Struct):
    """The part of a transcript's line that counts here; see :mod:`harness.tool.transcript`."""

    kind: str
    t: float = 0.0
    name: str = ""
    latency_us: float | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of event or command: how often it came, and how long its answer took.

    ``latency`` is None if none was answered: some events are not, and some commands fail to be.
    """

    name: str
    number: int
    latency: Distribution | None


@dataclass(frozen=True)
class Traffic:
    """All messages of a run; the most frequent kinds first.

    ``per_second`` has the number of events for each second of the run from the first to the last
    event, over all workers.
    """

    events: list[Kind]
    commands: list[Kind]
    per_second: list[int]

    @property
    def busy(self) -> Distribution | None:
        """How the seconds with events are distributed, by their number of events."""
        busy = [float(number) for number in self.per_second if number]
        return distribution([busy]) if busy else None


@dataclass
class _Seen:
    number: Counter[str] = field(default_factory=Counter)
    latency_ns: dict[str, list[float]] = field(default_factory=dict)

    def kinds(self) -> list[Kind]:
        return [
            Kind(name, number, distribution([samples]) if samples else None)
            for name, number in self.number.most_common()
            for samples in [self.latency_ns.get(name, [])]
        ]


def traffic_of(run_dir: Path, verdicts: Iterable[Verdict]) -> Traffic | None:
    """What the transcripts of these verdicts tell; None if there is no message in them.

    A transcript that is damaged counts as far as it can be read.
    """
    events, commands = _Seen(), _Seen()
    arrivals: list[float] = []
    # A test of several clauses has one transcript.
    started = {
        path: verdict.started
        for verdict in verdicts
        for name, path in verdict.evidence.items()
        if name.startswith("transcript")
    }
    for path, begin in started.items():
        zero = _seconds(begin)
        for entry in _entries(run_dir / path):
            if entry.kind == _EVENT:
                events.number[entry.name] += 1
                if zero is not None:
                    arrivals.append(zero + entry.t)
            elif entry.kind == _REPLY:
                commands.number[entry.name] += 1
            if entry.latency_us is not None:
                seen = events if entry.kind == _ANSWER else commands
                seen.latency_ns.setdefault(entry.name, []).append(entry.latency_us * 1000)
    if not events.number and not commands.number:
        return None
    return Traffic(events.kinds(), commands.kinds(), _per_second(arrivals))


def _entries(path: Path) -> Iterator[_Entry]:
    """The lines of a transcript, or of its raw form if its writer was killed."""
    decode = msgspec.json.Decoder(_Entry).decode
    with contextlib.suppress(Exception):  # evidence never keeps a report from being made
        if path.suffix == ".raw":
            from harness.tool.transcript import read_raw

            for entry in read_raw(path):
                yield msgspec.convert(entry, _Entry)
            return
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(msgspec.MsgspecError):
                yield decode(line)


def _per_second(arrivals: list[float]) -> list[int]:
    if not arrivals:
        return []
    first = int(min(arrivals))
    numbers = Counter(int(at) - first for at in arrivals)
    return [numbers[second] for second in range(max(numbers) + 1)]


def _seconds(stamp: str) -> float | None:
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(stamp).timestamp()
    return None
