# SPDX-License-Identifier: GPL-2.0-or-later
"""KTAP, KCIDB and mail: read by the tools that they are for, and held to what they must say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import junitparser
import kcidb_io
import pytest
from test_report_documents import verdict

from harness import paths
from harness.errors import UsageError
from harness.report import render
from harness.report.compare import compare
from harness.report.kcidb import kcidb_of
from harness.report.ktap import ktap_of
from harness.report.mail import mail_of, whole
from harness.report.model import End, MachineRecord, RunFacts, Verdict, exit_code
from harness.report.store import VerdictFile, load_run
from harness.report.view import RunView, view_of

EMULATED = MachineRecord(
    target="tcg", emulated=True, virtualisation="SVM, emulated by QEMU TCG 7.2 (Debian 1:7.2)"
)
METAL = MachineRecord(target="ssh", emulated=False, cpu_model="AMD EPYC 9754")
TESTER = "A Tester <a@example.org>"
KERNEL = {
    "release": "6.12.57-kvmi-1a2b3c4d",
    "series": "linux@1a2b3c4d5e6f",
    "title": "KVM: introspection",
    "patches": "36",
    "patchset_hash": "ab" * 32,
    "base": "linux-source-6.12 6.12.57",
    "message_id": "<0@list>",
}


def make_run(place: Path, *verdicts: Verdict, **facts: object) -> Path:
    """A stored run that came to its end."""
    values: dict[str, object] = {
        "run": place.name,
        "started": "2025-01-31T10:15:00.000Z",
        "target": "tcg",
        "series": "linux@1a2b3c4d5e6f qemu@2",
        "abi": "v12",
        "rerun": "inv conform",
        "machine": EMULATED,
        "kernel": KERNEL,
        "qemu": {"version": "10.0.2", "series": "qemu@2", "patches": "17"},
    }
    with VerdictFile(place) as file:
        file.write(RunFacts(**(values | facts)))  # type: ignore[arg-type]
        for one in verdicts:
            file.write(one)
        file.write(
            End(
                finished="2025-01-31T10:16:00.000Z",
                duration_s=60,
                exit_code=exit_code(verdicts),
            )
        )
    return place


def evidence(place: Path) -> dict[str, str]:
    """Evidence as a failed test leaves it."""
    folder = place / "evidence" / "fail"
    folder.mkdir(parents=True)
    (folder / "failure.txt").write_text("def test():\n>   x\nE   AssertionError: 1 != 2\n# not ok")
    (folder / "kernel_log.txt").write_text("[ 1.0] fine\n[ 1.1] WARNING: CPU: 0 at kvmi.c:42\n")
    entries = [{"kind": "transcript", "abi": "v12", "name": "", "started": "", "monotonic_ns": 0}]
    entries += [
        {"t": 0.1 * n, "channel": 1, "dir": "out", "kind": "command", "name": "GET_VERSION",
         "seq": n, "fields": {}}
        for n in range(9)
    ]  # fmt: skip
    (folder / "transcript.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    return {p.stem: p.relative_to(place).as_posix() for p in folder.iterdir()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one verdict of each kind."""
    place = tmp_path / "run-a"
    return make_run(
        place,
        verdict("HOOK-OK", "PASS"),
        verdict("HOOK-ENOMEM", "SKIP", reason="needs EPT # TODO"),
        verdict("HOOK-ABI", "FAIL", reason="# got\n1", evidence=evidence(place)),
        verdict("UNHOOK-ABI", "ERROR"),
        verdict("EV-HYPERCALL-NOTOOL", "MISS"),
        verdict(None, "PASS"),
    )


@pytest.fixture
def view(run_dir: Path) -> RunView:
    return view_of(load_run(run_dir))


# -- KTAP ---------------------------------------------------------------------------------------


def _checked(lines: list[str], depth: int = 0) -> Iterator[tuple[str, str, str]]:
    """The results of KTAP text; fails where Documentation/dev-tools/ktap.rst is not kept."""
    assert lines[0] == "KTAP version 1"
    plan = None
    number = 0
    inner: list[str] = []
    for line in lines[1:]:
        if line.startswith("    "):
            inner.append(line[4:])
        elif found := re.fullmatch(r"1\.\.(\d+)", line):
            assert plan is None
            plan = int(found[1])
        elif found := re.fullmatch(r"(ok|not ok) (\d+) ([^#]+?)(?: # SKIP ?([^#]*))?", line):
            number += 1
            assert int(found[2]) == number
            children = list(_checked(inner, depth + 1)) if inner else []
            if children:
                bad = any(state == "not ok" for state, _, _ in children)
                assert (found[1] == "not ok") == bad
            inner = []
            yield from children
            if not children:
                yield found[1], found[3], found[4] or ""
        else:
            assert line.startswith("# "), line
    assert plan == number
    assert not inner


