# SPDX-License-Identifier: GPL-2.0-or-later
"""ioctls of KVM, and addresses that are no good."""

from __future__ import annotations

import ctypes
import mmap
import os
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
