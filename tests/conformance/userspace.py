# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device manager does to its guest by itself, beside introspection.

These are ioctls of linux/kvm.h. All of them want a vCPU that does not run (``vm.stop()``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from harness.errors import InfraError
from harness.manager.payloads import SREGS
from harness.manager.smallvm import KVM_SET_GUEST_DEBUG, SmallVm

__all__ = [
    "CpuidEntry",
    "debug",
    "get_cpuid",
    "get_xsave",
    "reject_msr_writes",
    "set_cpuid",
    "set_special",
    "set_xcr0",
]

KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_CPUID2 = 0xC008AE91
KVM_SET_XCRS = 0x4188AEA7
KVM_GET_XSAVE = 0x9000AEA4
KVM_X86_SET_MSR_FILTER = 0x4188AEC6
CPUID_ENTRY = struct.Struct("<IIIIIII12x")
CPUID_ROOM = 128
GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP, GUESTDBG_USE_HW_BP = 1, 2, 0x2_0000
FILTER_WRITE = 2


class CpuidEntry(NamedTuple):
    """One leaf as in struct kvm_cpuid_entry2. Flag 1: ``subleaf`` counts."""

    function: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def set_special(vm: SmallVm, *, vcpu: int = 0, **registers: int) -> None:
    """KVM_SET_SREGS with some registers changed, which has to succeed."""
    patches = [[SREGS[name], struct.pack("<Q", value).hex()] for name, value in registers.items()]
    vm.manager.link.call("set_state", vm=vm.name, vcpu=vcpu, state={"sregs": patches})


def set_xcr0(vm: SmallVm, value: int, *, vcpu: int = 0) -> None:
    """KVM_SET_XCRS with XCR0 alone, which has to succeed."""
    data = struct.pack("<IIIIQ368x", 1, 0, 0, 0, value)
    _must(vm, KVM_SET_XCRS, data, vcpu)


def get_xsave(vm: SmallVm, *, vcpu: int = 0) -> bytes:
    """KVM_GET_XSAVE: 4096 bytes."""
    return _must(vm, KVM_GET_XSAVE, bytes(4096), vcpu)


def get_cpuid(vm: SmallVm, *, vcpu: int = 0) -> list[CpuidEntry]:
    """KVM_GET_CPUID2: all leaves."""
    data = struct.pack("<II", CPUID_ROOM, 0) + bytes(CPUID_ENTRY.size * CPUID_ROOM)
    data = _must(vm, KVM_GET_CPUID2, data, vcpu)
    (count,) = struct.unpack_from("<I", data)
    return [CpuidEntry(*CPUID_ENTRY.unpack_from(data, 8 + i * CPUID_ENTRY.size))
            for i in range(count)]  # fmt: skip


def set_cpuid(vm: SmallVm, entries: Iterable[CpuidEntry], *, vcpu: int = 0) -> None:
    """KVM_SET_CPUID2, which has to succeed; for a vCPU that never ran."""
    packed = [CPUID_ENTRY.pack(*entry) for entry in entries]
    _must(vm, KVM_SET_CPUID2, struct.pack("<II", len(packed), 0) + b"".join(packed), vcpu)


def debug(vm: SmallVm, *, step: bool = False, at: int | None = None, vcpu: int = 0) -> str:
    """KVM_SET_GUEST_DEBUG: single-step, or stop at an address by debug register; or neither.

    Answers the errno's name, or OK.
    """
    control = GUESTDBG_SINGLESTEP if step else 0
    registers = [0] * 8
    if at is not None:
        control |= GUESTDBG_USE_HW_BP
        registers[0], registers[7] = at, 0x402  # breakpoint 0, on execution
    control |= GUESTDBG_ENABLE if control else 0
    result, _ = vm.vcpu_ioctl(
        KVM_SET_GUEST_DEBUG, struct.pack("<II8Q", control, 0, *registers), vcpu=vcpu
    )
    return result


def reject_msr_writes(vm: SmallVm, *msrs: int) -> None:
    """KVM_X86_SET_MSR_FILTER: the guest's writes of these MSRs fail (#GP); without any, none.

    All vCPUs may run meanwhile.
    """
    ranges = b"".join(struct.pack("<IIIIQ", FILTER_WRITE, 1, msr, 0, 0) for msr in msrs)
    data = struct.pack("<II", 0, 0) + ranges.ljust(16 * 24, b"\0")
    bitmap = bytes(8)  # a range's bitmap has whole words; 0 is: not allowed
    pointers = [[8 + 24 * i + 16, len(data)] for i in range(len(msrs))]
    answer = vm.manager.link.call(
        "ioctl",
        on=f"vm:{vm.name}",
        request=KVM_X86_SET_MSR_FILTER,
        arg={"hex": (data + bitmap).hex(), "pointers": pointers},
    )
    if answer["ret"]:
        raise InfraError(f"KVM_X86_SET_MSR_FILTER answered errno {answer['errno']}")


def _must(vm: SmallVm, request: int, data: bytes, vcpu: int) -> bytes:
    result, out = vm.vcpu_ioctl(request, data, vcpu=vcpu, out=True)
    if result != "OK":
        raise InfraError(f"vCPU ioctl {request:#x} answered {result}")
    return out
