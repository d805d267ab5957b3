# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code for the guests of the small device manager, and the machine around it.

The code is in ``guest-images/payloads`` as assembler source and is made with the
system's assembler and linker when first used. This module also lays out what a CPU
needs before it can run any of it: descriptor tables, page tables, the state of the
registers. ``layout.inc`` beside the sources holds the same addresses as this file.
"""

from __future__ import annotations

import base64
import struct
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from harness.build import cache as build_cache
from harness.errors import BuildError
from harness.paths import GUEST_IMAGES

__all__ = [
    "DUMP_A",
    "DUMP_B",
    "FREE",
    "MAILBOX_WORDS",
    "Machine",
    "Mode",
    "Payload",
    "mailbox",
    "segment_of",
]

Mode = Literal["long", "compat32", "protected32", "real16"]

MAILBOX_STEP = 0x200
GDT, TSS, TSS_STEP, IDT = 0x1000, 0x1200, 0x80, 0x2000
PML4, PDPT, PAGE_DIRECTORY = 0x3000, 0x4000, 0x5000
DUMP_A, DUMP_B = 0x6000, 0x7000
STACKS, STACK_STEP = 0x8000, 0x1000
CODE = 0x10000
FREE = 0x20000
"""First address that neither the payload nor its machine uses: the tests' own."""

ALIAS = 0x4000_0000
"""In long mode all memory is mapped a second time here, so that gva and gpa differ."""

# Labels of a payload that does not have all of "vectors"; what it does not have is on_fault.
_HANDLERS = {
    1: "on_debug",
    3: "on_breakpoint",
    0x21: "on_software_interrupt",
    0x80: "on_software_interrupt",
}

MAX_VCPUS = 4
MAILBOX_WORDS = {
    "ticks": 0x00, "want": 0x08, "done": 0x10, "result": 0x18, "refused": 0x20, "traps": 0x28,
    "trap_ip": 0x30, "faults": 0x38, "fault_top": 0x40, "kind": 0x50, "arg_nr": 0x58,
    "arg_1": 0x60, "arg_2": 0x68, "flags": 0x70,
    "vector": 0x78, "fault_sp": 0x80, "fault_cr2": 0x88, "stack": 0x90, "resume": 0xC0,
    "resume_sp": 0xC8, "area": 0x100,
}  # fmt: skip

CR0_PE, CR0_PROTECTED, CR0_PAGING = 0x1, 0x30, 0x8001_0000  # ET+NE; PG+WP
CR4_PAE, CR4_SMAP = 0x20, 0x20_0000
EFER_LME_LMA = 0x500
RFLAGS_FIXED, RFLAGS_IF = 0x2, 0x200

