# SPDX-License-Identifier: GPL-2.0-or-later
"""Which target a run uses: the one that was asked for, or the best of this machine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from harness.hosts.seen import Nature, Seen, look_here

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["AUTO", "Choice", "best", "choose", "settled"]

AUTO = "auto"
"""The setting that leaves the choice to us."""


class Choice(NamedTuple):
    """A target, and why it."""

    target: str
    reason: str


def best(seen: Seen) -> Choice:
    """The best target of a machine that was looked at.

    Nested virtualisation on a processor comes first; with an emulated processor it would be
    an emulated processor all the same, and slower.
    """
    if obstacle := seen.obstacle():
        return Choice("tcg", f"hosts are emulated: {obstacle.reason}")
    if seen.nature is Nature.EMULATED:
        return Choice("tcg", f"hosts are emulated, as is this machine itself: {seen.describe()}")
    return Choice("kvm", f"{seen.extension} with {seen.paging}, nested; {seen.describe()}")


def choose(settings: Settings) -> Choice:
    """The target of ``settings``; this machine is looked at if they leave it open."""
    if settings.target != AUTO:
        return Choice(settings.target, "asked for")
    return best(look_here())


def settled(settings: Settings) -> tuple[Settings, Choice]:
    """Settings that name their target, for all processes of a run, and why it is that one."""
    choice = choose(settings)
    workers = 1 if choice.target == "ssh" else settings.workers  # there is one machine
    return dataclasses.replace(settings, target=choice.target, workers=workers), choice
