# SPDX-License-Identifier: GPL-2.0-or-later
"""The facts of a host: looked up in the host itself, the same way for every target."""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness.errors import BuildError
from harness.hosts.base import MachineFacts
from harness.hosts.seen import Nature, Seen, look_at
from harness.hosts.ssh import Shell
from harness.paths import GUEST_IMAGES

__all__ = ["NO_QEMU", "facts_of", "processor_here", "version_in"]

NO_QEMU = "none"
"""The version of a QEMU that is not there."""

_LOOK_TIMEOUT_S = 60.0


def facts_of(
    host: Shell,
    *,
    target: str,
    kernel_series: str,
    emulator: str = "",
    below: Seen | None = None,
    qemu: str = "/opt/qemu/bin/qemu-system-x86_64",
    machine: str = "",
) -> MachineFacts:
    """Look at a host that is up.

    :param target: the name of what provides it.
    :param kernel_series: what reports call the series of its kernel.
    :param emulator: the program that is its processor, with its version; empty if none
        that we know of.
    :param below: the machine whose processor the host was given, if it is not its own.
    :param qemu: the program that runs the guests, in the host; empty if it has none.
    :param machine: what all this runs on, for people; by default this machine.
    :raises BuildError: the QEMU in the host does not run there.
    :raises InfraError: the host cannot be looked at.
    """
    seen = look_at(lambda command: host.run(command, check=False, timeout_s=_LOOK_TIMEOUT_S))
    guest_qemu = _qemu_version(host, qemu) if qemu else NO_QEMU
    base = below or seen
    extension = seen.extension or "no virtualisation"
    if emulator:
        virtualisation = f"{extension}, emulated by {emulator}"
    else:
        nested = "nested by KVM on " if below is not None else ""
        virtualisation = f"{extension}, {nested}{base.describe()}"
    return MachineFacts(
        target=target,
        emulated=bool(emulator) or base.nature is Nature.EMULATED,
        hypervisor=base.hypervisor if not emulator and base.nature is Nature.VIRTUAL else "",
        vendor=seen.vendor,
        cpu_model=seen.cpu_model,
        cpus=seen.cpus,
        memory_mb=seen.memory_mb,
        virtualisation=virtualisation,
        nested_paging=bool(seen.paging),
        kernel_release=seen.release,
        kernel_series=kernel_series,
        guest_qemu=guest_qemu,
        machine=machine or f"{processor_here()}, {os.cpu_count()} CPUs",
    )


def _qemu_version(host: Shell, qemu: str) -> str:
    version = host.run(f"{qemu} --version", check=False)
    if version.returncode != 0:
        raise BuildError(
            "the QEMU of the host image does not run in it",
            hint=f"is a library missing in {GUEST_IMAGES / 'host/packages'}?",
            details=version.stderr.decode(errors="replace"),
        )
    return version_in(version.text)


def processor_here() -> str:
    """The model of this machine's processor, as the kernel names it."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else "unknown processor"


def version_in(text: str) -> str:
    """The version in what QEMU prints when asked for it."""
    return text.partition("\n")[0].replace("QEMU emulator version ", "").strip()
