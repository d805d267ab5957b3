# SPDX-License-Identifier: GPL-2.0-or-later
"""Target ``bochs``: hosts with an emulated Intel processor: VMX, EPT, monitor trap flag.

QEMU's TCG has no VMX; Bochs has, on any machine. It is slow: a host boots in some seconds
of its processor's time, from a medium with all that the tests of the kernel need and no
QEMU (see :mod:`harness.build.medium`), and cannot be saved.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build import cache, progress
from harness.build.bochs import build_bochs
from harness.build.medium import build_medium
from harness.errors import DeadlineError, HarnessError, UsageError
from harness.hosts.base import AS_USUAL, Boot, MachineFacts
from harness.hosts.bochs_machine import BochsMachine, BochsProgram, Place, find_program
from harness.hosts.console import Console
from harness.hosts.facts import facts_of
from harness.hosts.host import Host
from harness.hosts.ssh import Keys
from harness.hosts.tcg import TIMING_OPTIONS

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.build.kernel import KernelBuild
    from harness.settings import Settings

__all__ = ["BochsTarget"]

_BOOT_TIMEOUT_S = 300.0
_LOOK_EVERY_S = 0.05
_READY = "host: ready"
"""What init says before the SSH server starts."""

# Instructions per microsecond that each build manages on today's machines, rounded up.
_DEBIAN_SPEED, _BUILT_SPEED = 200, 400

# Of the models of 2.7 the one with EPT and the monitor trap flag.
_PROCESSOR = "tigerlake"

# Counted up when this module does something else with the host that it boots for its facts.
_RECIPE = "1"

MOST_MEMORY_MB = 2048
"""Where the range of Bochs's own option ends."""

KERNEL_OPTIONS = (
    # At the speed that the serial port has by default each character takes a millisecond.
    # Init ends the quiet.
    "console=ttyS0,115200", "quiet",
    # A kernel that oopsed has nothing more to say. Bochs ends at the triple fault by which
    # the kernel is told to restart; at other ways of restarting it would boot again.
    "oops=panic", "panic=-1", "reboot=t",
    # Slab caches under their own names in /proc/slabinfo, where leaks are looked for.
    "slab_nomerge",
    *TIMING_OPTIONS,
    # Features that Bochs 2.7 announces without telling where their state is saved. With
    # them the kernel finds the sizes to be wrong, and switches XSAVE off altogether.
    "clearcpuid=pku,xsaves,xsavec",
    # Bochs 3.0 announces it, but interrupts get lost.
    "kvm_intel.enable_apicv=0",
    # What this is about. Tests also switch it at run time, in /sys/module/kvm.
    "kvm.introspection=1",
)  # fmt: skip


