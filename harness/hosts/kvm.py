# SPDX-License-Identifier: GPL-2.0-or-later
"""Target ``kvm``: hosts that this machine's KVM runs, with nested virtualisation.

The machine is the one of target ``tcg``, with another accelerator and this machine's own
processor. Whether what is seen there was seen on hardware depends on this machine: it may
be a virtual machine, or an emulated one, itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import UsageError
from harness.hosts.facts import facts_of, processor_here
from harness.hosts.seen import look_here
from harness.hosts.template import TemplateTarget

if TYPE_CHECKING:
    from harness.build.kernel import KernelBuild
    from harness.hosts.base import MachineFacts
    from harness.hosts.host import Host

__all__ = ["KvmTarget"]


class KvmTarget(TemplateTarget):
    """Hosts that are nested virtual machines."""

    name = "kvm"
    # Whether KVM and QEMU can save a machine with nested virtualisation depends on both of
    # them and on the processor. Booting takes two seconds here.
    must_save = False

    def check(self) -> None:
        """See :class:`TemplateTarget`."""
        if obstacle := look_here().obstacle():
            raise UsageError(f"target kvm: {obstacle.reason}", hint=obstacle.fix)

    def processor(self) -> list[str]:
        """See :class:`TemplateTarget`."""
        return ["-accel", "kvm", "-cpu", "host"]

    def look(self, host: Host, *, kernel: KernelBuild) -> MachineFacts:
        """See :class:`TemplateTarget`."""
        return facts_of(host, target=self.name, kernel_series=kernel.series, below=look_here())

    def identity(self) -> str:
        """The saved machine has this processor's features, as this kernel passes them on."""
        here = look_here()
        return f"{processor_here()} {here.release} {here.describe()}"
