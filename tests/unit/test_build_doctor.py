# SPDX-License-Identifier: GPL-2.0-or-later
"""What is missing is named with its fix: packages, and what a host lacks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.build import packages
from harness.build.doctor import (
    Finding,
    State,
    examine_host,
    examine_machine,
    exit_code,
    show,
)
from harness.build.packages import PACKAGES, Package, apt_line, ensure_packages, missing_packages
from harness.errors import UsageError
from harness.settings import load_settings


def test_each_package_is_named_once_with_a_reason() -> None:
    names = [package.name for package in PACKAGES]
    assert len(set(names)) == len(names)
    assert all(package.reason for package in PACKAGES)


def test_a_package_is_there_when_what_we_use_of_it_is(tmp_path: Path) -> None:
    there = [
        Package("dash", "sh", "a program"),
        Package("some", str(tmp_path), "a path"),
        Package("python3", "module:json", "a module"),
    ]
    gone = [
        Package("nothing", "no-such-program", "a program"),
        Package("never", str(tmp_path / "none"), "a path"),
        Package("nowhere", "module:no_such_module", "a module"),
    ]
    assert missing_packages([*there, *gone]) == gone
    assert apt_line(gone).endswith("install -y --no-install-recommends never nothing nowhere")


def test_without_privilege_the_one_line_to_type_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_privilege", lambda: None)
    ensure_packages(tmp_path / "log", [Package("dash", "sh", "there")])
    with pytest.raises(UsageError) as caught:
        ensure_packages(tmp_path / "log", [Package("nothing", "no-such-program", "a reason")])
    assert "nothing" in caught.value.message
    assert "apt-get install -y --no-install-recommends nothing" in caught.value.hint
    assert caught.value.exit_code == 2


def test_this_machine_is_examined_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "series"
    empty.mkdir()
    settings = load_settings(cache=tmp_path, kernel_series=empty, qemu_series=tmp_path / "none")
    findings = {one.subject: one for one in examine_machine(settings)}
    assert {"Python", "system", "cores", "memory", "disk", "virtualisation", "cache"} <= set(
        findings
    )
    assert findings["kernel series"].state is State.NOTE
    assert findings["QEMU series"].state is State.MISSING
    show(findings.values(), title="title")
    assert "no directory" in capsys.readouterr().out


def test_only_what_is_missing_makes_the_exit_code() -> None:
    fine = [Finding("a", State.OK, ""), Finding("b", State.NOTE, "")]
    assert exit_code(fine) == 0
    assert exit_code([*fine, Finding("c", State.MISSING, "")]) == 2


class _Host:
    """A host of text files: the commands of the examination run here, on a small /sys."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "bin").mkdir()
        self.program("uname", "echo 6.12.1-test")

    def program(self, name: str, body: str) -> None:
        path = self.place / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def file(self, path: str, text: str) -> None:
        target = self.place / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def run(self, command: str) -> subprocess.CompletedProcess[bytes]:
        command = command.replace("/sys/module", f"{self.place}/sys/module")
        command = command.replace("/proc/cpuinfo", f"{self.place}/cpuinfo")
        command = command.replace("test -c /dev/kvm", "true")
        env = {"PATH": f"{self.place}/bin:/usr/bin:/bin"}
        return subprocess.run(["/bin/sh", "-c", command], env=env, capture_output=True, check=False)


@pytest.fixture
def host(tmp_path: Path) -> _Host:
    return _Host(tmp_path)


def _examined(host: _Host) -> dict[str, Finding]:
    found = examine_host(host.run, settings=load_settings(), qemu="qemu-system-x86_64")
    return {one.subject: one for one in found}


def test_a_host_that_has_everything(host: _Host) -> None:
    host.file("/cpuinfo", "flags\t\t: fpu svm npt\n")
    # As in a kernel that has both built in.
    host.file("/sys/module/kvm_intel/parameters/ept", "N\n")
    host.file("/sys/module/kvm_amd/parameters/npt", "Y\n")
    host.file("/sys/module/kvm/parameters/introspection", "Y\n")
    host.program("python3", "echo 1")
    host.program(
        "qemu-system-x86_64",
        'case $1 in --version) echo "QEMU emulator version 10.0.2";;'
        ' *) printf "List:\\n  introspection\\n  secret\\n";; esac',
    )
    assert [one.state for one in _examined(host).values()] == [State.OK] * 4


def test_a_host_with_stock_kernel_and_stock_qemu(host: _Host) -> None:
    host.file("/cpuinfo", "flags\t\t: fpu vmx\n")
    host.file("/sys/module/kvm_intel/parameters/ept", "N\n")
    host.program("python3", "echo 0")
    host.program("qemu-system-x86_64", 'echo "QEMU emulator version 7.2"')
    found = _examined(host)
    assert [one.state for one in found.values()] == [State.MISSING] * 4
    assert "ept=1" in found["nested paging"].fix
    assert "6.12.1-test: capability 999 answers 0" in found["kernel with KVMI"].found
    assert "stock QEMU" in found["QEMU with KVMI"].found


def test_the_parameter_that_is_off_is_not_a_missing_kernel(host: _Host) -> None:
    host.file("/cpuinfo", "flags\t\t: fpu svm\n")
    host.file("/sys/module/kvm_amd/parameters/npt", "1\n")
    host.file("/sys/module/kvm/parameters/introspection", "N\n")
    host.program("python3", "echo 0")
    host.program("qemu-system-x86_64", "exit 127")
    found = _examined(host)
    assert found["kernel with KVMI"].state is State.OK
    assert found["kvm.introspection"].state is State.MISSING
    assert "echo Y >" in found["kvm.introspection"].fix
    assert "does not run" in found["QEMU with KVMI"].found


def test_a_host_without_virtualisation(host: _Host) -> None:
    host.file("/cpuinfo", "flags\t\t: fpu\n")
    assert "neither VMX nor SVM" in _examined(host)["nested paging"].found
