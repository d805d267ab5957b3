# SPDX-License-Identifier: GPL-2.0-or-later
"""The half of the small device manager that runs in the host.

This file is sent to the host as text and executed there, so it is complete in
itself and uses the standard library alone. It owns what a device manager owns:
the descriptors of /dev/kvm, the memory of its guests, one thread per running vCPU,
and the sockets that it hands to KVM.

Requests come as JSON lines on standard input, ``{"id": 7, "op": "run", ...}``;
each is answered by one line, ``{"id": 7, "ok": ...}`` or ``{"id": 7, "fault": text}``.
Every request runs in a thread of its own, so one that blocks in the kernel does not
stop the others; the caller waits for an answer before it sends what depends on it.
A fault means a wrong request or a defect in here; what the kernel says (a return
value and an errno) is always part of ``ok``.

The process ends when standard input does, and with it all its virtual machines.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import mmap
import operator
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_GET_DIRTY_LOG = 0x4010AE42
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
KVM_CREATE_IRQCHIP = 0xAE60
KVM_ENABLE_CAP = 0x4068AEA3
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_REGS = 0x8090AE81

KVM_CAP_DIRTY_LOG_RING = 192

HUGE_PAGE = 2 << 20
SREGS_SIZE = 312
REGS_SIZE = 144
CPUID_ENTRIES = 128

# linux/kvm.h, KVM_EXIT_*: those that a guest of ours can cause.
EXIT_NAMES = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 3: "HYPERCALL", 4: "DEBUG", 5: "HLT", 6: "MMIO",
    7: "IRQ_WINDOW_OPEN", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 10: "INTR", 17: "INTERNAL_ERROR",
    24: "SYSTEM_EVENT", 31: "DIRTY_RING_FULL",
}  # fmt: skip

Request = dict[str, Any]

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
libc.mmap.restype = ctypes.c_void_p
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def ioctl(fd: int, request: int, arg: int = 0) -> tuple[int, int]:
    """Issue one ioctl; answer (return value, errno or 0). Never raises, never repeats."""
    ret = libc.ioctl(fd, request, arg)
    return ret, ctypes.get_errno() if ret < 0 else 0


def must(what: str, fd: int, request: int, arg: int = 0) -> int:
    """Issue an ioctl that is not under test; raise OSError when it fails."""
    ret, err = ioctl(fd, request, arg)
    if ret < 0:
        raise OSError(err, f"{what}: {os.strerror(err)}")
    return ret


def address_of(mapping: mmap.mmap) -> int:
    """Answer where a writable mapping lies in our address space."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


class BadPointers:
    """Addresses that the kernel cannot read an argument from."""

    def __init__(self) -> None:
        size = 2 * mmap.PAGESIZE
        base = libc.mmap(None, size, 3, 0x22, -1, 0)  # read+write, private+anonymous
        if base in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap of the guard pages")
        self._edge = int(base) + mmap.PAGESIZE
        if libc.mprotect(self._edge, mmap.PAGESIZE, 0) < 0:
            raise OSError(ctypes.get_errno(), "mprotect of the guard page")

    def address(self, kind: str, data: bytes) -> int:
        """Answer an address of that kind; ``edge`` holds the first half of data only."""
        if kind == "null":
            return 0
        if kind == "unmapped":
            return self._edge
        if kind == "kernel":
            return 0xFFFF_8880_0000_0000
        if kind == "edge":
            half = data[: len(data) // 2]
            ctypes.memmove(self._edge - len(half), half, len(half))
            return self._edge - len(half)
        raise ValueError(f"unknown kind of bad pointer {kind!r}")


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


COMPARE = {"eq": operator.eq, "ne": operator.ne, "ge": operator.ge}


class Agent:
    """Everything this process owns, and the requests it understands (``op_*``)."""

    def __init__(self) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.bad = BadPointers()
        self.vms: dict[str, Vm] = {}
        self.files: dict[str, int] = {}

    # -- the process and the host's kernel

    def op_hello(self, request: Request) -> Request:
        """Tell who we are and what KVM this is."""
        cpuinfo = Path("/proc/cpuinfo").read_text()
        return {
            "pid": os.getpid(),
            "api": must("KVM_GET_API_VERSION", self.kvm, KVM_GET_API_VERSION),
            "vendor": "AMD" if "AuthenticAMD" in cpuinfo else "Intel",
            "release": os.uname().release,
        }

    def op_read_file(self, request: Request) -> str:
        """Read a file of the host as text."""
        return Path(request["path"]).read_text(errors="replace")

    def op_write_file(self, request: Request) -> None:
        """Write text to a file of the host (a module parameter, say)."""
        Path(request["path"]).write_text(request["text"])

    def op_mode(self, request: Request) -> str:
        """Tell a file's permission bits in octal."""
        return f"{Path(request['path']).stat().st_mode & 0o7777:o}"

    def op_list(self, request: Request) -> list[str]:
        """List a directory of the host; a missing one is empty."""
        path = Path(request["path"])
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def op_threads(self, request: Request) -> list[str]:
        """Name the processes and kernel threads whose name starts with ``prefix``."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:  # it ended while we looked
                continue
            head, _, rest = text.rpartition(") ")  # the name may hold parentheses itself
            name, ended = head.partition("(")[2], rest[0] in "ZX"
            if name.startswith(request["prefix"]) and not ended:
                found.append(f"{stat.parent.name} {name}")
        return found

    # -- virtual machines

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

    # -- descriptors and ioctls

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

    def op_shutdown(self, request: Request) -> int:
        """Shut a socket down in both directions through our descriptor; answer the errno."""
        ret = libc.shutdown(self._fd(request["name"]), socket.SHUT_RDWR)
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

    # -- many at once

    def op_batch(self, request: Request) -> list[Any]:
        """Run requests one after another, ``repeat`` times; answer the last round's."""
        answers: list[Any] = []
        for _ in range(request.get("repeat", 1)):
            answers = [self.perform(item) for item in request["requests"]]
        return answers

    def op_reset(self, request: Request) -> list[str]:
        """Close everything; answer the VMs that could not be ended.

        Sockets are shut down first: whatever a test left waiting in the kernel for its
        tool wakes up then, also while introspection is switched off.
        """
        for name in list(self.files):
            self.op_shutdown({"name": name})
        stuck = []
        for name, vm in list(self.vms.items()):
            if request["unhook"] is not None:
                ioctl(vm.fd, request["unhook"])
            if self.op_close_vm({"vm": name, "limit_s": request["limit_s"]}):
                stuck.append(name)
        for name in list(self.files):
            self.op_close({"name": name})
        return stuck

    def perform(self, request: Request) -> Any:
        """Run one request and answer its result; any exception is a fault."""
        return getattr(self, "op_" + request["op"])(request)


def serve() -> None:
    """Answer requests until standard input ends, then end the process at once."""
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    agent = Agent()
    lock = threading.Lock()

    def answer(request: Request) -> None:
        reply: Request = {"id": request["id"]}
        try:
            reply["ok"] = agent.perform(request)
        except Exception:
            reply["fault"] = traceback.format_exc(limit=4)
        line = json.dumps(reply) + "\n"
        with lock:
            sys.stdout.write(line)
            sys.stdout.flush()

    for line in sys.stdin:
        threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()
    os._exit(0)  # vCPU threads may sit in KVM_RUN; the kernel takes everything down


if __name__ == "__main__":
    serve()
