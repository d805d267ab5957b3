# SPDX-License-Identifier: GPL-2.0-or-later
"""Once a night: build, run on the machines of an inventory, compare with the night before, tell.

What a night is told stands in a TOML file; ``examples/nightly.toml`` has all of it. The reports
lie in a directory of their own, one run a night, the newest ones kept. A night that could not
even run is told as well: who reads nothing in the morning would have to guess.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec

from harness.build.progress import note
from harness.conform import signals_as_interrupts
from harness.errors import DeadlineError, HarnessError, UsageError
from harness.fleet.inventory import Machine, load_inventory, read_toml
from harness.fleet.run import run_fleet
from harness.report import render
from harness.report.compare import Comparison, compare_runs, tell
from harness.report.store import VERDICTS, forget_latest, load_run, write_atomically
from harness.report.view import RunView
from harness.settings import FILE_NAME, Settings

__all__ = ["Night", "forget", "load_night", "nightly", "summarize"]

COMPARISON = "compare.txt"
"""In the run's directory: what differs from the night before."""

_SEND_TIMEOUT_S = 300.0


class Night(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a night is told. Paths are relative to its file."""

    inventory: str = "inventory.toml"
    settings: str = FILE_NAME
    """Settings as of any run, which name the series; defaults if there is no such file."""
    reports: str = "nights"
    """The directory of the reports, one run a night; for nothing else."""
    keep: Annotated[int, msgspec.Meta(ge=1)] = 30
    """How many nights are kept."""
    select: str = ""
    """What is run, as of ``inv conform --select``; by default all."""
    hours: Annotated[float, msgspec.Meta(gt=0, le=168)] = 10.0
    """How long a night is. What runs then is interrupted, and reported so."""
    send: str = ""
    """A shell command that gets the summary on its standard input, and ``$KVMI_SUBJECT``,
    ``$KVMI_EXIT_CODE`` and ``$KVMI_REPORT`` (a directory, empty if there is none)."""


def load_night(path: Path) -> tuple[Night, list[Machine]]:
    """What a file tells, with whole paths, and the machines of its inventory.

    :raises UsageError: one of the two files is wrong.
    """
    night: Night = read_toml(path, Night, what="the night's file")
    base = path.parent.absolute()
    changes = {key: str(base / Path(getattr(night, key)).expanduser()) for key in _PATHS}
    night = msgspec.structs.replace(night, **changes)
    return night, load_inventory(Path(night.inventory))


_PATHS = ("inventory", "settings", "reports")


def nightly(path: Path, ready: Callable[[Path | None, Path], Settings]) -> int:
    """One night.

    :param path: the night's file.
    :param ready: makes settings ready for a run, from a file (None: there is none) and the
        directory of the reports.
    :returns: the exit code of the run.
    :raises UsageError: a file is wrong, or another night is at work.
    :raises HarnessError: nothing could be run; that was told by the night's command, too.
    """
    night, machines = load_night(path)
    reports = Path(night.reports)
    with _alone(reports):
        settings_file = Path(night.settings)
        before = _last_whole(reports)
        forget_latest(reports)  # or a night without a run would show that of another
        try:
            with signals_as_interrupts(), _deadline(night.hours):
                settings = ready(settings_file if settings_file.is_file() else None, reports)
                code, run_dir = run_fleet(
                    settings,
                    machines,
                    select=night.select or None,
                    started_by=f"inv conform --inventory {shlex.quote(night.inventory)}",
                )
        except KeyboardInterrupt:
            error: HarnessError = DeadlineError(
                f"the night was interrupted, or took longer than its {night.hours:g} hours, "
                "before the suite ran"
            )
            _send(night, f"KVMI night: {error.message}", error.message, code=error.exit_code)
            raise error from None
        except HarnessError as error:
            text = "\n\n".join(part for part in (str(error), error.details) if part)
            _send(night, f"KVMI night: nothing ran: {error.message}", text, code=error.exit_code)
            raise
        try:
            subject, text = summarize(run_dir, before)
        except HarnessError as error:
            subject, text = "KVMI night: it cannot be compared", str(error)
            code = code or error.exit_code
        _send(night, subject, text, code=code, run_dir=run_dir)
        forget(reports, keep=night.keep)
        return code


@contextlib.contextmanager
def _alone(reports: Path) -> Iterator[None]:
    """Refuse to begin while another night is at work with these reports.

    The lock goes with its process, however that ends.
    """
    try:
        reports.mkdir(parents=True, exist_ok=True)
        with (reports / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise UsageError(
            f"another night is at work in {reports}", hint="wait until it has ended, or end it"
        ) from None


@contextlib.contextmanager
def _deadline(hours: float) -> Iterator[None]:
    """Interrupt what runs when the night is over, as Ctrl-C would."""

    def over(_number: int, _frame: FrameType | None) -> None:
        note(f"The night is over: it took {hours:g} hours")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, hours * 3600)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _nights(reports: Path) -> list[Path]:
    """The runs in the directory, the oldest first."""
    return sorted(path.parent for path in reports.glob(f"*T*Z-*/{VERDICTS}"))


def _last_whole(reports: Path) -> Path | None:
    """The newest run that came to its end; if none did, the newest that was not killed.

    What another did not test cannot be seen to break.
    """
    cut = None
    for path in reversed(_nights(reports)):
        with contextlib.suppress(UsageError):
            end = load_run(path).end
            if end is not None and not end.reason:
                return path
            cut = cut or (path if end else None)
    return cut


def forget(reports: Path, *, keep: int) -> None:
    """Delete all but the newest nights."""
    for path in _nights(reports)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def summarize(run_dir: Path, before: Path | None) -> tuple[str, str]:
    """Subject and text of what is sent; kept in the run's directory, too."""
    view = render(run_dir, ("mail",), against=before)
    parts = [view.headline + ".", *view.run.notes]
    found: Comparison | None = None
    if before is not None:
        found = compare_runs(before, run_dir)
        text = "\n".join([f"against {before.name}:", *tell(found)])
        write_atomically(run_dir / COMPARISON, text + "\n")
        parts += ["", text]
    parts += ["", f"Report: {run_dir / 'report.html'}", "", (run_dir / "mail.txt").read_text()]
    return _subject(view, found), "\n".join(parts)


def _subject(view: RunView, found: Comparison | None) -> str:
    """One line that tells whether to read on."""
    parts = [f"KVMI night: {view.headline}"]
    if found is not None and (worse := sum(one.worse for one in found.differences)):
        parts.append(f"{worse} worse than the night before")
    if view.run.end is not None and (lost := view.run.end.lost):
        parts.append(f"lost: {', '.join(lost)}")
    return "; ".join(parts)


def _send(night: Night, subject: str, text: str, *, code: int, run_dir: Path | None = None) -> None:
    """Hand the summary to the night's command. Its failure is told, and no more."""
    if not night.send:
        return
    environment = os.environ | {
        "KVMI_SUBJECT": subject,
        "KVMI_EXIT_CODE": str(code),
        "KVMI_REPORT": str(run_dir or ""),
    }
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", night.send],
            input=text.rstrip().encode() + b"\n",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=_SEND_TIMEOUT_S,
        )
        how = f"ended with status {done.returncode}" if done.returncode else ""
        said = done.stdout.decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        how, said = f"did not end within {_SEND_TIMEOUT_S:.0f} s", ""
    except OSError as error:
        how, said = f"could not be started: {error.strerror}", ""
    if how:
        note(f"The summary was not sent: {night.send!r} {how}{f': {said}' if said else ''}")
