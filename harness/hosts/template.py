# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that a QEMU process runs: booted once, saved, and restored again and again.

Targets ``tcg`` and ``kvm`` are this with a processor each. Booting a host takes some
seconds, so it is done once: the booted machine is saved, its memory as a plain file, the
rest as a migration stream. A new host maps that file copy-on-write and loads the rest,
which takes no memory that it does not change, no disk, and a tenth of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.build import cache, progress
from harness.build.run import output_of
from harness.errors import DeadlineError, HarnessError, HostCrashedError, InfraError, UsageError
from harness.hosts.base import AS_USUAL, Boot, MachineFacts
from harness.hosts.console import Console, complaints_in
from harness.hosts.emulator import Emulator, Place, option_value
from harness.hosts.facts import version_in
from harness.hosts.host import Host
from harness.hosts.leaks import forget_leaks
from harness.hosts.ssh import Keys

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.build.kernel import KernelBuild
    from harness.settings import Settings

__all__ = ["EMULATOR", "KERNEL_OPTIONS", "TemplateTarget", "emulator_version"]

EMULATOR = "qemu-system-x86_64"

_START_TIMEOUT_S = 20.0
_RESTORE_TIMEOUT_S = 60.0
_WARM_UP_TIMEOUT_S = 60.0

# How often a host is booted until it is fit to be saved.
_BOOT_TRIES = 4

# What this module does with a booted machine before it saves it; part of the key.
_TEMPLATE_RECIPE = "2"

