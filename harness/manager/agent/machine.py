# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine: its memory, its vCPUs, and the threads that run them."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import mmap
import os
import signal
import struct
import threading

from .kernel import (
    CPUID_ENTRIES,
    HUGE_PAGE,
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CREATE_IRQCHIP,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_ENABLE_CAP,
    KVM_GET_DIRTY_LOG,
    KVM_GET_SREGS,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_RUN,
    KVM_SET_CPUID2,
    KVM_SET_REGS,
    KVM_SET_SREGS,
    KVM_SET_TSS_ADDR,
    KVM_SET_USER_MEMORY_REGION,
    REGS_SIZE,
    SREGS_SIZE,
    Request,
    address_of,
    ioctl,
    must,
)

# linux/kvm.h, KVM_EXIT_*: those that a guest of ours can cause.
EXIT_NAMES = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 3: "HYPERCALL", 4: "DEBUG", 5: "HLT", 6: "MMIO",
    7: "IRQ_WINDOW_OPEN", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 10: "INTR", 17: "INTERNAL_ERROR",
    24: "SYSTEM_EVENT", 31: "DIRTY_RING_FULL",
}  # fmt: skip


class Vcpu:
    """One vCPU: its descriptor, its kvm_run page, and the thread that runs it."""

    def __init__(self, fd: int, run_size: int) -> None:
        self.fd = fd
        self.page = mmap.mmap(fd, run_size)
        self.thread: threading.Thread | None = None
        self.exit: Request | None = None
        self.runs = 0
        self._stop = threading.Event()

    def start(self, *, interrupt_window: bool) -> None:
        """Start the thread that stays in KVM_RUN until an exit or a stop."""
        if self.thread is not None and self.thread.is_alive():
            raise RuntimeError("this vCPU runs already")
        self._stop.clear()
        self.page[0] = interrupt_window  # kvm_run.request_interrupt_window
        self.page[1] = 0  # kvm_run.immediate_exit
        self.exit = None
        self.runs += 1
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def _loop(self) -> None:
        while True:
            ret, err = ioctl(self.fd, KVM_RUN)
            if ret >= 0:
                self.exit = self._decode()
                return
            # EINTR is our own kick; EAGAIN is what KVM answers when the wait of a vCPU
            # that was never started (no SIPI yet) ends: both mean "enter again".
            if err not in (4, 11) or self._stop.is_set():
                self.exit = {"reason": "STOPPED" if self._stop.is_set() else "ERROR", "errno": err}
                return

    def _decode(self) -> Request:
        number = struct.unpack_from("<I", self.page, 8)[0]
        result: Request = {
            "reason": EXIT_NAMES.get(number, str(number)),
            "number": number,
            "errno": 0,
            "union": self.page[32:96].hex(),
        }
        if number == 2:
            direction, size, port, count, offset = struct.unpack_from("<BBHIQ", self.page, 32)
            result["io"] = {
                "out": bool(direction),
                "port": port,
                "data": self.page[offset : offset + size * count].hex(),
            }
        elif number == 6:
            gpa, data, length, write = struct.unpack_from("<Q8sIB", self.page, 32)
            result["mmio"] = {"gpa": gpa, "write": bool(write), "data": data[:length].hex()}
        return result

    def wait(self, timeout_s: float) -> Request | None:
        """Wait for the thread to leave KVM_RUN; None when it did not in time."""
        if self.thread is None:
            raise RuntimeError("this vCPU was never run")
        self.thread.join(timeout_s)
        return None if self.thread.is_alive() else self.exit

    def kick(self) -> None:
        """Ask the thread to leave KVM_RUN and to stay out; does not wait."""
        self._stop.set()
        self.page[1] = 1
        if self.thread is not None and self.thread.is_alive() and self.thread.ident:
            signal.pthread_kill(self.thread.ident, signal.SIGUSR1)

    def running(self) -> bool:
        """True while the thread is in KVM_RUN."""
        return self.thread is not None and self.thread.is_alive()


class Slot:
    """One memory slot and our mapping of it.

    A huge one lies at an address that huge pages can back, and asks for them.
    """

    def __init__(self, gpa: int, size: int, flags: int, huge: bool) -> None:
        self.gpa, self.size, self.flags = gpa, size, flags
        room = size + HUGE_PAGE if huge else size
        self.memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = address_of(self.memory)
        start = -base % HUGE_PAGE if huge else 0
        self.address = base + start
        self.view = memoryview(self.memory)[start : start + size]
        if huge:
            with contextlib.suppress(OSError):  # a kernel without them
                self.memory.madvise(mmap.MADV_HUGEPAGE, start, size)


