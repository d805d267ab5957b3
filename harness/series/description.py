# SPDX-License-Identifier: GPL-2.0-or-later
"""What a series speaks, in a small TOML file: ``series.toml`` beside its patches.

::

    revision = "v12"                 # the version of the interface: a profile of harness/abi
    capability = 999                 # KVM_CAP_INTROSPECTION
    config = ["CONFIG_KVM_INTROSPECTION"]
    commands = ["GET_VERSION", …]    # what it claims to have, by the profile's names
    events = ["UNHOOK", …]
    [ioctls]
    HOOK = 0x4018aec8                # request values

These numbers are used instead of the profile's wherever something runs, and what is not
claimed is not tested. Descriptions of the published series come with this package.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import tomllib
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness import paths
from harness.abi import Profile, load_profile, profile_names
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = [
    "FILE_NAME",
    "Description",
    "description_of",
    "found_beside",
    "interface",
    "load_description",
    "shipped",
    "to_toml",
]

FILE_NAME = "series.toml"
_OWN = "linux-6.12"


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a series speaks; see the top of this module."""

    revision: str
    capability: int
    config: list[str]
    commands: list[str]
    events: list[str]
    ioctls: dict[str, int]

    @property
    def profile(self) -> Profile:
        """The interface's version, with these numbers and what is claimed of it."""
        return load_profile(self.revision).claimed(
            capability=self.capability,
            commands=self.commands,
            events=self.events,
            requests=self.ioctls,
        )


def shipped() -> list[str]:
    """Names of the descriptions that come with this package."""
    found = (entry.name for entry in resources.files(__package__).iterdir())
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def found_beside(series: Path) -> str:
    """Where the series in that directory is described, for :func:`load_description`; empty if
    nobody wrote a description."""
    if (series / FILE_NAME).is_file():
        return str(series / FILE_NAME)
    return _OWN if series == paths.KERNEL_CONFIG / "linux" else ""


def description_of(settings: Settings) -> Description | None:
    """What the kernel series of the settings says of itself; None if nothing.

    :raises UsageError: it is wrong, as of :func:`load_description`.
    """
    which = settings.description or found_beside(Path(settings.kernel_series))
    return load_description(which) if which else None


def interface(settings: Settings) -> Profile:
    """The interface that the kernel series of the settings is held to.

    That which its description claims; but the whole of a version that the settings demand and
    the description does not have.

    :raises UsageError: the description is wrong, or there is no such version.
    """
    description = description_of(settings)
    if description and settings.abi in ("", description.revision):
        return description.profile
    return load_profile(settings.abi or "v12")


@functools.cache
def load_description(which: str) -> Description:
    """Read a description: a file's path, or the name of one of :func:`shipped`. Once.

    :raises UsageError: no such file or name; or a key, value or name in it that is wrong. The
        message names the file and what is wrong in it.
    """
    if which in shipped():
        text = resources.files(__package__).joinpath(f"{which}.toml").read_text()
    else:
        try:
            text = Path(which).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the description {which} cannot be read: {error}",
                hint=f"name a file, or one that comes with this package: {', '.join(shipped())}",
            ) from error
    try:
        description = msgspec.convert(tomllib.loads(text), Description)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            f"the description {which} is wrong: {error}",
            hint="`inv series.describe` makes one from the headers of a series",
        ) from error
    if faults := _faults(description):
        raise UsageError(
            f"the description {which} is wrong: {'; '.join(faults)}",
            hint="names are those of the profile, in harness/abi",
        )
    return description


def _faults(one: Description) -> list[str]:
    if one.revision not in profile_names():
        return [f"revision is {one.revision!r}, not one of {', '.join(profile_names())}"]
    profile = load_profile(one.revision)
    faults = [
        *_strangers("commands", one.commands, profile.commands),
        *_strangers("events", one.events, profile.events),
        *_strangers("ioctls", list(one.ioctls), profile.ioctls),
    ]
    faults += [
        f"config: {symbol!r} is no CONFIG_… symbol"
        for symbol in one.config
        if not re.fullmatch(r"CONFIG_[A-Z0-9_]+", symbol)
    ]
    if one.capability <= 0:
        faults.append(f"capability is {one.capability}")
    return faults


def _strangers(key: str, names: list[str], known: Collection[str]) -> list[str]:
    faults = []
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            faults.append(f"{key}: {name} is there {names.count(name)} times")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            faults.append(f"{key}: {name} is unknown" + (f" ({near[0]}?)" if near else ""))
    return faults


def to_toml(one: Description) -> str:
    """The text of the file."""

    def several(names: list[str]) -> str:
        line = json.dumps(names)
        if len(line) <= 80:
            return line
        return "[\n" + "".join(f"  {json.dumps(name)},\n" for name in names) + "]"

    lines = [
        f"revision = {json.dumps(one.revision)}",
        f"capability = {one.capability}",
        f"config = {several(one.config)}",
        f"commands = {several(one.commands)}",
        f"events = {several(one.events)}",
        "",
        "[ioctls]",
        *(f"{name} = {value:#x}" for name, value in one.ioctls.items()),
    ]
    return "\n".join(lines) + "\n"
