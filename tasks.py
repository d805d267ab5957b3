# SPDX-License-Identifier: GPL-2.0-or-later
"""The tasks. Each calls one function of the package; ``inv --list`` shows them all.

Settings come from ``kvmi-harness.toml``, if there is one, and from a task's options.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from harness.errors import HarnessError, UsageError
from harness.report import FORMATS as FORMATS_OF_REPORTS
from harness.series import FORMS
from harness.settings import Settings, load_settings, with_series

if TYPE_CHECKING:
    from harness.bench import Options as BenchOptions

_INTERRUPTED = 130


def _told(function: Callable[..., int | None]) -> Callable[..., None]:
    """End with one clear message and the error's exit code, never with a traceback of ours."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> None:
        try:
            code = function(*arguments, **options)
        except HarnessError as error:
            parts = [f"error: {error.message}"]
            if error.details:
                parts.insert(0, error.details)
            if error.hint:
                parts.append(f"  next: {error.hint}")
            raise Exit("\n".join(parts), code=error.exit_code) from error
        except KeyboardInterrupt:
            raise Exit("interrupted", code=_INTERRUPTED) from None
        if code:
            raise Exit(code=code)

    return wrapper


def _ready(path: Path | None = None, **options: Any) -> Settings:
    """The settings, on a machine that has the packages: installed now if we may."""
    from harness.build.packages import ensure_packages, packages_for

    settings = load_settings(path, **options)
    ensure_packages(settings.cache / "logs" / "packages.log", packages_for(settings))
    return with_series(settings)


