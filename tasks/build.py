# SPDX-License-Identifier: GPL-2.0-or-later
"""What is built, and with what."""

from __future__ import annotations

import subprocess
from typing import Any

from invoke.context import Context

from harness.settings import Settings, load_settings
from tasks.common import harness_task, ready

__all__ = [
    "build_all",
    "build_clean",
    "build_images",
    "build_kernel",
    "build_packages",
    "build_qemu",
    "build_sources",
    "doctor",
]


@harness_task()
def doctor(_context: Context, target: str | None = None, ssh_host: str | None = None) -> int:
    """Name everything that is missing on this machine, with its fix."""
    from harness.build import doctor as examination

    settings = load_settings(target=target, ssh_host=ssh_host)
    findings = examination.examine_machine(settings)
    examination.show(findings, title="This machine")
    findings += _look_at_kept_host(settings)
    if settings.ssh_host:
        found = examination.examine_remote(settings)
        examination.show(found, title=f"\n{settings.ssh_host}")
        findings += found
    return examination.exit_code(findings)


def _look_at_kept_host(settings: Settings) -> list[Any]:
    from harness.build import doctor as examination
    from harness.keep import kept

    record = kept(settings)
    if record is None or not record.host:
        return []

    def run(command: str) -> subprocess.CompletedProcess[bytes]:
        argv = [*record.host, command]
        return subprocess.run(argv, capture_output=True, check=False, timeout=60)

    findings = examination.examine_host(
        run, settings=settings, qemu="/opt/qemu/bin/qemu-system-x86_64"
    )
    examination.show(findings, title="\nThe kept host")
    return findings


@harness_task("kernel")
def build_kernel(
    _context: Context,
    kernel_series: str | None = None,
    kernel_base: str | None = None,
    flavour: str | None = None,
) -> None:
    """Build the kernel of the series."""
    from harness.build.kernel import build_kernel as build

    built = build(ready(kernel_series=kernel_series, kernel_base=kernel_base, flavour=flavour))
    print(f"{built.release}, {built.series}: {built.bzimage}")


@harness_task("qemu")
def build_qemu(
    _context: Context, qemu_series: str | None = None, qemu_base: str | None = None
) -> None:
    """Build the QEMU of the series."""
    from harness.build.qemu import build_qemu as build

    built = build(ready(qemu_series=qemu_series, qemu_base=qemu_base))
    print(f"QEMU {built.version}, {built.series}: {built.binary}")


def _build_images(**options: Any) -> None:
    from harness.build import builds

    images = builds.build_all(ready(**options)).images
    print(f"host {images.host_disk}, guest {images.guest_initrd}")


@harness_task("images")
def build_images(
    _context: Context,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    flavour: str | None = None,
) -> None:
    """Build the images of host and guest, and the kernel and QEMU in them."""
    _build_images(kernel_series=kernel_series, qemu_series=qemu_series, flavour=flavour)


@harness_task("packages")
def build_packages(_context: Context) -> None:
    """Install the Debian packages that the project's own tests need, those of a run included."""
    from harness.build.packages import BROWSER_PACKAGES, PACKAGES, ensure_packages

    log = load_settings().cache / "logs" / "packages.log"
    ensure_packages(log, (*PACKAGES, *BROWSER_PACKAGES))


@harness_task("all", default=True)
def build_all(_context: Context) -> None:
    """Build everything that a run needs."""
    _build_images()


@harness_task("sources")
def build_sources(_context: Context) -> None:
    """Fetch the newest sources of kernel and QEMU; what the cache has is used otherwise."""
    from harness.build import sources

    settings = ready()
    for package in (sources.LINUX_PACKAGE, sources.QEMU_PACKAGE):
        source = sources.fetch(settings, package)
        print(f"{source.name} {source.version}")


@harness_task("clean")
def build_clean(_context: Context, days: int = 7) -> None:
    """Delete what the cache holds and nobody used lately."""
    from harness.build.cache import clean

    settings = load_settings()
    print(f"{clean(settings.cache, unused_days=days)} entries deleted from {settings.cache}")
