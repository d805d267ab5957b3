# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel's selftests say, and when two kernels count as different."""

from __future__ import annotations

import dataclasses

import pytest

from harness.hosts.base import MachineFacts
from harness.selftests import BASE, OFF, ON, Comparison, Outcome, summary, verdict_of

FACTS = MachineFacts(
    target="tcg", emulated=True, vendor="AMD", cpu_model="EPYC", cpus=2, memory_mb=3072,
    virtualisation="SVM, emulated by a test", nested_paging=True, kernel_release="6.12-base",
    kernel_series="linux@1", guest_qemu="10", machine="here",
)  # fmt: skip

PASS = Outcome("pass")
FAIL = Outcome("fail", "x86_64/state_test.c:7: rc == 0")


def _comparison(**tests: dict[str, list[Outcome]]) -> Comparison:
    return Comparison(
        outcomes=tests, left_out={}, source="linux 6.12", base=FACTS,
        series=dataclasses.replace(FACTS, kernel_release="6.12-series"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "output", "verdict", "detail"),
    [
        (0, "Random seed: 0x6b8b4567\n", "pass", ""),
        (0, "TAP version 13\n1..2\nok 1 msr\nok 2 cap\n", "pass", "ok msr; ok cap"),
        (4, "1..0 # SKIP - Requirement not met: kvm_has_cap(X)\n", "skip",
         "Requirement not met: kvm_has_cap(X)"),
        (4, "MCG_CMCI_P is not supported, skipping test\n", "skip",
         "MCG_CMCI_P is not supported, skipping test"),
        (254, "==== Test Assertion Failure ====\n  x86_64/debug_regs.c:112: a == b\n  pid=99\n",
         "fail", "x86_64/debug_regs.c:112: a == b"),
        (1, "not ok 1 one\nok 2 two\n", "fail", "not ok one; ok two"),
        (127, "", "fail", "exit status 127"),
        (-1, "", "signal", ""),
    ],
)  # fmt: skip
def test_what_a_test_says(status: int, output: str, verdict: str, detail: str) -> None:
    """Verdict, place of a failed assertion, reason of a skip, and sub-tests."""
    assert verdict_of(status, output) == (verdict, detail)


def test_the_same_failure_is_no_difference() -> None:
    """Only what a kernel does otherwise counts."""
    same = _comparison(state={BASE: [FAIL], OFF: [FAIL], ON: [FAIL]})
    assert not same.differences(OFF)
    assert not same.differences(ON)
    assert not same.unequal()
    assert "Failing without the series too: 1" in summary(same)
    assert "nothing here was seen on hardware" in summary(same)


def test_a_lasting_difference_is_told_with_both_sides() -> None:
    """Also when the other place of an assertion is all that differs."""
    other = dataclasses.replace(FAIL, detail="x86_64/state_test.c:9: rc")
    found = _comparison(
        state={BASE: [FAIL] * 4, OFF: [FAIL] * 4, ON: [other] * 4},
        smm={BASE: [PASS], OFF: [PASS], ON: [PASS]},
    )
    assert found.differences(OFF) == []
    assert found.differences(ON) == ["state"]
    text = summary(found)
    assert "state_test.c:7" in text
    assert "state_test.c:9" in text


def test_a_complaint_of_the_kernel_is_a_difference() -> None:
    """A test may pass while the kernel warns."""
    warned = Outcome("pass", complaints=("WARNING: at kvm_main.c",))
    found = _comparison(state={BASE: [PASS] * 4, OFF: [PASS] * 4, ON: [warned] * 4})
    assert found.differences(ON) == ["state"]
    assert "WARNING" in summary(found)


def test_once_is_an_accident_twice_is_not() -> None:
    """A test that failed once of four times is named as flaky; twice is a difference."""
    slow = Outcome("timeout")
    once = _comparison(state={BASE: [PASS] * 4, OFF: [slow, PASS, PASS, PASS], ON: [PASS] * 4})
    assert once.differences(OFF) == []
    assert once.flaky() == ["state"]
    assert "1 of 12: timeout" in summary(once)
    twice = _comparison(state={BASE: [PASS] * 4, OFF: [slow, PASS, slow, PASS], ON: [PASS] * 4})
    assert twice.differences(OFF) == ["state"]
    assert twice.flaky() == []


def test_what_the_kernel_without_the_series_does_too_is_no_difference() -> None:
    """A test that sometimes fails there may fail with the series."""
    slow = Outcome("timeout")
    found = _comparison(state={BASE: [PASS, slow], OFF: [slow, slow], ON: [PASS, PASS]})
    assert found.differences(OFF) == []
    assert found.flaky() == ["state"]
