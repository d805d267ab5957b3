# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs compared, and made one of several."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from junitparser import JUnitXml
from test_report_documents import verdict
from test_report_formats import KERNEL, METAL, evidence, make_run

from harness.counters import create
from harness.errors import UsageError
from harness.plugin.shard import in_part, part_of
from harness.report import render
from harness.report.compare import Change, compare_runs, tell
from harness.report.merge import merge
from harness.report.model import MachineRecord, Outcome
from harness.report.speed import paired_test, permutation_test, speeds_of
from harness.report.store import load_run
from harness.report.tallies import tallies_of
from harness.report.view import view_of

# -- clauses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "change", "code"),
    [
        ("PASS", "PASS", None, 0),
        ("PASS", "FAIL", Change.BROKE, 1),
        ("PASS", "ERROR", Change.BROKE, 4),
        ("PASS", "MISS", Change.BROKE, 4),
        ("PASS", "SKIP", Change.VANISHED, 4),
        ("PASS", None, Change.VANISHED, 4),
        ("FAIL", None, Change.VANISHED, 0),
        ("FAIL", "PASS", Change.MENDED, 0),
        ("FAIL", "FAIL", None, 0),
        ("FAIL", "ERROR", Change.OTHERWISE, 0),
        ("MISS", "FAIL", Change.OTHERWISE, 1),
        (None, "PASS", Change.NEW, 0),
        (None, "FAIL", Change.NEW, 1),
        ("SKIP", "PASS", Change.NEW, 0),
        ("SKIP", None, None, 0),
    ],
)
def test_what_became_of_a_clause(
    tmp_path: Path, before: str | None, after: str | None, change: Change | None, code: int
) -> None:
    always = verdict("CAP-VERSION", "PASS")
    a = make_run(tmp_path / "a", always, *([verdict("HOOK-OK", before)] if before else []))
    b = make_run(tmp_path / "b", always, *([verdict("HOOK-OK", after)] if after else []))
    found = compare_runs(a, b)
    assert [one.change for one in found.differences] == ([change] if change else [])
    assert found.exit_code == code


def test_the_worst_comes_first_and_known_failures_are_no_news(tmp_path: Path) -> None:
    a = make_run(
        tmp_path / "a", verdict("HOOK-OK", "PASS"), verdict("HOOK-ABI", "FAIL"),
        verdict("UNHOOK-ABI", "PASS"),
    )  # fmt: skip
    b = make_run(
        tmp_path / "b", verdict("HOOK-ABI", "PASS"), verdict("HOOK-ENOMEM", "PASS"),
        verdict("UNHOOK-ABI", "FAIL"),
    )  # fmt: skip
    assert list(tell(compare_runs(a, b))) == [
        "broke (1):",
        f"  {'UNHOOK-ABI':<32} PASS -> FAIL: why FAIL",
        "mended (1):",
        f"  {'HOOK-ABI':<32} FAIL -> PASS",
        "new (1):",
        f"  {'HOOK-ENOMEM':<32} - -> PASS",
        "vanished (1):",
        f"  {'HOOK-OK':<32} PASS -> -",
        "2 worse, 1 mended",
    ]
    (b / "known.toml").write_text('[[known]]\nclause = "*-ABI"\ntracked = "t"\n')
    found = compare_runs(a, b)
    assert found.of(Change.BROKE)[0].known
    assert "(known failure)" in str(found.of(Change.BROKE)[0])
    assert found.exit_code == 4  # HOOK-OK is not tested any more
    assert list(tell(compare_runs(a, a))) == ["no clause differs"]


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", verdict("HOOK-OK", "PASS"))
    with pytest.raises(UsageError, match=r"none holds no verdicts\.jsonl"):
        compare_runs(a, tmp_path / "none")
    bench(tmp_path / "bench", {})
    with pytest.raises(UsageError, match=r"bench holds no verdicts\.jsonl"):
        compare_runs(a, tmp_path / "bench")


# -- speed --------------------------------------------------------------------------------------


def bench(
    place: Path,
    factors: dict[str, float],
    *,
    seed: int = 1,
    load: float = 1.0,
    pair: str = "",
    wild: float = 3.0,
) -> Path:
    """A benchmark's record: rounds that a loaded machine slows down as a whole."""
    # The two sides of a measurement in turns share what disturbs their rounds.
    chance = random.Random(pair or seed)
    slow = [load * chance.uniform(1, wild) for _ in range(12)]
    chance = random.Random(seed)
    kinds: list[dict[str, object]] = [
        {"name": "exit", "hold": {"rounds_ns": [1000 * one for one in slow]}}
    ]
    kinds += [
        {"name": name, "hold": {"rounds_ns": [
            5000 * factor * one * chance.uniform(0.95, 1.05) for one in slow]}}
        for name, factor in factors.items()
    ]  # fmt: skip
    kinds.append({"name": "lacking", "hold": None, "lacking": "no MTF"})
    place.mkdir(exist_ok=True)
    (place / "bench.json").write_text(json.dumps({"started": "", "kinds": kinds, "pair": pair}))
    return place


