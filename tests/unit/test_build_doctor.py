# SPDX-License-Identifier: GPL-2.0-or-later
"""What is missing is named with its fix: packages, and what a host lacks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from harness.build import doctor, packages
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
from harness.hosts.seen import Kvm, Seen
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


SVM = Seen(
    flags=frozenset({"svm", "npt"}),
    cpu_model="AMD EPYC",
    signature="KVMKVMKVM",
    kvm=Kvm(device=True, answers={"999": 1}),
    # As in a kernel that has both built in.
    modules={"kvm_intel.ept": "N", "kvm_amd.npt": "Y", "kvm.introspection": "Y"},
    release="6.12.1-test",
)
OURS = 'case $1 in --version) echo "QEMU 10.0.2";; *) printf "List:\\n  introspection\\n";; esac'


def _examined(place: Path, seen: Seen, qemu: str = OURS) -> dict[str, Finding]:
    """Examine a host whose programs are those of ``place``, and which looks like ``seen``."""
    program = place / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{qemu}\n")
    program.chmod(0o755)

    def run(command: str) -> subprocess.CompletedProcess[bytes]:
        if command.startswith("python3"):
            said = msgspec.json.encode(seen, enc_hook=sorted)
            return subprocess.CompletedProcess(command, 0, said, b"")
        argv = ["/bin/sh", "-c", command]
        env = {"PATH": f"{place}:/usr/bin:/bin"}
        return subprocess.run(argv, env=env, capture_output=True, check=False)

    found = examine_host(run, settings=load_settings(), qemu="qemu-system-x86_64")
    return {one.subject: one for one in found}


def test_a_host_that_has_everything(tmp_path: Path) -> None:
    found = _examined(tmp_path, SVM)
    assert {one.state for one in found.values()} == {State.OK}
    assert found["nested paging"].found == "NPT, by kvm_amd"
    assert found["this host is"].found == "a virtual machine on KVM"


def test_a_host_with_stock_kernel_and_stock_qemu(tmp_path: Path) -> None:
    stock = msgspec.structs.replace(
        SVM,
        flags=frozenset({"vmx"}),
        modules={"kvm_intel.ept": "N"},
        kvm=Kvm(device=True, answers={"999": 0}),
    )
    found = _examined(tmp_path, stock, 'echo "QEMU emulator version 7.2"')
    missing = {name for name, one in found.items() if one.state is State.MISSING}
    assert missing == {"nested paging", "kernel with KVMI", "kvm.introspection", "QEMU with KVMI"}
    assert "ept=1" in found["nested paging"].fix
    assert "6.12.1-test: capability 999 answers 0" in found["kernel with KVMI"].found
    assert "stock QEMU" in found["QEMU with KVMI"].found


def test_the_parameter_that_is_off_is_not_a_missing_kernel(tmp_path: Path) -> None:
    off = msgspec.structs.replace(
        SVM,
        modules=SVM.modules | {"kvm.introspection": "N"},
        kvm=Kvm(device=True, answers={"999": 0}),
    )
    found = _examined(tmp_path, off, "exit 127")
    assert found["kernel with KVMI"].state is State.OK
    assert found["kvm.introspection"].state is State.MISSING
    assert "echo Y >" in found["kvm.introspection"].fix
    assert "does not run" in found["QEMU with KVMI"].found


def test_a_host_without_virtualisation(tmp_path: Path) -> None:
    bare = msgspec.structs.replace(SVM, flags=frozenset(), kvm=Kvm())
    assert "neither SVM nor VMX" in _examined(tmp_path, bare)["nested paging"].found


def test_a_host_that_cannot_be_looked_at() -> None:
    def run(command: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, 127, b"", b"python3: not found")

    (found,) = examine_host(run, settings=load_settings(), qemu="")
    assert found.state is State.MISSING
    assert "python3" in found.fix


@pytest.mark.parametrize(
    ("changes", "target", "state", "word"),
    [
        ({}, "auto", State.OK, "nested, with NPT"),
        ({"kvm": Kvm(device=True)}, "auto", State.NOTE, "nested virtualisation is off"),
        ({"flags": frozenset()}, "auto", State.OK, "neither SVM nor VMX"),
        ({"flags": frozenset()}, "kvm", State.MISSING, "neither SVM nor VMX"),
    ],
)
def test_what_a_machine_can_do_is_told(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    target: str,
    state: State,
    word: str,
) -> None:
    nested = Kvm(device=True, nested=True, answers={"999": 1})
    seen = msgspec.structs.replace(SVM, **({"kvm": nested} | changes))
    monkeypatch.setattr(doctor, "look_here", lambda *_: seen)
    found = {one.subject: one for one in examine_machine(load_settings(target=target))}
    assert found["virtualisation"].state is state
    assert word in found["virtualisation"].found
    assert found["this machine is"].found == "a virtual machine on KVM"
    if not changes:
        assert "999 answers 1" in found["KVMI"].found
