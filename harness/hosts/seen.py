# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine is: whether its processor is hardware, and what its KVM is good for.

A machine is looked at from inside, by :mod:`harness.hosts.probe`. That a machine is no
emulator can be shown only where nothing is between it and the hardware: a hypervisor may
run in an emulated machine itself, and nothing inside tells. So there are three answers,
and the middle one is never reported as the last.
"""

from __future__ import annotations

import enum
import errno
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from harness.errors import InfraError
from harness.hosts import probe

__all__ = ["Kvm", "Nature", "Obstacle", "Seen", "look_at", "look_here", "probe_command"]

# What hypervisors answer to CPUID 0x40000000; as in arch/x86/kernel/cpu/hypervisor.c and
# in systemd's src/basic/virt.c. QEMU's own is that of its emulator.
_EMULATORS = {"TCGTCGTCGTCG": "QEMU TCG"}
_HYPERVISORS = {
    "KVMKVMKVM": "KVM",
    "Linux KVM Hv": "KVM",
    "Microsoft Hv": "Hyper-V",
    "VMwareVMware": "VMware",
    "XenVMMXenVMM": "Xen",
    "VBoxVBoxVBox": "VirtualBox",
    "bhyve bhyve": "bhyve",
    "ACRNACRNACRN": "ACRN",
    "SRESRESRESRE": "Oracle Private Cloud",
    "Jailhouse": "Jailhouse",
}
# Firmware of machines that are programs. Where the processor hides its hypervisor, these
# still tell. QEMU's and Bochs' firmware have one origin, and so one ACPI maker.
_EMULATED_FIRMWARE = ("QEMU", "Bochs", "BOCHS")
_VIRTUAL_FIRMWARE = {
    "VMware": "VMware",
    "innotek GmbH": "VirtualBox",
    "VirtualBox": "VirtualBox",
    "Virtual Machine": "Hyper-V",
    "Xen": "Xen",
    "Parallels": "Parallels",
    "BHYVE": "bhyve",
    "OpenStack": "OpenStack",
    "Google Compute Engine": "Google Compute Engine",
    "KVM": "KVM",
}


class Nature(enum.StrEnum):
    """What a machine's processor is."""

    HARDWARE = "hardware"
    VIRTUAL = "virtual"
    """There is a hypervisor; whether it runs on hardware cannot be seen from inside."""
    EMULATED = "emulated"


class Obstacle(NamedTuple):
    """Why something cannot be done, and what to do about it."""

    reason: str
    fix: str