def _settings_in(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a task's options that are settings."""
    known = {field.name for field in dataclasses.fields(Settings)}
    return {name: value for name, value in options.items() if name in known}


_OPTIONS = {
    "target": "what provides the hosts: auto, kvm, tcg, bochs, ssh",
    "ssh_host": "the machine of target ssh, such as root@name:22",
    "workers": "test processes, each with a host of its own",
    "kernel_series": f"the kernel's patches: {FORMS}",
    "qemu_series": "QEMU's patches, likewise",
    "kernel_base": "what they are for, if not Debian's source: a tarball, or TREE:REF",
    "qemu_base": "likewise, for QEMU's patches",
    "flavour": "kernel configuration fragment on top of base",
    "kernel": "a bzImage that was built elsewhere, instead of the series",
    "abi": "version of the interface: v12, v7, v6 (default: what the series is described to speak)",
    "description": "what the series speaks: a TOML file, or v12, v7, v6 (default: its series.toml)",
    "reports": "directory of the reports",
    "select": "only these clauses (patterns), tests, or pytest's -k expression; of fuzz: a case",
    "messages": "so many messages, at least",
    "sequences": "so many sequences of ioctls, at least",
    "repeat": "run each test so many times, until one is not good",
    "run": "directory of the run (default: the latest)",
    "which": "kernel or qemu",
    "directory": "of the tree (default: in the cache)",
    "series": "directory of the patches (default: that of the settings)",
    "command": "run this there instead of a shell",
    "rounds": "in each of which everything is measured once",
    "samples": "of each kind in each round",
    "vcpus": "how many raise events at the same time",
    "apart": "give the answering program a CPU of its own",
    "seed": "of the order in each round; of fuzz: any text (default: a new one)",
    "only": "these kinds, separated by blanks",
    "output": "write it to this file",
    "bisect": "find the first patch that changes this clause, without trying all",
    "shard": "run only this part, such as 2/3; inv report.merge makes one run of all parts",
    "known": "TOML file of known failures",
    "inventory": "TOML file of machines that the tests are spread over",
    "config": "TOML file of what a night is told; see examples/nightly.toml",
    "formats": f"of {', '.join(FORMATS_OF_REPORTS)} (default: all)",
    "against": "directory of an earlier run, to say in the mail what became of its verdicts",
    "before": "directory of a run; of bench.compare: a series or a bzImage",
    "after": "what is compared with it, likewise",
    "runs": "directories of runs, separated by blanks",
    "days": "keep what was used in so many days",
}


def _explained(function: Callable[..., Any]) -> dict[str, str]:
    """The options of a task, each with its line of help."""
    names = inspect.signature(function).parameters
    return {name: text for name, text in _OPTIONS.items() if name in names}


def _task(name: str | None = None, *, default: bool = False) -> Callable[..., Any]:
    """A task whose errors are told and whose options are explained."""

    def decorate(function: Callable[..., int | None]) -> Any:
        help_text = _explained(function)
        return task(name=name, default=default, help=help_text)(_told(function))

    return decorate


@_task()
def doctor(_context: Context, target: str | None = None, ssh_host: str | None = None) -> int:
    """Name everything that is missing on this machine, with its fix."""
    from harness.build import doctor as examination

    settings = load_settings(target=target, ssh_host=ssh_host)
    findings = examination.examine_machine(settings)
    examination.show(findings, title="This machine")
    findings += _look_at_kept_host(settings)
    if settings.ssh_host:
        found = examination.examine_remote(settings)
        examination.show(found, title=f"\n{settings.ssh_host}")
        findings += found
    return examination.exit_code(findings)


def _look_at_kept_host(settings: Settings) -> list[Any]:
    from harness.build import doctor as examination
    from harness.keep import kept

    record = kept(settings)
    if record is None or not record.host:
        return []

    def run(command: str) -> subprocess.CompletedProcess[bytes]:
        argv = [*record.host, command]
        return subprocess.run(argv, capture_output=True, check=False, timeout=60)

    findings = examination.examine_host(
        run, settings=settings, qemu="/opt/qemu/bin/qemu-system-x86_64"
    )
    examination.show(findings, title="\nThe kept host")
    return findings


@_task("kernel")
def build_kernel(
    _context: Context,
    kernel_series: str | None = None,
    kernel_base: str | None = None,
    flavour: str | None = None,
) -> None:
    """Build the kernel of the series."""
    from harness.build.kernel import build_kernel as build

    built = build(_ready(kernel_series=kernel_series, kernel_base=kernel_base, flavour=flavour))
    print(f"{built.release}, {built.series}: {built.bzimage}")


@_task("qemu")
def build_qemu(
    _context: Context, qemu_series: str | None = None, qemu_base: str | None = None
) -> None:
    """Build the QEMU of the series."""
    from harness.build.qemu import build_qemu as build

    built = build(_ready(qemu_series=qemu_series, qemu_base=qemu_base))
    print(f"QEMU {built.version}, {built.series}: {built.binary}")


def _build_images(**options: Any) -> None:
    from harness.build.images import build_images as build
    from harness.build.kernel import build_kernel
    from harness.build.qemu import build_qemu

    settings = _ready(**options)
    kernel = build_kernel(settings)
    built = build(settings, kernel=kernel, qemu=build_qemu(settings))
    print(f"host {built.host_disk}, guest {built.guest_initrd}")


@_task("images")
def build_images(
    _context: Context,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    flavour: str | None = None,
) -> None:
    """Build the images of host and guest, and the kernel and QEMU in them."""
    _build_images(kernel_series=kernel_series, qemu_series=qemu_series, flavour=flavour)


@_task("packages")
def build_packages(_context: Context) -> None:
    """Install the Debian packages that the project's own tests need, those of a run included."""
    from harness.build.packages import BROWSER_PACKAGES, PACKAGES, ensure_packages

    log = load_settings().cache / "logs" / "packages.log"
    ensure_packages(log, (*PACKAGES, *BROWSER_PACKAGES))


@_task("all", default=True)
def build_all(_context: Context) -> None:
    """Build everything that a run needs."""
    _build_images()


@_task("sources")
def build_sources(_context: Context) -> None:
    """Fetch the newest sources of kernel and QEMU; what the cache has is used otherwise."""
    from harness.build import sources

    settings = _ready()
    for package in (sources.LINUX_PACKAGE, sources.QEMU_PACKAGE):
        source = sources.fetch(settings, package)
        print(f"{source.name} {source.version}")


@_task("clean")
def build_clean(_context: Context, days: int = 7) -> None:
    """Delete what the cache holds and nobody used lately."""
    from harness.build.cache import clean

    settings = load_settings()
    print(f"{clean(settings.cache, unused_days=days)} entries deleted from {settings.cache}")


def _for_series(which: str, directory: str | None) -> Settings:
    options: dict[str, Any] = {f"{which}_series": directory} if directory else {}
    return load_settings(**options)


@_task("edit")
def tree_edit(
    _context: Context, which: str, directory: str | None = None, series: str | None = None
) -> None:
    """Make a git tree with a series as commits, to work in."""
    from harness.build.edit import edit

    settings = with_series(_for_series(which, series))
    place = edit(settings, which, directory=Path(directory) if directory else None)
    print(f"{place}: commit or amend there, then: inv tree.refresh {which}")


@_task("refresh")
def tree_refresh(
    _context: Context, which: str, directory: str | None = None, series: str | None = None
) -> None:
    """Write the commits of that tree back into the series."""
    from harness.build.edit import refresh

    names = refresh(
        _for_series(which, series), which, directory=Path(directory) if directory else None
    )
    print("\n".join(names) or "nothing changed")


@_task("up")
def host_up(
    _context: Context,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    flavour: str | None = None,
) -> None:
    """Start a host and keep it until host.down."""
    from harness.keep import up

    up(_ready(kernel_series=kernel_series, qemu_series=qemu_series, flavour=flavour))
    print("the host is up: inv host.ssh logs in, inv host.down ends it")


@_task("down")
def host_down(_context: Context) -> None:
    """End the kept host."""
    from harness.keep import down

    print("ended" if down(load_settings()) else "there was none")


def _log_in(which: str, command: str | None) -> int:
    from harness.keep import kept

    record = kept(load_settings())
    login = getattr(record, which) if record else []
    if not login:
        raise UsageError(f"no {which} is kept", hint=f"start one: inv {which}.up")
    terminal = ["-t"] if sys.stdin.isatty() and not command else []
    argv = [*login[:-1], *terminal, login[-1], *([command] if command else [])]
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError:
        raise UsageError(f"{login[0]} is missing", hint="apt-get install openssh-client") from None


@_task("ssh")
def host_ssh(_context: Context, command: str | None = None) -> int:
    """Log in to the kept host."""
    return _log_in("host", command)


@_task("up")
def guest_up(_context: Context, introspect: bool = False) -> None:
    """Start a guest on the kept host (and the host, if none is kept); be its tool."""
    from harness.keep import guest_up as up
    from harness.prompt import introspect as be_tool

    if introspect:
        be_tool(_ready())
        return
    up(_ready())
    print("the guest is up: inv guest.ssh logs in; it ends with the host")


@_task("ssh")
def guest_ssh(_context: Context, command: str | None = None) -> int:
    """Log in to the guest on the kept host."""
    return _log_in("guest", command)


@_task()
def watch(_context: Context, seconds: int = 0) -> None:
    """Show the events of the kept guest as they come, with rates; Ctrl-C ends it."""
    from harness.prompt import watch as run

    run(load_settings(), seconds=seconds or None)


@_task()
def conform(
    _context: Context,
    *,
    target: str | None = None,
    ssh_host: str | None = None,
    workers: str | None = None,
    select: str | None = None,
    repeat: int = 1,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    kernel_base: str | None = None,
    qemu_base: str | None = None,
    flavour: str | None = None,
    abi: str | None = None,
    description: str | None = None,
    kernel: str | None = None,
    reports: str | None = None,
    shard: str | None = None,
    known: str | None = None,
    inventory: str | None = None,
) -> int:
    """Hold kernel and QEMU to the suite: build, boot, run, report."""
    from harness.conform import conform as run

    settings = _ready(**_settings_in(locals()))
    if inventory:
        from harness.fleet.run import conform_fleet

        place = Path(inventory)
        return conform_fleet(settings, place, select=select, repeat=repeat, shard=shard)
    return run(settings, select=select, repeat=repeat, shard=shard)


@_task()
def nightly(_context: Context, config: str) -> int:
    """Build, run on the machines of an inventory, compare with the last night, tell."""
    from harness.fleet.nightly import nightly as run

    return run(Path(config), lambda path, reports: _ready(path, reports=reports))


@_task("check")
def series_check(
    _context: Context,
    *,
    select: str | None = None,
    bisect: str | None = None,
    target: str | None = None,
    workers: str | None = None,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    kernel_base: str | None = None,
    qemu_base: str | None = None,
    flavour: str | None = None,
    abi: str | None = None,
    description: str | None = None,
    reports: str | None = None,
) -> int:
    """Judge a series patch by patch: applies, builds, boots, checkers, clauses."""
    from harness.series.check import check

    settings = _ready(**_settings_in(locals()))
    return check(settings, select=select, bisect=bisect)


def _report(run: str | None, known: str | None = None, **options: Any) -> int:
    from harness.conform import report as render

    return render(load_settings(known=known), run=Path(run) if run else None, **options)


@_task("all", default=True)
def report_all(_context: Context, run: str | None = None) -> int:
    """Make the report of a run again from its verdicts, and show the summary."""
    return _report(run)


@_task("render")
def report_render(
    _context: Context,
    run: str | None = None,
    formats: str = "",
    against: str | None = None,
    known: str | None = None,
) -> int:
    """Make some documents of a run from its verdicts."""
    before = Path(against) if against else None
    return _report(run, known, formats=formats.replace(",", " ").split(), against=before)


@_task("compare")
def report_compare(_context: Context, before: str, after: str) -> int:
    """Tell what broke, was mended, is new, vanished, or got slower from one run to another."""
    from harness.report.compare import compare_runs, tell

    found = compare_runs(Path(before), Path(after))
    print("\n".join(tell(found)))
    return found.exit_code


@_task("merge")
def report_merge(_context: Context, runs: str, reports: str | None = None) -> int:
    """Make one run of the parts that were run with --shard, and its report."""
    from harness.conform import merged_report
    from harness.report.merge import merge

    settings = load_settings(reports=reports)
    place = merge([Path(run) for run in runs.split()], reports=settings.reports)
    return merged_report(place)


@_task("describe")
def series_describe(
    _context: Context,
    kernel_series: str | None = None,
    kernel_base: str | None = None,
    output: str | None = None,
) -> int:
    """Make the description of a series from the headers that it adds; show what differs."""
    from harness.series.describe import describe

    settings = _ready(kernel_series=kernel_series, kernel_base=kernel_base)
    return describe(settings, output=Path(output) if output else None)


@_task()
def mutants(_context: Context, select: str | None = None) -> int:
    """Break kernel and QEMU on purpose, one defect at a time; each must turn its clauses red."""
    from harness.mutants import run

    return run(_ready(), select=select)


@_task()
def revisions(_context: Context, select: str | None = None, reports: str | None = None) -> int:
    """Hold variants of the series that speak older revisions of the interface to the suite."""
    from harness.revisions import run

    return run(_ready(reports=reports), select=select)


@_task()
def selftests(
    _context: Context,
    *,
    select: str | None = None,
    target: str | None = None,
    workers: str | None = None,
    kernel_series: str | None = None,
    flavour: str | None = None,
    kernel: str | None = None,
    reports: str | None = None,
) -> int:
    """Compare the kernel's own KVM selftests with the series and without it."""
    from harness.selftests import run

    settings = _ready(**_settings_in(locals()))
    return run(settings, select=select)


def _bench_options(options: dict[str, Any]) -> BenchOptions:
    from harness.bench import Options

    known = {field.name for field in dataclasses.fields(Options)}
    given = {name: value for name, value in options.items() if name in known}
    return Options(**given | {"only": tuple(given["only"].split())})


@_task("events")
def bench_events(
    _context: Context,
    *,
    target: str | None = None,
    kernel: str | None = None,
    kernel_series: str | None = None,
    flavour: str | None = None,
    reports: str | None = None,
    rounds: int = 12,
    samples: int = 200,
    vcpus: int = 1,
    apart: bool = False,
    seed: int = 0,
    only: str = "",
) -> int:
    """Measure how long one event holds a vCPU, next to a plain exit to user space."""
    from harness.bench import bench_events as run

    given = dict(locals())
    options = _bench_options(given)
    return run(_ready(**_settings_in(given)), options)


@_task("compare")
def bench_compare(
    _context: Context,
    before: str,
    after: str,
    *,
    target: str | None = None,
    flavour: str | None = None,
    reports: str | None = None,
    rounds: int = 12,
    samples: int = 200,
    vcpus: int = 1,
    apart: bool = False,
    seed: int = 0,
    only: str = "",
) -> int:
    """Measure two kernels in turns, each a series or a bzImage; tell what got slower."""
    from harness.bench import bench_compare as run
    from harness.bench import kernel_named

    given = dict(locals())
    options = _bench_options(given)
    one, other = (
        _ready(**(_settings_in(given) | kernel_named(kernel))) for kernel in (before, after)
    )
    return run(one, other, options)


@_task()
def fuzz(
    _context: Context,
    *,
    seed: str | None = None,
    messages: int | None = None,
    sequences: int | None = None,
    select: str | None = None,
    target: str | None = None,
    ssh_host: str | None = None,
    workers: str | None = None,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    flavour: str | None = None,
    abi: str | None = None,
    description: str | None = None,
    kernel: str | None = None,
    reports: str | None = None,
) -> int:
    """Attack the kernel with wrong, random and badly timed messages and ioctls."""
    from harness.fuzz.run import fuzz as run

    settings = _ready(**_settings_in(locals()))
    wanted = {"messages": messages, "sequences": sequences}
    numbers = {name: int(value) for name, value in wanted.items() if value is not None}
    return run(settings, seed=seed, select=select, **numbers)


namespace = Collection(
    doctor,
    conform,
    nightly,
    mutants,
    revisions,
    fuzz,
    selftests,
    watch,
    build=Collection(
        build_all,
        build_kernel,
        build_qemu,
        build_images,
        build_sources,
        build_packages,
        build_clean,
    ),
    bench=Collection(bench_events, bench_compare),
    tree=Collection(tree_edit, tree_refresh),
    series=Collection(series_describe, series_check),
    report=Collection(report_all, report_render, report_compare, report_merge),
    host=Collection(host_up, host_ssh, host_down),
    guest=Collection(guest_up, guest_ssh),
)
# Output of ours comes line by line also through a pipe, in step with that of children.
os.environ.setdefault("PYTHONUNBUFFERED", "1")
