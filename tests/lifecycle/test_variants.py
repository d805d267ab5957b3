# SPDX-License-Identifier: GPL-2.0-or-later
"""Promises that only some QEMU series make."""

from __future__ import annotations

import pytest

from harness.plugin import skip_clause

from .stage import Stage, refused_start


@pytest.mark.clause("QEMU-CHARDEV-VSOCK")
def test_vsock_options(stage: Stage) -> None:
    """A socket chardev takes cid and port, and exactly one of path, fd, cid and host."""
    said = refused_start(stage, None, extra=("-chardev", "socket,id=c,cid=2,host=127.0.0.1,port=1"))
    if "Invalid parameter 'cid'" in said:
        skip_clause("this QEMU has no vsock options on its command line; QMP reaches vsock anyway")
    assert "cid" in refused_start(stage, None, extra=("-chardev", "socket,id=c,cid=2"))


@pytest.mark.clause("QEMU-HSK-E820", "QEMU-POWERDOWN-RFC", "QEMU-FORCERESET-RFC")
def test_rfc_only() -> None:
    """What the RFC series of QEMU did differently: memory map, powerdown, reset by command."""
    skip_clause("the RFC series behaved so; v12, which this run holds QEMU to, replaced it")