class Vm:
    """One virtual machine."""

    def __init__(self, kvm: int, request: Request) -> None:
        self.fd = must("KVM_CREATE_VM", kvm, KVM_CREATE_VM)
        self.slots: dict[int, Slot] = {}
        self.vcpus: list[Vcpu] = []
        try:
            self._build(kvm, request)
        except BaseException:
            self.release()
            raise

    def _build(self, kvm: int, request: Request) -> None:
        must("KVM_SET_TSS_ADDR", self.fd, KVM_SET_TSS_ADDR, 0xFFFB_D000)
        if request.get("irqchip"):
            must("KVM_CREATE_IRQCHIP", self.fd, KVM_CREATE_IRQCHIP)
        if size := request.get("dirty_ring"):
            enable = struct.pack("<II4Q64x", KVM_CAP_DIRTY_LOG_RING, 0, size, 0, 0, 0)
            buffer = ctypes.create_string_buffer(enable, len(enable))
            must("KVM_ENABLE_CAP", self.fd, KVM_ENABLE_CAP, ctypes.addressof(buffer))
        for slot in request["slots"]:
            self.set_slot(slot)
        for gpa, text in request["memory"]:
            self.write(gpa, base64.b64decode(text))
        run_size = must("KVM_GET_VCPU_MMAP_SIZE", kvm, KVM_GET_VCPU_MMAP_SIZE)
        cpuid = ctypes.create_string_buffer(8 + 40 * CPUID_ENTRIES)
        struct.pack_into("<I", cpuid, 0, CPUID_ENTRIES)
        must("KVM_GET_SUPPORTED_CPUID", kvm, KVM_GET_SUPPORTED_CPUID, ctypes.addressof(cpuid))
        for index, state in enumerate(request["vcpus"]):
            fd = must("KVM_CREATE_VCPU", self.fd, KVM_CREATE_VCPU, state.get("id", index))
            self.vcpus.append(Vcpu(fd, run_size))
            must("KVM_SET_CPUID2", fd, KVM_SET_CPUID2, ctypes.addressof(cpuid))
            set_state(fd, state)

    def set_slot(self, request: Request) -> None:
        """Create, change the flags of, move or (size 0) delete a memory slot."""
        slot, gpa, size = request["slot"], request["gpa"], request["size"]
        flags = request.get("flags", 0)
        known = self.slots.get(slot)
        if size and (known is None or known.size != size):
            known = self.slots[slot] = Slot(gpa, size, flags, request.get("huge", False))
        if known is None:
            raise ValueError(f"no memory slot {slot} to delete")
        region = struct.pack("<IIQQQ", slot, flags, gpa, size, known.address)
        buffer = ctypes.create_string_buffer(region, len(region))
        number, address = KVM_SET_USER_MEMORY_REGION, ctypes.addressof(buffer)
        must("KVM_SET_USER_MEMORY_REGION", self.fd, number, address)
        known.gpa, known.flags = gpa, flags
        if not size:
            del self.slots[slot]

    def _find(self, gpa: int, size: int) -> tuple[Slot, int]:
        for slot in self.slots.values():
            if slot.gpa <= gpa and gpa + size <= slot.gpa + slot.size:
                return slot, gpa - slot.gpa
        raise ValueError(f"no memory slot holds {size} bytes at {gpa:#x}")

    def read(self, gpa: int, size: int) -> bytes:
        """Read guest memory through our own mapping."""
        slot, offset = self._find(gpa, size)
        return bytes(slot.view[offset : offset + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory through our own mapping."""
        slot, offset = self._find(gpa, len(data))
        slot.view[offset : offset + len(data)] = data

    def u64(self, gpa: int) -> int:
        """Read one aligned 8-byte word of guest memory in one go."""
        slot, offset = self._find(gpa, 8)
        return int(slot.view[offset : offset + 8].cast("Q")[0])

    def dirty_log(self, slot: int) -> bytes:
        """Fetch and clear the dirty bitmap of a slot."""
        pages = self.slots[slot].size // mmap.PAGESIZE
        bitmap = ctypes.create_string_buffer((pages + 63) // 64 * 8)
        log = ctypes.create_string_buffer(struct.pack("<IIQ", slot, 0, ctypes.addressof(bitmap)))
        must("KVM_GET_DIRTY_LOG", self.fd, KVM_GET_DIRTY_LOG, ctypes.addressof(log))
        return bitmap.raw

    def release(self) -> None:
        """Close every descriptor; the kernel destroys the VM when the last one goes."""
        for vcpu in self.vcpus:
            os.close(vcpu.fd)
            vcpu.page.close()  # the mapping holds the vCPU's file as much as the descriptor
        self.vcpus.clear()
        os.close(self.fd)


def set_state(fd: int, state: Request) -> None:
    """Patch the special registers of a vCPU as asked and set its general ones."""
    sregs = ctypes.create_string_buffer(SREGS_SIZE)
    must("KVM_GET_SREGS", fd, KVM_GET_SREGS, ctypes.addressof(sregs))
    for offset, text in state.get("sregs", []):
        data = bytes.fromhex(text)
        ctypes.memmove(ctypes.addressof(sregs) + offset, data, len(data))
    if state.get("sregs"):
        must("KVM_SET_SREGS", fd, KVM_SET_SREGS, ctypes.addressof(sregs))
    if state.get("regs"):
        regs = ctypes.create_string_buffer(bytes.fromhex(state["regs"]), REGS_SIZE)
        must("KVM_SET_REGS", fd, KVM_SET_REGS, ctypes.addressof(regs))
