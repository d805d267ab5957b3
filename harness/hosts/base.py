# SPDX-License-Identifier: GPL-2.0-or-later
"""What a target is, and the facts that hosts and commands on them come with.

A *host* is the machine whose kernel is under test; a *target* is what provides hosts.
There is one class for hosts, :class:`harness.hosts.host.Host`, reached over SSH whatever
provides it; the targets differ only in how a host comes to life and dies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.build.kernel import KernelBuild
    from harness.hosts.host import Host

__all__ = ["AS_USUAL", "Boot", "Completed", "MachineFacts", "Target"]


@dataclass(frozen=True)
class Completed:
    """A command that came to its end."""

    command: str
    returncode: int
    """The exit status; minus the signal's number if a signal ended it."""
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, without the newline at its end."""
        return self.stdout.decode(errors="replace").rstrip("\n")


@dataclass(frozen=True)
class MachineFacts:
    """What the hosts of a target are; recorded with every run."""

    target: str
    emulated: bool
    """Whether the host's CPU is a program, so that times in it mean little."""
    vendor: str
    """``AMD`` (SVM) or ``Intel`` (VMX)."""
    cpu_model: str
    cpus: int
    memory_mb: int
    virtualisation: str
    """What guests run on, for people: ``SVM, emulated by QEMU TCG 7.2.22``."""
    nested_paging: bool
    """Whether the host's KVM uses NPT or EPT; read from the host itself."""
    kernel_release: str
    kernel_series: str
    guest_qemu: str
    """Version of the QEMU in the host, which runs the guests."""
    machine: str
    """The machine that all this runs on: CPU model and cores."""
    hypervisor: str = ""
    """What the hosts run on and cannot look below, for people: ``KVM``. Empty on hardware.

    A hypervisor may itself run in an emulator, so with one nothing was seen on hardware
    for sure.
    """

    def as_dict(self) -> dict[str, Any]:
        """The facts as plain values, for the report."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Boot:
    """How a host is to be booted, where not as usual; it is booted from nothing then."""

    without: tuple[str, ...] = ()
    """Options to take off the default kernel command line, such as ``kvm.introspection=1``."""
    options: tuple[str, ...] = ()
    """Options to put at the end of it."""
    processor: str = ""
    """One of the target's :attr:`Target.processors` instead of its usual one."""

    def __bool__(self) -> bool:
        """Whether anything is not as usual."""
        return self != AS_USUAL


AS_USUAL = Boot()


class Target(Protocol):
    """Provides hosts. Kept small: everything else is the same for all of them."""

    name: str
    boots: bool
    """Whether it can boot a host with other kernel options than usual."""
    processors: Sequence[str]
    """Processors that it can boot a host with besides its usual one."""
    most_memory_mb: int | None
    """How much memory a host can have; None: as much as the machine can give."""
    patience: float
    """How many times longer than usual its hosts may take: all limits of waits for them and of
    tests are multiplied by it. Times that pass on purpose are not."""

    def prepare(self, kernel: KernelBuild, images: Images) -> None:
        """Make ready what all hosts share, such as a saved machine; may take a minute.

        Idempotent, and safe to call in several processes at once.

        :raises BuildError: what was built does not fit together.
        :raises HostCrashedError: the kernel under test does not boot.
        :raises InfraError: the machine or the emulator failed.
        """

    def facts(self) -> MachineFacts:
        """The facts of the prepared target."""

    def start(
        self,
        *,
        name: str,
        evidence: Path,
        boot: Boot = AS_USUAL,
    ) -> Host:
        """A fresh host that answers commands.

        :param name: for messages; unique among the hosts that live at one time.
        :param evidence: a directory for its console and other logs; made if missing.
        :param boot: how to boot it, where not as usual.
        :raises HostCrashedError: its kernel panicked on the way.
        :raises InfraError: it did not come up; the console's end is in ``details``.
        """
