# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian packages that the whole way needs, and how to get them.

Names hold for Debian 12 and 13. A package counts as there when what we use of it is
there: somebody may have built his own QEMU or compiler, and that is fine.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.build.progress import step
from harness.build.run import run_logged
from harness.errors import BuildError, UsageError
from harness.settings import Settings

__all__ = [
    "BOCHS_BUILD_PACKAGES",
    "BOCHS_PACKAGES",
    "BROWSER_PACKAGES",
    "PACKAGES",
    "Package",
    "apt_line",
    "ensure_packages",
    "find_firmware",
    "missing_packages",
    "packages_for",
]

_TIMEOUT_S = 1800
_LIBRARIES = "/usr/lib/x86_64-linux-gnu"

# Debian 12 keeps the ROMs of network cards apart.
_FIRMWARE_PLACES = ("/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu")


def find_firmware(name: str) -> Path | None:
    """Where Debian's packages of firmware have the file ``name``; None if nowhere."""
    places = (Path(place) / name for place in _FIRMWARE_PLACES)
    return next((path for path in places if path.is_file()), None)


@dataclass(frozen=True)
class Package:
    """A Debian package, why it is needed, and what shows that it is there."""

    name: str
    proof: str
    """A program's name, an absolute path, ``module:NAME`` of Python, or ``firmware:FILE``."""
    reason: str

    def present(self) -> bool:
        """Whether what we use of it is on this machine."""
        if self.proof.startswith("module:"):
            return importlib.util.find_spec(self.proof.removeprefix("module:")) is not None
        if self.proof.startswith("firmware:"):
            return find_firmware(self.proof.removeprefix("firmware:")) is not None
        if self.proof.startswith("/"):
            return Path(self.proof).exists()
        # Programs of the administrator's directories need not be in a user's PATH.
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        return shutil.which(self.proof, path=path) is not None


PACKAGES = (
    # Fetching, unpacking, patching.
    Package("ca-certificates", "/etc/ssl/certs/ca-certificates.crt", "archives over HTTPS"),
    Package("dpkg-dev", "dpkg-source", "unpacks QEMU's source package"),
    Package("git", "git", "applies the series"),
    Package("xz-utils", "xz", "unpacks the kernel's source"),
    # Compilers.
    Package("gcc", "gcc", "compiles kernel, QEMU and guest programs"),
    Package("make", "make", "builds the kernel"),
    Package("libc6-dev", f"{_LIBRARIES}/libc.a", "headers; guest programs are linked statically"),
    Package("binutils", "objcopy", "assembles the guests' machine code"),
    # The kernel.
    Package("bc", "bc", "kernel build: time constants"),
    Package("bison", "bison", "kernel build: its configuration language"),
    Package("flex", "flex", "kernel build: its configuration language"),
    Package("libelf-dev", "/usr/include/gelf.h", "kernel build: objtool"),
    Package("lz4", "lz4", "kernel build: packs the kernel"),
    # QEMU.
    Package("pkg-config", "pkg-config", "QEMU build: finds libraries"),
    Package("python3-venv", "module:ensurepip", "QEMU build: meson in an environment of its own"),
    Package("libglib2.0-dev", f"{_LIBRARIES}/pkgconfig/glib-2.0.pc", "QEMU build"),
    Package("zlib1g-dev", "/usr/include/zlib.h", "QEMU build"),
    Package("libfdt-dev", "/usr/include/libfdt.h", "QEMU build: x86 machines ask for it"),
    Package("libslirp-dev", "/usr/include/slirp/libslirp.h", "QEMU build: the guests' network"),
    # Firmware of the guests.
    Package("seabios", "firmware:bios-256k.bin", "firmware of the guests"),
    Package("ipxe-qemu", "firmware:efi-virtio.rom", "firmware of network cards"),
    Package("qemu-system-data", "firmware:linuxboot_dma.bin", "boots a kernel directly"),
    # Hosts.
    Package("qemu-system-x86", "qemu-system-x86_64", "emulates the hosts"),
    Package("mmdebstrap", "mmdebstrap", "makes the host image"),
    Package("e2fsprogs", "mke2fs", "writes the host image"),
    Package("uidmap", "newuidmap", "makes the host image without root"),
    Package("openssh-client", "ssh", "logs a person in to a kept host"),
    Package("util-linux", "setpriv", "ends what we started when we are killed"),
)

