# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests about virtual machines."""

from __future__ import annotations

import base64
import operator
import struct
import threading
import time

from .host import HostRequests
from .kernel import Request
from .machine import Vm, set_state

COMPARE = {"eq": operator.eq, "ne": operator.ne, "ge": operator.ge}


class MachineRequests(HostRequests):
    """The virtual machines, each by the name that the caller gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.vms: dict[str, Vm] = {}

    def op_create_vm(self, request: Request) -> Request:
        """Make a VM with its memory, its vCPUs and their state, not running."""
        name = request["vm"]
        if name in self.vms:
            raise ValueError(f"there is a VM {name!r} already")
        vm = self.vms[name] = Vm(self.kvm, request)
        return {
            "fd": vm.fd,
            "vcpu_fds": [vcpu.fd for vcpu in vm.vcpus],
            # KVM names a VM's directory of statistics after the thread that made it.
            "statistics": f"/sys/kernel/debug/kvm/{threading.get_native_id()}-{vm.fd}/",
        }

    def op_set_slot(self, request: Request) -> None:
        """Change a memory slot."""
        self.vms[request["vm"]].set_slot(request)

    def op_set_state(self, request: Request) -> None:
        """Set registers of a vCPU that does not run."""
        set_state(self.vms[request["vm"]].vcpus[request["vcpu"]].fd, request["state"])

    def op_run(self, request: Request) -> None:
        """Let a vCPU enter the guest in a thread of its own."""
        vcpu = self.vms[request["vm"]].vcpus[request["vcpu"]]
        vcpu.start(interrupt_window=request.get("interrupt_window", False))

    def op_wait_exit(self, request: Request) -> Request | None:
        """Wait until a vCPU left KVM_RUN; null when it did not in ``limit_s`` seconds."""
        return self.vms[request["vm"]].vcpus[request["vcpu"]].wait(request["limit_s"])

    def op_running(self, request: Request) -> list[bool]:
        """Tell for each vCPU whether its thread is in KVM_RUN."""
        return [vcpu.running() for vcpu in self.vms[request["vm"]].vcpus]

    def op_vcpu_thread(self, request: Request) -> int | None:
        """The number of the thread that runs a vCPU, for /proc/self/task."""
        thread = self.vms[request["vm"]].vcpus[request["vcpu"]].thread
        return None if thread is None else thread.native_id

    def op_stop(self, request: Request) -> Request | None:
        """Signal a vCPU's thread out of KVM_RUN and wait for it; null when it stays."""
        vcpu = self.vms[request["vm"]].vcpus[request["vcpu"]]
        vcpu.kick()
        return vcpu.wait(request["limit_s"])

    def op_kick(self, request: Request) -> None:
        """Signal a vCPU's thread out of KVM_RUN without waiting."""
        self.vms[request["vm"]].vcpus[request["vcpu"]].kick()

    def op_close_vm(self, request: Request) -> list[int]:
        """End all vCPU threads and close a VM; answer the vCPUs whose thread is stuck.

        Nothing is closed while a thread is stuck: a closed descriptor would not free
        anything then, and might be reused by the next VM.
        """
        vm = self.vms[request["vm"]]
        deadline = time.monotonic() + request["limit_s"]
        for vcpu in vm.vcpus:
            vcpu.kick()
        stuck = []
        for index, vcpu in enumerate(vm.vcpus):
            if vcpu.running() and vcpu.wait(max(0.01, deadline - time.monotonic())) is None:
                stuck.append(index)
        if not stuck:
            del self.vms[request["vm"]]
            vm.release()
        return stuck

    def op_read(self, request: Request) -> str:
        """Read guest memory through the manager's mapping, as base64."""
        data = self.vms[request["vm"]].read(request["gpa"], request["size"])
        return base64.b64encode(data).decode()

    def op_write(self, request: Request) -> None:
        """Write guest memory through the manager's mapping."""
        self.vms[request["vm"]].write(request["gpa"], base64.b64decode(request["data"]))

    def op_fill(self, request: Request) -> None:
        """Fill guest memory with one byte, so that the host has to back it."""
        vm, size = self.vms[request["vm"]], request["size"]
        vm.write(request["gpa"], bytes([request["byte"]]) * size)

    def op_add_u64(self, request: Request) -> int:
        """Add to a word of guest memory that the guest does not write; answer the sum."""
        vm, gpa = self.vms[request["vm"]], request["gpa"]
        value = vm.u64(gpa) + int(request["value"])
        vm.write(gpa, struct.pack("<Q", value))
        return value

    def op_wait_u64(self, request: Request) -> Request:
        """Wait until a word of guest memory compares as asked; answer the last value.

        With ``relative`` the wanted value counts from what the word is now; with
        ``value_at`` it is another word of guest memory.
        """
        vm, holds = self.vms[request["vm"]], COMPARE[request["compare"]]
        wanted = vm.u64(request["value_at"]) if "value_at" in request else request["value"]
        if request.get("relative"):
            wanted += vm.u64(request["gpa"])
        deadline = time.monotonic() + request["limit_s"]
        while True:
            value = vm.u64(request["gpa"])
            if holds(value, wanted):
                return {"value": value, "met": True}
            if time.monotonic() >= deadline:
                return {"value": value, "met": False}
            time.sleep(0.0005)  # a pause of the poll, bounded by the deadline above

    def op_dirty_log(self, request: Request) -> list[int]:
        """Fetch and clear the dirty log of a slot: numbers of the dirty pages in it."""
        bitmap = self.vms[request["vm"]].dirty_log(request["slot"])
        return [
            byte * 8 + bit
            for byte, bits in enumerate(bitmap)
            for bit in range(8)
            if bits >> bit & 1
        ]
