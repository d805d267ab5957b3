# SPDX-License-Identifier: GPL-2.0-or-later
"""Name everything that is missing, with its fix, before anything is run.

:func:`examine_machine` looks at the machine that builds and emulates;
:func:`examine_host` at a host, whose kernel and QEMU are to be tested: any machine on
which a command can be run.
"""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from rich.console import Console
from rich.table import Table

from harness.build.archive import machine_codename
from harness.build.packages import (
    BROWSER_PACKAGES,
    apt_line,
    missing_packages,
    packages_for,
)
from harness.build.series import load_series
from harness.errors import HarnessError, InfraError
from harness.hosts.choice import choose
from harness.hosts.seen import Seen, look_at, look_here
from harness.resources import BUILD_MEMORY_MB, free_cores, free_memory_mb
from harness.series import fetched, interface
from harness.settings import Settings

__all__ = [
    "Answer",
    "Finding",
    "State",
    "examine_host",
    "examine_machine",
    "examine_remote",
    "exit_code",
    "show",
]

_OLDEST_PYTHON = (3, 11)
_RELEASES = ("bookworm", "trixie")
# What a first run leaves in the cache and needs meanwhile, measured and rounded up.
_DISK_MB = 6000
_PARAMETER = "kvm.introspection"


class State(Enum):
    """What a finding means for a run."""

    OK = "ok"
    NOTE = "note"
    """Works, though slower or with less than could be."""
    MISSING = "missing"
    """A run would fail."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    subject: str
    state: State
    found: str
    fix: str = ""


class Answer(Protocol):
    """How a command ended; both ours and the standard library's records are of this form."""

    @property
    def returncode(self) -> int: ...
    @property
    def stdout(self) -> bytes: ...


def exit_code(findings: Iterable[Finding]) -> int:
    """0, or 2 if something required is missing."""
    return 2 if any(one.state is State.MISSING for one in findings) else 0


