# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the description of a series from the headers that it adds, and compare with the ABI data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.abi import Profile, Struct, load_profile, profile_names
from harness.build.series import Series, load_series
from harness.errors import UsageError
from harness.series.description import Description, to_toml
from harness.series.headers import CStruct, Headers, read_headers

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["Described", "derive", "describe"]

_UAPI = re.compile(r"(?:include/uapi|arch/x86/include/uapi)/(?P<header>\S+\.h)")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_IOCTL = "KVM_INTROSPECTION_"
_CAPABILITY = "KVM_CAP_INTROSPECTION"
# Others belong to KVM itself, and are there without the series.
_OWN_STRUCTS = ("kvmi_", "kvm_introspection")
_EVENT = re.compile(r"KVMI_(?:VM_|VCPU_)?EVENT_(?!ACTION_|REPLY)\w+")
# Ids of the messages that carry events, and names that mark the ends of a list.
_NO_COMMAND = re.compile(r"KVMI_(?:\w*_)?EVENT(?:_REPLY)?|\w+_(?:FIRST|NEXT|NUM|LAST|MAX)_\w+")


@dataclass(frozen=True)
class Described:
    """A description, and where the headers differ from the ABI data of its revision."""

    description: Description
    differences: tuple[str, ...]


def describe(settings: Settings, *, output: Path | None = None) -> int:
    """Describe the kernel series of the settings: print it, or write it to ``output``.

    :returns: 0: differences are no error, since a series may well be ahead of the data.
    :raises UsageError: the series adds no introspection headers, or none that compile.
    :raises PatchError: a patch does not apply.
    """
    from harness.build.kernel import patched_source

    series = load_series(settings.kernel_series)
    with patched_source(settings) as src:
        found = derive(series, [src / "include/uapi", src / "arch/x86/include/uapi"])
    if output is None:
        print(to_toml(found.description))
    else:
        output.write_text(to_toml(found.description))
        print(f"written to {output}")
    name = found.description.revision
    for line in found.differences:
        print(f"differs: {line}")
    print(f"{len(found.differences) or 'no'} differences from the ABI data of {name}")
    return 0


def derive(series: Series, include: list[Path]) -> Described:
    """The description that follows from the headers in ``include``, to which ``series`` added.

    :raises UsageError: there is no command in them, or they cannot be compiled.
    """
    added, headers = _added(series)
    facts = read_headers(include, sorted(headers), macros=added)
    constants = {name: value for name, value in facts.constants.items() if name in added}
    commands = _commands(facts, constants)
    events = {name: value for name, value in constants.items() if _EVENT.fullmatch(name)}
    if not commands or _CAPABILITY not in constants:
        raise UsageError(
            f"the series {series.id} adds no introspection interface to the headers for user space",
            hint=f"looked for KVMI_GET_VERSION and {_CAPABILITY} in: "
            + (", ".join(sorted(headers)) or "no header at all"),
        )
    profile = max(map(load_profile, profile_names()), key=lambda p: _likeness(p, commands | events))
    ioctls = {n.removeprefix(_IOCTL): v for n, v in constants.items() if n.startswith(_IOCTL)}
    description = Description(
        revision=profile.name,
        capability=constants[_CAPABILITY],
        config=sorted(f"CONFIG_{option}" for option in series.options()),
        commands=[c.name for c in profile.commands.values() if c.c_name in commands],
        events=[e.name for e in profile.events.values() if e.c_name in events],
        ioctls={name: ioctls[name] for name in profile.ioctls if name in ioctls},
    )
    structs = {
        name: one
        for name, one in facts.structs.items()
        if name in added and name.startswith(_OWN_STRUCTS)
    }
    differences = [
        *_capability(profile, description),
        *_numbers("command", {c.c_name: c.id for c in profile.commands.values()}, commands),
        *_numbers("event", {e.c_name: e.id for e in profile.events.values()}, events),
        *_numbers(
            "ioctl",
            {i.c_name: i.request for i in profile.ioctls.values()},
            {f"{_IOCTL}{name}": value for name, value in ioctls.items()},
        ),
        *_layouts(profile, structs),
    ]
    return Described(description, tuple(differences))


def _added(series: Series) -> tuple[set[str], set[str]]:
    """Identifiers in added lines of headers for user space, and these headers."""
    names: set[str] = set()
    headers: set[str] = set()
    for patch in series.patches:
        for file in re.split(r"^diff --git ", patch.content.decode(errors="replace"), flags=re.M):
            path = re.search(r"^\+\+\+ b/(\S+)", file, re.MULTILINE)
            if path and (found := _UAPI.fullmatch(path[1])):
                headers.add(found["header"])
                for line in file.splitlines():
                    if line.startswith("+") and not line.startswith("+++"):
                        names.update(_IDENTIFIER.findall(line))
    return names, headers


def _commands(facts: Headers, constants: dict[str, int]) -> dict[str, int]:
    """Constants that are commands: known ones, and what is listed together with them."""
    known = {
        command.c_name
        for name in profile_names()
        for command in load_profile(name).commands.values()
    }
    lists = [members for members in facts.enums if known.intersection(members)]
    names = known.union(*lists)
    return {
        name: value
        for name, value in constants.items()
        if name in names and (name in known or not _NO_COMMAND.fullmatch(name))
    }


def _likeness(profile: Profile, found: dict[str, int]) -> int:
    """How many names the profile has with these very numbers."""
    has = {c.c_name: c.id for c in profile.commands.values()}
    has |= {e.c_name: e.id for e in profile.events.values()}
    return len(has.items() & found.items())


def _capability(profile: Profile, found: Description) -> Iterator[str]:
    if found.capability != profile.capability:
        yield f"{_CAPABILITY} is {found.capability}, {profile.name} has {profile.capability}"


def _numbers(what: str, known: dict[str, int], found: dict[str, int]) -> Iterator[str]:
    for name, value in known.items():
        if name not in found:
            yield f"{what} {name} is not in the headers"
        elif found[name] != value:
            yield f"{what} {name} is {found[name]:#x}, expected {value:#x}"
    for name in found.keys() - known.keys():
        yield f"{what} {name} ({found[name]:#x}) is not in the ABI data"


def _layouts(profile: Profile, found: dict[str, CStruct]) -> Iterator[str]:
    for layout in profile.structs.values():
        if not layout.name.startswith(_OWN_STRUCTS):
            continue
        one = found.get(layout.name)
        if one is None:
            yield f"struct {layout.name} is not in the headers"
        else:
            yield from _layout(layout, one)
    for name in sorted(found.keys() - profile.structs.keys()):
        yield f"struct {name} ({found[name].size} bytes) is not in the ABI data"


def _layout(layout: Struct, one: CStruct) -> Iterator[str]:
    if one.size != layout.size:
        yield f"struct {layout.name} has {one.size} bytes, expected {layout.size}"
    has = {member.name: (member.offset, member.size) for member in one.fields}
    due = {field.name: (field.offset, field.size) for field in layout.fields}
    for name, place in due.items():
        if name not in has:
            yield f"struct {layout.name} has no member {name}"
        elif has[name] != place:
            yield (
                f"struct {layout.name}: {name} is at {_place(has[name])}, expected {_place(place)}"
            )
    for name in (name for name in has if name not in due):
        yield f"struct {layout.name}: {name} at {_place(has[name])} is not in the ABI data"


def _place(place: tuple[int, int]) -> str:
    return f"{place[0]} ({place[1]} bytes)"
