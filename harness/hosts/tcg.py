# SPDX-License-Identifier: GPL-2.0-or-later
"""Target ``tcg``: hosts with an emulated AMD processor, nested paging included.

QEMU's TCG emulates SVM with NPT well enough for the host's KVM to run guests, on any
machine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from harness.hosts.facts import facts_of, processor_here
from harness.hosts.template import KERNEL_OPTIONS, TemplateTarget, emulator_version
from harness.hosts.tsc import tsc_khz

if TYPE_CHECKING:
    from harness.build.kernel import KernelBuild
    from harness.hosts.base import MachineFacts
    from harness.hosts.host import Host

__all__ = ["TIMING_OPTIONS", "TcgTarget"]

_SETTLE_TIMEOUT_S = 120.0
# How far a host's clock may be off: as much as a crystal, since guests' clocks are set by
# the one and go by the other.
_CLOCK_TOLERANCE = 200e-6

# Options of QEMU's EPYC model that TCG lacks, in one version or another. Taken off by
# name, so that a newer QEMU gives the same processor. Without NRIP save and decode
# assists KVM finds the length of intercepted instructions by itself.
_WITHOUT = (
    "rdseed", "sha-ni", "fxsr-opt", "misalignsse", "3dnowprefetch", "osvw", "topoext",
    "nrip-save", "xsavec", "decodeassists",
)  # fmt: skip

TIMING_OPTIONS = (
    # All emulated CPUs read the same counter. Without this the kernel's watchdog, on a
    # busy machine, takes it for unstable and falls back to a timer that is slow.
    "tsc=reliable",
    # The rate of that clock is measured outside, see harness/hosts/tsc.py; a difference to
    # what the kernel then finds out itself is nothing for KVM to refuse its work over.
    "kvm.tsc_tolerance_ppm=5000",
    # The same with its check at boot that the timer ticks, which ends in a panic.
    "no_timer_check",
    # The same with its lockup detectors, which run in real time: an emulated CPU gets
    # none while the machine is busy with others.
    "watchdog_thresh=60",
    "rcupdate.rcu_cpu_stall_timeout=120",
)
"""What a kernel has to be told whose processor and clocks are programs."""


class TcgTarget(TemplateTarget):
    """Hosts whose processor is QEMU's translator."""

    name = "tcg"
    kernel_options = (*KERNEL_OPTIONS, *TIMING_OPTIONS)

    def processor(self) -> list[str]:
        """See :class:`TemplateTarget`."""
        return [
            # One thread for each CPU. The buffer for translated code takes real memory as
            # it fills; the default of 1 GiB is more than the host itself has.
            "-accel", "tcg,thread=multi,tb-size=256",
            # AMD, because TCG emulates SVM with nested paging; it has no VMX.
            "-cpu", ",".join(["EPYC", "svm=on", "npt=on", *(f"{flag}=off" for flag in _WITHOUT)]),
        ]  # fmt: skip

    def boot_options(self) -> list[str]:
        """See :class:`TemplateTarget`."""
        return [f"tsc_early_khz={tsc_khz()}"]

    def fit(self, host: Host) -> bool:
        """Whether the host's clock goes right."""
        return abs(_counter_khz(host) / tsc_khz() - 1) <= _CLOCK_TOLERANCE

    def look(self, host: Host, *, kernel: KernelBuild) -> MachineFacts:
        """See :class:`TemplateTarget`."""
        return facts_of(
            host,
            target=self.name,
            kernel_series=kernel.series,
            emulator=f"QEMU TCG {emulator_version()}",
        )

    def identity(self) -> str:
        """The saved machine keeps time by this processor's counter."""
        return f"{processor_here()} {tsc_khz() / 10_000:.0f}"


def _counter_khz(host: Host) -> float:
    """What the host's kernel takes for the rate of its counter, once it has settled."""
    host.run(
        "while grep -q early /sys/devices/system/clocksource/clocksource0/current_clocksource;"
        " do sleep 0.1; done",
        timeout_s=_SETTLE_TIMEOUT_S,
    )
    found = re.findall(
        r"tsc: (?:Detected|Refined TSC clocksource calibration:) ([\d.]+) MHz", host.console.since()
    )
    return float(found[-1]) * 1000 if found else 0.0
