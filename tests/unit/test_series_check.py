# SPDX-License-Identifier: GPL-2.0-or-later
"""A series patch by patch: what follows from verdicts, what is kept, what the checkers say."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import shutil
from pathlib import Path

import msgspec
import pytest

from harness import paths
from harness.build.checkers import checkpatch
from harness.build.kernel import local_version
from harness.build.series import Patch, load_series
from harness.errors import (
    BuildError,
    CompileError,
    DeadlineError,
    HarnessError,
    HostCrashedError,
    InfraError,
    PatchError,
    UsageError,
)
from harness.report.model import Outcome, RunFacts, Verdict
from harness.report.store import Run
from harness.series import interface
from harness.series.ahead import building_ahead
from harness.series.check import Check, check
from harness.series.history import (
    Judged,
    breaks,
    first_change,
    holds_since,
    to_csv,
    untested_before,
)
from harness.series.page import render_page
from harness.series.parts import PARTS, Part
from harness.settings import Settings, load_settings

OWN = paths.KERNEL_CONFIG / "linux"
P, F, M, S = Outcome.PASS, Outcome.FAIL, Outcome.MISS, Outcome.SKIP


def judged(number: int, **verdicts: Outcome) -> Judged:
    return Judged(number=number, patch=f"{number:04d}.patch", digest=str(number),
                  verdicts=verdicts)  # fmt: skip


# -- history ------------------------------------------------------------------------------------


def test_since_when_a_clause_holds_and_what_breaks_it() -> None:
    history = [
        judged(1, A=F, B=F, C=F),
        judged(2, A=P, B=P, C=F),
        Judged(number=3, patch="3", digest="3", builds="a semicolon"),
        judged(4, A=P, B=F, C=F, D=S),
        judged(5, A=P, B=P, C=P, D=P),
        judged(6, A=P, B=P, C=M, D=P),
        judged(7, A=S, B=P, C=F, D=P),
        msgspec.structs.replace(judged(8, A=S, B=P, C=F, D=F), known=["D"]),
    ]
    assert holds_since(history) == {"B": 5}
    assert breaks(history) == {4: ["B"], 7: ["A", "C"]}
    assert untested_before(4, {3}) == "3"
    assert untested_before(4, {1, 2, 3}) == "1 or 2 or 3"
    assert untested_before(4, {2}) == ""
    assert history[2].problem == "does not build: a semicolon"


def test_the_table_has_patches_down_and_clauses_across() -> None:
    rows = list(csv.reader(io.StringIO(to_csv([judged(1, A=F), judged(2, A=P, B=P)]))))
    assert rows == [
        ["number", "patch", "problem", "A", "B"],
        ["1", "0001.patch", "", "FAIL", ""],
        ["2", "0002.patch", "", "PASS", "PASS"],
    ]


def test_the_page_leaves_out_no_clause(settings: Settings, tmp_path: Path) -> None:
    """Those of another version of the interface are in it, too, and text is only text."""
    history = [judged(1, **{"HOOK-OK": P, "OF-ANOTHER-VERSION": F}), judged(2)]
    history[1] = msgspec.structs.replace(history[1], boots="<b>panic</b>")
    page = render_page(load_series(settings.kernel_series), history, tmp_path)
    assert 'id="c-HOOK-OK"' in page
    assert 'id="c-OF-ANOTHER-VERSION"' in page
    assert "Patch 2 does not boot" in page
    assert "does not boot: &lt;b&gt;panic" in page
    assert "2 of 3 patches" in page


@pytest.mark.parametrize(
    ("outcomes", "heading"),
    [
        ([F, P], '<h1 class="">2 of 3 patches looked at, none breaks a clause</h1>'),
        ([F, P, P], '<h1 class="pass">No patch breaks a clause; 1 of 1 hold at the end</h1>'),
        ([F, F, F], '<h1 class="fail">No patch breaks a clause; 0 of 1 hold at the end</h1>'),
        ([P, F, P], '<h1 class="fail">Patch 2 breaks HOOK-OK</h1>'),
    ],
)
def test_the_page_does_not_praise_what_was_not_seen(
    settings: Settings, tmp_path: Path, outcomes: list[Outcome], heading: str
) -> None:
    history = [judged(number, **{"HOOK-OK": one}) for number, one in enumerate(outcomes, start=1)]
    assert heading in render_page(load_series(settings.kernel_series), history, tmp_path)


@pytest.mark.parametrize("last", [1, 2, 7, 30, 77])
def test_the_first_change_is_found_with_few_steps(last: int) -> None:
    for change in range(1, last + 1):
        tried: list[int] = []

        def state(number: int, change: int = change, tried: list[int] = tried) -> Outcome:
            tried.append(number)
            return P if number >= change else F

        assert first_change(last, state) == (change, P, ())
        assert len(set(tried)) <= 2 * last.bit_length() + 2

        # Broken by a patch after it held from the first one on.
        if change > 1:
            broken = [F] + [P] * (change - 1) + [F] * (last - change + 1)
            assert first_change(last, broken.__getitem__) == (change, F, ())


def test_a_clause_that_never_changes() -> None:
    with pytest.raises(UsageError, match="is FAIL all the time"):
        first_change(30, lambda _number: F)
    with pytest.raises(UsageError, match="cannot be tested after any"):
        first_change(3, lambda _number: None)


@pytest.mark.parametrize("length", [1, 3])
def test_patches_that_cannot_be_tested_are_passed_by(length: int) -> None:
    """The change is found all the same, or it may be one of them, which is said."""
    last = 12
    for change in range(1, last + 1):
        for first in range(1, last + 1 - length):
            untested = range(first, first + length)
            history = {n: P if n >= change else F for n in range(last + 1) if n not in untested}
            found = first_change(last, history.get)
            assert change in (found.number, *found.untested)
            assert found.number in history
            assert set(found.untested) <= set(untested)


# -- what is kept -------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    series = tmp_path / "mine"
    series.mkdir()
    for number, path in enumerate(("a.c", "Documentation/x.rst", "b.c"), start=1):
        (series / f"{number:04d}-p.patch").write_text(
            f"Subject: [PATCH] p{number}\n\n---\ndiff --git a/{path} b/{path}\n"
            f"--- a/{path}\n+++ b/{path}\n@@ -1 +1 @@\n-a\n+b\n"
        )
    return load_settings(
        kernel_series=series, qemu_series=series, cache=tmp_path / "c", reports=tmp_path / "r"
    )


class Quick(Check):
    """One without checkers, which need a source."""

    def _checkpatch(self, settings: Settings, patch: Patch) -> list[str]:
        return []

    def _sparse(self, settings: Settings, patch: Patch) -> list[str]:
        return []


def test_what_was_found_out_is_not_found_out_again(settings: Settings) -> None:
    """A journal whose writer was killed within a line; nothing is built or run here."""
    series = load_series(settings.kernel_series)
    first = Check(settings, series, select=None)
    known = [
        msgspec.structs.replace(judged(n, A=P), digest=series.first(n).digest) for n in (1, 2, 3)
    ]
    lines = b"".join(msgspec.json.encode(one) + b"\n" for one in known)
    (first.place / "judged.jsonl").write_bytes(lines + b'{"number":4,"pa')
    again = Check(settings, series, select=None)
    assert [again.judge(number) for number in (1, 2, 3)] == known
    assert Check(settings, series, select="HOOK-OK").place != first.place


def test_a_patch_of_documentation_is_as_the_one_before(settings: Settings, tmp_path: Path) -> None:
    tree = _kernel_tree()
    if tree is None:
        pytest.skip("no kernel tree in the cache")
    series = load_series(settings.kernel_series)
    one = Check(settings, series, select=None)
    known = msgspec.structs.replace(judged(1, A=P), digest=series.first(1).digest)
    (one.place / "judged.jsonl").write_bytes(msgspec.json.encode(known) + b"\n")

    class Here(Check):
        """One that does not unpack a source for checkpatch."""

        def _checkpatch(self, settings: Settings, patch: Patch) -> list[str]:
            assert tree is not None
            return checkpatch(tree, patch)

    found = Here(settings, series, select=None).judge(2)
    assert (found.same_as, found.verdicts) == (1, {"A": P})
    assert found.checkpatch


def test_no_patch_is_blamed_for_what_does_not_come_again(settings: Settings) -> None:
    """On hosts that serve on after failures, A fails by accident, and B for good; C never held."""
    series = load_series(settings.kernel_series)
    asked = []

    class Here(Check):
        """One with the runs of a list."""

        runs = iter([{"A": F, "B": F, "C": F, "D": P}, {"A": P, "B": F}])

        def _run(
            self, settings: Settings, select: str | None, *, unfinished: bool = False
        ) -> tuple[str, Run | None]:
            asked.append((select, unfinished))
            verdicts = [
                Verdict(
                    clause=clause, verdict=verdict, test=f"tests/{clause}.py", target="tcg",
                    series="", duration_s=1.0, reason="why",
                )
                for clause, verdict in next(self.runs).items()
            ]  # fmt: skip
            facts = RunFacts(run="r", started="")
            place = settings.reports / f"{len(asked)}"
            return "", Run(path=place, facts=facts, verdicts=verdicts, plan=[])

    one = Here(settings, series, select=None)
    before = msgspec.structs.replace(judged(1, A=P, B=P, D=P), digest=series.first(1).digest)
    one._known[before.digest] = before
    found = one._judge_clauses(2, settings, judged(2))
    assert (found.boots, found.verdicts) == ("", {"A": P, "B": F, "C": F, "D": P})
    assert found.run.endswith("/1")
    assert asked == [(None, True), ("tests/A.py tests/B.py", False)]


def _kernel(monkeypatch: pytest.MonkeyPatch, error: HarnessError) -> Part:
    """A kernel that is not built, or fails so; if the error is of no build, the suite does."""

    def fails(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(
        "harness.series.check.building_ahead", lambda *_arguments: contextlib.nullcontext()
    )
    monkeypatch.setattr("harness.series.check.conform", fails)
    build = fails if isinstance(error, BuildError) else lambda _settings: None
    return dataclasses.replace(PARTS["kernel"], build=build)


@pytest.mark.parametrize("error", [BuildError("no network"), InfraError("a busy machine")])
def test_trouble_of_ours_is_not_kept_as_a_patchs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, error: HarnessError
) -> None:
    """It ends the check, which goes on there the next time."""
    part = _kernel(monkeypatch, error)
    one = Quick(settings, load_series(settings.kernel_series), select=None, part=part)
    with pytest.raises(type(error), match=error.message):
        one.judge(1)
    assert (one.place / "judged.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (CompileError("a semicolon"), "does not build: a semicolon"),
        (PatchError("hunk 1"), "does not apply: hunk 1"),
        (DeadlineError("no login"), "does not boot: no login"),
        (HostCrashedError("panic"), "does not boot: panic"),
    ],
)
def test_what_is_wrong_with_a_patch(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    error: HarnessError,
    problem: str,
) -> None:
    part = _kernel(monkeypatch, error)
    one = Quick(settings, load_series(settings.kernel_series), select=None, part=part)
    assert one.judge(1).problem == problem
    assert Quick(settings, one.series, select=None).judge(1).problem == problem


def test_a_patch_of_documentation_has_to_apply(settings: Settings) -> None:
    class Here(Quick):
        """One whose patches do not apply."""

        def _checkpatch(self, settings: Settings, patch: Patch) -> list[str]:
            raise PatchError(f"{patch.name} does not fit")

    one = Here(settings, load_series(settings.kernel_series), select=None)
    before = msgspec.structs.replace(judged(1, A=P), digest=one.series.first(1).digest)
    one._known[before.digest] = before
    assert one.judge(2).problem == "does not apply: 0002-p.patch does not fit"


def test_the_journal_is_for_one_base_and_one_description(settings: Settings) -> None:
    series = load_series(settings.kernel_series)
    places = [
        Check(settings, series, select=None, part=PARTS["qemu"]).place,
        Check(settings, series, select=None, base="linux 6.12").place,
        Check(settings, series, select=None, base="linux 6.13").place,
        Check(dataclasses.replace(settings, description="v12"), series, select=None).place,
        Check(settings, series, select=None).place,
    ]
    assert len(set(places)) == len(places)


def test_the_first_patch_with_numbers_says_what_a_series_speaks(settings: Settings) -> None:
    """One that changes them later is a patch to be judged, and no end of the check."""
    directory = Path(settings.kernel_series)

    def define(number: int, value: int) -> None:
        path = directory / f"{number:04d}-p.patch"
        text = path.read_text().replace("+b\n", f"+#define KVM_CAP_INTROSPECTION {value}\n")
        path.write_text(text)

    define(3, 1)
    with pytest.raises(UsageError, match="KVM_CAP_INTROSPECTION is 1 there"):
        Check(settings, load_series(directory), select=None).require_own_numbers()
    define(1, interface(settings).capability)
    Check(settings, load_series(directory), select=None).require_own_numbers()


def test_series_that_cannot_be_checked(settings: Settings, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    kwargs = {"qemu_series": empty, "cache": tmp_path, "reports": tmp_path}
    with pytest.raises(UsageError, match="no patches to check"):
        check(load_settings(kernel_series=empty, **kwargs))
    for clause in ("HOOK-OKAY", "HOOK-*", "tests/conformance"):
        with pytest.raises(UsageError, match="there is no clause"):
            check(settings, bisect=clause)


def test_building_ahead_ends_with_its_block(settings: Settings, tmp_path: Path) -> None:
    place = tmp_path / "ahead"
    # It fails at once, which is nobody's business here.
    hopeless = dataclasses.replace(settings, kernel_series=tmp_path / "none")
    with building_ahead(PARTS["kernel"], hopeless, place):
        assert (place / "settings.json").is_file()
    assert (place / "ahead.log").is_file()
    with building_ahead(PARTS["kernel"], None, tmp_path / "nothing"):
        assert not (tmp_path / "nothing").exists()


# -- checkers -----------------------------------------------------------------------------------


def _kernel_tree() -> Path | None:
    found = sorted(paths.cache_dir().glob("trees/linux-*/src/scripts/checkpatch.pl"))
    return found[0].parent.parent if found else None


@pytest.mark.skipif(_kernel_tree() is None, reason="no kernel tree in the cache")
@pytest.mark.skipif(not shutil.which("perl"), reason="no perl here")
def test_checkpatch_is_asked_about_the_patch_itself(tmp_path: Path) -> None:
    tree = _kernel_tree()
    assert tree is not None
    own = load_series(OWN).patches[0]
    options = PARTS["kernel"].checkpatch
    assert not [line for line in checkpatch(tree, own, *options) if line.startswith("ERROR")]
    bad = Patch(tmp_path / "x.patch", own.content.replace(b"\n+\t", b"\n+        ", 1))
    found = checkpatch(tree, bad, *options)
    assert any("CODE_INDENT" in line and "(line " in line for line in found)
    with pytest.raises(BuildError, match="checkpatch failed"):
        checkpatch(tmp_path, own)


def test_an_unfinished_series_asks_for_no_option_of_it() -> None:
    series = load_series(OWN)
    assert series.first(1).options() == set()
    assert series.options() == {"KVM_INTROSPECTION"}
    assert local_version(series.first(0)) == "-kvmi-base"
