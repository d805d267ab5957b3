# SPDX-License-Identifier: GPL-2.0-or-later
"""The introspection object's options, in both of QEMU's forms."""

from __future__ import annotations

from harness.manager.introspection import Introspection, UnixAddress, VsockAddress


def test_bare() -> None:
    """What is not given is left out, so that QEMU's defaults hold."""
    bare = Introspection(address=("10.0.2.2", 4000))
    assert bare.arguments() == [
        *("-chardev", "socket,id=tool,host=10.0.2.2,port=4000,reconnect-ms=300"),
        *("-object", "introspection,id=introspection0,chardev=tool"),
    ]
    assert bare.object_add() == {
        "qom-type": "introspection",
        "id": "introspection0",
        "chardev": "tool",
    }


def test_everything() -> None:
    """Every option is passed on; a key of any bytes gets through QEMU's option syntax."""
    full = Introspection(
        address=("10.0.2.2", 4000),
        key=b"a,b\0\xff",
        handshake="e820",
        handshake_timeout_s=1,
        unhook_timeout_s=2,
        async_unhook=False,
        unhook_on_shutdown=False,
        commands=(8, 12),
        events=(3,),
        reconnect_ms=1000,
    )
    secret, introspection = full.arguments()[3], full.arguments()[5]
    assert secret == "secret,id=cookie,format=base64,data=YSxiAP8="
    assert introspection == (
        "introspection,id=introspection0,chardev=tool,key=cookie,handshake=e820,"
        "handshake_timeout=1,unhook_timeout=2,async_unhook=off,unhook_on_shutdown=off,command=8,command=12,event=3"
    )
    assert full.object_add()["command"] == [8, 12]
    assert full.object_add()["async_unhook"] is False
    assert full.object_add()["unhook_on_shutdown"] is False
    backend = full.chardev_add()["backend"]["data"]
    assert backend["reconnect-ms"] == 1000
    assert backend["server"] is False


def test_reconnect_time_of_an_old_qemu() -> None:
    """Whole seconds, rounded up; none stays none."""
    for ms, seconds in ((0, 0), (300, 1), (1000, 1), (1001, 2)):
        old = Introspection(address=("host", 9), reconnect_ms=ms, reconnect_in_s=True)
        assert old.chardev_option().endswith(f",port=9,reconnect={seconds}")
        data = old.chardev_add()["backend"]["data"]
        assert data["reconnect"] == seconds
        assert "reconnect-ms" not in data


def test_addresses() -> None:
    """A tool is reached by TCP, by a UNIX socket or by vsock, in both forms."""
    for address, option, kind, data in (
        (UnixAddress("/run/x"), "path=/run/x", "unix", {"path": "/run/x"}),
        (VsockAddress(3, 9), "cid=3,port=9", "vsock", {"cid": "3", "port": "9"}),
        (("host", 9), "host=host,port=9", "inet", {"host": "host", "port": "9"}),
    ):
        introspection = Introspection(address=address)
        assert f",{option}," in introspection.chardev_option()
        found = introspection.chardev_add()["backend"]["data"]["addr"]
        assert found == {"type": kind, "data": data}
