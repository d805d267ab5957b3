# SPDX-License-Identifier: GPL-2.0-or-later
"""VCPU_GET_MTRR_TYPE."""

from __future__ import annotations

import pytest
from checks import requires
from lab import Lab

from harness.manager.smallvm import SmallVm
from harness.tool import Session

# MSRs and types: Intel SDM volume 3, "Memory Type Range Registers (MTRRs)".
DEFAULT_TYPE, FIXED_64K, FIXED_16K, FIXED_4K = 0x2FF, 0x250, 0x258, 0x268
ENABLED, FIXED_ENABLED, VALID = 0x800, 0x400, 0x800
UC, WC, WT, WP, WB = 0, 1, 4, 5, 6
GB = 1 << 30


def _variable(number: int, base: int, size: int, kind: int) -> dict[int, int]:
    """The two MSRs of a variable range; it lies below 64 GB."""
    mask = (64 * GB - size) | VALID
    return {0x200 + 2 * number: base | kind, 0x201 + 2 * number: mask}


def _types(session: Session, addresses: dict[int, int], *, vcpu: int = 0) -> None:
    """Check the type of each address; the reply is that byte and seven of padding."""
    pending = {gpa: session.send("VCPU_GET_MTRR_TYPE", vcpu=vcpu, gpa=gpa) for gpa in addresses}
    for gpa, one in pending.items():
        raw = one.reply(10).ok().raw
        assert raw[8:] == bytes([addresses[gpa]]) + bytes(7), f"{gpa:#x}: {raw[8:].hex()}"


def _with(lab: Lab, msrs: dict[int, int]) -> tuple[SmallVm, Session]:
    vm = lab.vm(payload="system")
    vm.set_msrs(msrs)
    session = lab.hook(vm)
    requires(session, command="VCPU_GET_MTRR_TYPE")
    vm.run()
    return vm, session


@pytest.mark.clause("MTRR-OK")
@pytest.mark.parametrize("kind", [UC, WC, WT, WP, WB])
def test_default(lab: Lab, kind: int) -> None:
    """Where no range says otherwise the type is the default one, memory or not."""
    _, session = _with(lab, {DEFAULT_TYPE: ENABLED | kind})
    _types(session, dict.fromkeys((0, 0xA0000, 0x20000, 0x12345, 3 * GB, 40 * GB), kind))


@pytest.mark.clause("MTRR-OK")
def test_disabled(lab: Lab) -> None:
    """While MTRRs are disabled all is uncached, whatever they say; the guest enables them."""
    vm, session = _with(lab, {DEFAULT_TYPE: WB, **_variable(0, 2 * GB, GB, WT)})
    _types(session, dict.fromkeys((0, 0x20000, 2 * GB, 5 * GB), UC))
    assert vm.perform("set_msr", DEFAULT_TYPE, ENABLED | WB)["faults"] == 0
    _types(session, {0: WB, 0x20000: WB, 2 * GB: WT, 5 * GB: WB})


@pytest.mark.clause("MTRR-OK")
def test_fixed(lab: Lab) -> None:
    """Below 1 MB the fixed ranges count, of 64, 16 and 4 KB, while they are enabled."""
    fixed = {
        FIXED_64K: 0x06_06_06_06_00_01_04_05,
        FIXED_16K: 0x06_05_04_01_00_06_05_04,
        FIXED_16K + 1: 0x05_06_06_06_06_06_06_01,  # from 0xa0000
        FIXED_4K: 0x06_06_06_06_06_06_06_04,
        FIXED_4K + 7: 0x00_01_04_05_06_06_06_06,  # from 0xf8000
    }
    vm, session = _with(lab, {DEFAULT_TYPE: ENABLED | FIXED_ENABLED | WB, **fixed})
    _types(session, {
        0: WP, 0xFFFF: WP, 0x1_0000: WT, 0x1_FFFF: WT, 0x2_0000: WC, 0x3_8000: UC, 0x4_0000: WB,
        0x8_0000: WT, 0x8_3FFF: WT, 0x8_4000: WP, 0x8_C000: UC, 0x9_0000: WC, 0x9_FFFF: WB,
        0xA_0000: WC, 0xA_3FFF: WC, 0xA_4000: WB, 0xB_C000: WP, 0xC_0000: WT, 0xC_1000: WB,
        0xF_8000: WB, 0xF_BFFF: WB, 0xF_C000: WP, 0xF_D000: WT, 0xF_E000: WC, 0xF_FFFF: UC,
        0x10_0000: WB,
    })  # fmt: skip
    assert vm.perform("set_msr", DEFAULT_TYPE, ENABLED | WT)["faults"] == 0
    _types(session, dict.fromkeys((0, 0x2_0000, 0x8_C000, 0xF_FFFF), WT))


@pytest.mark.clause("MTRR-OK")
def test_variable(lab: Lab) -> None:
    """Variable ranges count from their first byte to their last, if they are valid."""
    off = {0x200 + 2 * 3: 6 * GB | WT, 0x201 + 2 * 3: 64 * GB - GB}
    _, session = _with(lab, {
        DEFAULT_TYPE: ENABLED | WB,
        **_variable(0, 0x8000_0000, 0x1_0000, UC),
        **_variable(1, 5 * GB, 0x1000, WC),
        **_variable(2, 8 * GB, 4 * GB, WP),
        **_variable(7, 16 * GB, GB, WT),  # the last one that KVM has
        **off,
    })  # fmt: skip
    _types(session, {
        0x7FFF_F000: WB, 0x7FFF_FFFF: WB, 0x8000_0000: UC, 0x8000_1234: UC, 0x8000_FFFF: UC,
        0x8001_0000: WB, 5 * GB - 1: WB, 5 * GB: WC, 5 * GB + 0xFFF: WC, 5 * GB + 0x1000: WB,
        8 * GB - 1: WB, 8 * GB: WP, 12 * GB - 1: WP, 12 * GB: WB, 6 * GB: WB,
        16 * GB: WT, 17 * GB - 1: WT, 17 * GB: WB,
    })  # fmt: skip


@pytest.mark.clause("MTRR-OK")
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(UC, WB, UC), (WB, UC, UC), (UC, WT, UC), (WC, UC, UC), (WT, WB, WT), (WB, WT, WT),
     (WB, WB, WB)],
)  # fmt: skip
def test_overlap(lab: Lab, first: int, second: int, expected: int) -> None:
    """Where ranges overlap uncached wins, and write-through wins over write-back."""
    _, session = _with(lab, {
        DEFAULT_TYPE: ENABLED | WC,
        **_variable(0, 2 * GB, 2 * GB, first),
        **_variable(1, 3 * GB, GB, second),
    })  # fmt: skip
    _types(session, {2 * GB: first, 3 * GB: expected, 4 * GB - 1: expected, 4 * GB: WC})


@pytest.mark.clause("MTRR-OK")
def test_of_the_vcpu_asked_for(lab: Lab) -> None:
    """Each vCPU has its own types."""
    vm = lab.vm(payload="system", vcpus=2)
    vm.set_msrs({DEFAULT_TYPE: ENABLED | WT}, vcpu=1)
    vm.set_msrs({DEFAULT_TYPE: ENABLED | WB}, vcpu=0)
    session = lab.hook(vm)
    requires(session, command="VCPU_GET_MTRR_TYPE")
    vm.run()
    for vcpu, kind in ((1, WT), (0, WB), (1, WT)):
        _types(session, {0x1000: kind}, vcpu=vcpu)
