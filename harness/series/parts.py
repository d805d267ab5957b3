# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's part of a series and QEMU's: how each is built and what it is held to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.build import kernel, qemu
from harness.build.sources import Source, linux_source, qemu_source
from harness.conform.selection import KERNEL_SUITES, QEMU_SUITES
from harness.settings import Settings

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """One of the two."""

    name: str
    setting: Literal["kernel_series", "qemu_series"]
    """Which setting names its patches."""
    build: Callable[[Settings], object]
    source: Callable[[Settings], Source]
    patched_source: Callable[[Settings], AbstractContextManager[Path]]
    suites: tuple[str, ...]
    """The tests that its patches are held to: those of the other do not change with them."""
    checkpatch: tuple[str, ...]
    """Options that its own ``checkpatch.pl`` has beside those that both have."""
    untested: tuple[str, ...]
    """Beginnings of the paths of what is neither compiled nor run."""


_PEOPLE = ("MAINTAINERS", "CREDITS", ".mailmap")

PARTS = {
    "kernel": Part(
        name="kernel",
        setting="kernel_series",
        build=kernel.build_kernel,
        source=linux_source,
        patched_source=kernel.patched_source,
        suites=KERNEL_SUITES,
        checkpatch=("--show-types",),
        untested=("Documentation/", *_PEOPLE),
    ),
    "qemu": Part(
        name="qemu",
        setting="qemu_series",
        build=qemu.build_qemu,
        source=qemu_source,
        patched_source=qemu.patched_source,
        suites=QEMU_SUITES,
        checkpatch=(),
        untested=("docs/", *_PEOPLE),
    ),
}