def test_ktap_keeps_the_format(view: RunView) -> None:
    results = {name: state for state, name, _ in _checked(ktap_of(view).splitlines())}
    assert results == {
        "HOOK-OK": "ok",
        "HOOK-ENOMEM": "ok",
        "HOOK-ABI": "not ok",
        "UNHOOK-ABI": "not ok",
        "EV-HYPERCALL-NOTOOL": "not ok",
        "-": "ok",
    }
    text = ktap_of(view)
    assert re.search(r"^    ok \d HOOK-ENOMEM # SKIP needs EPT \* TODO$", text, re.MULTILINE)
    assert "    # ERROR: tests/conformance/test_x.py::test_unhook-abi: why ERROR" in text
    assert "# The CPU is emulated: nothing here was seen on hardware." in text


def _kunit() -> Path | None:
    pattern = "trees/linux-*/src/tools/testing/kunit/kunit.py"
    return next(iter(sorted(paths.cache_dir().glob(pattern))), None)


@pytest.mark.skipif(_kunit() is None, reason="no kernel tree in the cache")
def test_the_kernels_own_tool_reads_ktap(run_dir: Path) -> None:
    render(run_dir, ["ktap"])
    tool = _kunit()
    assert tool is not None
    done = subprocess.run(
        [sys.executable, str(tool), "parse", str(run_dir / "ktap.txt")],
        cwd=tool.parents[3],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Ran 6 tests: passed: 2, failed: 3, skipped: 1" in said, said
    assert "error" not in said.lower().replace("# error:", "").replace("why error", "")
    assert "[FAILED] HOOK-ABI" in said
    assert done.returncode == 1


# -- KCIDB --------------------------------------------------------------------------------------


def test_kcidb_accepts_the_document(run_dir: Path) -> None:
    render(run_dir, ["kcidb"])
    data = json.loads((run_dir / "kcidb.json").read_text())
    assert kcidb_io.schema.V5_3.validate(data) is data
    assert kcidb_io.schema.LATEST.is_compatible(data)
    (checkout,) = data["checkouts"]
    assert checkout["patchset_hash"] == "ab" * 32
    assert checkout["message_id"] == "0@list"
    assert [test["status"] for test in data["tests"]] == [
        "PASS", "SKIP", "FAIL", "ERROR", "MISS", "PASS",
    ]  # fmt: skip
    failed = data["tests"][2]
    assert failed["path"] == "kvmi.hook-ioctl.HOOK-ABI"
    assert "AssertionError: 1 != 2" in failed["log_excerpt"]
    assert failed["misc"]["again"].startswith("inv conform --select ")
    assert "nothing here was seen on hardware" in failed["environment"]["comment"]


def test_kcidb_of_a_run_without_a_series(tmp_path: Path) -> None:
    run = make_run(tmp_path / "b", verdict("HOOK-OK", "PASS"), kernel={"release": "6.12"})
    data = kcidb_of(view_of(load_run(run)))
    kcidb_io.schema.V5_3.validate(data)
    assert "patchset_hash" not in data["checkouts"][0]


# -- mail ---------------------------------------------------------------------------------------


def test_mail_tells_what_was_tested_and_shows_each_failure(view: RunView) -> None:
    text = mail_of(view, tester=TESTER)
    assert text.startswith("Subject: Re: KVM: introspection\nIn-Reply-To: <0@list>\n\n")
    assert "6.12.57-kvmi-1a2b3c4d, linux@1a2b3c4d5e6f, 36 patches on linux-source-6.12" in (
        " ".join(text.split())
    )
    assert "The CPU is emulated: nothing here was seen on hardware." in text
    assert re.search(r"^HOOK ioctl +1 +1 +\. +\. +1$", text, re.MULTILINE)
    start = text.index("  FAIL HOOK-ABI: # got 1\n")
    shown = re.findall(r"^    > (.*)$", text[start:], re.MULTILINE)
    assert len(shown) == 5
    assert shown[0] == "[ 1.1] WARNING: CPU: 0 at kvmi.c:42"
    assert shown[1] == "AssertionError: 1 != 2"
    assert all(line.startswith("-> command GET_VERSION") for line in shown[2:])
    assert "HOOK-ENOMEM: needs EPT # TODO" in text
    assert "Tested-by" not in text
    assert max(len(line) for line in text.splitlines()) <= 160


GOOD = (verdict("HOOK-OK", "PASS"), verdict("HOOK-ENOMEM", "SKIP"))


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        (EMULATED, f"Tested-by: {TESTER} # SVM, emulated by QEMU TCG 7.2\n"),
        (METAL, f"Tested-by: {TESTER} # AMD EPYC 9754\n"),
    ],
)
def test_tested_by_says_on_what(tmp_path: Path, machine: MachineRecord, line: str) -> None:
    run = make_run(tmp_path / "good", *GOOD, machine=machine)
    text = mail_of(view_of(load_run(run)), tester=TESTER)
    assert text.endswith(line)
    assert "Tested-by" not in mail_of(view_of(load_run(run)))


