# SPDX-License-Identifier: GPL-2.0-or-later
"""A night without machines: the lock, what is told when nothing could run, what is kept."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_report_documents import verdict
from test_report_formats import make_run

from harness.errors import BuildError, DeadlineError, UsageError
from harness.fleet.nightly import COMPARISON, _last_whole, forget, nightly, summarize
from harness.report.model import End
from harness.report.store import VERDICTS, VerdictFile
from harness.settings import Settings


@pytest.fixture
def night(tmp_path: Path) -> Path:
    """A night's file that writes down what is sent."""
    (tmp_path / "inventory.toml").write_text('[[machine]]\nname = "one"\naddress = "one"\n')
    path = tmp_path / "nightly.toml"
    path.write_text(
        f"send = 'cat >{tmp_path}/text; echo $KVMI_SUBJECT:$KVMI_EXIT_CODE >{tmp_path}/subject'\n"
    )
    return path


def _broken(_path: Path | None, _reports: Path) -> Settings:
    raise BuildError("the kernel does not build", hint="see its log", details="foo.c:3: error")


def test_a_night_that_cannot_run_is_told(night: Path) -> None:
    with pytest.raises(BuildError):
        nightly(night, _broken)
    assert (night.parent / "subject").read_text() == (
        "KVMI night: nothing ran: the kernel does not build:3\n"
    )
    assert "foo.c:3: error" in (night.parent / "text").read_text()


def test_a_command_that_fails_changes_nothing(
    night: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    night.write_text("send = 'echo no such list; exit 3'\n")
    with pytest.raises(BuildError):
        nightly(night, _broken)
    assert "ended with status 3: no such list" in capfd.readouterr().err


def test_one_night_at_a_time(night: Path) -> None:
    reports = night.parent / "nights"
    reports.mkdir()
    with (reports / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another night is at work"):
            nightly(night, _broken)
    assert not (night.parent / "subject").exists()
    with pytest.raises(BuildError):
        nightly(night, _broken)


def test_a_night_ends(night: Path) -> None:
    """Also while it builds."""
    night.write_text(night.read_text() + f"hours = {0.5 / 3600}\n")

    def slow(_path: Path | None, _reports: Path) -> Settings:
        time.sleep(60)
        raise AssertionError

    with pytest.raises(DeadlineError, match="before the suite ran"):
        nightly(night, slow)
    assert "interrupted, or took longer" in (night.parent / "text").read_text()


def test_a_night_that_is_ended_says_so(night: Path) -> None:
    """As by systemd, while it builds; and the last night's report does not pass for its own."""
    latest = night.parent / "nights" / "latest"
    latest.parent.mkdir()
    latest.symlink_to("20250101T000000Z-0001")

    def ended(_path: Path | None, _reports: Path) -> Settings:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError

    with pytest.raises(DeadlineError, match="before the suite ran"):
        nightly(night, ended)
    assert "was interrupted" in (night.parent / "text").read_text()
    assert not latest.is_symlink()


def test_settings_are_those_beside_the_night(night: Path) -> None:
    """If there are any."""
    told: list[Path | None] = []

    def ready(path: Path | None, reports: Path) -> Settings:
        told.append(path)
        assert reports == night.parent / "nights"
        raise BuildError("enough")

    for _ in range(2):
        with pytest.raises(BuildError):
            nightly(night, ready)
        (night.parent / "kvmi-harness.toml").touch()
    assert told == [None, night.parent / "kvmi-harness.toml"]


def test_the_summary_says_what_matters_first(tmp_path: Path) -> None:
    before = make_run(tmp_path / "20250101T000000Z-0001", verdict("HOOK-OK", "PASS"))
    after = make_run(tmp_path / "20250102T000000Z-0002", verdict("HOOK-OK", "FAIL"))
    with VerdictFile(after) as file:
        file.write(End(finished="", duration_s=1, exit_code=1, lost={"epyc": "it burnt"}))
    subject, text = summarize(after, before)
    assert subject == (
        "KVMI night: 1 of 1 promises was broken; 1 worse than the night before; lost: epyc"
    )
    assert text.index("machine epyc was lost: it burnt") < text.index("PASS -> FAIL")
    assert "against 20250101T000000Z-0001" in (after / COMPARISON).read_text()
    assert "Regressions against the run before" in (after / "mail.txt").read_text()
    assert "the night before" not in summarize(after, None)[0]


def test_a_night_is_compared_with_one_that_came_to_its_end(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "20250101T000000Z-0001", verdict("HOOK-OK", "PASS"))
    cut = make_run(tmp_path / "20250102T000000Z-0002", verdict("HOOK-OK", "MISS"))
    with VerdictFile(cut) as file:
        file.write(End(finished="", duration_s=1, exit_code=4, reason="the night is over"))
    assert _last_whole(tmp_path) == whole
    shutil.rmtree(whole)
    assert _last_whole(tmp_path) == cut


def test_old_nights_go(tmp_path: Path) -> None:
    for day in range(1, 6):
        place = tmp_path / f"2025010{day}T000000Z-000{day}"
        place.mkdir()
        (place / VERDICTS).touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / VERDICTS).touch()  # not ours
    forget(tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["20250104T000000Z-0004", "20250105T000000Z-0005", "notes"]
