# SPDX-License-Identifier: GPL-2.0-or-later
"""Name everything that is missing, with its fix, before anything is run.

:func:`examine_machine` looks at the machine that builds and emulates;
:func:`examine_host` at a host, whose kernel and QEMU are to be tested: any machine on
which a command can be run.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from harness.abi.profile import load_profile
from harness.build.archive import machine_codename
from harness.build.packages import apt_line, missing_packages
from harness.build.series import load_series
from harness.errors import HarnessError
from harness.settings import Settings

__all__ = ["Answer", "Finding", "State", "examine_host", "examine_machine", "exit_code", "show"]

_OLDEST_PYTHON = (3, 11)
_RELEASES = ("bookworm", "trixie")
# What a first run leaves in the cache and needs meanwhile, measured and rounded up.
_DISK_MB = 6000
_BUILD_MEMORY_MB = 2000
# By the processor's flag: KVM's module, and its parameter for nested paging.
_MODULES = {"vmx": ("kvm_intel", "ept"), "svm": ("kvm_amd", "npt")}


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
        *_packages(),
        _cores(),
        _memory(settings),
        _disk(settings),
        _kvm(),
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


def _packages() -> list[Finding]:
    missing = missing_packages()
    if not missing:
        return [Finding("Debian packages", State.OK, "all there")]
    fix = apt_line(missing)
    return [Finding(one.name, State.MISSING, one.reason, fix) for one in missing]


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return Finding("cores", State.NOTE, str(count), "use two or more: everything takes longer")
    return Finding("cores", State.OK, str(count))


def _memory(settings: Settings) -> Finding:
    found = re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = int(found[1]) >> 10 if found else 0
    # The template of the hosts' memory lies in the page cache, and each host beside it.
    wanted = _BUILD_MEMORY_MB + (settings.workers + 1) * settings.host_memory_mb
    least = _BUILD_MEMORY_MB + 2 * settings.host_memory_mb
    text = f"{free} MB free; {settings.workers} workers want {wanted} MB"
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


def _kvm() -> Finding:
    device = Path("/dev/kvm")
    if not device.exists():
        return Finding("virtualisation", State.OK, "no /dev/kvm: hosts are emulated, as by default")
    if not os.access(device, os.R_OK | os.W_OK):
        return Finding(
            "virtualisation",
            State.NOTE,
            "/dev/kvm is there, but not for this user; hosts are emulated",
            f"sudo usermod -aG kvm {os.environ.get('USER', 'USER')}, then log in again",
        )
    facts = []
    flags = set(Path("/proc/cpuinfo").read_text().split())
    for module, paging in (_MODULES[flag] for flag in _MODULES if flag in flags):
        place = Path("/sys/module") / module / "parameters"
        for name in (paging, "nested"):
            if (place / name).is_file():
                facts.append(f"{module}.{name}={(place / name).read_text().strip()}")
    if not facts:
        found = "/dev/kvm, but neither kvm_intel nor kvm_amd behind it: hosts are emulated"
        return Finding("virtualisation", State.OK, found)
    return Finding("virtualisation", State.OK, f"/dev/kvm, {', '.join(facts)}")


def _series(settings: Settings) -> list[Finding]:
    findings = []
    for name, place in (("kernel", settings.kernel_series), ("QEMU", settings.qemu_series)):
        subject = f"{name} series"
        try:
            series = load_series(place)
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
    :param qemu: the QEMU to look at there, a path or a name.
    """
    return [
        _host_virtualisation(run),
        _host_capability(run, load_profile(settings.abi).capability),
        _host_parameter(run),
        _host_qemu(run, qemu),
    ]


def _text(answer: Answer) -> str:
    return answer.stdout.decode(errors="replace").strip() if answer.returncode == 0 else ""


def _host_virtualisation(run: Callable[[str], Answer]) -> Finding:
    subject = "nested paging"
    if run("test -c /dev/kvm").returncode != 0:
        return Finding(
            subject,
            State.MISSING,
            "no /dev/kvm",
            "switch virtualisation on (firmware, or the outer hypervisor), and load kvm_intel "
            "or kvm_amd",
        )
    # Built into a kernel, both modules show their parameters on any processor.
    flag = _text(run("grep -o -m1 -w -E 'vmx|svm' /proc/cpuinfo")).partition("\n")[0]
    if flag not in _MODULES:
        return Finding(
            subject,
            State.MISSING,
            "the CPU has neither VMX nor SVM",
            "switch virtualisation on: in the firmware, or nested in the outer hypervisor",
        )
    module, paging = _MODULES[flag]
    value = _text(run(f"cat /sys/module/{module}/parameters/{paging}"))
    if value in ("Y", "1"):
        return Finding(subject, State.OK, f"{module}.{paging}={value}")
    return Finding(
        subject,
        State.MISSING,
        f"{module}.{paging}={value}" if value else f"{module} is not loaded",
        f"load {module} with {paging}=1, on a CPU that has it",
    )


def _host_capability(run: Callable[[str], Answer], number: int) -> Finding:
    subject = "kernel with KVMI"
    release = _text(run("uname -r"))
    # 0xae03 is KVM_CHECK_EXTENSION.
    code = f"import fcntl; print(fcntl.ioctl(open('/dev/kvm', 'rb'), 0xae03, {number}))"
    answer = _text(run(f"python3 -c {shlex.quote(code)}"))
    if answer.isdecimal() and int(answer) > 0:
        return Finding(subject, State.OK, f"{release}, capability {number} answers {answer}")
    parameter = run("test -e /sys/module/kvm/parameters/introspection")
    if answer == "0" and parameter.returncode == 0:
        return Finding(
            subject,
            State.OK,
            f"{release} has it; capability {number} answers 0 while the parameter is off",
        )
    found = f"{release}: capability {number} answers {answer or 'nothing (no python3?)'}"
    return Finding(subject, State.MISSING, found, "boot a kernel of the series: inv build.kernel")


def _host_parameter(run: Callable[[str], Answer]) -> Finding:
    subject = "kvm.introspection"
    place = "/sys/module/kvm/parameters/introspection"
    value = _text(run(f"cat {place}"))
    if value in ("Y", "1"):
        return Finding(subject, State.OK, value)
    if value:
        fix = f"echo Y > {place}, or boot with kvm.introspection=1"
        return Finding(subject, State.MISSING, value, fix)
    return Finding(subject, State.MISSING, "no such parameter", "boot a kernel of the series")


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
