# SPDX-License-Identifier: GPL-2.0-or-later
"""A cache for what passes: what is made of a kernel or QEMU that nobody will want again.

A saved host takes a gigabyte, and whoever judges dozens of them needs each of them once.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["passing_cache"]

_PASSING = {
    "kernel": (
        "kernel", "initrd", "host-disk", "guest-disk", "template", "bochs-host", "bochs-medium",
    ),
    "qemu": ("qemu", "host-disk", "template"),
}  # fmt: skip
"""Kinds of the cache that depend on it."""


def passing_cache(usual: Path, place: Path, *, of: str = "kernel") -> Path:
    """Make ``place`` a cache that shares with ``usual`` all but what depends on one series.

    :param place: a directory below ``usual``; delete it after use.
    :param of: which series it is, ``kernel`` or ``qemu``.
    :raises OSError: it cannot be written.
    """
    place.mkdir(parents=True, exist_ok=True)
    inside = place.relative_to(usual).parts[0]
    for kind in usual.iterdir():
        link = place / kind.name
        if kind.is_dir() and kind.name not in (*_PASSING[of], inside) and not link.exists():
            link.symlink_to(kind)
    return place
