# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_GET_CPUID."""

from __future__ import annotations

import struct

import pytest
from causes import CR4_OSXSAVE, CR4_PAE
from checks import all_fail, requires
from lab import Lab
from userspace import CpuidEntry, get_cpuid, set_cpuid

from harness.manager.payloads import MAILBOX_WORDS, mailbox
from harness.manager.smallvm import SmallVm
from harness.tool import Session

INDEX_COUNTS = 1
# Leaves that tell what the CPU that executes the instruction is, so that they depend on it.
MARKS = (
    CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, 0x1111_1111, 0x2222_2222, 0x3333_3333),
    CpuidEntry(0x4000_0001, 0, 0, 0x0102_0304, 0, 0, 0xFFFF_FFFF),
    CpuidEntry(0xC000_0000, 0, 0, 5, 6, 7, 8),
    CpuidEntry(0x20, 0, INDEX_COUNTS, 0x10, 0x11, 0x12, 0x13),
    CpuidEntry(0x20, 2, INDEX_COUNTS, 0x20, 0x21, 0x22, 0x23),
)
NOT_THERE = ((0x3FFF_FFFF, 0), (0x4000_0002, 0), (0xFFFF_FFFF, 0), (0x8FFF_FFFF, 5), (0x20, 1),
             (0x20, 3), (0x20, 0xFFFF_FFFF), (0xD, 62), (0xC000_0001, 0))  # fmt: skip


def _asked(session: Session, function: int, index: int, *, vcpu: int = 0) -> tuple[int, ...]:
    fields = (
        session.command("VCPU_GET_CPUID", vcpu=vcpu, function=function, index=index).ok().fields
    )
    return fields.eax, fields.ebx, fields.ecx, fields.edx


def _seen(vm: SmallVm, function: int, index: int) -> tuple[int, ...]:
    """What the guest's own instruction tells it."""
    vm.perform("identify", function, index)
    return struct.unpack("<4I", vm.read(mailbox(0) + MAILBOX_WORDS["area"], 16))


@pytest.mark.clause("CPUID-OK")
def test_all_leaves(lab: Lab) -> None:
    """Each leaf and subleaf is answered as user space configured it for that vCPU."""
    vm, session = lab.pair(payload="system", vcpus=2, run=False)
    requires(session, command="VCPU_GET_CPUID")
    entries = [entry for entry in get_cpuid(vm, vcpu=1) if entry.function >> 28 != 4]
    set_cpuid(vm, [*entries, *MARKS], vcpu=1)
    configured = get_cpuid(vm, vcpu=1)
    assert set(MARKS) <= set(configured)
    vm.run()
    pending = {
        entry: session.send(
            "VCPU_GET_CPUID", vcpu=1, function=entry.function, index=entry.subleaf
        )
        for entry in configured
    }  # fmt: skip
    for entry, reply in pending.items():
        fields = reply.reply(5).ok().fields
        assert (fields.eax, fields.ebx, fields.ecx, fields.edx) == entry[3:], entry
    # The other vCPU was not configured so.
    for mark in MARKS[2:]:
        session.command(
            "VCPU_GET_CPUID", vcpu=0, function=mark.function, index=mark.subleaf
        ).fails("KVM_ENOENT")  # fmt: skip


@pytest.mark.clause("CPUID-OK")
def test_as_the_guest_sees_it(lab: Lab) -> None:
    """The answer is what the guest's own instruction gets, also where that changes over time."""
    vm, session = lab.pair(payload="system")
    requires(session, command="VCPU_GET_CPUID")
    leaves = [(0, 0), (1, 0), (7, 0), (0xD, 0), (0xD, 1), (0x8000_0000, 0), (0x8000_0001, 0),
              (0x8000_0008, 0)]  # fmt: skip
    for _ in range(2):
        for function, index in leaves:
            assert _asked(session, function, index) == _seen(vm, function, index), hex(function)
        # From now on leaf 1 has OSXSAVE, and the size in leaf 0xd is another.
        vm.perform("set_cr4", CR4_PAE | CR4_OSXSAVE)
        assert vm.perform("set_xcr", 0, 3)["faults"] == 0
    assert _asked(session, 1, 0)[2] & 1 << 27


@pytest.mark.clause("CPUID-ENOENT")
def test_no_such_leaf(lab: Lab) -> None:
    """A function that is not there, or an index of one that has others, answers KVM_ENOENT."""
    vm, session = lab.pair(payload="system", run=False)
    requires(session, command="VCPU_GET_CPUID")
    entries = [entry for entry in get_cpuid(vm) if entry.function >> 28 != 4]
    set_cpuid(vm, [*entries, *MARKS])
    vm.run()
    wrongs = [{"function": function, "index": index} for function, index in NOT_THERE]
    all_fail(session, "VCPU_GET_CPUID", "KVM_ENOENT", wrongs)
    assert _asked(session, 0x20, 2) == (0x20, 0x21, 0x22, 0x23)