BOCHS_PACKAGES = (
    # Which of its displays is installed does not matter: the one we use is in bochs itself.
    Package("bochs", "bochs-bin", "emulates hosts of target bochs"),
    Package("bochsbios", "/usr/share/bochs/BIOS-bochs-latest", "firmware of target bochs"),
    Package("vgabios", "/usr/share/vgabios/vgabios.bin", "firmware of target bochs"),
)
"""What target ``bochs`` needs beside the others."""

BOCHS_BUILD_PACKAGES = (
    *BOCHS_PACKAGES[1:],
    Package("g++", "g++", "compiles Bochs"),
)
"""What it needs if Bochs is built from source."""

BROWSER_PACKAGES = (
    Package("chromium", "chromium", "shows the pages of reports to the tests"),
    Package("chromium-driver", "chromedriver", "lets the tests use it"),
)
"""What the tests of the reports' pages need."""


def packages_for(settings: Settings) -> tuple[Package, ...]:
    """All packages that a run with these settings needs."""
    if settings.target != "bochs":
        return PACKAGES
    return PACKAGES + (BOCHS_BUILD_PACKAGES if settings.bochs == "built" else BOCHS_PACKAGES)


def missing_packages(packages: Iterable[Package] = PACKAGES) -> list[Package]:
    """Those of ``packages`` of which nothing is here."""
    return [package for package in packages if not package.present()]


def apt_line(packages: Iterable[Package]) -> str:
    """The one line that installs ``packages``, for a person to type."""
    names = " ".join(sorted(package.name for package in packages))
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get update && {sudo}apt-get install -y --no-install-recommends {names}"


def ensure_packages(log: Path, packages: Iterable[Package] = PACKAGES) -> None:
    """Install what is missing, if we may: as root, or by a sudo that asks no password.

    :param log: where apt's output goes.
    :raises UsageError: we may not; its hint is the line to type.
    :raises BuildError: apt could not.
    """
    missing = missing_packages(packages)
    if not missing:
        return
    names = sorted(package.name for package in missing)
    prefix = _privilege()
    if prefix is None:
        raise UsageError(
            f"Debian packages are missing: {', '.join(names)}",
            hint=f"type this, then start again: {apt_line(missing)}",
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    with step(f"Install {len(missing)} Debian packages") as progress:

        def show(line: str) -> None:
            progress.update(doing=line.strip())

        def apt(*arguments: str) -> None:
            # sudo starts with an environment of its own, so it is told ours once more.
            variable = "DEBIAN_FRONTEND=noninteractive"
            run_logged(
                [*prefix, *([variable] if prefix else []), "apt-get", "-q", *arguments],
                cwd=Path("/"),
                log=log,
                timeout_s=_TIMEOUT_S,
                env=environment,
                what="apt-get " + arguments[0],
                on_line=show,
            )

        install = ("install", "-y", "--no-install-recommends", *names)
        try:
            apt(*install)
        except BuildError:
            # Lists that were never fetched, or are older than the archive.
            apt("update")
            apt(*install)
    if still := missing_packages(missing):
        proofs = ", ".join(f"{package.name} ({package.proof})" for package in still)
        raise BuildError(
            f"installed, yet what we need of them is not there: {proofs}",
            hint=f"does this machine run Debian 12 or 13 on x86-64? Log: {log}",
        )


def _privilege() -> list[str] | None:
    """What to put before a command that root must run; None if we cannot."""
    if os.geteuid() == 0:
        return []
    if (sudo := shutil.which("sudo")) is None:
        return None
    return [sudo, "-n"] if _succeeds([sudo, "-n", "true"], os.environ) else None


def _succeeds(argv: list[str], env: Mapping[str, str]) -> bool:
    done = subprocess.run(argv, env=env, capture_output=True, check=False, timeout=30)
    return done.returncode == 0