# Offsets in struct kvm_sregs (linux/kvm.h for x86).
SREGS = {
    "cs": 0, "ds": 24, "es": 48, "fs": 72, "gs": 96, "ss": 120, "tr": 144, "ldt": 168,
    "gdt": 192, "idt": 208, "cr0": 224, "cr3": 240, "cr4": 248, "efer": 264,
}  # fmt: skip
REGS = (  # the order of struct kvm_regs
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12",
    "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip


def mailbox(vcpu: int) -> int:
    """Answer the guest-physical address of a vCPU's mailbox."""
    return vcpu * MAILBOX_STEP


@dataclass(frozen=True)
class Payload:
    """Code linked at 0, and where its labels are."""

    name: str
    code: bytes
    symbols: Mapping[str, int]

    @classmethod
    @cache
    def load(cls, name: str, *, vendor: str, root: Path) -> Payload:
        """Assemble a payload for hosts of that CPU vendor, or find it made already.

        :param root: the cache of built things, as in ``settings.cache``.
        :raises BuildError: the assembler or the linker is missing or refuses the source.
        """
        source = GUEST_IMAGES / "payloads" / f"{name}.S"
        inputs: dict[str, str | bytes | Path] = {
            "source": source,
            "layout": source.with_name("layout.inc"),
            "vendor": vendor,
        }
        entry = build_cache.entry(
            "payload", inputs, lambda directory: _assemble(source, vendor, directory), root=root
        )
        symbols = {}
        for line in (entry / "symbols").read_text().splitlines():
            value, kind, label = line.split()
            if kind in "tT":  # labels of the code; the constants of layout.inc are symbols too
                symbols[label] = int(value, 16)
        return cls(name, (entry / "code").read_bytes(), symbols)


def _assemble(source: Path, vendor: str, directory: Path) -> None:
    amd = int(vendor == "AMD")
    steps = (
        ["as", "--64", "-I", str(source.parent), "--defsym", f"AMD={amd}", "-o", "object",
         str(source)],
        ["ld", "-e", "0", "-Ttext=0", "-o", "linked", "object"],
        ["objcopy", "-O", "binary", "-j", ".text", "linked", "code"],
        ["nm", "--defined-only", "linked"],
    )  # fmt: skip
    for argv in steps:
        try:
            done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise BuildError(
                f"cannot assemble {source}: there is no {argv[0]}", hint="apt-get install binutils"
            ) from error
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{argv[0]} refuses {source}", details=error.stderr) from error
    (directory / "symbols").write_text(done.stdout)


def segment_of(
    *, base: int = 0, limit: int = 0xFFFFFFFF, selector: int, kind: int, dpl: int = 0,
    db: int = 1, s: int = 1, long: int = 0, g: int = 1,
) -> bytes:  # fmt: skip
    """Pack one struct kvm_segment."""
    return struct.pack(
        "<QIHBBBBBBBBBB", base, limit, selector, kind, 1, dpl, db, s, long, g, 0, 0, 0
    )


def _descriptor(*, access: int, flags: int, base: int = 0, limit: int = 0xFFFFF) -> bytes:
    """Pack one 8-byte entry of a descriptor table."""
    value = (
        (limit & 0xFFFF)
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )
    return value.to_bytes(8, "little")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a VM of the small manager starts from: memory contents and vCPU states.

    :param cpl: privilege level of the code (long mode only).
    :param alias: run the code at its second mapping (long mode only), so that the
        linear address of an instruction is not its physical one.
    :param smap: keep ring 0 from the pages of outer rings (which all pages are here, so
        the payload's exception handlers cannot run).
    :param interrupts: start with interrupts enabled, though none ever come: Bochs (2.7 and
        3.0) keeps the host's timer from a guest that it enters with interrupts disabled, so
        one that spins would never let go of the processor.
    :param registers: general registers to start with, over the defaults.
    """

    payload: Payload
    vcpus: int = 1
    mode: Mode = "long"
    cpl: int = 0
    alias: bool = False
    smap: bool = False
    interrupts: bool = True
    registers: Mapping[str, int] = field(default_factory=dict)

    @property
    def linear_code(self) -> int:
        """The address at which the CPU runs the code."""
        return CODE + ALIAS if self.alias else CODE

    def address(self, label: str) -> int:
        """Answer the guest-physical address of a label of the payload."""
        return CODE + self.payload.symbols[label]

    def linear(self, label: str) -> int:
        """Answer what rip is at a label of the payload."""
        if self.mode == "real16":
            return self.payload.symbols[label]
        return self.linear_code + self.payload.symbols[label]

    def physical(self, rip: int) -> int:
        """Answer where in guest-physical memory rip points to."""
        if self.mode == "real16":
            return CODE + rip
        return rip - ALIAS if rip >= ALIAS and self.mode != "protected32" else rip

    def memory(self) -> list[tuple[int, bytes]]:
        """List the chunks of guest memory to fill, as (address, bytes)."""
        chunks = [(CODE, self.payload.code), (GDT, self._gdt())]
        for vcpu in range(self.vcpus):
            # Hypercalls are the introspection one (34, 24, 0) unless a test says otherwise.
            chunks.append((mailbox(vcpu) + MAILBOX_WORDS["arg_nr"], struct.pack("<QQQ", 34, 24, 0)))
        if self.mode in ("long", "compat32"):
            chunks += [(IDT, self._idt()), *self._page_tables()]
            for vcpu in range(self.vcpus):
                # Ring 0 stack for exceptions out of outer rings: the lower half.
                stack = STACKS + vcpu * STACK_STEP + STACK_STEP // 2
                chunks.append((TSS + vcpu * TSS_STEP + 4, struct.pack("<Q", stack)))
        return chunks

    def _gdt(self) -> bytes:
        table = bytearray(8)
        for ring in range(4):
            table += _descriptor(access=0x9B | ring << 5, flags=0xA)  # code, 64 bits
            table += _descriptor(access=0x93 | ring << 5, flags=0xC)  # data
        for vcpu in range(MAX_VCPUS):
            table += _descriptor(access=0x8B, flags=0, base=TSS + vcpu * TSS_STEP, limit=103)
            table += bytes(8)  # upper half of the base
        return bytes(table)

    def _idt(self) -> bytes:
        symbols = self.payload.symbols
        if not symbols.keys() & {"on_fault", "vectors"}:
            return bytes(16)
        table = b""
        for vector in range(256):
            if "vectors" in symbols:
                target = self.linear("vectors") + 16 * vector
            else:
                label = _HANDLERS.get(vector, "on_fault")
                target = self.linear(label if label in symbols else "on_fault")
            # Trap gates, which leave interrupts enabled in the handlers; int3 from any ring.
            access = 0xEF if vector == 3 else 0x8F
            table += struct.pack(
                "<HHBBHII", target & 0xFFFF, 8, 0, access, target >> 16 & 0xFFFF, target >> 32, 0
            )
        return table

    @staticmethod
    def _page_tables() -> Iterable[tuple[int, bytes]]:
        user_writable = 7
        yield PML4, struct.pack("<Q", PDPT | user_writable)
        directory = PAGE_DIRECTORY | user_writable
        yield PDPT, struct.pack("<QQ", directory, directory)  # second one: ALIAS
        yield PAGE_DIRECTORY, struct.pack("<Q", user_writable | 0x80)  # one page of 2 MB

    def state(self, vcpu: int) -> dict[str, Any]:
        """Describe the registers of a vCPU in the agent's form."""
        regs = dict.fromkeys(REGS, 0)
        regs["rip"] = 0 if self.mode == "real16" else self.linear_code
        regs["rflags"] = RFLAGS_FIXED | (RFLAGS_IF if self.interrupts else 0)
        regs["rsp"] = STACKS + (vcpu + 1) * STACK_STEP
        regs["r15"] = mailbox(vcpu)
        regs |= self.registers
        packed = struct.pack("<18Q", *(regs[name] for name in REGS))
        patches = [(SREGS[name], data.hex()) for name, data in self._special(vcpu).items()]
        return {"regs": packed.hex(), "sregs": patches}

    def _special(self, vcpu: int) -> dict[str, bytes]:
        if self.mode == "real16":
            return {
                "cs": segment_of(base=CODE, limit=0xFFFF, selector=CODE >> 4, kind=11, db=0, g=0)
            }
        ring = self.cpl
        long = self.mode == "long"
        code, data = (0x08 + ring * 16) | ring, (0x10 + ring * 16) | ring
        special = {
            "cs": segment_of(selector=code, kind=11, dpl=ring, db=int(not long), long=int(long))
        }
        for name in ("ds", "es", "fs", "gs", "ss"):
            special[name] = segment_of(selector=data, kind=3, dpl=ring)
        cr0 = CR0_PE | CR0_PROTECTED
        if self.mode != "protected32":
            cr0 |= CR0_PAGING
            special |= {
                "tr": segment_of(
                    base=TSS + vcpu * TSS_STEP, limit=103, selector=0x48 + vcpu * 16, kind=11,
                    db=0, s=0, g=0,
                ),
                "gdt": struct.pack("<QHHHH", GDT, len(self._gdt()) - 1, 0, 0, 0),
                "idt": struct.pack("<QHHHH", IDT, 0xFFF, 0, 0, 0),
                "cr3": struct.pack("<Q", PML4),
                "cr4": struct.pack("<Q", CR4_PAE | (CR4_SMAP if self.smap else 0)),
                "efer": struct.pack("<Q", EFER_LME_LMA),
            }  # fmt: skip
        special["cr0"] = struct.pack("<Q", cr0)
        return special


def encode(chunks: Iterable[tuple[int, bytes]]) -> list[tuple[int, str]]:
    """Put chunks of memory into the agent's form."""
    return [(address, base64.b64encode(data).decode()) for address, data in chunks]
