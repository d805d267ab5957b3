# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests about descriptors: ioctls, and sockets for KVM."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import time
from typing import Any

from .kernel import BadPointers, Request, ioctl, libc
from .machines import MachineRequests


class DescriptorRequests(MachineRequests):
    """Descriptors by the caller's names; those of virtual machines by theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = BadPointers()
        self.files: dict[str, int] = {}

    def _fd(self, name: str | int) -> int:
        if isinstance(name, int):
            return name
        kind, _, rest = name.partition(":")
        if kind == "kvm":
            return self.kvm
        if kind == "vm":
            return self.vms[rest].fd
        if kind == "vcpu":
            vm, _, index = rest.partition(":")
            return self.vms[vm].vcpus[int(index)].fd
        return self.files[name]

    def op_ioctl(self, request: Request) -> Request:
        """Issue any ioctl with any argument; see :meth:`_argument` for its forms."""
        buffer, value = self._argument(request.get("arg") or {})
        ret, err = ioctl(self._fd(request["on"]), request["request"], value)
        out = buffer.raw.hex() if buffer is not None and request.get("out") else None
        return {"ret": ret, "errno": err, "out": out}

    def op_failing_ioctl(self, request: Request) -> Request:
        """Issue an ioctl during which the ``nth`` allocation of the kernel fails.

        ``injected`` tells whether there was such an allocation. Needs a kernel with fault
        injection (Documentation/fault-injection/fault-injection.rst, fail-nth).
        """
        buffer, value = self._argument(request.get("arg") or {})
        fd, number = self._fd(request["on"]), request["request"]
        nth = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
        try:
            os.write(nth, b"%d" % request["nth"])
            ret, err = ioctl(fd, number, value)
            left = int(os.pread(nth, 16, 0))
            os.write(nth, b"0")
        finally:
            os.close(nth)
        del buffer  # lived until here, as the kernel reads it
        return {"ret": ret, "errno": err, "injected": left == 0}

    def _argument(self, arg: Request) -> tuple[Any, int]:
        """``{"hex": h}`` in a buffer, ``{"value": n}`` raw, ``{"bad": kind, "hex": h}``.

        ``"pointers": [[at, to], ...]``: at offset ``at`` stands the address of offset ``to``.
        """
        data = bytes.fromhex(arg.get("hex", ""))
        if "bad" in arg:
            return None, self.bad.address(arg["bad"], data)
        if "hex" in arg:
            buffer = ctypes.create_string_buffer(data, len(data))
            for at, to in arg.get("pointers", []):
                struct.pack_into("<Q", buffer, at, ctypes.addressof(buffer) + to)
            return buffer, ctypes.addressof(buffer)
        return None, arg.get("value", 0)

    def op_connect(self, request: Request) -> int:
        """Connect to the introspection tool over TCP; answer the descriptor."""
        sock = socket.create_connection(
            (request["host"], request["port"]), timeout=request["limit_s"]
        )
        # Like what a device manager hands over: blocking, and without delay for small messages.
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._keep(request["name"], sock.detach())

    def op_socketpair(self, request: Request) -> list[int]:
        """Make a pair of local sockets ``NAME`` and ``NAME.peer`` (the tool's end)."""
        if request.get("kind") == "tcp":
            with socket.create_server(("127.0.0.1", 0)) as server:
                ours = socket.create_connection(server.getsockname())
                peer = server.accept()[0]
            ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            kinds = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}
            ours, peer = socket.socketpair(socket.AF_UNIX, kinds[request.get("kind", "stream")])
        name = request["name"]
        return [self._keep(name, ours.detach()), self._keep(name + ".peer", peer.detach())]

    def op_socket(self, request: Request) -> int:
        """Make a TCP socket that is connected to nothing."""
        return self._keep(request["name"], socket.socket().detach())

    def op_open(self, request: Request) -> int:
        """Open a file, for a descriptor that is no socket."""
        return self._keep(request["name"], os.open(request["path"], os.O_RDWR))

    def op_pipe(self, request: Request) -> list[int]:
        """Make a pipe: ``NAME`` (the writing end) and ``NAME.peer``."""
        reader, writer = os.pipe()
        name = request["name"]
        return [self._keep(name, writer), self._keep(name + ".peer", reader)]

    def _keep(self, name: str, fd: int) -> int:
        if name in self.files:
            os.close(fd)
            raise ValueError(f"there is a descriptor {name!r} already")
        self.files[name] = fd
        return fd

    def op_close(self, request: Request) -> None:
        """Close a named descriptor of ours."""
        os.close(self.files.pop(request["name"]))

    def op_receive_timeout(self, request: Request) -> None:
        """Set SO_RCVTIMEO of a socket to so many seconds; negative: do not wait at all."""
        with socket.socket(fileno=os.dup(self._fd(request["name"]))) as sock:
            timeout = struct.pack("qq", request["seconds"], 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)

    def op_shutdown(self, request: Request) -> int:
        """Shut a socket down, in both directions by default; answer the errno."""
        ret = libc.shutdown(self._fd(request["name"]), request.get("how", socket.SHUT_RDWR))
        return ctypes.get_errno() if ret < 0 else 0

    def op_poll(self, request: Request) -> list[str]:
        """Poll a descriptor for IN, HUP, RDHUP, ERR; answer what came in ``limit_s`` seconds."""
        names = {"HUP": select.POLLHUP, "RDHUP": select.POLLRDHUP, "ERR": select.POLLERR,
                 "IN": select.POLLIN}  # fmt: skip
        poll = select.poll()
        poll.register(self._fd(request["name"]), sum(names[name] for name in request["wanted"]))
        ready = poll.poll(request["limit_s"] * 1000)
        return sorted(name for name, bit in names.items() if ready and ready[0][1] & bit)

    def op_send(self, request: Request) -> int:
        """Send bytes on a socket of ours, in one go."""
        return os.write(self._fd(request["name"]), bytes.fromhex(request["hex"]))

    def op_receive(self, request: Request) -> Request:
        """Receive up to ``size`` bytes; ``end`` is true at the end of the stream."""
        fd, size, data = self._fd(request["name"]), request["size"], b""
        deadline = time.monotonic() + request["limit_s"]
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                return {"hex": data.hex(), "end": False}
            part = os.read(fd, size - len(data))
            if not part:
                return {"hex": data.hex(), "end": True}
            data += part
        return {"hex": data.hex(), "end": False}
