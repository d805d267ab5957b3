# SPDX-License-Identifier: GPL-2.0-or-later
"""Profiles: one version of the interface each.

A profile is facts only: structs, commands, events, ioctls, errnos, constants. They are read by
:mod:`harness.abi.load`, and the codec that applies them is :mod:`harness.abi.codec`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from harness.abi.layout import Struct
from harness.errors import AbsentError, UsageError

__all__ = ["Command", "Event", "Ioctl", "Profile"]


@dataclass(frozen=True)
class Command:
    """One command that the tool sends.

    ``request`` and ``reply`` are what follows the vCPU header and the error code, None when
    nothing does. ``is_vcpu``: the request begins with a vCPU header, and a vCPU thread handles it.
    ``reply_data`` names the field of the request that tells how many items of data, of
    ``reply_unit`` bytes each, a successful reply carries. ``short`` is what a request shorter
    than its struct meets: "" when it is zero extended, the name of an error, or "close".
    ``errors`` are all errors that the interface names for it, the common ones first.
    ``common`` is its name in v12, which may be called otherwise here.
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
    common: str

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
    ``common`` is its name in v12.
    """

    name: str
    id: int
    is_vcpu: bool
    c_name: str
    payload: Struct | None
    reply: Struct | None
    actions: tuple[str, ...]
    enabling: str
    common: str

    @property
    def controllable(self) -> bool:
        """Whether a CONTROL_EVENTS command switches it on and off."""
        return self.enabling.endswith(("CONTROL_EVENTS", "CONTROL_VM_EVENTS"))


@dataclass(frozen=True)
class Ioctl:
    """One ioctl on the VM's descriptor. ``errors`` in the order of the kernel's checks.

    ``common`` is the name in v12 of the one that means the same.
    """

    name: str
    nr: int
    request: int
    argument: Struct | None
    errors: tuple[str, ...]
    common: str

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

    ``unknown_command`` is what an id that is no command meets, ``unknown_query`` what a query
    for it answers. Of a series that claims less than the version has, ``commands``, ``events``
    and ``ioctls`` are what it claims, and ``whole`` is the version.
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
    unknown_command: str
    unknown_query: str
    constants: Mapping[str, int]
    errno: Mapping[str, int]
    names: Mapping[str, Mapping[str, int]]
    ioctls: Mapping[str, Ioctl]
    commands: Mapping[str, Command]
    events: Mapping[str, Event]
    structs: Mapping[str, Struct]
    whole: Profile | None = None

    def claimed(
        self,
        *,
        capability: int,
        commands: Collection[str],
        events: Collection[str],
        requests: Mapping[str, int],
    ) -> Profile:
        """What a series has of this version, with numbers of its own.

        :param requests: of its ioctls, by name; those that are not there it does not have.
        """
        ioctls = {
            name: replace(self.ioctls[name], request=request, nr=request & 0xFF)
            for name, request in requests.items()
        }
        return replace(
            self,
            capability=capability,
            commands=MappingProxyType({n: c for n, c in self.commands.items() if n in commands}),
            events=MappingProxyType({n: e for n, e in self.events.items() if n in events}),
            ioctls=MappingProxyType(ioctls),
            whole=self,
        )

    @property
    def unclaimed(self) -> tuple[str, ...]:
        """What the version has and the series does not claim: commands, events, ioctls."""
        if self.whole is None:
            return ()
        return (
            *(name for name in self.whole.commands if name not in self.commands),
            *(f"event {name}" for name in self.whole.events if name not in self.events),
            *(f"ioctl {name}" for name in self.whole.ioctls if name not in self.ioctls),
        )

    @functools.cached_property
    def command_by_id(self) -> Mapping[int, Command]:
        """Commands by message id, for reading: also those that are not claimed."""
        return {c.id: c for c in (self.whole or self).commands.values()}

    @functools.cached_property
    def event_by_id(self) -> Mapping[int, Event]:
        """Events by event id, likewise."""
        return {e.id: e for e in (self.whole or self).events.values()}

    @functools.cached_property
    def _names(self) -> tuple[Mapping[str, Any], ...]:
        """Commands, events and ioctls by the names that they have here and in v12.

        Ioctls only by the latter: UNHOOK does something else in v6.
        """
        return (
            {**self.commands, **{c.common: c for c in self.commands.values()}},
            {**self.events, **{e.common: e for e in self.events.values()}},
            {i.common: i for i in self.ioctls.values()},
        )

    def has(self, what: str) -> bool:
        """Whether it has a command, an ``event NAME`` or an ``ioctl NAME`` (v12's names)."""
        kind, _, name = what.rpartition(" ")
        return name in self._names[("", "event", "ioctl").index(kind)]

    @functools.cached_property
    def error_by_number(self) -> Mapping[int, str]:
        """Names of errors by their positive numbers."""
        return {number: name for name, number in self.errno.items()}

    def command(self, which: str | int | Command) -> Command:
        """The command called ``which`` (with or without KVMI_) or numbered so.

        :raises AbsentError: another version has it, or it is not claimed.
        :raises UsageError: there is none.
        """
        if isinstance(which, Command):
            return which
        if isinstance(which, int):
            found: Command | None = self.command_by_id.get(which)
        else:
            which = which.removeprefix("KVMI_")
            found = self._names[0].get(which)
        if found is None:
            raise self._missing("command", which, self.commands)
        return found

    def event(self, which: str | int | Event) -> Event:
        """The event called ``which`` (HYPERCALL, VCPU_HYPERCALL, KVMI_VCPU_EVENT_HYPERCALL) or
        numbered so.

        :raises AbsentError: another version has it, or it is not claimed.
        :raises UsageError: there is none.
        """
        if isinstance(which, Event):
            return which
        if isinstance(which, int):
            found: Event | None = self.event_by_id.get(which)
        else:
            which = _short_event_name(which)
            found = self._names[1].get(which)
        if found is None:
            raise self._missing("event", which, self.events)
        return found

    def ioctl(self, name: str) -> Ioctl:
        """The ioctl that does what v12's of that name does.

        :raises AbsentError: another version has it, or it is not claimed.
        :raises UsageError: there is none.
        """
        found: Ioctl | None = self._names[2].get(name)
        if found is None:
            raise self._missing("ioctl", name, self.ioctls)
        return found

    def _missing(self, kind: str, which: str | int, known: Collection[str]) -> UsageError:
        from harness.abi.load import load_profile, profile_names

        what = f"{kind} {which}".removeprefix("command ")
        if self.whole and self.whole.has(what):
            return AbsentError(f"not claimed: the {kind} {which}")
        if any(load_profile(name).has(what) for name in profile_names()):
            return AbsentError(f"{self.name} has no {kind} {which}")
        return UsageError(f"{self.name} has no {kind} {which}", hint=f"it has: {', '.join(known)}")

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
