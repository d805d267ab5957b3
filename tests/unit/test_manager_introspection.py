# SPDX-License-Identifier: GPL-2.0-or-later
"""The introspection object's options, in both of QEMU's forms."""

from __future__ import annotations

from harness.manager.introspection import Introspection


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
        handshake_timeout_s=1,
        unhook_timeout_s=2,
        async_unhook=False,
        commands=(8, 12),
        events=(3,),
        reconnect_ms=1000,
    )
    secret, introspection = full.arguments()[3], full.arguments()[5]
    assert secret == "secret,id=cookie,format=base64,data=YSxiAP8="
    assert introspection == (
        "introspection,id=introspection0,chardev=tool,key=cookie,handshake_timeout=1,"
        "unhook_timeout=2,async_unhook=off,command=8,command=12,event=3"
    )
    assert full.object_add()["command"] == [8, 12]
    assert full.object_add()["async_unhook"] is False
    backend = full.chardev_add()["backend"]["data"]
    assert backend["reconnect-ms"] == 1000
    assert backend["server"] is False
