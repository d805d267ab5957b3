# SPDX-License-Identifier: GPL-2.0-or-later
"""What came of a run: its end, its documents, and its exit code."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import HarnessError, InfraError, UsageError
from harness.report import FORMATS, render
from harness.report.model import End, exit_code, missing
from harness.report.store import Run, VerdictFile, last_run, load_run, utc_now
from harness.settings import Settings

__all__ = [
    "INTERRUPTED",
    "account",
    "death_of",
    "ended_run",
    "merged_report",
    "report",
    "tell",
]

INTERRUPTED = "the run was interrupted"
"""Why a run ended that somebody interrupted."""

_FAILED, _USAGE, _NO_TESTS = 1, 4, 5  # pytest.ExitCode, which is slow to import


def death_of(code: int) -> str:
    """What pytest died of, if it did."""
    if code < 0:
        return f"pytest was killed by {signal.Signals(-code).name}"
    return ""


def account(run_dir: Path, reason: str, *, machines: Mapping[str, str] | None = None) -> None:
    """See to it that the run has an end, and a verdict on all that was collected.

    :param reason: why it ended early, if it is known.
    :param machines: of a fleet that were lost, each with how; a run without such a machine
        that owes nothing came to its end.
    """
    run = load_run(run_dir)
    if run.end is not None:
        return
    if machines is None:
        reason = reason or "pytest ended before the run did; see pytest.log"
    lost = missing(run.plan, run.verdicts, reason=reason or "no machine was left to run it")
    started = run_dir.stat().st_ctime  # only for the duration; the start itself is in the facts
    with contextlib.suppress(OSError), VerdictFile(run_dir) as file:
        for verdict in lost:
            file.write(verdict)
        file.write(
            End(
                finished=utc_now(),
                duration_s=round(max(0.0, time.time() - started), 3),
                exit_code=exit_code([*run.verdicts, *lost]),
                reason=reason,
                lost=dict(machines or {}),
            )
        )


def tell(run_dir: Path, code: int, arguments: list[str]) -> int:
    """Make the documents, print the summary, and settle the exit code."""
    log = run_dir / "pytest.log"
    rendered = True
    try:
        render(run_dir, [one for one in FORMATS if one != "summary"])
    except HarnessError as error:
        rendered = False
        print(f"error: {error}", file=sys.stderr)
    except Exception:
        # A defect in a document must not hide what the run found out.
        rendered = False
        traceback.print_exc()
    view = render(run_dir, ("summary",))
    if not view.verdicts and code == _NO_TESTS:
        raise UsageError(
            f"no test matches {shlex.join(arguments)}",
            hint="name clauses (HOOK-*), tests (a file, or pytest's id), or words of their names",
        )
    if code == _USAGE:
        raise UsageError(f"pytest cannot run these tests; see {log}", details=_errors_in(log))
    if not view.verdicts:
        raise InfraError(f"pytest ran nothing; see {log}", details=_errors_in(log))
    if rendered:
        print(f"Report: {run_dir / 'report.html'}")
    if view.bad_tests:
        few = [test.test for test in view.bad_tests[:5]]
        print(f"Run {'them' if len(few) > 1 else 'it'} again: {view.rerun(few)}")
    # pytest knows of no known failures: with nothing but these, its 1 means success.
    code = 0 if code == _FAILED and view.known and view.exit_code == 0 else code
    return _settled(view.exit_code, code if rendered else InfraError.exit_code)


def _settled(verdicts: int, pytest_code: int) -> int:
    """Verdicts decide; but a pytest that failed otherwise never counts as success."""
    return 4 if verdicts == 0 and pytest_code != 0 else verdicts


def _errors_in(log: Path, *, lines: int = 40) -> str:
    """What a log of pytest says about what went wrong, or its end."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    starts = [n for n, line in enumerate(text) if re.match(r"=+ ERRORS =+", line)]
    if starts:
        section = text[starts[-1] + 1 :]
        ends = [n for n, line in enumerate(section) if line.startswith("=====")]
        return "\n".join(section[: ends[0] if ends else lines][:lines])
    errors = [line for line in text if line.startswith("INTERNALERROR")]
    return "\n".join((errors or text)[-lines:])


def ended_run(settings: Settings) -> Run:
    """The run that :func:`conform` has just ended.

    :raises KeyboardInterrupt: it was interrupted, and what it did not say means nothing.
    :raises HarnessError: there is none.
    """
    done = load_run(last_run(settings.reports))
    if done.end is not None and done.end.reason == INTERRUPTED:
        raise KeyboardInterrupt
    return done


def report(
    settings: Settings,
    *,
    run: Path | None = None,
    formats: Sequence[str] = FORMATS,
    against: Path | None = None,
) -> int:
    """Make documents of a stored run again, and print its summary.

    :param run: its directory; the newest one if None.
    :param formats: some of :data:`harness.report.FORMATS`.
    :param against: an earlier run, for the mail to say what became of its verdicts.
    :returns: 0: the exit code is about the report, not about the run's verdicts.
    :raises UsageError: there is no such run or format.
    """
    place = run or last_run(settings.reports)
    view = render(place, formats or FORMATS, against=against, known=settings.known)
    print(f"Report: {view.run.path}")
    return 0


def merged_report(run_dir: Path) -> int:
    """Make all documents of a run that was merged from others; the exit code is the run's."""
    view = render(run_dir)
    print(f"Report: {run_dir / 'report.html'}")
    early = bool(view.run.end and view.run.end.reason)
    return view.exit_code or (InfraError.exit_code if early else 0)
