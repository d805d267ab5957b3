# SPDX-License-Identifier: GPL-2.0-or-later
"""The inventory: a TOML file with one ``[[machine]]`` for each machine of the fleet.

::

    [[machine]]
    name = "epyc"                       # in reports
    address = "root@epyc.example:22"    # or a name of ~/.ssh/config
    switch = "kexec"                    # how it gets the kernel under test

What else may be said is in :class:`Machine`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from harness.errors import UsageError
from harness.hosts.address import Address

__all__ = ["Machine", "load_inventory", "read_toml"]

_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
_Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=7200)]


class Machine(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One machine, as its owner describes it."""

    name: _Name
    address: str
    """``user@name:port``, or a name of ``~/.ssh/config``. The user has to be root there."""
    identity: str = ""
    """The file of the key that it lets in; by default what ``ssh`` would take."""
    known_hosts: str = ""
    """A file with the machine's own key, besides the user's."""
    switch: Literal["kexec", "boots-itself"] = "boots-itself"
    """How it gets the kernel under test: we start it there, or somebody else does."""
    command: str = ""
    """With ``boots-itself``: a command of this machine here that makes that machine boot the
    kernel; empty if it runs it already. The image is ``$KVMI_KERNEL``."""
    initrd: str = ""
    """With ``kexec``: an initrd for the kernel, a file here."""
    cmdline: str | None = None
    """With ``kexec``: the kernel's command line; that of the running kernel if not given."""
    return_s: _Seconds = 600.0
    """How long it may take to come back with the kernel, in seconds."""
    python: str = "python3"
    """Its Python; it has to be of the same minor version as the one here."""
    has: tuple[_Word, ...] = ()
    """Words for what it has beyond what it tells itself; tests may need them."""
    lacks: tuple[_Word, ...] = ()
    """Words for what it is not to be used for, such as ``qemu``."""

    def where(self) -> Address:
        """Its address, with what the inventory adds to the user's own configuration.

        :raises UsageError: it is none.
        """
        found = Address.parse(self.address)
        return dataclasses.replace(
            found,
            keys=(self.identity,) if self.identity else found.keys,
            known_hosts=(self.known_hosts, *found.known_hosts)
            if self.known_hosts
            else found.known_hosts,
        )


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    machine: list[Machine] = []


def read_toml(path: Path, kind: type[Any], *, what: str) -> Any:
    """A TOML file as a struct of ``kind``.

    :param what: the file is, for messages.
    :raises UsageError: it cannot be read, is no TOML, or has a wrong key or value, which the
        message names.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(values, kind)
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path} is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{what} {path}: {str(error)[:1].lower()}{str(error)[1:]}",
            hint="the folder `examples` has one that is right",
        ) from error


def load_inventory(path: Path) -> list[Machine]:
    """The machines of an inventory; paths in it are relative to it.

    :raises UsageError: it is wrong; the message names file, machine and key.
    """
    machines: list[Machine] = read_toml(path, _File, what="inventory").machine
    if not machines:
        raise UsageError(f"inventory {path} names no machine", hint="begin one with [[machine]]")
    names = [machine.name for machine in machines]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"inventory {path} names two machines {name}")
    return [_checked(machine, path) for machine in machines]


def _checked(machine: Machine, path: Path) -> Machine:
    """The machine with whole paths, held to what a type cannot say."""
    where = f"inventory {path}, machine {machine.name}"
    if machine.switch == "kexec" and machine.command:
        raise UsageError(f'{where}: command is for switch = "boots-itself"')
    if machine.switch != "kexec" and (machine.initrd or machine.cmdline is not None):
        raise UsageError(f'{where}: initrd and cmdline are for switch = "kexec"')
    if both := sorted(set(machine.has) & set(machine.lacks)):
        raise UsageError(f"{where}: it cannot have and lack {', '.join(both)}")
    changes: dict[str, str] = {}
    for key in ("identity", "known_hosts", "initrd"):
        if value := getattr(machine, key):
            file = path.parent.absolute() / Path(value).expanduser()
            if not file.is_file():
                raise UsageError(f"{where}: {key}: there is no file {file}")
            changes[key] = str(file)
    checked = msgspec.structs.replace(machine, **changes)
    try:
        checked.where()
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}") from error
    return checked
