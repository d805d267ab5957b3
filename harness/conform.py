# SPDX-License-Identifier: GPL-2.0-or-later
"""From a series to a report: build, boot, run the suite, say what came of it.

The suite runs in a pytest of its own (with workers of its own), so that whatever happens to
it, what it has found out is reported: verdicts are in their file the moment they are known,
and this process makes documents of that file. Both end with this process.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from harness import __version__, paths
from harness.abi import load_profile
from harness.build.progress import note
from harness.build.series import load_series, record
from harness.build.sources import linux_source
from harness.errors import HarnessError, InfraError, UsageError
from harness.hosts.choice import settled
from harness.plugin.beat import open_counters
from harness.plugin.controller import PARENT_VARIABLE
from harness.plugin.inputs import machine_record, save_builds, save_machine, save_settings
from harness.plugin.processes import adopted_orphans
from harness.plugin.shard import part_of
from harness.report import FORMATS, render
from harness.report.known import FILE_NAME as KNOWN
from harness.report.known import load_known
from harness.report.live import LiveView
from harness.report.model import End, RunFacts, exit_code, missing
from harness.report.store import (
    Run,
    VerdictFile,
    last_run,
    load_run,
    new_run_dir,
    point_latest,
    utc_now,
)
from harness.series import interface
from harness.series.numbers import require_numbers
from harness.settings import Settings, load_settings, with_series

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.build.kernel import KernelBuild
    from harness.build.qemu import QemuBuild
    from harness.report.model import MachineRecord

__all__ = [
    "INTERRUPTED",
    "account",
    "begin_run",
    "conform",
    "death_of",
    "ended_run",
    "report",
    "rerun_of",
    "run_pytest",
    "run_suite",
    "selection",
    "tell",
]

SUITES = ("tests/conformance", "tests/lifecycle")

INTERRUPTED = "the run was interrupted"
"""Why a run ended that somebody interrupted."""

LOOK_EVERY_S = 0.5

INTERRUPT_GRACE_S = 60.0
"""How long pytest may take to end its workers after Ctrl-C."""

STALLED_S = 900.0
"""When nothing at all moved for so long, pytest itself is stuck: limits of tests are shorter."""

FULL_BYTES = 1 << 20
"""With less than this left, a disk counts as full."""

_RERUN = (
    "target", "ssh_host", "kernel_series", "qemu_series", "kernel_base", "qemu_base", "flavour",
    "kernel", "abi", "description",
)  # fmt: skip
"""Settings that the command has which starts a run again."""

_FAILED, _USAGE, _NO_TESTS = 1, 4, 5  # pytest.ExitCode, which is slow to import


def conform(
    settings: Settings,
    *,
    select: str | None = None,
    repeat: int = 1,
    shard: str | None = None,
    suites: Sequence[str] = SUITES,
) -> int:
    """Hold the series of the settings to the suite.

    :param select: clauses (``HOOK-OK``, ``EVT-*``), tests (a file or pytest's node id), or
        an expression for pytest's ``-k``; several of the first two, separated by blanks.
    :param repeat: run each test so many times, and stop at the first that is not good.
    :param shard: run only this part, ``2/3``, of what would run; see
        :func:`harness.report.merge.merge` for what to do with the parts.
    :param suites: directories of tests that ``select`` chooses from.
    :returns: the exit code: 0 all held, 1 a promise was broken, 2 usage, 4 our own side or
        the machine.
    :raises UsageError: ``select`` names nothing.
    :raises BuildError: something could not be built; nothing was run.
    :raises ConformanceError: the kernel under test does not even boot; nothing was run.
    :raises InfraError: nothing could be run.

    Afterwards the run's directory holds verdicts and documents, also if this ends with an
    exception after the first test began.
    """
    if suites == SUITES and not speaks_to_qemu(settings):
        note("QEMU has other numbers than the kernel: the tests that need it are left out")
        suites = SUITES[:1]
    arguments = selection(select, suites)
    if shard:
        part_of(shard)
        arguments.append(f"--kvmi-shard={shard}")
    settings, run_dir = prepare_run(
        settings, task="conform", select=select or "", repeat=repeat, shard=shard or ""
    )
    workers = settings.workers
    note(f"Run the suite with {workers} worker{'s' if workers > 1 else ''}: {run_dir}")
    if repeat > 1:
        arguments += [f"--kvmi-repeat={repeat}", "-x"]
    return run_suite(run_dir, [f"-n{workers}", *arguments])


def ended_run(settings: Settings) -> Run:
    """The run that :func:`conform` has just ended.

    :raises KeyboardInterrupt: it was interrupted, and what it did not say means nothing.
    :raises HarnessError: there is none.
    """
    done = load_run(last_run(settings.reports))
    if done.end is not None and done.end.reason == INTERRUPTED:
        raise KeyboardInterrupt
    return done


def prepare_run(
    settings: Settings,
    *,
    task: str,
    options: str = "",
    select: str = "",
    repeat: int = 1,
    shard: str = "",
) -> tuple[Settings, Path]:
    """Choose the target, build, and make the target and the directory of a run ready.

    :param task: of ``inv``, whose run it is. :param options: that start such a run again.
    :returns: the settings with the target in them, and the directory, for :func:`run_suite`.
    :raises HarnessError: as :func:`conform`, before anything was run.
    """
    if settings.known:
        load_known(settings.known)  # a wrong list is told before the work, not after it
    run_dir = new_run_dir(settings.reports)
    rerun = rerun_of(settings, task) + options
    settings, choice = settled(settings)
    note(f"Target {choice.target}: {choice.reason}")
    _prepare(
        settings,
        run_dir,
        select=select,
        repeat=repeat,
        shard=shard,
        chosen=choice.reason,
        rerun=rerun,
    )
    return settings, run_dir


def run_suite(run_dir: Path, arguments: list[str], *, root: Path = paths.ROOT) -> int:
    """Run pytest for a prepared run, see to it that nothing is lost, and make the documents.

    :param run_dir: holds the run's facts, and what workers need to get hosts.
    :param arguments: for pytest.
    :param root: where the tests are, with the ``pyproject.toml`` that configures pytest.
    :returns: the exit code, as of :func:`conform`.
    """
    code, reason = run_pytest(run_dir, arguments, root)
    if shutil.disk_usage(run_dir).free < FULL_BYTES:
        reason = f"no space left on the disk of {run_dir}"
        print(f"error: {reason}; the verdicts so far are kept", file=sys.stderr)
    account(run_dir, reason or death_of(code))
    return tell(run_dir, code, arguments)


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


# -- what runs ----------------------------------------------------------------------------------


def speaks_to_qemu(settings: Settings) -> bool:
    """Whether the kernel under test has the numbers that QEMU was built with, as far as known.

    They are known of this project's own QEMU series, which speaks to this project's own kernel.
    """
    if settings.qemu_series != Settings.qemu_series:
        return True
    own, under_test = load_profile("v12"), interface(settings)
    return (
        under_test.name == own.name
        and all(
            under_test.has(f"ioctl {one.common}") and under_test.ioctl(one.common) == one
            for one in own.ioctls.values()
        )
        and under_test.capability == own.capability
    )


def selection(select: str | None, suites: Sequence[str] = SUITES) -> list[str]:
    """Arguments for pytest that choose what ``select`` names.

    :raises UsageError: a clause or file that does not exist.
    """
    if not select or not select.strip():
        return list(suites)
    # Blanks within the brackets of a parametrised test are part of its name.
    words = [word for word in re.split(r"[\s,]+(?![^\[]*\])", select.strip()) if word]
    if all(
        re.fullmatch(r"[A-Z][A-Z0-9]*-[A-Z0-9*?-]*|[A-Z0-9?-]*\*[A-Z0-9*?-]*", w) for w in words
    ):
        for word in words:
            _check_clause(word)
        return [*(f"--kvmi-clause={word}" for word in words), *suites]
    if all("::" in word or word.endswith(".py") or "/" in word for word in words):
        for word in words:
            if not (paths.ROOT / word.partition("::")[0]).exists():
                raise UsageError(f"there is no {word.partition('::')[0]} in {paths.ROOT}")
        return words
    if all(re.fullmatch(r"\w+", word) and word not in {"and", "or", "not"} for word in words):
        select = " or ".join(words)
    return ["-k", select, *suites]


def _check_clause(pattern: str) -> None:
    from harness.abi import all_clauses

    known = all_clauses()
    if not fnmatch.filter(known, pattern):
        near = difflib.get_close_matches(pattern, known, n=3)
        raise UsageError(
            f"there is no clause {pattern}",
            hint=f"did you mean {', '.join(near)}?" if near else "see harness/abi/clauses.toml",
        )


def _prepare(
    settings: Settings,
    run_dir: Path,
    *,
    select: str,
    repeat: int,
    shard: str,
    chosen: str,
    rerun: str,
) -> None:
    """Build, make the target ready, and leave in the run's directory what workers need."""
    from harness.build.images import build_images
    from harness.build.kernel import build_kernel
    from harness.build.qemu import build_qemu
    from harness.hosts import target_for

    start = time.monotonic()
    require_numbers(settings)
    target = target_for(settings)
    kernel = build_kernel(settings)
    qemu = build_qemu(settings)
    images = build_images(settings, kernel=kernel, qemu=qemu)
    target.prepare(kernel, images)
    machine = target.facts()
    begin_run(
        settings,
        run_dir,
        kernel=kernel,
        qemu=qemu,
        images=images,
        machine=machine_record(machine),
        # Of the hosts; one that we did not boot may have another.
        release=machine.kernel_release,
        under_test=machine.kernel_series,
        target=settings.target,
        chosen=chosen,
        workers=settings.workers,
        select=select,
        repeat=repeat,
        shard=shard,
        rerun=rerun,
        prepare_s=time.monotonic() - start,
    )
    with _writing(run_dir):
        save_machine(run_dir, machine)


@contextlib.contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InfraError(
            f"the run's directory {run_dir} cannot be written: {error.strerror}",
            hint="make room there, or set 'reports' to another directory",
        ) from error


def begin_run(
    settings: Settings,
    run_dir: Path,
    *,
    kernel: KernelBuild,
    qemu: QemuBuild,
    images: Images,
    machine: MachineRecord,
    release: str,
    under_test: str,
    target: str,
    chosen: str,
    workers: int,
    select: str,
    rerun: str,
    prepare_s: float,
    repeat: int = 1,
    shard: str = "",
) -> None:
    """Write down what a run is, and leave in its directory what workers need.

    :param release: of the kernel under test. :param under_test: its series.
    :param rerun: the command that starts such a run again.
    :raises InfraError: the directory cannot be written.
    """
    profile = interface(settings)
    facts = RunFacts(
        run=run_dir.name,
        started=utc_now(),
        target=target,
        chosen=chosen,
        series=f"{under_test} {qemu.series}",
        abi=profile.name,
        unclaimed=list(profile.unclaimed),
        workers=workers,
        select=select,
        repeat=repeat,
        shard=shard,
        rerun=rerun,
        harness=__version__,
        python=platform.python_version(),
        system=_system_here(),
        controller=f"{platform.node()}, {len(os.sched_getaffinity(0))} CPUs",
        kernel={
            "release": release,
            "series": under_test,
            "key": kernel.key,
            **_kernel_patches(settings, under_test),
        },
        qemu={
            "version": qemu.version,
            "series": qemu.series,
            "key": qemu.key,
            **record(load_series(settings.qemu_series), base=f"qemu {qemu.version}"),
        },
        machine=machine,
        prepare_s=round(prepare_s, 1),
    )
    with _writing(run_dir):
        with VerdictFile(run_dir) as file:
            file.write(facts)
        if settings.known:
            shutil.copyfile(settings.known, run_dir / KNOWN)
        save_settings(run_dir, settings)
        save_builds(run_dir, kernel=kernel, qemu=qemu, images=images)
        open_counters(run_dir, profile=profile).close()
        point_latest(run_dir)


def _kernel_patches(settings: Settings, under_test: str) -> dict[str, str]:
    """What is to be said of the kernel's series, if that is what the hosts run."""
    if settings.kernel:
        return {}
    series = load_series(settings.kernel_series)
    source = linux_source(settings)
    found = record(series, base=f"{source.name} {source.version}")
    return found if series.id == under_test else {}


def _system_here() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return platform.platform()


def rerun_of(settings: Settings, task: str) -> str:
    """The command that starts such a run again; ``--select`` can be added to it."""
    command = f"inv {task}"
    if task == "conform" and "TOX_ENV_NAME" in os.environ:
        command = "python3 -m tox run -e conform --"
    usual = with_series(load_settings())
    for name in _RERUN:
        value = getattr(settings, name)
        if value != getattr(usual, name):
            command += f" --{name.replace('_', '-')} {shlex.quote(str(value))}"
    return command


# -- running it ---------------------------------------------------------------------------------


def run_pytest(
    run_dir: Path, arguments: list[str], root: Path, *, ours: Sequence[str] = ()
) -> tuple[int, str]:
    """Run pytest under watch; gives its exit status, and why it was ended if it was.

    :param ours: further options, for workers on other machines: these are told the command
        line, so that it has none of our paths then.
    """
    own = [
        # What this run is, wherever it is started from.
        f"--rootdir={root}",
        f"--config-file={root / 'pyproject.toml'}",
        f"--kvmi-run={run_dir}",
        # Tests take from a tenth of a second to a minute: hand them out one by one.
        "--dist=load",
        "--maxschedchunk=1",
        *ours,
    ]
    argv = [
        sys.executable,
        "-m",
        "pytest",
        *([] if ours else own),
        # Nothing of a run stays in the repository.
        "-pno:cacheprovider",
        "--color=no",
        *arguments,
    ]
    environment = os.environ | {
        PARENT_VARIABLE: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if ours:
        environment["PYTEST_ADDOPTS"] = shlex.join(own)
    with adopted_orphans(), _signals_as_interrupts(), (run_dir / "pytest.log").open("ab") as log:
        process = subprocess.Popen(
            argv,
            # pytest-xdist refuses to name files to other machines that it finds here.
            cwd=run_dir if ours else root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own: Ctrl-C reaches this process only, which passes it on once.
            process_group=0,
        )
        try:
            reason = _watch(process, run_dir)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode, reason


def _watch(process: subprocess.Popen[bytes], run_dir: Path) -> str:
    """Show the run until pytest ends; gives the reason if it had to be ended."""
    with LiveView(run_dir) as live:
        state: object = None
        moved = time.monotonic()
        while True:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_EVERY_S)
                    live.update()
                    return ""
                now = live.update()
            except KeyboardInterrupt:
                note("Interrupted: ending the workers; once more to end them at once")
                return _interrupt(process)
            if now != state:
                state, moved = now, time.monotonic()
            elif time.monotonic() - moved > STALLED_S:
                return f"nothing moved for {STALLED_S:.0f} s, so pytest was ended"


def _interrupt(process: subprocess.Popen[bytes]) -> str:
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        process.wait(INTERRUPT_GRACE_S)
    return INTERRUPTED


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Let signals end a run as Ctrl-C does: with a report."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    # SIGINT, too: a shell lets jobs in the background ignore it, and pytest would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not in the main thread: leave them alone
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- what came of it ----------------------------------------------------------------------------


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
