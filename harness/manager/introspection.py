# SPDX-License-Identifier: GPL-2.0-or-later
"""What makes a guest of QEMU one that can be introspected, as data.

The options are those of the QEMU series' ``introspection`` object and of the
socket chardev that becomes the introspection channel. Each is known in both of
QEMU's forms: as command-line options, and as arguments of QMP commands.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CHARDEV_ID",
    "OBJECT_ID",
    "SECRET_ID",
    "Introspection",
    "ToolAddress",
    "UnixAddress",
    "VsockAddress",
]

OBJECT_ID = "introspection0"
CHARDEV_ID = "tool"
SECRET_ID = "cookie"


@dataclass(frozen=True)
class UnixAddress:
    """A UNIX socket in the host."""

    path: str


@dataclass(frozen=True)
class VsockAddress:
    """A vsock port of another guest on the same host, or of the host itself (cid 2)."""

    cid: int
    port: int


#: Where a tool listens. A pair is a TCP host and port.
ToolAddress = tuple[str, int] | UnixAddress | VsockAddress


@dataclass(frozen=True, kw_only=True)
class Introspection:
    """What a guest's ``introspection`` object and its chardev are given.

    None and empty mean that the option is left out, so QEMU's default holds.
    """

    #: where the tool listens, as seen from the host
    address: ToolAddress
    #: the shared cookie; None: any tool is accepted
    key: bytes | None = None
    #: the form of QEMU's record: ``max-gpa`` or ``e820``
    handshake: str | None = None
    handshake_timeout_s: int | None = None
    unhook_timeout_s: int | None = None
    async_unhook: bool | None = None
    unhook_on_shutdown: bool | None = None
    #: allowed command ids; empty: all
    commands: tuple[int, ...] = ()
    #: allowed event ids; empty: all
    events: tuple[int, ...] = ()
    #: how long the chardev waits before it connects again; 0: never
    reconnect_ms: int = 300
    #: QEMU before 9.2 knows this time in seconds only, as ``reconnect``; it is rounded up
    reconnect_in_s: bool = False

    # -- command line --------------------------------------------------------------

    def arguments(self) -> list[str]:
        """The part of QEMU's command line that makes secret, chardev and object."""
        argv = ["-chardev", self.chardev_option()]
        if self.key is not None:
            argv += ["-object", self.secret_option()]
        return [*argv, "-object", self.object_option()]

    def chardev_option(self) -> str:
        """The value of ``-chardev``."""
        match self.address:
            case UnixAddress(path):
                where = f"path={path}"
            case VsockAddress(cid, port):
                where = f"cid={cid},port={port}"
            case (host, port):
                where = f"host={host},port={port}"
        name, value = self._reconnect()
        return f"socket,id={CHARDEV_ID},{where},{name}={value}"

    def _reconnect(self) -> tuple[str, int]:
        if self.reconnect_in_s:
            return "reconnect", -(-self.reconnect_ms // 1000)
        return "reconnect-ms", self.reconnect_ms

    def secret_option(self) -> str:
        """The value of ``-object`` for the key.

        In base64, which keeps any byte and QEMU's option syntax apart.
        """
        data = base64.b64encode(self.key or b"").decode()
        return f"secret,id={SECRET_ID},format=base64,data={data}"

    def object_option(self) -> str:
        """The value of ``-object`` for the introspection object itself."""
        parts = [f"introspection,id={OBJECT_ID},chardev={CHARDEV_ID}"]
        if self.key is not None:
            parts.append(f"key={SECRET_ID}")
        if self.handshake is not None:
            parts.append(f"handshake={self.handshake}")
        if self.handshake_timeout_s is not None:
            parts.append(f"handshake_timeout={self.handshake_timeout_s}")
        if self.unhook_timeout_s is not None:
            parts.append(f"unhook_timeout={self.unhook_timeout_s}")
        if self.async_unhook is not None:
            parts.append(f"async_unhook={'on' if self.async_unhook else 'off'}")
        if self.unhook_on_shutdown is not None:
            parts.append(f"unhook_on_shutdown={'on' if self.unhook_on_shutdown else 'off'}")
        parts += [f"command={number}" for number in self.commands]
        parts += [f"event={number}" for number in self.events]
        return ",".join(parts)

    # -- QMP -----------------------------------------------------------------------

    def chardev_add(self) -> dict[str, Any]:
        """The arguments of ``chardev-add``."""
        address: dict[str, Any]
        match self.address:
            case UnixAddress(path):
                address = {"type": "unix", "data": {"path": path}}
            case VsockAddress(cid, port):
                address = {"type": "vsock", "data": {"cid": str(cid), "port": str(port)}}
            case (host, port):
                address = {"type": "inet", "data": {"host": host, "port": str(port)}}
        reconnect, value = self._reconnect()
        data = {"addr": address, "server": False, reconnect: value}
        return {"id": CHARDEV_ID, "backend": {"type": "socket", "data": data}}

    def object_add(self) -> dict[str, Any]:
        """The arguments of ``object-add`` for the introspection object."""
        optional: dict[str, Any] = {
            "key": SECRET_ID if self.key is not None else None,
            "handshake": self.handshake,
            "handshake_timeout": self.handshake_timeout_s,
            "unhook_timeout": self.unhook_timeout_s,
            "async_unhook": self.async_unhook,
            "unhook_on_shutdown": self.unhook_on_shutdown,
            "command": list(self.commands) or None,
            "event": list(self.events) or None,
        }
        return {
            "qom-type": "introspection",
            "id": OBJECT_ID,
            "chardev": CHARDEV_ID,
            **{name: value for name, value in optional.items() if value is not None},
        }
