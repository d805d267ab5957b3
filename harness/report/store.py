# SPDX-License-Identifier: GPL-2.0-or-later
"""A run's directory: its name, its verdict file, and reading both back.

::

    reports/latest -> 20250131T101500Z-3f9c
    reports/20250131T101500Z-3f9c/
        verdicts.jsonl     see harness.report.model; written by one process at a time
        plan.jsonl         what was collected: what the run owes a verdict on
        settings.json      the settings of the run
        build.json         what was built for it
        counters           the shared-memory event counter
        pytest.log         what pytest printed
        evidence/<test>/   transcript, kernel log, timeline, failure, ...
        hosts/<host>/      console and the like of each host

Everything here can be read at any time, also after the writers were killed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import msgspec

from harness.errors import UsageError
from harness.report.model import End, MachineRecord, Planned, RunFacts, Verdict, missing

__all__ = [
    "Run",
    "VerdictFile",
    "forget_latest",
    "last_run",
    "load_run",
    "new_run_dir",
    "point_latest",
    "read_plan",
    "utc_now",
    "write_atomically",
    "write_plan",
]

VERDICTS = "verdicts.jsonl"
PLAN = "plan.jsonl"
MACHINE = "machine.json"

_encode = msgspec.json.Encoder().encode
_decode_record = msgspec.json.Decoder(RunFacts | Verdict | End).decode
_decode_planned = msgspec.json.Decoder(Planned).decode


def utc_now() -> str:
    """Now, as ISO 8601 in UTC with milliseconds."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_run_dir(reports: Path) -> Path:
    """Name the directory of a new run: UTC time and a short random id. Makes nothing.

    Names sort by time. The random part keeps two runs of the same second apart.
    """
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return reports.resolve() / f"{stamp}-{secrets.token_hex(2)}"


def forget_latest(reports: Path) -> None:
    """Let ``latest`` point nowhere, until a run begins; see :func:`point_latest`."""
    latest = reports / "latest"
    if latest.is_symlink():
        latest.unlink()


def point_latest(run_dir: Path) -> None:
    """Let ``latest`` beside the run's directory point to it, by one atomic rename.

    A reader sees the old target or the new one, never none. A real file or directory of
    that name, made by somebody else, is left alone.
    """
    latest = run_dir.parent / "latest"
    if latest.exists() and not latest.is_symlink():
        return
    temporary = run_dir.parent / f".latest-{secrets.token_hex(4)}"
    temporary.symlink_to(run_dir.name)
    temporary.replace(latest)


def last_run(reports: Path) -> Path:
    """The newest run's directory.

    :raises UsageError: when there is none.
    """
    latest = reports / "latest"
    if (latest / VERDICTS).is_file():
        return latest.resolve()
    runs = sorted(path.parent for path in reports.glob(f"*/{VERDICTS}"))
    if not runs:
        raise UsageError(
            f"no run in {reports}", hint="make one with `inv conform`, or name its directory"
        )
    return runs[-1].resolve()


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a whole file so that no reader ever sees a part of it."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class VerdictFile:
    """Appends records to a run's ``verdicts.jsonl``; each is on its way with one write.

    A record is handed to the kernel before :meth:`write` returns, so a killed writer loses
    nothing that was written. Opening repairs the end of a file whose writer was killed in
    the middle of a line: the next record starts on a line of its own.

    One process at a time may hold a run's file open.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / VERDICTS
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        self.empty = size == 0
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def write(self, record: RunFacts | Verdict | End) -> None:
        """Append one record.

        :raises OSError: disk full and the like; a half-written line is told by the loader.
        """
        line = _encode(record) + b"\n"
        written = os.write(self._fd, line)
        while written < len(line):
            written += os.write(self._fd, line[written:])
        self.empty = False

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> VerdictFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def write_plan(run_dir: Path, plan: Iterable[Planned]) -> None:
    """Save what was collected. Workers collect the same, so the last writer changes nothing."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / PLAN, b"".join(_encode(planned) + b"\n" for planned in plan))


def read_plan(run_dir: Path) -> list[Planned]:
    """What was collected, in order; empty when collection never came to its end."""
    with contextlib.suppress(FileNotFoundError):
        return [_decode_planned(line) for line in (run_dir / PLAN).read_bytes().splitlines()]
    return []


class Run(msgspec.Struct, kw_only=True):
    """A run as read back from its directory.

    ``verdicts`` holds what was written; ``notes`` says what is wrong with the files (a cut
    line, no end), for the reader of the report.
    """

    path: Path
    facts: RunFacts
    verdicts: list[Verdict]
    plan: list[Planned]
    end: End | None = None
    notes: list[str] = []

    def all_verdicts(self) -> list[Verdict]:
        """The written verdicts, and a MISS for each planned test that has none.

        Those appear when a run was killed before it could write them itself.
        """
        why = self.end.reason if self.end and self.end.reason else "the run ended before its turn"
        return self.verdicts + missing(self.plan, self.verdicts, reason=why)


def load_run(path: Path) -> Run:
    """Read a run's directory (or the path of its ``verdicts.jsonl``).

    A last line that was cut is tolerated and said in ``notes``, as is any other line that
    cannot be read: one damaged line must not hide the rest.

    :raises UsageError: when there is no such run, or its file holds no record at all.
    """
    run_dir = path.parent if path.name == VERDICTS else path
    try:
        data = (run_dir / VERDICTS).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{run_dir} holds no {VERDICTS}", hint="name the directory of a run, as in reports/"
        ) from None
    records, notes = _decode_lines(data)
    verdicts = [record for record in records if isinstance(record, Verdict)]
    all_facts = [record for record in records if isinstance(record, RunFacts)]
    ends = [record for record in records if isinstance(record, End)]
    if not all_facts and not verdicts:
        raise UsageError(
            f"{run_dir / VERDICTS} holds no record that can be read",
            hint="run `inv conform` again; this run ended before its first verdict",
        )
    if not all_facts:
        notes.append(f"{VERDICTS}: the line with the run's facts is missing")
    facts = all_facts[-1] if all_facts else RunFacts(run=run_dir.name, started="")
    if facts.machine is None:
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            machine = msgspec.json.decode((run_dir / MACHINE).read_bytes(), type=MachineRecord)
            facts = msgspec.structs.replace(facts, machine=machine)
    if ends:
        notes += [f"machine {name} was lost: {how}" for name, how in ends[-1].lost.items()]
    else:
        notes.append("the run did not come to its end (killed, or still running)")
    return Run(
        path=run_dir,
        facts=facts,
        verdicts=verdicts,
        plan=read_plan(run_dir),
        end=ends[-1] if ends else None,
        notes=notes,
    )


def _decode_lines(data: bytes) -> tuple[list[RunFacts | Verdict | End], list[str]]:
    """The records of a verdict file, and a note on each line that is none."""
    records: list[RunFacts | Verdict | End] = []
    notes: list[str] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(_decode_record(line))
        except msgspec.MsgspecError as error:
            if number == len(lines):
                notes.append(
                    f"{VERDICTS}: the last line was cut, as when its writer was killed or the "
                    "disk was full; it is left out"
                )
            else:
                notes.append(f"{VERDICTS}: line {number} cannot be read and is left out: {error}")
    return records, notes