KERNEL_OPTIONS = (
    # The console goes to the evidence; it shows all that is said from "info" on.
    "console=ttyS0", "loglevel=7",
    # The image, shared by all hosts, so read-only; init puts a tmpfs over it.
    "root=/dev/vda", "rootfstype=ext4", "ro", "init=/opt/host/init",
    # A kernel that oopsed has nothing more to say: end at once, with the report on the
    # console, instead of leaving tests to wait. -no-reboot makes the emulator exit.
    "oops=panic", "panic=-1",
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

    @property
    def usable(self) -> bool:
        """Whether hosts can be restored from it; it has the facts in any case."""
        return self.state.exists()

    def give_up(self, error: HarnessError) -> None:
        """Keep the facts alone: hosts are booted from now on."""
        progress.note(f"hosts cannot be saved here, so each is booted: {error.message}")
        for path in (self.state, self.memory):
            path.unlink(missing_ok=True)

    def facts(self) -> MachineFacts:
        return MachineFacts(**json.loads((self.directory / "facts.json").read_text()))


class TemplateTarget:
    """See the module's text. :meth:`prepare` before anything else.

    A target says what its machines run on: the methods and values of the first part.
    """

    name = ""
    boots = True
    processors: Sequence[str] = ()
    most_memory_mb: int | None = None
    patience = 1.0
    must_save = True
    """Whether a machine that cannot be saved and restored is an error; else each is booted."""

    kernel_options: tuple[str, ...] = KERNEL_OPTIONS
    """The kernel command line, apart from what is known only when a host boots."""

    def processor(self) -> list[str]:
        """QEMU's options for accelerator and processor."""
        raise NotImplementedError

    def check(self) -> None:
        """Find out whether this machine can run such hosts.

        :raises UsageError: it cannot, and what to do about it.
        """

    def boot_options(self) -> list[str]:
        """Kernel options that are found out on this machine, for a host that boots now."""
        return []

    def fit(self, host: Host) -> bool:
        """Whether a booted host came out well enough to be saved and used."""
        return True

    def look(self, host: Host, *, kernel: KernelBuild) -> MachineFacts:
        """The facts of a booted host."""
        raise NotImplementedError

    def identity(self) -> str:
        """What a saved machine depends on, beside emulator, kernel and images."""
        raise NotImplementedError

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        if settings.flavour == "debug":
            self.patience *= 4.0  # what watches each access takes its time
        self._kernel: KernelBuild | None = None
        self._images: Images | None = None
        self._keys: Keys | None = None
        self._template: _Template | None = None

    # -- the template -----------------------------------------------------------------

    def prepare(self, kernel: KernelBuild, images: Images) -> None:
        """Boot a host and save it, unless the cache has it. See :class:`Target`."""
        self.check()
        self._kernel, self._images = kernel, images
        self._keys = Keys(images.keys)
        inputs: dict[str, cache.Input] = {
            "kernel": kernel.key,
            "images": images.key,
            "emulator": emulator_version(),
            "argv": "\0".join(self._arguments(Place.unnamed(), self.kernel_options)),
            "recipe": _TEMPLATE_RECIPE,
            "identity": self.identity(),
        }
        place = cache.entry("template", inputs, self._make_template, root=self.settings.cache)
        self._template = _Template(place)

    def _make_template(self, directory: Path) -> None:
        cache.require_space(
            self.settings.cache, megabytes=self.settings.host_memory_mb, purpose="a saved host"
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
                    logs = self.settings.cache / "logs"
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
        if not self.must_save:
            self._try_restoring(template)
        if not template.usable:
            return
        # The memory was written by the emulator through a mapping; the cache's promise that
        # a named entry is complete must hold after a power failure, too.
        for path in (template.memory, template.state):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _boot_and_save(self, template: _Template, place: Place) -> bool:
        """Fill the template's directory; False if the host turned out not to be fit."""
        for path in (template.console, place.log, template.memory):
            path.unlink(missing_ok=True)
        emulator = Emulator.start(self._arguments(place, self._options()), place)
        with self._host(emulator, template.directory) as host:
            emulator.open(timeout_s=_START_TIMEOUT_S)
            self._wait_up(host, timeout_s=self.settings.boot_s)
            _warm_up(host)
            forget_leaks(host)
            if not self.fit(host):
                return False
            assert self._kernel is not None
            facts = json.dumps(self.look(host, kernel=self._kernel).as_dict(), indent=1)
            (template.directory / "facts.json").write_text(facts + "\n")
            host.check()
            for complaint in complaints_in(host.console.since()):
                progress.note(f"the host's kernel complained while it booted: {complaint.line}")
            try:
                emulator.save(template.state)
            except InfraError as error:
                if self.must_save:
                    raise
                template.give_up(error)
        return True

    def _try_restoring(self, template: _Template) -> None:
        """Find out whether hosts can be had from the template; give it up if not."""
        if not template.usable:
            return
        self._template = template
        try:
            self.start(name="trial", evidence=template.directory / "trial").close()
        except (InfraError, HostCrashedError) as error:
            template.give_up(error)
        finally:
            self._template = None

    def _options(self, without: Sequence[str] = (), more: Sequence[str] = ()) -> list[str]:
        """The kernel command line of a host that boots now."""
        options = [option for option in self.kernel_options if option not in without]
        return [*options, *self.boot_options(), *more]

    def facts(self) -> MachineFacts:
        """The facts of the prepared target. See :class:`Target`."""
        facts = self._prepared().facts()
        assert self._kernel is not None
        # The same patches may have been somewhere else when it was booted and saved.
        return dataclasses.replace(facts, kernel_series=self._kernel.series)

    def _prepared(self) -> _Template:
        if self._template is None:
            raise UsageError(f"target {self.name} is not prepared", hint="call prepare() first")
        return self._template

    # -- hosts ------------------------------------------------------------------------

    def start(
        self,
        *,
        name: str,
        evidence: Path,
        boot: Boot = AS_USUAL,
    ) -> Host:
        """A fresh host that answers commands, restored in about a second. See :class:`Target`.

        If it is to be booted in another way than usual, that takes some seconds.

        :raises UsageError: there is no such processor.
        """
        template = self._prepared()
        if boot.processor:
            raise UsageError(f"target {self.name} has no processor {boot.processor}")
        cold = bool(boot) or not template.usable
        evidence.mkdir(parents=True, exist_ok=True)
        place = Place(
            name=name,
            memory=None if cold else template.memory,
            share=False,
            console=evidence / "console.log",
            log=evidence / "emulator.log",
        )
        argv = self._arguments(place, self._options(boot.without, boot.options))
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
                self._wait_up(host, timeout_s=self.settings.boot_s)
            else:
                emulator.restore(template.state)
                self._wait_up(host, timeout_s=_RESTORE_TIMEOUT_S * self.patience)
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
            host.console.explain(error, host.name)
            raise

    def _arguments(self, place: Place, options: Sequence[str]) -> list[str]:
        """The emulator's command line."""
        assert self._kernel is not None
        assert self._images is not None
        settings = self.settings
        memory = f"size={settings.host_memory_mb}M"
        if place.memory is None:
            backend = f"memory-backend-ram,id=memory,{memory}"
        else:
            share = "on" if place.share else "off"
            backend = f"memory-backend-file,id=memory,{memory},share={share}"
            backend += f",mem-path={option_value(place.memory)}"
        drive = "format=raw,if=none,readonly=on"
        # A kernel that watches itself takes 30 seconds for a method of ACPI's tables under
        # emulation, and then gives up: it has no interrupts from disks.
        acpi = "off" if settings.flavour == "debug" else "on"
        cpus = str(settings.host_cpus)
        if acpi == "off":
            cpus += f",sockets={cpus}"
        return [
            EMULATOR,
            # In the process list: whose host it is.
            "-name", f"kvmi-host-{place.name}",
            # Only what is named here exists, so a saved machine fits the next emulator.
            "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
            # The PC that every kernel knows; no HPET, whose emulation costs much and which
            # nothing needs. Memory comes from the backend below.
            "-machine", f"pc,acpi={acpi},hpet=off,vmport=off,memory-backend=memory",
            "-object", backend,
            *self.processor(),
            # Without ACPI nothing tells of CPUs but the first of a socket.
            "-smp", cpus,
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
        timeout_s=_WARM_UP_TIMEOUT_S * host.patience,
    )


def emulator_version() -> str:
    """The emulator's version with its packager's, such as ``7.2.22 (Debian 1:7.2+...)``."""
    if shutil.which(EMULATOR) is None:
        raise UsageError(
            f"{EMULATOR} is not installed", hint="`inv doctor` says which package has it"
        )
    return version_in(output_of([EMULATOR, "--version"]))
