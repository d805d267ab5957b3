# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine is taken for, and which target is chosen on it."""

from __future__ import annotations

import dataclasses
import errno
import os

import msgspec
import pytest

from harness.errors import InfraError, UsageError
from harness.hosts import facts, kvm
from harness.hosts.base import Completed
from harness.hosts.choice import best, choose, settled
from harness.hosts.seen import Kvm, Nature, Seen, look_at, look_here
from harness.settings import load_settings

METAL = Seen(
    flags=frozenset(("svm", "npt")),
    cpu_model="AMD EPYC 9354",
    dmi={"sys_vendor": "Dell Inc.", "product_name": "PowerEdge R6615", "bios_vendor": "Dell Inc."},
    acpi_oem="DELL",
    kvm=Kvm(device=True, nested=True),
    modules={"kvm": "loaded", "kvm_amd": "loaded", "kvm_amd.npt": "Y", "kvm_amd.nested": "1"},
    release="6.12.57",
)


def _but(**changes: object) -> Seen:
    return msgspec.structs.replace(METAL, **changes)


VIRTUAL = _but(flags=METAL.flags | {"hypervisor"}, signature="KVMKVMKVM")


@pytest.mark.parametrize(
    ("seen", "nature", "word"),
    [
        (METAL, Nature.HARDWARE, "PowerEdge"),
        (VIRTUAL, Nature.VIRTUAL, "KVM"),
        (_but(flags=METAL.flags | {"hypervisor"}, signature="TCGTCGTCGTCG"),
         Nature.EMULATED, "QEMU TCG"),
        # The flag alone, and a name that nobody knows.
        (_but(flags=METAL.flags | {"hypervisor"}), Nature.VIRTUAL, "unknown hypervisor"),
        (_but(flags=METAL.flags | {"hypervisor"}, signature="NewNewNewNew"),
         Nature.VIRTUAL, "NewNewNewNew"),
        # Hypervisors and emulators that hide themselves, but not their firmware.
        (_but(dmi={}, acpi_oem="BOCHS"), Nature.EMULATED, "Bochs"),
        (_but(dmi={"sys_vendor": "QEMU", "product_name": "Standard PC"}), Nature.EMULATED, "QEMU"),
        (_but(dmi={"sys_vendor": "VMware, Inc."}), Nature.VIRTUAL, "VMware"),
        (_but(dmi={"sys_vendor": "Amazon EC2", "product_name": "m5.metal"}, acpi_oem="AMAZON"),
         Nature.HARDWARE, "m5.metal"),
        # What shows nothing is not taken for hardware.
        (_but(dmi={}, acpi_oem=""), Nature.VIRTUAL, "tells nothing"),
    ],
)  # fmt: skip
def test_only_what_shows_it_is_hardware(seen: Seen, nature: Nature, word: str) -> None:
    """The flag, the hypervisor's name, DMI and ACPI are all looked at."""
    assert seen.nature is nature
    assert word in seen.describe()


@pytest.mark.parametrize(
    ("seen", "reason", "fix"),
    [
        (_but(flags=frozenset(), kvm=Kvm()), "neither SVM nor VMX", "firmware"),
        # A KVM that runs guests without the processor's help.
        (_but(flags=frozenset(), modules={"kvm": "loaded", "kvm_pvm": "loaded"}),
         "/dev/kvm (kvm_pvm)", "firmware"),
        (_but(kvm=Kvm()), "no /dev/kvm", "modprobe kvm_amd"),
        (_but(kvm=Kvm(device=True, error=os.strerror(errno.EACCES))), "this user", "usermod"),
        (_but(kvm=Kvm(device=True, error=os.strerror(errno.EBUSY))), "busy", "another"),
        (_but(kvm=Kvm(device=True), modules={"kvm_amd.nested": "0", "kvm_amd.npt": "Y"}),
         "kvm_amd.nested=0", "nested=1"),
        (_but(modules={"kvm_amd.nested": "1", "kvm_amd.npt": "N"}), "npt is off", "npt=1"),
        (_but(flags=frozenset({"vmx"}), modules={"kvm_intel.ept": "N"}), "ept is off", "ept=1"),
    ],
)  # fmt: skip
def test_what_keeps_kvm_from_being_used_is_named(seen: Seen, reason: str, fix: str) -> None:
    """With what to do about it; hosts are emulated then."""
    obstacle = seen.obstacle()
    assert obstacle is not None
    assert reason.lower() in obstacle.reason.lower()
    assert fix in obstacle.fix
    choice = best(seen)
    assert choice.target == "tcg"
    assert obstacle.reason in choice.reason


