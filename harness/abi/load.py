# SPDX-License-Identifier: GPL-2.0-or-later
"""Profiles, read from the data files of their names."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from types import MappingProxyType

import msgspec

from harness.abi.layout import Struct, build_structs
from harness.abi.profile import Command, Event, Ioctl, Profile
from harness.errors import UsageError

__all__ = ["load_profile", "profile_names"]

_IOC_WRITE = 1
_KVMIO = 0xAE
_VCPU_ERRORS = ("KVM_EINVAL", "KVM_EAGAIN")


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    request: str = ""
    reply: str = ""
    reply_data: str = ""
    reply_unit: int = 1
    vcpu: bool | None = None
    always_allowed: bool = False
    short: str = ""
    errors: list[str] = []
    common: str = ""


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    c_name: str
    actions: list[str]
    enabling: str
    vcpu: bool | None = None
    payload: str = ""
    reply: str = ""
    common: str = ""


class _Ioctl(msgspec.Struct, forbid_unknown_fields=True):
    nr: int
    request: int
    errors: list[str]
    argument: str = ""
    common: str = ""


class _Struct(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    fields: list[str]
    lax_padding: bool = False


class _File(msgspec.Struct, forbid_unknown_fields=True):
    abi: str
    version: int
    capability: int
    byte_order: str
    max_message_size: int
    module_parameter: str
    vm_event: int
    vcpu_event: int
    event_reply: int
    event_header: str
    event_common: str
    event_reply_common: str
    unknown_command: str
    unknown_query: str
    constants: dict[str, int]
    errno: dict[str, int]
    names: dict[str, dict[str, int]]
    ioctls: dict[str, _Ioctl]
    commands: dict[str, _Command]
    events: dict[str, _Event]
    structs: dict[str, _Struct]


def profile_names() -> list[str]:
    """Names of the profiles that this package carries."""
    found = (p.name for p in resources.files(__package__).iterdir())
    return sorted(
        n.removesuffix(".toml") for n in found if n.startswith("v") and n.endswith(".toml")
    )


@functools.cache
def load_profile(name: str = "v12") -> Profile:
    """The profile of that name, read once.

    :raises UsageError: no such profile, or its data contradict themselves.
    """
    if name not in profile_names():
        raise UsageError(
            f"there is no ABI profile {name!r}", hint=f"there are: {', '.join(profile_names())}"
        )
    text = resources.files(__package__).joinpath(f"{name}.toml").read_text()
    try:
        raw = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"ABI profile {name}: {error}") from error
    return _profile(raw)


def _profile(raw: _File) -> Profile:
    structs = build_structs({n: (s.size, s.lax_padding, s.fields) for n, s in raw.structs.items()})

    def find(name: str) -> Struct | None:
        if name and name not in structs:
            raise UsageError(f"ABI profile {raw.abi}: there is no struct {name}")
        return structs[name] if name else None

    for needed in (raw.event_common, raw.event_reply_common):
        find(needed)

    ioctls = {
        name: Ioctl(name, i.nr, i.request, find(i.argument), tuple(i.errors), i.common or name)
        for name, i in raw.ioctls.items()
    }
    commands = {
        name: Command(
            name=name,
            id=c.id,
            is_vcpu=_is_vcpu(c),
            request=find(c.request),
            reply=find(c.reply),
            reply_data=c.reply_data or None,
            reply_unit=c.reply_unit,
            always_allowed=c.always_allowed,
            short=c.short,
            errors=_all_errors(c, raw.unknown_command),
            common=c.common or name,
        )
        for name, c in raw.commands.items()
    }
    events = {
        name: Event(
            name=name,
            id=e.id,
            is_vcpu=_is_vcpu(e),
            c_name=e.c_name,
            payload=find(e.payload),
            reply=find(e.reply),
            actions=tuple(e.actions),
            enabling=e.enabling,
            common=e.common or name,
        )
        for name, e in raw.events.items()
    }
    profile = Profile(
        name=raw.abi,
        version=raw.version,
        capability=raw.capability,
        byte_order=raw.byte_order,
        max_message_size=raw.max_message_size,
        module_parameter=raw.module_parameter,
        vm_event=raw.vm_event,
        vcpu_event=raw.vcpu_event,
        event_reply=raw.event_reply,
        event_header=find(raw.event_header),
        event_common=structs[raw.event_common],
        event_reply_common=structs[raw.event_reply_common],
        unknown_command=raw.unknown_command,
        unknown_query=raw.unknown_query,
        constants=MappingProxyType(raw.constants),
        errno=MappingProxyType(raw.errno),
        names=MappingProxyType(raw.names),
        ioctls=MappingProxyType(ioctls),
        commands=MappingProxyType(commands),
        events=MappingProxyType(events),
        structs=MappingProxyType(structs),
    )
    _check(profile)
    return profile


def _is_vcpu(raw: _Command | _Event) -> bool:
    """What the tables say; where they do not, v12's rule: the lowest bit of the id says it."""
    return raw.id % 2 == 1 if raw.vcpu is None else raw.vcpu


def _all_errors(command: _Command, unknown: str) -> tuple[str, ...]:
    refused = () if command.always_allowed else ("KVM_EPERM",)
    common = (unknown, *refused, *(_VCPU_ERRORS if _is_vcpu(command) else ()))
    return tuple(dict.fromkeys((*common, *command.errors)))


def _check(profile: Profile) -> None:
    """:raises UsageError: ids, names or request values that do not fit together."""
    faults = []
    for command in profile.commands.values():
        if command.name.startswith("VM_" if command.is_vcpu else "VCPU_"):
            faults.append(f"command {command.name} must not have id {command.id}")
        faults += [
            f"{command.name}: no error {e}" for e in command.errors if e not in profile.errno
        ]
    for event in profile.events.values():
        if event.c_name.startswith("KVMI_VM_" if event.is_vcpu else "KVMI_VCPU_"):
            faults.append(f"event {event.name} must not have id {event.id}")
    for ioctl in profile.ioctls.values():
        size = ioctl.argument.size if ioctl.argument else 0
        direction = _IOC_WRITE if size else 0
        request = direction << 30 | size << 16 | _KVMIO << 8 | ioctl.nr
        if request != ioctl.request:
            faults.append(f"ioctl {ioctl.name} should have request {request:#x}")
    for what, found in (("command", profile.command_by_id), ("event", profile.event_by_id)):
        if len(found) != len(profile.commands if what == "command" else profile.events):
            faults.append(f"two {what}s share an id")
    if faults:
        raise UsageError(f"ABI profile {profile.name}: {'; '.join(faults)}")