def test_what_got_slower_is_told_from_a_busy_machine(tmp_path: Path) -> None:
    a = bench(tmp_path / "a", {"cr": 1.0, "msr": 1.0, "pf": 1.0, "gone": 1.0})
    b = bench(tmp_path / "b", {"cr": 1.0, "msr": 1.3, "pf": 0.7}, seed=2, load=4)
    found = compare_runs(a, b)
    by_kind = {one.kind: one for one in found.speeds}
    assert set(by_kind) == {"cr", "msr", "pf"}
    assert not by_kind["cr"].slower
    assert not by_kind["cr"].faster
    assert by_kind["msr"].slower
    assert by_kind["pf"].faster
    assert found.exit_code == 1
    assert any("SLOWER" in line for line in tell(found))
    assert compare_runs(a, a).exit_code == 0


def test_kernels_measured_in_turns_are_compared_round_by_round(tmp_path: Path) -> None:
    """Rounds that differ by a factor of 50 do not hide 20 %, as they do without their pairs."""
    alike = {"cr": 1.0, "msr": 1.0}
    a = bench(tmp_path / "a", alike, pair="p", wild=50)
    b = bench(tmp_path / "b", alike | {"msr": 1.2}, seed=2, pair="p", wild=50)
    found = compare_runs(a, b)
    by_kind = {one.kind: one for one in found.speeds}
    assert set(by_kind) == {"exit", "cr", "msr"}  # the plain exit, too
    assert [kind for kind, one in by_kind.items() if one.slower] == ["msr"]
    assert by_kind["msr"].factor == pytest.approx(1.2, rel=0.05)
    assert found.exit_code == 1
    lines = list(tell(found))
    assert lines[0] == "time that an event holds a vCPU, both kernels measured in turns:"
    assert lines[1] == "  The CPU is emulated: nothing here was seen on hardware."
    c = bench(tmp_path / "c", alike | {"msr": 1.2}, seed=2, pair="q", wild=50)
    other = compare_runs(a, c)
    assert not other.measured.in_turns
    assert "inv bench.compare" in list(tell(other))[1]


def test_paired_test() -> None:
    assert paired_test([0.0] * 12) == 1.0
    assert paired_test([0.1, 0.2, 0.3]) == 0.25  # two of eight ways to give signs
    assert paired_test([0.01] * 12) == 2 / 2**12
    assert paired_test([0.01] * 11 + [-5.0]) > 0.01
    assert paired_test([0.01] * 40) < 0.001  # too many ways to try them all
    chance = random.Random(5)
    noise = [paired_test([chance.gauss(0, 1) for _ in range(12)]) for _ in range(40)]
    assert sum(p < 0.05 for p in noise) <= 6


def test_a_difference_that_nobody_would_notice_is_none(tmp_path: Path) -> None:
    a = bench(tmp_path / "a", {"cr": 1.0})
    data = json.loads((a / "bench.json").read_text())
    data["kinds"][1]["hold"]["rounds_ns"] = [
        one * 1.03 for one in data["kinds"][0]["hold"]["rounds_ns"]
    ]
    b = tmp_path / "b"
    b.mkdir()
    (b / "bench.json").write_text(json.dumps(data))
    data["kinds"][1]["hold"]["rounds_ns"] = data["kinds"][0]["hold"]["rounds_ns"]
    (a / "bench.json").write_text(json.dumps(data))
    (one,) = speeds_of(a, b).kinds
    assert one.p < 0.01
    assert one.factor == pytest.approx(1.03)
    assert not one.slower


def test_figures_that_cannot_tell_anything_say_so(tmp_path: Path) -> None:
    a, b = bench(tmp_path / "a", {"cr": 1.0}), bench(tmp_path / "b", {"cr": 3.0})
    for run in (a, b):
        data = json.loads((run / "bench.json").read_text())
        for kind in data["kinds"][:2]:
            kind["hold"]["rounds_ns"] = kind["hold"]["rounds_ns"][:3]
        (run / "bench.json").write_text(json.dumps(data))
    (one,) = speeds_of(a, b).kinds
    assert not one.slower
    assert str(one).endswith("too few rounds to tell")
    (b / "bench.json").write_text(json.dumps(data | {"machine": {"target": "bochs"}}))
    with pytest.raises(UsageError, match="different machines"):
        speeds_of(a, b)


def test_permutation_test() -> None:
    same = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert permutation_test(same, same) == 1.0
    assert permutation_test(same, [one + 10 for one in same]) < 0.01
    assert permutation_test([1.0, 2.0], [9.0, 10.0]) > 0.2  # too few to tell
    chance = random.Random(5)
    noise = [
        permutation_test(
            [chance.gauss(0, 1) for _ in range(8)], [chance.gauss(0, 1) for _ in range(8)]
        )
        for _ in range(40)
    ]
    assert sum(p < 0.05 for p in noise) <= 6


def test_a_benchmark_that_cannot_be_read(tmp_path: Path) -> None:
    a, b = bench(tmp_path / "a", {"cr": 1.0}), bench(tmp_path / "b", {"cr": 1.0})
    (b / "bench.json").write_text("{}")
    with pytest.raises(UsageError, match=r"bench\.json cannot be read"):
        compare_runs(a, b)


