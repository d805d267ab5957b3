# SPDX-License-Identifier: GPL-2.0-or-later
"""How verdicts add up, and how a run's files survive whatever happens to their writer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.report.model import (
    End,
    Outcome,
    Planned,
    RunFacts,
    Verdict,
    combine,
    exit_code,
    missing,
    results_by_clause,
)
from harness.report.store import (
    VerdictFile,
    last_run,
    load_run,
    new_run_dir,
    point_latest,
    write_plan,
)


def verdict(outcome: str, *, clause: str | None = "HOOK-OK", test: str = "t.py::test") -> Verdict:
    """A verdict of which only the outcome matters."""
    return Verdict(
        clause=clause,
        verdict=Outcome(outcome),
        test=test,
        target="tcg",
        series="linux@0 qemu@0",
        duration_s=0.1,
        reason="" if outcome == "PASS" else f"why {outcome}",
    )


@pytest.mark.parametrize(
    ("several", "one"),
    [
        ("PASS", "PASS"),
        ("PASS FAIL ERROR MISS SKIP", "FAIL"),
        ("PASS ERROR MISS SKIP", "ERROR"),
        ("PASS MISS SKIP", "MISS"),
        ("PASS SKIP", "PASS"),
        ("SKIP SKIP", "SKIP"),
    ],
)
def test_the_worst_counts(several: str, one: str) -> None:
    """FAIL > ERROR > MISS, and a skip does not take away what another test showed."""
    assert combine(map(Outcome, several.split())) == one


def test_partial_pass_shows_its_skip() -> None:
    """A clause that holds in one test and is skipped in another says so."""
    result = results_by_clause([verdict("PASS"), verdict("SKIP")])["HOOK-OK"]
    assert result.verdict is Outcome.PASS
    assert result.partial
    assert result.reasons == ["why SKIP"]


@pytest.mark.parametrize(
    ("several", "code"),
    [
        ("PASS SKIP", 0),
        ("PASS FAIL", 1),
        ("FAIL ERROR MISS", 1),
        ("PASS ERROR", 4),
        ("PASS MISS", 4),
        ("SKIP SKIP", 4),
        ("", 4),
    ],
)
def test_exit_code(several: str, code: int) -> None:
    """1 for a broken promise, 4 for ours, and 4 when nothing was tested."""
    assert exit_code(map(verdict, several.split())) == code


def test_missing() -> None:
    """Each clause of each planned test is owed a verdict."""
    plan = [
        Planned(test="t.py::a", clauses=["A-1", "A-2"]),
        Planned(test="t.py::b"),
        Planned(test="t.py::c", clauses=["A-1"]),
    ]
    lost = missing(plan, [verdict("PASS", clause="A-1", test="t.py::a")], reason="killed")
    assert [(v.test, v.clause) for v in lost] == [
        ("t.py::a", "A-2"),
        ("t.py::b", None),
        ("t.py::c", "A-1"),
    ]
    assert {(v.verdict, v.reason, v.target) for v in lost} == {(Outcome.MISS, "killed", "tcg")}


def written(run_dir: Path) -> Path:
    """A run with two verdicts and an end."""
    with VerdictFile(run_dir) as file:
        file.write(RunFacts(run=run_dir.name, started="2025-01-31T10:15:00.000Z", target="tcg"))
        file.write(verdict("PASS"))
        file.write(verdict("FAIL", clause="HOOK-ABI"))
        file.write(End(finished="2025-01-31T10:16:00.000Z", duration_s=60, exit_code=1))
    return run_dir / "verdicts.jsonl"


def test_round_trip(tmp_path: Path) -> None:
    """What was written is read back; each line is one JSON object with the promised keys."""
    path = written(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "verdict", "verdict", "end"]
    assert lines[2].keys() >= {
        "clause", "verdict", "test", "target", "series", "duration_s", "reason",
    }  # fmt: skip
    run = load_run(tmp_path)
    assert [v.clause for v in run.verdicts] == ["HOOK-OK", "HOOK-ABI"]
    assert run.end is not None
    assert run.notes == []


@pytest.mark.parametrize("cut", [3, 60, 200])
def test_cut_anywhere(tmp_path: Path, cut: int) -> None:
    """A file whose end is missing is read as far as it goes, and says so."""
    path = written(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    run = load_run(path)
    assert run.notes
    assert run.verdicts[0].clause == "HOOK-OK"


def test_goes_on_after_a_cut_line(tmp_path: Path) -> None:
    """Another writer starts on a line of its own."""
    path = written(tmp_path)
    os.truncate(path, path.stat().st_size - 3)
    with VerdictFile(tmp_path) as file:
        file.write(verdict("PASS", clause="UNHOOK-ABI"))
    run = load_run(tmp_path)
    assert [v.clause for v in run.verdicts] == ["HOOK-OK", "HOOK-ABI", "UNHOOK-ABI"]
    assert any("line 4 cannot be read" in note for note in run.notes)


def test_a_killed_run_owes_verdicts(tmp_path: Path) -> None:
    """Planned tests without a verdict are MISS, though nobody wrote it."""
    with VerdictFile(tmp_path) as file:
        file.write(RunFacts(run="r", started=""))
        file.write(verdict("PASS", test="t.py::a"))
    write_plan(
        tmp_path,
        [Planned(test="t.py::a", clauses=["HOOK-OK"]), Planned(test="t.py::b", clauses=["X"])],
    )
    outcomes = {v.test: v.verdict for v in load_run(tmp_path).all_verdicts()}
    assert outcomes == {"t.py::a": Outcome.PASS, "t.py::b": Outcome.MISS}


def test_no_run(tmp_path: Path) -> None:
    """Neither a missing file nor an empty one is taken for a run."""
    with pytest.raises(UsageError, match=r"verdicts\.jsonl"):
        load_run(tmp_path)
    (tmp_path / "verdicts.jsonl").touch()
    with pytest.raises(UsageError, match="no record"):
        load_run(tmp_path)
    with pytest.raises(UsageError, match="no run"):
        last_run(tmp_path / "reports")


def test_latest(tmp_path: Path) -> None:
    """reports/latest follows the newest run, and a foreign file of that name is left alone."""
    first, second = new_run_dir(tmp_path), new_run_dir(tmp_path)
    assert first != second
    for run_dir in (first, second):
        written(run_dir)
        point_latest(run_dir)
        assert last_run(tmp_path) == run_dir
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.name, second.name, "latest"])
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").write_text("mine")
    point_latest(first)
    assert (tmp_path / "latest").read_text() == "mine"
