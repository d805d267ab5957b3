# SPDX-License-Identifier: GPL-2.0-or-later
"""Profiles: one version of the interface each, read from the data file of that name.

A profile is facts only: structs, commands, events, ioctls, errnos, constants. The codec that
applies them is :mod:`harness.abi.codec`.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

import msgspec

from harness.abi.layout import Struct, build_structs
from harness.errors import UsageError

__all__ = ["Command", "Event", "Ioctl", "Profile", "load_profile", "profile_names"]

_IOC_WRITE = 1
_KVMIO = 0xAE
_VCPU_ERRORS = ("KVM_EINVAL", "KVM_EAGAIN")


@dataclass(frozen=True)
class Command:
    """One command that the tool sends.

    ``request`` and ``reply`` are what follows the vCPU header and the error code, None when
    nothing does. ``is_vcpu``: the request begins with a vCPU header, and a vCPU thread handles it.
    ``reply_data`` names the field of the request that tells how many items of data, of
    ``reply_unit`` bytes each, a successful reply carries. ``short`` is what a request shorter
    than its struct meets: "" when it is zero extended, the name of an error, or "close".
    ``errors`` are all errors that the interface names for it, the common ones first.
    """

    name: str
    id: int
    is_vcpu: bool
    request: Struct | None
    reply: Struct | None
    reply_data: str | None
    reply_unit: int
    always_allowed: bool
    short: str
    errors: tuple[str, ...]

    @property
    def c_name(self) -> str:
        """Name in the kernel's header."""
        return f"KVMI_{self.name}"


@dataclass(frozen=True)
class Event:
    """One event that the kernel sends.

    ``payload`` is what follows the common part, ``reply`` what follows the common part of the
    reply; None when nothing does. ``is_vcpu``: a vCPU sends it, and waits for the reply.
    ``actions`` are those that a reply may ask for, empty when the
    event has no reply. ``enabling`` is the command that switches it on, or implies it.
    """

    name: str
    id: int
    is_vcpu: bool
    c_name: str
    payload: Struct | None
    reply: Struct | None
    actions: tuple[str, ...]
    enabling: str

    @property
    def controllable(self) -> bool:
        """Whether a CONTROL_EVENTS command switches it on and off."""
        return self.enabling.endswith(("CONTROL_EVENTS", "CONTROL_VM_EVENTS"))


@dataclass(frozen=True)
class Ioctl:
    """One ioctl on the VM's descriptor. ``errors`` in the order of the kernel's checks."""

    name: str
    nr: int
    request: int
    argument: Struct | None
    errors: tuple[str, ...]

    @property
    def c_name(self) -> str:
        """Name in the kernel's header."""
        return f"KVM_INTROSPECTION_{self.name}"


@dataclass(frozen=True, eq=False)
class Profile:
    """One version of the interface. Mappings are by name and read-only.

    ``vm_event``, ``vcpu_event`` and ``event_reply`` are the ids of the messages that carry
    events and their replies. A vCPU's event is ``event_header`` (None where the interface has
    none, and the common part tells the event), ``event_common``, and the event's own part.
    """

    name: str
    version: int
    capability: int
    byte_order: str
    max_message_size: int
    module_parameter: str
    vm_event: int
    vcpu_event: int
    event_reply: int
    event_header: Struct | None
    event_common: Struct
    event_reply_common: Struct
    constants: Mapping[str, int]
    errno: Mapping[str, int]
    names: Mapping[str, Mapping[str, int]]
    ioctls: Mapping[str, Ioctl]
    commands: Mapping[str, Command]
    events: Mapping[str, Event]
    structs: Mapping[str, Struct]

    @functools.cached_property
    def command_by_id(self) -> Mapping[int, Command]:
        """Commands by message id."""
        return {c.id: c for c in self.commands.values()}

    @functools.cached_property
    def event_by_id(self) -> Mapping[int, Event]:
        """Events by event id."""
        return {e.id: e for e in self.events.values()}

    @functools.cached_property
    def error_by_number(self) -> Mapping[int, str]:
        """Names of errors by their positive numbers."""
        return {number: name for name, number in self.errno.items()}

    def command(self, which: str | int | Command) -> Command:
        """The command called ``which`` (with or without KVMI_) or numbered so.

        :raises UsageError: there is none.
        """
        if isinstance(which, Command):
            return which
        if isinstance(which, int):
            found = self.command_by_id.get(which)
        else:
            found = self.commands.get(which.removeprefix("KVMI_"))
        if found is None:
            raise UsageError(
                f"{self.name} has no command {which}", hint=f"it has: {', '.join(self.commands)}"
            )
        return found

    def event(self, which: str | int | Event) -> Event:
        """The event called ``which`` (HYPERCALL, VCPU_HYPERCALL, KVMI_VCPU_EVENT_HYPERCALL) or
        numbered so.

        :raises UsageError: there is none.
        """
        if isinstance(which, Event):
            return which
        if isinstance(which, int):
            found = self.event_by_id.get(which)
        else:
            found = self.events.get(_short_event_name(which))
        if found is None:
            raise UsageError(
                f"{self.name} has no event {which}", hint=f"it has: {', '.join(self.events)}"
            )
        return found

    def error_name(self, err: int) -> str | None:
        """Name of a reply's ``err``: None for 0, ``errno N`` for one the interface lacks."""
        if err == 0:
            return None
        return self.error_by_number.get(-err, f"errno {-err}")


def _short_event_name(name: str) -> str:
    for prefix in ("KVMI_VCPU_EVENT_", "KVMI_VM_EVENT_", "KVMI_EVENT_", "VCPU_", "VM_"):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


# -- the form of the data file -------------------------------------------------------------------


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


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    c_name: str
    actions: list[str]
    enabling: str
    vcpu: bool | None = None
    payload: str = ""
    reply: str = ""


class _Ioctl(msgspec.Struct, forbid_unknown_fields=True):
    nr: int
    request: int
    errors: list[str]
    argument: str = ""


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
        name: Ioctl(name, i.nr, i.request, find(i.argument), tuple(i.errors))
        for name, i in raw.ioctls.items()
    }
    commands = {
        name: Command(
            name=name,
            id=c.id,
            is_vcpu=_odd(c.id) if c.vcpu is None else c.vcpu,
            request=find(c.request),
            reply=find(c.reply),
            reply_data=c.reply_data or None,
            reply_unit=c.reply_unit,
            always_allowed=c.always_allowed,
            short=c.short,
            errors=_all_errors(c, raw.unknown_command),
        )
        for name, c in raw.commands.items()
    }
    events = {
        name: Event(
            name=name,
            id=e.id,
            is_vcpu=_odd(e.id) if e.vcpu is None else e.vcpu,
            c_name=e.c_name,
            payload=find(e.payload),
            reply=find(e.reply),
            actions=tuple(e.actions),
            enabling=e.enabling,
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


def _odd(id: int) -> bool:
    """In v12, the lowest bit of an id says that it is about a vCPU."""
    return id % 2 == 1


def _all_errors(command: _Command, unknown: str) -> tuple[str, ...]:
    is_vcpu = _odd(command.id) if command.vcpu is None else command.vcpu
    refused = () if command.always_allowed else ("KVM_EPERM",)
    common = (unknown, *refused, *(_VCPU_ERRORS if is_vcpu else ()))
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
