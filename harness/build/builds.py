# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that hosts need, built together."""

from __future__ import annotations

from dataclasses import dataclass

from harness.build.images import Images, build_images
from harness.build.kernel import KernelBuild, build_kernel
from harness.build.qemu import QemuBuild, build_qemu
from harness.settings import Settings

__all__ = ["Builds", "build_all"]


@dataclass(frozen=True)
class Builds:
    """A kernel and a QEMU, and the images that have them."""

    kernel: KernelBuild
    qemu: QemuBuild
    images: Images


def build_all(settings: Settings) -> Builds:
    """Build what the settings name, as far as the cache does not have it.

    :raises BuildError: something cannot be built.
    """
    kernel = build_kernel(settings)
    qemu = build_qemu(settings)
    return Builds(kernel, qemu, build_images(settings, kernel=kernel, qemu=qemu))
