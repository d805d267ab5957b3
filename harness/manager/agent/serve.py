# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests in, answers out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from .descriptors import DescriptorRequests
from .kernel import Request, ioctl


class Agent(DescriptorRequests):
    """Everything this process owns, and the requests it understands (``op_*``)."""

    def op_batch(self, request: Request) -> list[Any]:
        """Run requests one after another, ``repeat`` times; answer the last round's."""
        answers: list[Any] = []
        for _ in range(request.get("repeat", 1)):
            answers = [self.perform(item) for item in request["requests"]]
        return answers

    def op_reset(self, request: Request) -> dict[str, list[str]]:
        """Close everything; answer the VMs that could not be unhooked, and not be ended.

        Sockets are shut down first: whatever a test left waiting in the kernel for its
        tool wakes up then, also while introspection is switched off.
        """
        for name in list(self.files):
            self.op_shutdown({"name": name})
        stuck: dict[str, list[str]] = {"hooked": [], "running": []}
        for name, vm in list(self.vms.items()):
            if request["unhook"] is not None:
                # A thread of its own: in the kernel, nothing but the kernel ends it.
                unhooks = threading.Thread(
                    target=ioctl, args=(vm.fd, request["unhook"]), daemon=True
                )
                unhooks.start()
                unhooks.join(request["limit_s"])
                if unhooks.is_alive():
                    stuck["hooked"].append(name)
                    continue
            if self.op_close_vm({"vm": name, "limit_s": request["limit_s"]}):
                stuck["running"].append(name)
        for name in list(self.files):
            self.op_close({"name": name})
        return stuck

    def perform(self, request: Request) -> Any:
        """Run one request and answer its result; any exception is a fault."""
        return getattr(self, "op_" + request["op"])(request)

    def op_capture(self, request: Request) -> Request:
        """Run requests; answer them, and what the TCP socket ``name`` put on the wire meanwhile.

        The socket's other end is in this host. Each entry of ``sent`` is one segment's data.
        """
        ours = socket.socket(fileno=os.dup(self._fd(request["name"])))
        port = ours.getsockname()[1]
        ours.close()
        everything = 0x0300  # ETH_P_ALL in network order
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, everything) as wire:
            wire.bind(("lo", 3))
            wire.setblocking(False)
            answers = [self.perform(item) for item in request["requests"]]
            sent = []
            while select.select([wire], [], [], 0.05)[0]:
                packet, address = wire.recvfrom(65536)
                header = (packet[0] & 15) * 4
                source = int.from_bytes(packet[header : header + 2], "big")
                data = packet[header + (packet[header + 12] >> 4) * 4 :]
                outgoing = address[2] == socket.PACKET_OUTGOING
                if outgoing and packet[9] == socket.IPPROTO_TCP and source == port and data:
                    sent.append(data.hex())
        return {"answers": answers, "sent": sent}


def serve() -> None:
    """Connect to who wants this agent, answer requests until that ends, then end at once.

    Standard input says where and who: a connection of its own is several times faster than
    the one through SSH.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    wanted = json.loads(sys.stdin.readline())
    connection = socket.create_connection((wanted["host"], wanted["port"]))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(wanted["token"].encode())
    _Service(connection).work()


class _Service:
    """Threads that take turns: while one performs a request, another reads on.

    One that is busy, or stuck in the kernel, is replaced; one that is done waits its turn.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._agent = Agent()
        self._connection = connection
        self._requests = connection.makefile()
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._counting = threading.Lock()
        self._free = 0
        """How many threads read, or wait for their turn."""

    def work(self) -> None:
        """Read requests and perform them, for ever."""
        while True:
            self._count(1)
            with self._reading:
                line = ""
                with contextlib.suppress(OSError):
                    line = self._requests.readline()
                if not line:
                    os._exit(0)  # vCPU threads may sit in KVM_RUN; the kernel takes all down
                if not self._count(-1):
                    threading.Thread(target=self.work, daemon=True).start()
            self._answer(json.loads(line))

    def _count(self, more: int) -> int:
        with self._counting:
            self._free += more
            return self._free

    def _answer(self, request: Request) -> None:
        reply: Request = {"id": request["id"]}
        try:
            reply["ok"] = self._agent.perform(request)
        except Exception:
            reply["fault"] = traceback.format_exc(limit=4)
        line = json.dumps(reply) + "\n"
        with self._writing:
            self._connection.sendall(line.encode())
