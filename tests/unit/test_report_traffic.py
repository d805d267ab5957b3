# SPDX-License-Identifier: GPL-2.0-or-later
"""What transcripts tell about events: how often they came, how long their answers took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report_documents import verdict
from test_report_formats import make_run

from harness.report import render
from harness.report.charts import rates_of
from harness.report.traffic import traffic_of
from harness.tool.transcript import Transcript


def transcript(place: Path, *entries: dict[str, Any]) -> str:
    """A transcript with these entries; its name, relative to the place."""
    place.mkdir(exist_ok=True)
    name = f"transcript{len(list(place.iterdir()))}.jsonl"
    (place / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return name


def exchange(name: str, at_s: float, took_us: float | None) -> list[dict[str, Any]]:
    """An event, and its answer if it took any time."""
    event = {"t": at_s, "channel": 1, "dir": "in", "kind": "event", "name": name}
    answer = {**event, "dir": "out", "kind": "event-reply", "latency_us": took_us}
    return [event] if took_us is None else [event, answer]


def test_events_and_commands_are_told_apart(tmp_path: Path) -> None:
    """One transcript counts once, however many clauses its test has; a cut line is left out."""
    reply = {"t": 0.5, "kind": "reply", "name": "GET_VERSION", "latency_us": 100.0}
    name = transcript(
        tmp_path,
        {"kind": "transcript", "abi": "v12"},
        *exchange("PF", 0.1, 50.0),
        *exchange("PF", 0.2, 70.0),
        *exchange("UNHOOK", 3.2, None),
        reply,
    )
    with (tmp_path / name).open("a") as file:
        file.write('{"t": 4, "kind": "eve')
    kept = {"transcript": name, "kernel_log": "none.txt"}
    verdicts = [
        verdict("HOOK-OK", "PASS", evidence=kept),
        verdict("HOOK-ABI", "PASS", evidence=kept),
    ]
    found = traffic_of(tmp_path, verdicts)
    assert found is not None
    assert [(kind.name, kind.number) for kind in found.events] == [("PF", 2), ("UNHOOK", 1)]
    page_fault, unhook = (kind.latency for kind in found.events)
    assert page_fault is not None
    assert (page_fault.samples, page_fault.median_ns) == (2, 60_000)
    assert unhook is None
    assert [(kind.name, kind.number) for kind in found.commands] == [("GET_VERSION", 1)]
    assert found.per_second == [2, 0, 0, 1]
    assert found.busy is not None
    assert (found.busy.samples, found.busy.most_ns) == (2, 2.0)
    render(make_run(tmp_path, *verdicts), ["html"])
    page = (tmp_path / "report.html").read_text()
    assert "PF: 2, median 60 µs" in page
    assert "none was answered" in page


def test_a_killed_worker_leaves_the_raw_form(tmp_path: Path) -> None:
    """What was written until then counts, too."""
    raw = Transcript(tmp_path / "transcript.jsonl")
    raw.channel().note("no message yet")
    kept = {"transcript": raw.raw_path.name}
    assert traffic_of(tmp_path, [verdict("HOOK-OK", "PASS", evidence=kept)]) is None
    channel = raw.channel()
    channel.sent(raw_ns := 10**12, 2, 7, b"")
    channel.received(raw_ns + 5_000, 2, 7, bytes(24))
    found = traffic_of(tmp_path, [verdict("HOOK-OK", "PASS", evidence=kept)])
    assert found is not None
    assert [kind.number for kind in found.commands] == [1]
    assert found.commands[0].latency is not None
    assert found.commands[0].latency.median_ns == 5_000


def test_nothing_is_made_of_nothing(tmp_path: Path) -> None:
    """No transcripts, lost ones, or empty ones."""
    assert traffic_of(tmp_path, []) is None
    (tmp_path / "empty").touch()
    for name in ("gone", "empty"):
        kept = {"transcript": name}
        assert traffic_of(tmp_path, [verdict("HOOK-OK", "PASS", evidence=kept)]) is None


@pytest.mark.parametrize("seconds", [1, 240, 241, 5000])
def test_rates_fit_the_width(seconds: int) -> None:
    """Of the seconds that share a column the highest is shown, and none is lost."""
    per_second = [0] * seconds
    per_second[-1] = 7
    (column,) = rates_of(per_second)
    assert (column.number, column.height) == (7, 100)
    assert column.start + column.width >= 99.9
    assert len(rates_of([1] * seconds)) <= 240