def test_tested_by_speaks_of_what_was_claimed(tmp_path: Path) -> None:
    """What the series does not claim is named, and the line does not vouch for it."""
    verdicts = (
        verdict("HOOK-OK", "PASS"),
        verdict("SETPAGE-OK", "SKIP", reason="not claimed: VM_SET_PAGE_ACCESS"),
    )
    unclaimed = ["VM_SET_PAGE_ACCESS", "event PF"]
    run = make_run(tmp_path / "part", *verdicts, unclaimed=unclaimed, machine=METAL)
    text = mail_of(view_of(load_run(run)), tester=TESTER)
    claimed = "interface v12 but for what the series does not claim: VM_SET_PAGE_ACCESS, event PF"
    assert claimed in " ".join(text.split())
    assert "SETPAGE-OK: not claimed: VM_SET_PAGE_ACCESS" in text
    assert text.endswith(f"Tested-by: {TESTER} # what it claims of v12, AMD EPYC 9754\n")


def test_mail_of_a_run_in_which_nothing_was_tested(tmp_path: Path) -> None:
    text = mail_of(view_of(load_run(make_run(tmp_path / "empty"))), tester=TESTER)
    assert "0 tests" in text
    assert "Tested-by" not in text


@pytest.mark.parametrize(
    "spoilt",
    ["FAIL", "ERROR", "MISS", "select", "shard", "left out", "skipped", "early", "known"],
)
def test_no_tested_by_unless_everything_was_tested_and_held(tmp_path: Path, spoilt: str) -> None:
    run = tmp_path / "run"
    verdicts = [verdict("HOOK-OK", "PASS"), verdict("HOOK-ABI", "PASS")]
    facts = {"select": "HOOK-*"} if spoilt == "select" else {}
    facts |= {"shard": "1/2"} if spoilt == "shard" else {}
    facts |= {"left_out": "the QEMU side"} if spoilt == "left out" else {}
    if spoilt in ("FAIL", "ERROR", "MISS"):
        verdicts.append(verdict("UNHOOK-ABI", spoilt))
    if spoilt == "skipped":
        verdicts = [verdict("HOOK-OK", "SKIP")]
    if spoilt == "known":
        verdicts.append(verdict("UNHOOK-ABI", "FAIL"))
        run.mkdir()
        (run / "known.toml").write_text('[[known]]\nclause = "UNHOOK-ABI"\ntracked = "t"\n')
    make_run(run, *verdicts, **facts)
    if spoilt == "early":
        text = (run / "verdicts.jsonl").read_text().replace('"exit_code":0', '"reason":"stop",'
                                                            '"exit_code":0')  # fmt: skip
        (run / "verdicts.jsonl").write_text(text)
    view = view_of(load_run(run))
    assert not whole(view)
    assert "Tested-by" not in mail_of(view, tester=TESTER)


def test_mail_has_regressions_first(tmp_path: Path, run_dir: Path, view: RunView) -> None:
    before = make_run(tmp_path / "run-0", verdict("HOOK-ABI", "PASS"), verdict("HOOK-OK", "FAIL"))
    text = mail_of(view, against=compare(view_of(load_run(before)), view))
    assert text.index("Regressions") < text.index("Mended") < text.index("Clauses by group")
    assert re.search(r"^  HOOK-ABI +PASS -> FAIL: # got", text, re.MULTILINE)
    render(run_dir, ["mail"], against=before)
    assert "Regressions" in (run_dir / "mail.txt").read_text()


