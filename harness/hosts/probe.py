# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at the machine it runs in and prints what it saw as one JSON object.

This file is sent to machines as text and executed there, so it is complete in itself and
uses the standard library alone. It judges nothing; :mod:`harness.hosts.seen` does. Its
arguments are numbers to ask KVM_CHECK_EXTENSION for.
"""

import ctypes
import fcntl
import json
import mmap
import os
import platform
import struct
import sys
from pathlib import Path
from typing import Any

KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
CPUID_ENTRIES = 256

# push rbx; mov eax, edi; xor ecx, ecx; cpuid
# mov [rsi], eax; mov [rsi+4], ebx; mov [rsi+8], ecx; mov [rsi+12], edx; pop rbx; ret
CPUID_CODE = bytes.fromhex("53 89f8 31c9 0fa2 8906 895e04 894e08 89560c 5b c3")

DMI = ("sys_vendor", "product_name", "board_vendor", "bios_vendor")


def text(path: str | Path) -> str:
    """A file's content without white space at its ends; empty if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def signature() -> str:
    """What the hypervisor calls itself (CPUID 0x40000000): ``KVMKVMKVM``, ``TCGTCGTCGTCG``.

    Only where the processor says that there is one: others answer anything.
    """
    if " hypervisor" not in text("/proc/cpuinfo"):
        return ""
    try:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=protection)
        code.write(CPUID_CODE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_void_p)(address)
        answer = (ctypes.c_uint32 * 4)()
        cpuid(0x40000000, ctypes.addressof(answer))
    except (OSError, ValueError):  # a system that lets nobody make code
        return ""
    return bytes(answer)[4:].decode("latin-1").strip("\0 ")


def cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    lines = text("/proc/cpuinfo").partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}


def nested_offered(device: int) -> bool:
    """Whether KVM offers its guests VMX or SVM: its own answer, whatever parameters say."""
    entries = bytearray(8 + 40 * CPUID_ENTRIES)
    struct.pack_into("<I", entries, 0, CPUID_ENTRIES)
    fcntl.ioctl(device, KVM_GET_SUPPORTED_CPUID, entries)
    (count,) = struct.unpack_from("<I", entries)
    for index in range(count):
        function, _, _, _, _, ecx, _ = struct.unpack_from("<7I", entries, 8 + 40 * index)
        if (function == 1 and ecx & 1 << 5) or (function == 0x80000001 and ecx & 1 << 2):
            return True
    return False


def kvm(numbers: list[int]) -> dict[str, Any]:
    """What /dev/kvm is good for."""
    answers: dict[str, int] = {}
    seen = {"device": Path("/dev/kvm").exists(), "error": "", "nested": False, "answers": answers}
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        seen["error"] = error.strerror
        return seen
    try:
        for number in numbers:
            answers[str(number)] = fcntl.ioctl(device, KVM_CHECK_EXTENSION, number)
        os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))
        seen["nested"] = nested_offered(device)
    except OSError as error:
        seen["error"] = error.strerror
    finally:
        os.close(device)
    return seen


def modules() -> dict[str, str]:
    """The parameters of KVM's modules that matter here, as ``kvm_amd.npt``: ``Y``."""
    found = {}
    for place in Path("/sys/module").glob("kvm*"):
        found[place.name] = "loaded"
        for name in ("ept", "npt", "nested", "introspection"):
            value = text(place / "parameters" / name)
            if value:
                found[place.name + "." + name] = value
    return found


def memory_mb() -> int:
    """All memory, in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def acpi_oem() -> str:
    """Who made the ACPI tables: six characters, as ``DELL`` or ``BOCHS``."""
    for name in ("DSDT", "FACP", "APIC"):
        try:
            header = Path("/sys/firmware/acpi/tables", name).read_bytes()[:36]
        except OSError:
            continue
        return header[10:16].decode("latin-1").strip("\0 ")
    return ""


def look(numbers: list[int]) -> dict[str, Any]:
    """All of it."""
    processor = cpuinfo()
    return {
        "signature": signature(),
        "flags": [*processor.get("flags", "").split(), *processor.get("vmx flags", "").split()],
        "cpu_model": processor.get("model name", ""),
        "dmi": {name: text("/sys/class/dmi/id/" + name) for name in DMI},
        "acpi_oem": acpi_oem(),
        "xen": text("/sys/hypervisor/type"),
        "kvm": kvm(numbers),
        "modules": modules(),
        "release": platform.release(),
        "boot_id": text("/proc/sys/kernel/random/boot_id"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mb": memory_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(look([int(word) for word in sys.argv[1:]])))