def test_nested_virtualisation_is_chosen_where_it_works() -> None:
    """The reason says on what; an emulated machine's own is not worth it."""
    assert best(METAL) == ("kvm", "SVM with NPT, nested; hardware (Dell Inc. PowerEdge R6615)")
    assert best(VIRTUAL).target == "kvm"
    emulated = _but(flags=METAL.flags | {"hypervisor"}, signature="TCGTCGTCGTCG")
    assert best(emulated).target == "tcg"


def test_what_is_asked_for_is_taken() -> None:
    """A choice that was made is not made again; one machine has one worker."""
    assert choose(load_settings(target="bochs")) == ("bochs", "asked for")
    assert settled(load_settings(target="ssh", workers=4))[0].workers == 1
    auto = load_settings(target="auto", workers=4)
    ours, choice = settled(auto)
    assert ours == dataclasses.replace(auto, target=choice.target)
    assert choice.target in ("kvm", "tcg")


def test_this_machine_can_be_looked_at() -> None:
    """The program runs, and what it prints is understood."""
    here = look_here()
    assert here.release == os.uname().release
    assert here.boot_id
    assert here.cpus == len(os.sched_getaffinity(0))


def test_a_machine_without_python_is_told() -> None:
    """Whatever the shell printed instead."""
    with pytest.raises(InfraError, match="could not be looked at") as caught:
        look_at(lambda command: Completed(command, 127, b"", b"sh: python3: not found"))
    assert "python3" in caught.value.hint


class _Host:
    """Answers what facts are made of."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def run(self, command: str, **_: object) -> Completed:
        said = b"QEMU emulator version 10.0.2 (x)\n"
        if "--version" not in command:
            said = msgspec.json.encode(self._seen, enc_hook=sorted)
        return Completed(command, 0, said, b"")


@pytest.mark.parametrize(
    ("below", "emulated", "hypervisor"),
    [
        (METAL, False, ""),
        (VIRTUAL, False, "KVM"),
        (_but(flags=METAL.flags | {"hypervisor"}, signature="TCGTCGTCGTCG"), True, ""),
    ],
)
def test_a_nested_host_is_what_is_below_it(below: Seen, emulated: bool, hypervisor: str) -> None:
    """KVM on hardware is hardware; in a virtual or emulated machine it is not."""
    found = facts.facts_of(_Host(VIRTUAL), target="kvm", kernel_series="linux@1", below=below)  # type: ignore[arg-type]
    assert (found.emulated, found.hypervisor) == (emulated, hypervisor)
    assert found.virtualisation == f"SVM, nested by KVM on {below.describe()}"
    assert found.nested_paging
    assert found.guest_qemu == "10.0.2 (x)"


def test_a_known_emulator_counts_whatever_the_host_shows() -> None:
    """An emulator may imitate hardware to the last register."""
    found = facts.facts_of(_Host(METAL), target="bochs", kernel_series="x", emulator="Bochs 3.0")  # type: ignore[arg-type]
    assert found.emulated
    assert found.virtualisation == "SVM, emulated by Bochs 3.0"


def test_target_kvm_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built or booted, and with the fix."""
    monkeypatch.setattr(kvm, "look_here", lambda: _but(kvm=Kvm()))
    with pytest.raises(UsageError, match="target kvm: SVM, but no /dev/kvm") as caught:
        kvm.KvmTarget(load_settings()).check()
    assert caught.value.hint == "load KVM: modprobe kvm_amd"