class Kvm(msgspec.Struct, frozen=True, kw_only=True):
    """What /dev/kvm is good for."""

    device: bool = False
    error: str = ""
    """Why no virtual machine can be made with it; empty if one can."""
    nested: bool = False
    """Whether it offers its guests VMX or SVM."""
    answers: dict[str, int] = {}
    """What KVM_CHECK_EXTENSION answered, by number."""

    @property
    def usable(self) -> bool:
        """Whether virtual machines can be made: tried, not guessed."""
        return self.device and not self.error


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, as :mod:`harness.hosts.probe` saw it."""

    signature: str = ""
    flags: frozenset[str] = frozenset()
    cpu_model: str = ""
    dmi: dict[str, str] = {}
    acpi_oem: str = ""
    xen: str = ""
    kvm: Kvm = Kvm()
    modules: dict[str, str] = {}
    release: str = ""
    boot_id: str = ""
    cpus: int = 0
    memory_mb: int = 0

    @property
    def vendor(self) -> str:
        """``AMD`` (SVM), ``Intel`` (VMX), or empty: the processor has neither."""
        return "AMD" if "svm" in self.flags else "Intel" if "vmx" in self.flags else ""

    @property
    def extension(self) -> str:
        """``SVM``, ``VMX`` or empty."""
        return {"AMD": "SVM", "Intel": "VMX"}.get(self.vendor, "")

    @property
    def module(self) -> str:
        """The module of KVM that counts on this processor, loaded or not; or empty."""
        return {"AMD": "kvm_amd", "Intel": "kvm_intel"}.get(self.vendor, "")

    @property
    def paging(self) -> str:
        """``NPT`` or ``EPT``, whichever KVM uses; empty if neither."""
        name = {"kvm_amd": "npt", "kvm_intel": "ept"}.get(self.module, "")
        return name.upper() if self.modules.get(f"{self.module}.{name}") in ("Y", "1") else ""

    @property
    def hypervisor(self) -> str:
        """The emulator or hypervisor below, for people; empty on hardware."""
        if self.signature:
            known = _EMULATORS | _HYPERVISORS
            return known.get(self.signature, f"an unknown hypervisor ({self.signature})")
        if "hypervisor" in self.flags:
            return "an unknown hypervisor"
        firmware = [value for value in (*self.dmi.values(), self.acpi_oem) if value]
        for value in firmware:
            for name in _EMULATED_FIRMWARE:
                if name in value:
                    return "Bochs, or a QEMU that hides itself"
            for name, title in _VIRTUAL_FIRMWARE.items():
                if name in value:
                    return title
        if self.xen:
            return "Xen"
        return "" if firmware else "something that tells nothing of itself"

    @property
    def nature(self) -> Nature:
        """What its processor is."""
        if self.signature in _EMULATORS or "Bochs" in self.hypervisor:
            return Nature.EMULATED
        return Nature.VIRTUAL if self.hypervisor else Nature.HARDWARE

    @property
    def title(self) -> str:
        """The machine's maker and model, as far as its firmware tells."""
        names = (self.dmi.get("sys_vendor", ""), self.dmi.get("product_name", ""))
        return " ".join(name for name in names if name) or self.acpi_oem

    def describe(self) -> str:
        """What the machine is, in a few words."""
        match self.nature:
            case Nature.HARDWARE:
                return f"hardware ({self.title})"
            case Nature.EMULATED:
                return f"emulated by {self.hypervisor}"
        return f"a virtual machine on {self.hypervisor}"

    def obstacle(self) -> Obstacle | None:
        """What keeps its KVM from running hosts that run guests themselves; None if nothing."""
        return self.no_machines() or self._no_nesting() or self.no_paging()

    def no_machines(self) -> Obstacle | None:
        """What keeps its KVM from running virtual machines with the processor's help."""
        if not self.vendor:
            others = sorted(name for name in self.modules if re.fullmatch(r"kvm_[a-z]+", name))
            by = f" ({', '.join(others)})" if others else ""
            there = f", though there is a /dev/kvm{by} for other guests" if self.kvm.device else ""
            return Obstacle(
                f"the processor offers neither SVM nor VMX{there}",
                "switch virtualisation on: in the firmware, or nested in the outer hypervisor",
            )
        if not self.kvm.device:
            return Obstacle(
                f"{self.extension}, but no /dev/kvm", f"load KVM: modprobe {self.module}"
            )
        if self.kvm.error == os.strerror(errno.EACCES):
            return Obstacle(
                "/dev/kvm is not for this user",
                f"sudo usermod -aG kvm {os.environ.get('USER', 'USER')}, then log in again",
            )
        if self.kvm.error:
            return Obstacle(
                f"/dev/kvm makes no virtual machine: {self.kvm.error}",
                "is another hypervisor in use, or the device kept from this container?",
            )
        return None

    def _no_nesting(self) -> Obstacle | None:
        if not self.kvm.nested:
            value = self.modules.get(f"{self.module}.nested", "off")
            return Obstacle(
                f"nested virtualisation is off ({self.module}.nested={value})",
                f"modprobe -r {self.module} && modprobe {self.module} nested=1",
            )
        return None

    def no_paging(self) -> Obstacle | None:
        """Why its guests have no nested paging; None if they have."""
        if not self.paging:
            name = {"AMD": "npt", "Intel": "ept"}[self.vendor]
            return Obstacle(
                f"KVM does not use nested paging ({self.module}.{name} is off)",
                f"load {self.module} with {name}=1, on a processor that has it",
            )
        return None


class _Answer(Protocol):
    @property
    def returncode(self) -> int: ...
    @property
    def stdout(self) -> bytes: ...


def probe_command(numbers: Sequence[int] = ()) -> str:
    """The shell command that looks at a machine with python3, and prints JSON."""
    source = Path(probe.__file__).read_text(encoding="utf-8")
    return shlex.join(["python3", "-c", source, *map(str, numbers)])


def look_at(run: Callable[[str], _Answer], numbers: Sequence[int] = ()) -> Seen:
    """Look at a machine on which ``run`` runs a shell command.

    :param numbers: capabilities to ask its KVM for.
    :raises InfraError: it has no python3, or what it printed cannot be read.
    """
    answer = run(probe_command(numbers))
    try:
        return msgspec.json.decode(answer.stdout, type=Seen)
    except msgspec.DecodeError as error:
        raise InfraError(
            f"the machine could not be looked at (status {answer.returncode}): {error}",
            hint="it needs python3 with its standard library",
            details=answer.stdout.decode(errors="replace"),
        ) from error


@functools.cache
def look_here(*numbers: int) -> Seen:
    """Look at this machine; once.

    :param numbers: capabilities to ask its KVM for.
    """

    def run(command: str) -> subprocess.CompletedProcess[bytes]:
        argv = shlex.split(command)
        return subprocess.run(
            [sys.executable, *argv[1:]], capture_output=True, check=False, timeout=60
        )

    return look_at(run, numbers)
