# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things lie: the repository's rooms, and the cache of what was built.

Everything that is made for reuse goes into one cache directory per user; nothing is
written into the repository or the system. The cache may be deleted at any time when
nothing of ours runs: whatever is missing is made again.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["GUEST_IMAGES", "KERNEL_CONFIG", "ROOT", "cache_dir"]

ROOT = Path(__file__).resolve().parent.parent
"""The repository: recipes, series and tests are read from here."""

KERNEL_CONFIG = ROOT / "kernel-config"
"""Configuration fragments and the patch series of the kernel and of QEMU."""

GUEST_IMAGES = ROOT / "guest-images"
"""Recipes of the host image and of the guest's initramfs."""


def cache_dir() -> Path:
    """The cache of this user: ``$KVMI_CACHE``, else ``kvmi-harness`` in the XDG cache.

    The directory is not made here; whoever writes into it makes it.
    """
    if chosen := os.environ.get("KVMI_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path in the variable is to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "kvmi-harness"
