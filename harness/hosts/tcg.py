# SPDX-License-Identifier: GPL-2.0-or-later
"""Target ``tcg``: hosts with an emulated AMD processor, nested paging included.

QEMU's TCG emulates SVM with NPT well enough for the host's KVM to run guests, on any
machine. Booting such a host takes some seconds, so it is done once: the booted machine
is saved, its memory as a plain file, the rest as a migration stream. A new host maps
that file copy-on-write and loads the rest, which takes no memory that it does not
change, no disk, and a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build import cache, progress
from harness.build.run import output_of
from harness.errors import BuildError, DeadlineError, HarnessError, InfraError, UsageError
from harness.hosts.base import MachineFacts
from harness.hosts.console import Console, complaints_in
from harness.hosts.emulator import Emulator, Place, option_value
from harness.hosts.host import Host
from harness.hosts.ssh import Keys
from harness.hosts.tsc import tsc_khz
from harness.paths import GUEST_IMAGES

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.build.kernel import KernelBuild
    from harness.settings import Settings

__all__ = ["TcgTarget"]

EMULATOR = "qemu-system-x86_64"

_START_TIMEOUT_S = 20.0
_BOOT_TIMEOUT_S = 120.0
_RESTORE_TIMEOUT_S = 30.0

# How often a host is booted until its clock is right, and how far it may be off: as much
# as a crystal, since guests' clocks are set by the one and go by the other.
_BOOT_TRIES = 4
_CLOCK_TOLERANCE = 200e-6

# What this module does with a booted machine before it saves it; part of the key.
_TEMPLATE_RECIPE = "1"

# Options of QEMU's EPYC model that TCG lacks, in one version or another. Taken off by
# name, so that a newer QEMU gives the same processor. Without NRIP save and decode
# assists KVM finds the length of intercepted instructions by itself.
_WITHOUT = (
    "rdseed", "sha-ni", "fxsr-opt", "misalignsse", "3dnowprefetch", "osvw", "topoext",
    "nrip-save", "xsavec", "decodeassists",
)  # fmt: skip

KERNEL_OPTIONS = (
    # The console goes to the evidence; it shows all that is said from "info" on.
    "console=ttyS0", "loglevel=7",
    # The image, shared by all hosts, so read-only; init puts a tmpfs over it.
    "root=/dev/vda", "rootfstype=ext4", "ro", "init=/opt/host/init",
    # A kernel that oopsed has nothing more to say: end at once, with the report on the
    # console, instead of leaving tests to wait. -no-reboot makes the emulator exit.
    "oops=panic", "panic=-1",
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
    "watchdog_thresh=60", "rcupdate.rcu_cpu_stall_timeout=120",
    # Slab caches under their own names in /proc/slabinfo, where leaks are looked for.
    "slab_nomerge",
    # What this is about. Tests also switch it at run time, in /sys/module/kvm.
    "kvm.introspection=1",
)  # fmt: skip


@dataclass(frozen=True)
class _Template:
    """The saved machine that hosts are restored from: a directory of the cache."""

    directory: Path

    @property
    def memory(self) -> Path:
        return self.directory / "memory"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    def facts(self) -> MachineFacts:
        return MachineFacts(**json.loads((self.directory / "facts.json").read_text()))


class TcgTarget:
    """See the module's text. :meth:`prepare` before anything else."""

    name = "tcg"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kernel: KernelBuild | None = None
        self._images: Images | None = None
        self._keys: Keys | None = None
        self._template: _Template | None = None

    # -- the template -----------------------------------------------------------------

    def prepare(self, kernel: KernelBuild, images: Images) -> None:
        """Boot a host and save it, unless the cache has it. See :class:`Target`."""
        self._kernel, self._images = kernel, images
        self._keys = Keys(images.keys)
        inputs: dict[str, cache.Input] = {
            "kernel": kernel.key,
            "images": images.key,
            "emulator": _emulator_version(),
            "argv": "\0".join(self._arguments(Place.unnamed(), KERNEL_OPTIONS)),
            "recipe": _TEMPLATE_RECIPE,
            # The saved machine keeps time by this processor's counter.
            "processor": f"{_processor()} {tsc_khz() / 10_000:.0f}",
        }
        place = cache.entry("template", inputs, self._make_template, root=self._settings.cache)
        self._template = _Template(place)

    def _make_template(self, directory: Path) -> None:
        cache.require_space(
            self._settings.cache, megabytes=self._settings.host_memory_mb, purpose="a saved host"
        )
        template = _Template(directory)
        place = Place(
            name="template",
            memory=template.memory,
            share=True,
            console=template.console,
            log=directory / "emulator.log",
        )
        with progress.step("Boot a host and save it"):
            for _ in range(_BOOT_TRIES):
                try:
                    if self._boot_and_save(template, place):
                        break
                except HarnessError as error:
                    # The directory will be gone with all that is in it.
                    logs = self._settings.cache / "logs"
                    logs.mkdir(exist_ok=True)
                    for path in (place.console, place.log):
                        with contextlib.suppress(OSError):
                            shutil.copyfile(path, logs / f"template-{path.name}")
                    error.hint = f"its console is kept as {logs / 'template-console.log'}"
                    raise
            else:
                raise InfraError(
                    f"the clock of a booted host was off in each of {_BOOT_TRIES} tries",
                    hint="the machine is too busy; free it from other work for a minute",
                )
        # The memory was written by the emulator through a mapping; the cache's promise that
        # a named entry is complete must hold after a power failure, too.
        for path in (template.memory, template.state):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _boot_and_save(self, template: _Template, place: Place) -> bool:
        """Fill the template's directory; False if the host's clock turned out unusable."""
        for path in (template.console, place.log, template.memory):
            path.unlink(missing_ok=True)
        emulator = Emulator.start(self._arguments(place, self._options()), place)
        with self._host(emulator, template.directory) as host:
            emulator.open(timeout_s=_START_TIMEOUT_S)
            self._wait_up(host, timeout_s=_BOOT_TIMEOUT_S)
            _warm_up(host)
            if abs(_counter_khz(host) / tsc_khz() - 1) > _CLOCK_TOLERANCE:
                return False
            facts = json.dumps(self._look(host).as_dict(), indent=1)
            (template.directory / "facts.json").write_text(facts + "\n")
            host.check()
            for complaint in complaints_in(host.console.since()):
                progress.note(f"the host's kernel complained while it booted: {complaint.line}")
            emulator.save(template.state)
        return True

    def _options(self, without: Sequence[str] = (), more: Sequence[str] = ()) -> list[str]:
        """The kernel command line of a host that boots now."""
        options = [option for option in KERNEL_OPTIONS if option not in without]
        return [*options, f"tsc_early_khz={tsc_khz()}", *more]

    def _look(self, host: Host) -> MachineFacts:
        """The facts of a booted host, as it tells them."""
        assert self._kernel is not None
        release = host.run("uname -r").text
        npt = host.run("cat /sys/module/kvm_amd/parameters/npt", check=False).text
        qemu = host.run("/opt/qemu/bin/qemu-system-x86_64 --version", check=False)
        if qemu.returncode != 0:
            raise BuildError(
                "the QEMU of the host image does not run in it",
                hint=f"is a library missing in {GUEST_IMAGES / 'host/packages'}?",
                details=qemu.stderr.decode(errors="replace"),
            )
        settings = self._settings
        return MachineFacts(
            target=self.name,
            emulated=True,
            vendor="AMD",
            cpu_model="EPYC",
            cpus=settings.host_cpus,
            memory_mb=settings.host_memory_mb,
            virtualisation=f"SVM, emulated by QEMU TCG {_emulator_version()}",
            nested_paging=npt in ("Y", "1"),
            kernel_release=release,
            kernel_series=self._kernel.series,
            guest_qemu=_version_in(qemu.text),
            machine=f"{_processor()}, {os.cpu_count()} CPUs",
        )

    def facts(self) -> MachineFacts:
        """The facts of the prepared target. See :class:`Target`."""
        return self._prepared().facts()

    def _prepared(self) -> _Template:
        if self._template is None:
            raise UsageError("target tcg is not prepared", hint="call prepare() first")
        return self._template

    # -- hosts ------------------------------------------------------------------------

    def start(
        self,
        *,
        name: str,
        evidence: Path,
        without_options: Sequence[str] = (),
        with_options: Sequence[str] = (),
    ) -> Host:
        """A fresh host that answers commands, restored in about a second. See :class:`Target`.

        With other kernel options than usual it is booted from nothing, in some seconds.
        """
        cold = bool(without_options or with_options)
        template = self._prepared()
        evidence.mkdir(parents=True, exist_ok=True)
        place = Place(
            name=name,
            memory=None if cold else template.memory,
            share=False,
            console=evidence / "console.log",
            log=evidence / "emulator.log",
        )
        argv = self._arguments(place, self._options(without_options, with_options))
        if cold:
            place.console.write_bytes(b"")
            emulator = Emulator.start(argv, place)
        else:
            # What the kernel said while it booted belongs to this host's story, too.
            shutil.copyfile(template.console, place.console)
            emulator = Emulator.start([*argv, "-incoming", "defer"], place)
        host = self._host(emulator, evidence)
        try:
            emulator.open(timeout_s=_START_TIMEOUT_S)
            if cold:
                self._wait_up(host, timeout_s=_BOOT_TIMEOUT_S)
            else:
                emulator.restore(template.state)
                self._wait_up(host, timeout_s=_RESTORE_TIMEOUT_S)
                # Its clock went on from when it was saved.
                host.run(f"date -u -s @{time.time():.3f}")
        except BaseException:
            host.close()
            raise
        return host

    def _host(self, emulator: Emulator, evidence: Path) -> Host:
        assert self._keys is not None
        place = emulator.place
        return Host(
            emulator,
            name=place.name,
            evidence=evidence,
            console=Console(place.console),
            keys=self._keys,
        )

    def _wait_up(self, host: Host, *, timeout_s: float) -> None:
        try:
            host.wait_up(timeout_s=timeout_s)
        except DeadlineError as error:
            error.message = f"host {host.name} did not come up: {error.message}"
            error.details = host.console.tail()
            raise

    def _arguments(self, place: Place, options: Sequence[str]) -> list[str]:
        """The emulator's command line."""
        assert self._kernel is not None
        assert self._images is not None
        settings = self._settings
        memory = f"size={settings.host_memory_mb}M"
        if place.memory is None:
            backend = f"memory-backend-ram,id=memory,{memory}"
        else:
            share = "on" if place.share else "off"
            backend = f"memory-backend-file,id=memory,{memory},share={share}"
            backend += f",mem-path={option_value(place.memory)}"
        drive = "format=raw,if=none,readonly=on"
        return [
            EMULATOR,
            # In the process list: whose host it is.
            "-name", f"kvmi-host-{place.name}",
            # Only what is named here exists, so a saved machine fits the next emulator.
            "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
            # The PC that every kernel knows; no HPET, whose emulation costs much and which
            # nothing needs. Memory comes from the backend below.
            "-machine", "pc,hpet=off,vmport=off,memory-backend=memory",
            "-object", backend,
            # One thread for each CPU. The buffer for translated code takes real memory as
            # it fills; the default of 1 GiB is more than the host itself has.
            "-accel", "tcg,thread=multi,tb-size=256",
            # AMD, because TCG emulates SVM with nested paging; it has no VMX.
            "-cpu", ",".join(["EPYC", "svm=on", "npt=on", *(f"{flag}=off" for flag in _WITHOUT)]),
            "-smp", str(settings.host_cpus),
            "-m", f"{settings.host_memory_mb}M",
            # Direct boot: no boot loader in the image, and any kernel fits any image.
            "-kernel", str(self._kernel.bzimage),
            "-append", " ".join(options),
            # A restart, also the one after a panic, ends the emulator.
            "-no-reboot",
            # /dev/vda: the system. Shared by all hosts, read-only.
            "-drive", f"file={option_value(self._images.host_disk)},{drive},id=system",
            "-device", "virtio-blk-pci,drive=system,addr=5",
            # /dev/vdb: what guests boot. Apart, because it changes with every kernel.
            "-drive", f"file={option_value(self._images.guest_disk)},{drive},id=guest",
            "-device", "virtio-blk-pci,drive=guest,addr=6",
            # User network: the host reaches us at 10.0.2.2. Port 0 lets the system choose a
            # free port for SSH, so no two hosts can ask for the same one.
            "-netdev", "user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:0-10.0.2.15:22",
            # No option ROM: the machine never boots from the network.
            "-device", "virtio-net-pci,netdev=net,romfile=,addr=4",
            # The console, appended to what is there already.
            "-chardev", f"file,id=console,path={option_value(place.console)},append=on",
            "-serial", "chardev:console",
        ]  # fmt: skip