class BochsTarget:
    """See the module's text. :meth:`prepare` before anything else."""

    name = "bochs"
    boots = True
    # The first with VMX and 64 bits: no EPT, no monitor trap flag, no exits at descriptor tables.
    processors: Sequence[str] = ("core2_penryn_t9600",)
    most_memory_mb: int | None = MOST_MEMORY_MB
    patience = 4.0

    def __init__(self, settings: Settings) -> None:
        if settings.host_memory_mb > MOST_MEMORY_MB:
            raise UsageError(
                f"a host in Bochs has at most {MOST_MEMORY_MB} MB of memory, "
                f"and {settings.host_memory_mb} are asked for",
                hint="set host_memory_mb in kvmi-harness.toml",
            )
        self._settings = settings
        self._kernel: KernelBuild | None = None
        self._images: Images | None = None
        self._program: BochsProgram | None = None
        self._facts: MachineFacts | None = None

    def prepare(self, kernel: KernelBuild, images: Images) -> None:
        """Make the medium, and boot a host once to learn its facts. See :class:`Target`."""
        self._kernel, self._images = kernel, images
        if self._settings.bochs == "built":
            path = str(build_bochs(self._settings))
            self._program = find_program(path, debugger=False, ticks_per_us=_BUILT_SPEED)
        else:
            self._program = find_program("bochs-bin", debugger=True, ticks_per_us=_DEBIAN_SPEED)
        inputs: dict[str, cache.Input] = {
            "kernel": kernel.key,
            "medium": self._medium().parent.name,
            "emulator": f"{self._program.path} {self._program.version}",
            "recipe": _RECIPE,
        }
        place = cache.entry("bochs-host", inputs, self._learn, root=self._settings.cache)
        self._facts = MachineFacts(**json.loads((place / "facts.json").read_text()))

    def _learn(self, directory: Path) -> None:
        with progress.step("Boot a host in Bochs"):
            try:
                with self._boot("first", directory) as host:
                    facts = self._look(host)
                    host.check()
                    boot = host.run("dmesg").stdout
            except HarnessError as error:
                # The directory will be gone with all that is in it.
                logs = self._settings.cache / "logs"
                logs.mkdir(exist_ok=True)
                for name in ("console.log", "emulator.log"):
                    with contextlib.suppress(OSError):
                        shutil.copyfile(directory / name, logs / f"bochs-{name}")
                error.hint = f"its console is kept as {logs / 'bochs-console.log'}"
                raise
        (directory / "boot.log").write_bytes(boot)
        (directory / "facts.json").write_text(json.dumps(facts.as_dict(), indent=1) + "\n")

    def _look(self, host: Host) -> MachineFacts:
        assert self._kernel is not None
        assert self._program is not None
        return facts_of(
            host,
            target=self.name,
            kernel_series=self._kernel.series,
            emulator=f"Bochs {self._program.version}",
            qemu="",
        )

    def facts(self) -> MachineFacts:
        """The facts of the prepared target. See :class:`Target`."""
        if self._facts is None:
            raise UsageError("target bochs is not prepared", hint="call prepare() first")
        return self._facts

    # -- hosts ------------------------------------------------------------------------

    def start(
        self,
        *,
        name: str,
        evidence: Path,
        boot: Boot = AS_USUAL,
    ) -> Host:
        """A fresh host that answers commands, booted from nothing. See :class:`Target`.

        :raises UsageError: there is no such processor.
        """
        self.facts()
        if boot.processor not in ("", *self.processors):
            raise UsageError(f"target bochs has no processor {boot.processor}")
        evidence.mkdir(parents=True, exist_ok=True)
        return self._boot(name, evidence, boot)

    def _medium(self, boot: Boot = AS_USUAL) -> Path:
        assert self._kernel is not None
        assert self._images is not None
        assert self._program is not None
        options = [option for option in KERNEL_OPTIONS if option not in boot.without]
        # The counter ticks once an instruction, whatever the processor's model says of it.
        options.append(f"tsc_early_khz={self._program.ticks_per_us * 1000}")
        if self._program.version.startswith("2."):
            # It logs modified pages by whole addresses, of which KVM warns.
            options.append("kvm_intel.pml=0")
        return build_medium(
            self._settings,
            kernel=self._kernel,
            keys=self._images.keys,
            options=[*options, *boot.options],
        )

    def _boot(self, name: str, evidence: Path, boot: Boot = AS_USUAL) -> Host:
        assert self._images is not None
        assert self._program is not None
        place = Place(name, evidence)
        machine = BochsMachine.start(
            self._program,
            place,
            medium=self._medium(boot),
            processor=boot.processor or _PROCESSOR,
            memory_mb=self._settings.host_memory_mb,
        )
        console = Console(place.console)
        keys = Keys(self._images.keys)
        host = Host(
            machine,
            name=name,
            evidence=evidence,
            console=console,
            keys=keys,
            patience=self.patience,
        )
        try:
            deadline = time.monotonic() + _BOOT_TIMEOUT_S
            # Not by trying to log in, which would give a booting host more to do.
            while _READY not in console.since():
                host.check()
                if time.monotonic() > deadline:
                    raise DeadlineError(f"it did not boot within {_BOOT_TIMEOUT_S:.0f} s")
                time.sleep(_LOOK_EVERY_S)
            host.wait_up(timeout_s=max(1.0, deadline - time.monotonic()))
        except DeadlineError as error:
            host.close()
            console.explain(error, name)
            raise
        except BaseException:
            host.close()
            raise
        return host
