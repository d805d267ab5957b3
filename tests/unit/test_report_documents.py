# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents of a run: what they say, and that machines and browsers can read them."""

from __future__ import annotations

import html.parser
import io
import json
import re
from pathlib import Path

import junitparser
import msgspec
import pytest
from rich.console import Console

from harness.errors import UsageError
from harness.plugin.timeline import Timeline, load_timeline
from harness.report import render
from harness.report.__main__ import main
from harness.report.charts import bars_of, duration, lanes_of, ticks
from harness.report.evidence import messages_of, text_of
from harness.report.live import LiveView, Progress
from harness.report.model import End, MachineRecord, Outcome, Planned, RunFacts, Verdict
from harness.report.store import Run, VerdictFile, load_run, write_plan
from harness.report.summary import print_summary
from harness.report.view import RunView, rerun_command, view_of

NASTY = "<script>alert('x')</script> & \x1b[31m\x00 \U0001f9ea"


def verdict(clause: str | None, outcome: str, **more: object) -> Verdict:
    """A verdict with what does not matter filled in."""
    values = {
        "clause": clause,
        "verdict": outcome,
        "test": f"tests/conformance/test_x.py::test_{(clause or 'none').lower()}",
        "target": "tcg",
        "series": "linux@1 qemu@2",
        "duration_s": 1.5,
        "reason": "" if outcome == "PASS" else f"why {outcome}",
        "worker": "gw0",
        "started": "2025-01-31T10:15:00.000Z",
    }
    return msgspec.convert(values | more, Verdict)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one verdict of each kind, with evidence, as workers leave it."""
    evidence = tmp_path / "evidence" / "fail"
    evidence.mkdir(parents=True)
    (evidence / "failure.txt").write_text(f"E assert 1 == 2 {NASTY}")
    (evidence / "kernel_log.txt").write_text("[    1.0] WARNING: at kvmi.c:42\n")
    (evidence / "guests.txt").write_text(f"Guest 1\n> 0x00010001  nop {NASTY}\n")
    entries = [
        {"kind": "transcript", "abi": "v12", "name": "", "started": "", "monotonic_ns": 0},
        {"t": 0.1, "channel": 1, "kind": "note", "text": NASTY},
        {"t": 0.2, "channel": 1, "dir": "out", "kind": "command", "name": "GET_VERSION", "seq": 7,
         "fields": {}},
        {"t": 0.3, "channel": 1, "dir": "in", "kind": "reply", "name": "GET_VERSION", "seq": 7,
         "error": "KVM_EPERM", "latency_us": 12.0},
    ]  # fmt: skip
    (evidence / "transcript.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries) + '{"t": 0.4, "cha'
    )
    timeline = Timeline(evidence / "timeline.jsonl")
    with timeline.step("hook"):
        timeline.mark("event")
    with pytest.raises(AssertionError), timeline.step("migrate"):
        raise AssertionError("lost")
    paths = {path.stem: path.relative_to(tmp_path).as_posix() for path in evidence.iterdir()}
    with VerdictFile(tmp_path) as file:
        file.write(
            RunFacts(
                run="20250131T101500Z-3f9c",
                started="2025-01-31T10:15:00.000Z",
                target="tcg",
                series="linux@1 qemu@2",
                rerun="inv conform",
                machine=MachineRecord(
                    target="tcg",
                    emulated=True,
                    vendor="AMD",
                    cpu_model="EPYC",
                    virtualisation="SVM, emulated by QEMU TCG 7.2",
                    nested_paging=True,
                    extra={"memory_mb": "1024"},
                ),
            )
        )
        file.write(verdict("HOOK-OK", "PASS", description=NASTY))
        file.write(verdict("HOOK-ENOMEM", "SKIP"))
        file.write(verdict("HOOK-ABI", "FAIL", reason=NASTY, evidence=paths))
        file.write(verdict("UNHOOK-ABI", "ERROR"))
        file.write(verdict("EV-HYPERCALL-NOTOOL", "PASS", seen="enosys"))
        file.write(verdict(None, "MISS"))
        file.write(End(finished="2025-01-31T10:16:00.000Z", duration_s=60, exit_code=1))
    test = verdict("HOOK-ABI", "FAIL").test
    write_plan(tmp_path, [Planned(test=test, clauses=["HOOK-ABI"], lifecycle=True)])
    return tmp_path


@pytest.fixture
def view(run_dir: Path) -> RunView:
    """The run as documents see it."""
    return view_of(load_run(run_dir))


class Page(html.parser.HTMLParser):
    """Collects what the page links to and defines, and checks that its tags are balanced."""

    VOID = frozenset({"meta", "br", "input", "link", "img", "hr", "rect", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name == "href" and value:
                self.links.append(value)
            if name == "src" and value:
                self.sources.append(value)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Well-formed, self-contained, every link of it leads somewhere, nothing is injected."""
    render(run_dir)
    text = (run_dir / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.sources == []
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        else:
            assert (run_dir / link).is_file(), link
    assert not re.search(r"(https?:)?//[a-z]+\.", text)
    assert "<script>alert" not in text
    words = " ".join(" ".join(page.words).split())
    assert "1 of 5 promises was broken" in words
    assert "Emulated CPU." in words
    assert "Nothing on this page was seen on hardware" in words
    assert "WARNING: at kvmi.c:42" in words
    assert "reply GET_VERSION (seq 7): KVM_EPERM" in words
    assert "inv conform --select tests/conformance/test_x.py::test_hook-abi" in words
    assert "the guest gets -KVM_ENOSYS" in words
    assert "why SKIP" in words


def test_real_hardware_is_not_called_emulated(run_dir: Path) -> None:
    """The page says which it was."""
    path = run_dir / "verdicts.jsonl"
    path.write_text(path.read_text().replace('"emulated":true', '"emulated":false'))
    render(run_dir, ["html"])
    text = (run_dir / "report.html").read_text()
    assert "Real CPU." in text
    assert "Emulated CPU." not in text


def test_a_virtual_machine_is_not_called_hardware(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither page nor terminal do; what is below a hypervisor cannot be seen."""
    path = run_dir / "verdicts.jsonl"
    text = path.read_text().replace('"emulated":true', '"emulated":false')
    path.write_text(text.replace('"hypervisor":""', '"hypervisor":"KVM"'))
    render(run_dir, ["html", "summary"])
    text = (run_dir / "report.html").read_text()
    assert "Real CPU." not in text
    assert "real hardware" not in text
    assert "Virtual machine." in text
    assert "nothing here counts as seen on hardware" in capsys.readouterr().out


def test_junit(run_dir: Path) -> None:
    """junitparser reads the same verdicts; groups are class names, facts are properties."""
    render(run_dir, ["junit"])
    document = junitparser.JUnitXml.fromfile(str(run_dir / "junit.xml"))
    (suite,) = list(document)
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (6, 1, 2, 1)
    cases = {case.name.partition(" ")[0]: case for case in suite}
    assert cases["HOOK-OK"].classname == "HOOK ioctl"
    assert cases["HOOK-OK"].is_passed
    assert cases["HOOK-ENOMEM"].result[0].message == "why SKIP"
    failure = cases["HOOK-ABI"].result[0]
    assert isinstance(failure, junitparser.Failure)
    assert "inv conform --select" in failure.text
    assert "assert 1 == 2" in failure.text
    assert cases["-"].result[0].type == "MISS"
    properties = {p.name: p.value for p in suite.properties()}  # type: ignore[no-untyped-call]
    assert properties["machine.emulated"] == "true"
    assert properties["series"] == "linux@1 qemu@2"


def test_summary(view: RunView) -> None:
    """Counts by group, each failure by name with its reason and the command to repeat it."""
    out = io.StringIO()
    print_summary(view, Console(file=out, width=200))
    text = out.getvalue()
    for words in (
        "HOOK ioctl",
        "FAIL  HOOK-ABI",
        "why ERROR",
        "again: inv conform --select tests/conformance/test_x.py::test_hook-abi",
        "The CPU is emulated",
        "1 of 5 promises was broken.",
        "0.300000 <- reply GET_VERSION (seq 7): KVM_EPERM",
        "> 0x00010001  nop",
        "WARNING: at kvmi.c:42",
    ):
        assert words in text
    assert "\x1b" not in text


def test_no_hook_is_left_uncovered_silently(view: RunView) -> None:
    """Clauses and groups that no test names are listed, not hidden."""
    hook = next(group for group in view.groups if group.title == "HOOK ioctl")
    assert "HOOK-REHOOK" in [clause.id for clause in hook.uncovered]
    assert "VM_PAUSE_VCPU" in view.untested_groups


@pytest.mark.parametrize(
    ("outcomes", "headline"),
    [
        ("PASS PASS", "All 2 promises held"),
        ("PASS SKIP", "The promise held, 1 do not apply here"),
        ("PASS FAIL", "1 of 2 promises was broken"),
        ("FAIL FAIL ERROR", "2 of 3 promises were broken"),
        ("PASS MISS", "No promise was broken, 1 of 2 could not be judged"),
        ("SKIP SKIP", "Nothing was tested: all 2 were skipped"),
        ("", "Nothing was tested"),
    ],
)
def test_headline(outcomes: str, headline: str, tmp_path: Path) -> None:
    """The run in one sentence."""
    names = ("HOOK-OK", "HOOK-ABI", "UNHOOK-ABI")
    verdicts = [verdict(name, o) for name, o in zip(names, outcomes.split(), strict=False)]
    facts = RunFacts(run="r", started="")
    run = Run(path=tmp_path, facts=facts, verdicts=verdicts, plan=[])
    assert view_of(run).headline == headline


@pytest.mark.parametrize(
    ("outcomes", "headline"),
    [
        ("PASS PASS", "None of 2 tests failed; they name no clause"),
        ("PASS FAIL", "1 of 2 tests failed; they name no clause"),
    ],
)
def test_headline_without_clauses(outcomes: str, headline: str, tmp_path: Path) -> None:
    """A run of the fuzzer is no run in which nothing was tested."""
    verdicts = [
        verdict(None, outcome, test=f"t.py::test_{number}")
        for number, outcome in enumerate(outcomes.split())
    ]
    run = Run(path=tmp_path, facts=RunFacts(run="r", started=""), verdicts=verdicts, plan=[])
    assert view_of(run).headline == headline


def test_command_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """python -m harness.report RUN."""
    assert main([str(run_dir)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert main([str(run_dir / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(UsageError, match="pdf"):
        render(run_dir, ["pdf"])


def test_rerun_command_is_quoted() -> None:
    """The command can be pasted into a shell."""
    command = rerun_command("inv conform", ["t.py::a[x y]", "t.py::b"])
    assert command == "inv conform --select 't.py::a[x y] t.py::b'"


def test_bars_of_a_cut_sequence(tmp_path: Path) -> None:
    """A step that never ended goes to the end of what is known."""
    path = tmp_path / "timeline.jsonl"
    path.write_text(
        '{"number":1,"step":"a","state":"begin","at_s":0.0}\n'
        '{"number":2,"step":"b","state":"begin","at_s":1.0,"depth":1}\n'
        '{"number":2,"step":"b","state":"ok","at_s":3.0,"depth":1}\n'
        '{"number":3,"step":"c","state":"mark","at_s":4.0,"depth":1}\n'
        '{"number":4,"st'
    )
    bars = bars_of(load_timeline(path))
    assert [(b.label, b.state, b.start, b.width) for b in bars] == [
        ("a", "cut", 0.0, 100.0),
        ("b", "ok", 25.0, 50.0),
        ("c", "mark", 99.6, 0.4),
    ]


def test_lanes() -> None:
    """Each worker's tests over time, in percent of the whole."""
    tests = [
        verdict("HOOK-OK", "PASS"),
        verdict("HOOK-ABI", "FAIL", worker="gw1", started="2025-01-31T10:15:02.000Z",
                duration_s=2.0),
        verdict("UNHOOK-ABI", "MISS", started=""),
    ]  # fmt: skip
    lanes, span_s = lanes_of((v, "") for v in tests)
    assert span_s == 4.0
    assert [(lane.worker, lane.blocks[0].start, lane.blocks[0].width) for lane in lanes] == [
        ("gw0", 0.0, 37.5),
        ("gw1", 50.0, 50.0),
    ]
    assert [text for _at, text in ticks(span_s)] == ["0", "1.0 s", "2.0 s", "3.0 s"]
    assert lanes_of([]) == ([], 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0 ms"),
        (0.0995, "0.1 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (7261, "2 h 01 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Durations as people write them."""
    assert duration(seconds) == text


def test_evidence_that_is_not_there(tmp_path: Path) -> None:
    """Missing or damaged evidence is shown as far as it goes, and never fails."""
    assert text_of(tmp_path / "no.txt").text == ""
    assert messages_of(tmp_path / "transcript.jsonl") == ([], 0)
    (tmp_path / "transcript.jsonl").write_bytes(b"\xff\x00 not json\n")
    assert messages_of(tmp_path / "transcript.jsonl") == ([], 0)
    long = tmp_path / "long.txt"
    long.write_text("\n".join(map(str, range(1000))))
    assert text_of(long, lines=10).left_out == 990


def test_progress_reads_piece_by_piece(run_dir: Path, tmp_path: Path) -> None:
    """The live view sees each verdict once, and waits for the end of a line."""
    data = (run_dir / "verdicts.jsonl").read_bytes()
    other = tmp_path / "live"
    other.mkdir()
    path = other / "verdicts.jsonl"
    progress = Progress(other)
    assert progress.update() == []
    cut = data.index(b"HOOK-ABI")
    path.write_bytes(data[:cut])
    assert [v.clause for v in progress.update()] == ["HOOK-OK", "HOOK-ENOMEM"]
    path.write_bytes(data)
    assert progress.update()[0].clause == "HOOK-ABI"
    assert progress.counts[Outcome.MISS] == 1
    assert progress.tests_done == 6


def test_live_view_in_a_log(run_dir: Path) -> None:
    """Where there is no terminal, bad verdicts are told at once, as lines."""
    out = io.StringIO()
    with LiveView(run_dir, console=Console(file=out, width=300)) as live:
        live.update()
        live.update()
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["FAIL", "ERROR", "MISS"]


def test_live_view_does_not_repeat_itself(tmp_path: Path) -> None:
    """What every test says where a kernel lacks what all need is told a few times."""
    with VerdictFile(tmp_path) as file:
        for n in range(20):
            reason = f"the kernel of host gw{n % 2}-{n} does not know the ioctl HOOK"
            file.write(verdict(f"X-{n}", "FAIL", reason=reason, test=f"test_{n}"))
        file.write(verdict("Y", "FAIL", reason="another", test="test_y"))
    out = io.StringIO()
    with LiveView(tmp_path, console=Console(file=out, width=300)) as live:
        live.update()
    told = out.getvalue().splitlines()
    assert [line.split()[1] for line in told] == ["X-0", "X-1", "X-2", "X-3", "X-4", "more", "Y"]