# -- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_test_is_in_exactly_one_part(count: int) -> None:
    tests = [f"tests/f{file}.py::test_{n}" for file in range(9) for n in range(file * 3 + 1)]
    parts = [in_part(tests, f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(test for part in parts for test in part) == sorted(tests)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 9
    assert in_part(reversed(tests), f"1/{count}") == parts[0]


@pytest.mark.parametrize("text", ["0/3", "4/3", "x", "1", "1/0", "-1/3"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UsageError, match="no shard"):
        part_of(text)


def test_parts_become_one_run(tmp_path: Path) -> None:
    a = tmp_path / "a"
    make_run(a, verdict("HOOK-OK", "PASS"), shard="1/2", machine=METAL)
    b = tmp_path / "b"
    failed = verdict("HOOK-ABI", "FAIL", evidence=evidence(b))
    make_run(b, failed, verdict("HOOK-OK", "PASS", test="t::other"), shard="2/2", target="kvm")
    place = merge([a, b], reports=tmp_path / "reports")
    shutil.rmtree(a)
    shutil.rmtree(b)
    view = render(place)
    assert {name: one.verdict for name, one in view.results.items()} == {
        "HOOK-OK": Outcome.PASS,
        "HOOK-ABI": Outcome.FAIL,
    }
    assert len(view.results["HOOK-OK"].verdicts) == 2
    assert view.path(view.results["HOOK-ABI"].verdicts[0].evidence["failure"]).is_file()
    assert view.exit_code == 1
    assert view.facts.target == "tcg kvm"
    assert view.facts.shard == ""
    assert view.facts.machine is not None
    assert view.facts.machine.emulated  # a part of it was
    assert view.run.end is not None
    assert view.run.end.reason == ""
    assert "WARNING: CPU: 0 at kvmi.c:42" in (place / "mail.txt").read_text()


def test_a_test_that_failed_on_two_targets_is_told_twice(tmp_path: Path) -> None:
    """Each with its evidence, its own command to run it again, and a name of its own."""
    runs = []
    for target in ("tcg", "bochs"):
        place = tmp_path / target
        bad = verdict("HOOK-ABI", "FAIL", target=target, evidence=evidence(place))
        machine = MachineRecord(target=target, virtualisation=f"emulated by {target}")
        command = f"inv conform --target {target} --flavour debug"
        runs.append(make_run(place, bad, target=target, machine=machine, rerun=command))
        with create(place / "counters", slots=1) as counters:
            counters.slot(0).command(8)
    place = merge(runs, reports=tmp_path / "reports")
    view = render(place)
    assert [test.target for test in view.bad_tests] == ["tcg", "bochs"]
    assert view.groups[0].rows[0].by_target == {"tcg": Outcome.FAIL, "bochs": Outcome.FAIL}
    assert view.facts.machine is not None
    assert view.facts.machine.virtualisation == "emulated by tcg, emulated by bochs"
    page = (place / "report.html").read_text()
    again = "inv conform --flavour debug --target {} --select tests/conformance/test_x.py"
    for target in ("tcg", "bochs"):
        assert again.format(target) in page
        assert again.format(target) in (place / "ktap.txt").read_text()
        assert f"FAIL HOOK-ABI on {target}: why FAIL" in (place / "mail.txt").read_text()
    cases = {case.name for suite in JUnitXml.fromfile(str(place / "junit.xml")) for case in suite}
    assert cases == {f"HOOK-ABI (test_hook-abi) on {target}" for target in ("tcg", "bochs")}
    assert [tally.commands for tally in tallies_of(place)] == [1, 1]


def test_a_part_that_is_missing_does_not_look_good(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", verdict("HOOK-OK", "PASS"), shard="1/3")
    b = make_run(tmp_path / "b", verdict("HOOK-ABI", "PASS"), shard="3/3")
    run = load_run(merge([a, b], reports=tmp_path / "reports"))
    assert run.end is not None
    assert run.end.reason == "missing: shard 2/3"
    assert run.end.exit_code == 4
    assert view_of(run).facts.chosen == "merged from a b"


def test_runs_that_do_not_belong_together(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", verdict("HOOK-OK", "PASS"))
    b = make_run(tmp_path / "b", verdict("HOOK-OK", "PASS"), series="linux@9", kernel=KERNEL)
    third = make_run(tmp_path / "c", verdict("HOOK-OK", "PASS"), shard="1/3")
    half = make_run(tmp_path / "d", verdict("HOOK-ABI", "PASS"), shard="2/2")
    for runs, complaint in (
        ([a], "nothing to merge"),
        ([a, a], "named twice"),
        ([a, b], "series .* is not linux@9"),
        ([a, tmp_path / "none"], "no verdicts"),
        ([third, half], "parts of different wholes: 1/3, 2/2"),
    ):
        with pytest.raises(UsageError, match=complaint):
            merge(runs, reports=tmp_path / "reports")