# -- known failures -----------------------------------------------------------------------------


def _list(place: Path, text: str) -> Path:
    file = place / "list.toml"
    file.write_text(text)
    return file


def test_known_failures_are_told_apart_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(
        tmp_path / "run", verdict("HOOK-OK", "PASS"), verdict("HOOK-ABI", "FAIL"),
        verdict("UNHOOK-ABI", "PASS"),
    )  # fmt: skip
    known = _list(
        tmp_path,
        '[[known]]\nclause = "*-ABI"\ntracked = "https://bugs/1"\nkernel = ">=6.12,<6.13"\n',
    )
    assert view_of(load_run(run)).exit_code == 1
    view = render(run, known=known)
    assert view.exit_code == 0
    assert view.headline == "1 of 3 promises was broken, 1 of them as is known"
    said = capsys.readouterr().out
    assert "known: HOOK-ABI fails, see https://bugs/1" in said
    assert "UNHOOK-ABI holds again: take it off the known failures (https://bugs/1)" in said
    mail = (run / "mail.txt").read_text()
    assert "Known failures\n  FAIL HOOK-ABI" in mail
    assert "    tracked: https://bugs/1" in mail
    assert "Known failures that pass again\n  UNHOOK-ABI" in mail
    assert "What failed" not in mail
    data = json.loads((run / "kcidb.json").read_text())
    assert [test.get("waived", False) for test in data["tests"]] == [False, True, False]
    assert "# known failure: https://bugs/1" in (run / "ktap.txt").read_text()
    page = (run / "report.html").read_text()
    link = '<a href="https://bugs/1">https://bugs/1</a>'
    assert f"Known failure: <code>HOOK-ABI</code>, tracked at {link}" in page
    assert "<code>UNHOOK-ABI</code> holds again" in page
    junit = junitparser.JUnitXml.fromfile(str(run / "junit.xml"))
    (suite,) = junit
    assert (junit.failures, suite.failures, suite.skipped) == (0, 0, 1)
    again = {case.name.partition(" ")[0]: case.system_out for case in suite if case.system_out}
    assert list(again) == ["UNHOOK-ABI"]
    assert "holds again: take it off the known failures (https://bugs/1)" in again["UNHOOK-ABI"]
    assert "# holds again, a known failure: https://bugs/1" in (run / "ktap.txt").read_text()


@pytest.mark.parametrize(
    ("entry", "covered"),
    [
        ("", True),
        ('series = "linux@1a2b*"', True),
        ('series = "linux@ffff*"', False),
        ('kernel = ">=6.12.57"', True),
        ('kernel = "<6.12.57"', False),
        ('kernel = ">=6.1, <6.12"', False),
        ('kernel = "==6.12.57"', True),
        ('kernel = "==6.12.57.0"', True),
    ],
)
def test_an_entry_is_for_some_series_and_kernels(tmp_path: Path, entry: str, covered: bool) -> None:
    run = make_run(tmp_path / "run", verdict("HOOK-ABI", "FAIL"), verdict("HOOK-OK", "PASS"))
    file = f'[[known]]\nclause = "HOOK-ABI"\ntracked = "t"\n{entry}\n'
    (run / "known.toml").write_text(file)
    assert (view_of(load_run(run)).exit_code == 0) is covered


def test_only_a_broken_promise_can_be_known(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", verdict("HOOK-ABI", "ERROR"), verdict("HOOK-OK", "PASS"))
    (run / "known.toml").write_text('[[known]]\nclause = "HOOK-ABI"\ntracked = "t"\n')
    view = view_of(load_run(run))
    assert view.exit_code == 4
    assert view.known == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[known]]\n", "missing required field `clause`"),
        ('[[known]]\nclause = "HOOK-OKAY"\ntracked = ""\n', "there is no clause HOOK-OKAY"),
        ('[[known]]\nclause = "HOOK-OK"\ntracked = ""\nwho = 1\n', "unknown field `who`"),
        ('[[known]]\nclause = "HOOK-OK"\ntracked = "t"\nkernel = "6.12"\n', "no range of kernels"),
        ('[[known]]\nclause = "HOOK-OK"\ntracked = ""\n', "where it is tracked"),
        ("[[known", "are wrong"),
    ],
)
def test_a_wrong_list_is_told(tmp_path: Path, run_dir: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        render(run_dir, ["summary"], known=_list(tmp_path, text))
    assert "list.toml" in caught.value.message