def show(findings: Iterable[Finding], *, title: str) -> None:
    """Print the findings as a table, and below it each fix as a line that can be copied."""
    findings = list(findings)
    table = Table(title=title, title_justify="left", show_edge=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    colours = {State.OK: "green", State.NOTE: "yellow", State.MISSING: "red"}
    for one in findings:
        state = f"[{colours[one.state]}]{one.state.value}[/]"
        table.add_row(state, _plain(one.subject), _plain(one.found))
    # A log has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 400)
    console.print(table, highlight=False)
    for fix in dict.fromkeys(one.fix for one in findings if one.fix):
        subjects = ", ".join(one.subject for one in findings if one.fix == fix)
        console.print(f"\n{_plain(subjects)}:\n    {_plain(fix)}", soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def examine_machine(settings: Settings) -> list[Finding]:
    """Look at this machine: can it build, and emulate the hosts of ``settings``?"""
    return [
        _python(),
        _system(),
        *_packages(settings),
        _cores(),
        _memory(settings),
        _disk(settings),
        *_virtualisation(settings),
        *_series(settings),
        _cache(settings),
    ]


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info >= _OLDEST_PYTHON:
        return Finding("Python", State.OK, version)
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    return Finding("Python", State.MISSING, version, f"run with Python {wanted} or newer")


def _system() -> Finding:
    machine, codename = platform.machine(), machine_codename()
    found = f"{codename or 'unknown'}, {machine}"
    if machine != "x86_64":
        return Finding("system", State.MISSING, found, "use an x86-64 machine")
    if codename not in _RELEASES:
        return Finding("system", State.NOTE, found, "tried on Debian 12 and 13 only")
    return Finding("system", State.OK, f"Debian {codename}, {machine}")


def _packages(settings: Settings) -> list[Finding]:
    findings = []
    for packages, state in (
        (packages_for(settings), State.MISSING),
        (BROWSER_PACKAGES, State.NOTE),
    ):
        missing = missing_packages(packages)
        findings += [Finding(one.name, state, one.reason, apt_line(missing)) for one in missing]
    return findings or [Finding("Debian packages", State.OK, "all there")]


def _cores() -> Finding:
    count = free_cores()
    if count < 2:
        return Finding("cores", State.NOTE, str(count), "use two or more: everything takes longer")
    return Finding("cores", State.OK, str(count))


def _memory(settings: Settings) -> Finding:
    free = free_memory_mb()
    # The template of the hosts' memory lies in the page cache, and each host beside it.
    wanted = BUILD_MEMORY_MB + (settings.workers + 1) * settings.host_memory_mb
    least = BUILD_MEMORY_MB + 2 * settings.host_memory_mb
    workers = f"{settings.workers} worker{'s' if settings.workers > 1 else ''}"
    text = f"{free} MB free; {workers} with {settings.host_memory_mb} MB each: {wanted} MB"
    if free < least:
        return Finding("memory", State.MISSING, text, f"have at least {least} MB free")
    if free < wanted:
        return Finding("memory", State.NOTE, text, "run fewer workers: inv conform --workers 1")
    return Finding("memory", State.OK, text)


def _disk(settings: Settings) -> Finding:
    place = settings.cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free >> 20
    built = len(list(settings.cache.glob("trees/*/build-*")))
    wanted = _DISK_MB if built < 2 else _DISK_MB // 6
    text = f"{free} MB free in {settings.cache}; about {wanted} MB are needed"
    if free < wanted:
        fix = "free some, `inv build.clean`, or set KVMI_CACHE to a directory on a larger disk"
        return Finding("disk", State.MISSING, text, fix)
    return Finding("disk", State.OK, text)


def _virtualisation(settings: Settings) -> list[Finding]:
    """What this machine is, what its KVM is good for, and which target follows from it."""
    number = interface(settings).capability
    seen = look_here(number)
    extension = seen.extension or "neither SVM nor VMX"
    findings = [
        Finding("processor", State.OK, f"{seen.cpu_model}: {extension}"),
        Finding("this machine is", State.OK, seen.describe()),
    ]
    if obstacle := seen.obstacle():
        # Hosts can be emulated; but a processor that is able and unused is worth a word.
        state = State.NOTE if seen.vendor else State.OK
        if settings.target == "kvm":
            state = State.MISSING
        fix = "" if state is State.OK else obstacle.fix
        findings.append(Finding("virtualisation", state, obstacle.reason, fix))
    else:
        parameters = ", ".join(
            f"{name}={value}" for name, value in seen.modules.items() if name.count(".")
        )
        found = f"/dev/kvm makes virtual machines, nested, with {seen.paging}; {parameters}"
        findings.append(Finding("virtualisation", State.OK, found))
    answer = seen.kvm.answers.get(str(number), 0)
    if answer:
        found = f"the running kernel, {seen.release}, has it: capability {number} answers {answer}"
        findings.append(Finding("KVMI", State.OK, found))
    choice = choose(settings)
    findings.append(Finding("target", State.OK, f"{choice.target}: {choice.reason}"))
    return findings


def _series(settings: Settings) -> list[Finding]:
    findings = []
    for name, place in (("kernel", settings.kernel_series), ("QEMU", settings.qemu_series)):
        subject = f"{name} series"
        # Elsewhere: whoever asks what is missing here waits for no network.
        if isinstance(place, str):
            findings.append(Finding(subject, State.OK, f"{place}, fetched when it is needed"))
            continue
        try:
            series = load_series(fetched(place, root=settings.cache) if place.exists() else place)
        except HarnessError as error:
            findings.append(Finding(subject, State.MISSING, error.message, error.hint))
            continue
        count = len(series.patches)
        state = State.OK if count else State.NOTE
        fix = "" if count else f"without patches {name} has no introspection to test"
        findings.append(Finding(subject, state, f"{count} patches, {series.id}", fix))
    return findings


def _cache(settings: Settings) -> Finding:
    held = [path.name for path in sorted(settings.cache.glob("sources/*/")) if path.is_dir()]
    for kind in sorted(settings.cache.glob("*/lock")):
        count = len(list(kind.parent.glob("*/inputs.json")))
        if count:
            held.append(f"{kind.parent.name}: {count}")
    found = ", ".join(held) or "empty: the first run fetches and builds everything"
    return Finding("cache", State.OK, found)


def examine_host(run: Callable[[str], Answer], *, settings: Settings, qemu: str) -> list[Finding]:
    """Look at a host: does what runs there have introspection, and is it on?

    :param run: runs a shell command there and returns how it ended, also when it failed.
    :param qemu: the QEMU to look at there, a path or a name; empty if none is needed.
    """
    number = interface(settings).capability
    try:
        seen = look_at(run, [number])
    except InfraError as error:
        return [Finding("host", State.MISSING, error.message, error.hint)]
    findings = [
        Finding("processor", State.OK, f"{seen.cpu_model}: {seen.extension or 'no SVM, no VMX'}"),
        Finding("this host is", State.OK, seen.describe()),
        _host_virtualisation(seen),
        _host_capability(seen, number),
        _host_parameter(seen),
    ]
    return [*findings, _host_qemu(run, qemu)] if qemu else findings


def examine_remote(settings: Settings) -> list[Finding]:
    """Look at the machine of target ``ssh``; our QEMU is copied to it when it is used."""
    from harness.hosts.remote import SshTarget

    try:
        with SshTarget(settings).shell() as shell:
            return examine_host(
                lambda command: shell.run(command, check=False), settings=settings, qemu=""
            )
    except HarnessError as error:
        return [Finding("host", State.MISSING, error.message, error.hint)]


def _text(answer: Answer) -> str:
    return answer.stdout.decode(errors="replace").strip() if answer.returncode == 0 else ""


def _host_virtualisation(seen: Seen) -> Finding:
    subject = "nested paging"
    # Whether its guests can be hosts themselves does not matter.
    if obstacle := seen.no_machines() or seen.no_paging():
        return Finding(subject, State.MISSING, obstacle.reason, obstacle.fix)
    return Finding(subject, State.OK, f"{seen.paging}, by {seen.module}")


def _host_capability(seen: Seen, number: int) -> Finding:
    subject = "kernel with KVMI"
    answer = seen.kvm.answers.get(str(number))
    if answer:
        found = f"{seen.release}, capability {number} answers {answer}"
        return Finding(subject, State.OK, found)
    if answer == 0 and _PARAMETER in seen.modules:
        found = f"{seen.release} has it; capability {number} answers 0 while the parameter is off"
        return Finding(subject, State.OK, found)
    found = f"{seen.release}: capability {number} answers {'nothing' if answer is None else answer}"
    return Finding(subject, State.MISSING, found, "boot a kernel of the series: inv build.kernel")


def _host_parameter(seen: Seen) -> Finding:
    value = seen.modules.get(_PARAMETER, "")
    if value in ("Y", "1"):
        return Finding(_PARAMETER, State.OK, value)
    if value:
        fix = "echo Y > /sys/module/kvm/parameters/introspection, or boot with kvm.introspection=1"
        return Finding(_PARAMETER, State.MISSING, value, fix)
    return Finding(_PARAMETER, State.MISSING, "no such parameter", "boot a kernel of the series")


def _host_qemu(run: Callable[[str], Answer], qemu: str) -> Finding:
    subject = "QEMU with KVMI"
    program = shlex.quote(qemu)
    version = _text(run(f"{program} --version")).partition("\n")[0]
    if not version:
        return Finding(subject, State.MISSING, f"{qemu} does not run", "inv build.qemu")
    if re.search(r"^\s*introspection\b", _text(run(f"{program} -object help")), re.MULTILINE):
        return Finding(subject, State.OK, version)
    return Finding(
        subject,
        State.MISSING,
        f"{version}: a stock QEMU, it has no `introspection` object",
        "use the QEMU of the series: inv build.qemu",
    )