def _warm_up(host: Host) -> None:
    """Have in the host's page cache what every test uses."""
    host.run(
        "python3 -c 'import ctypes, fcntl, json, mmap, select, socket, struct, threading';"
        " /opt/qemu/bin/qemu-system-x86_64 --version; cat /opt/guest/* >/dev/null",
        check=False,
    )


def _counter_khz(host: Host) -> float:
    """What the host's kernel takes for the rate of its counter, once it has settled."""
    host.run(
        "while grep -q early /sys/devices/system/clocksource/clocksource0/current_clocksource;"
        " do sleep 0.1; done",
        timeout_s=_BOOT_TIMEOUT_S,
    )
    found = re.findall(
        r"tsc: (?:Detected|Refined TSC clocksource calibration:) ([\d.]+) MHz", host.console.since()
    )
    return float(found[-1]) * 1000 if found else 0.0


def _emulator_version() -> str:
    """The emulator's version with its packager's, such as ``7.2.22 (Debian 1:7.2+...)``."""
    if shutil.which(EMULATOR) is None:
        raise UsageError(
            f"{EMULATOR} is not installed", hint="`inv doctor` says which package has it"
        )
    return _version_in(output_of([EMULATOR, "--version"]))


def _version_in(text: str) -> str:
    """The version in what ``--version`` prints."""
    return text.partition("\n")[0].replace("QEMU emulator version ", "").strip()


def _processor() -> str:
    """The model of this machine's processor, as the kernel names it."""
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else "unknown processor"
