# SPDX-License-Identifier: GPL-2.0-or-later
"""What selftests gave, on each kernel, and where that differs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.hosts import MachineFacts

__all__ = ["BASE", "OFF", "ON", "TITLES", "Comparison", "Outcome", "verdict_of"]

BASE, OFF, ON = "base", "off", "on"
TITLES = {
    BASE: "without the series",
    OFF: "with it, introspection off",
    ON: "with it, introspection on and unused",
}

_SKIPPED = 4  # kselftest's exit status; tools/testing/selftests/kselftest.h


@dataclass(frozen=True)
class Outcome:
    """What one run of a test gave; two that are equal gave the same."""

    verdict: str
    """``pass``, ``skip``, ``fail``, ``signal``, ``timeout`` or ``lost`` (the host died)."""
    detail: str = ""
    """Where it failed, why it was skipped, and what its sub-tests gave."""
    complaints: tuple[str, ...] = ()
    """What the host's kernel complained about meanwhile, without times and addresses."""
    output: str = field(default="", compare=False)
    duration_s: float = field(default=0.0, compare=False)

    def words(self) -> str:
        """For people, in a line."""
        said = f"{self.verdict}: {self.detail}" if self.detail else self.verdict
        return said + "".join(f"; kernel: {one}" for one in self.complaints)


_FAILED = re.compile(r"^==== Test Assertion Failure ====\s*\n\s*(\S+:\d+): (.*)$", re.MULTILINE)
_TAP = re.compile(r"^(?:# )?((?:not )?ok) \d+ (.*)$", re.MULTILINE)


def verdict_of(status: int, output: str) -> tuple[str, str]:
    """Verdict and detail of a test that ended with ``status`` and printed ``output``."""
    parts = [f"{word} {name.strip()}" for word, name in _TAP.findall(output)]
    if status == 0:
        return "pass", "; ".join(parts)
    if status == _SKIPPED:
        lines = [line for line in output.splitlines() if line.strip()]
        reason = next((line for line in lines if "SKIP" in line), lines[-1] if lines else "")
        return "skip", re.sub(r"^.*# SKIP[\s-]*", "", reason).strip()
    if found := _FAILED.search(output):
        parts.insert(0, f"{found[1]}: {found[2].strip()}")
    if status < 0:
        return "signal", "; ".join(parts)
    return "fail", "; ".join(parts) or f"exit status {status}"


@dataclass
class Comparison:
    """All that was run. ``outcomes[test][kernel]`` holds each run's outcome, in order."""

    outcomes: dict[str, dict[str, list[Outcome]]]
    left_out: dict[str, str]
    """Tests that were not run, with the reason."""
    source: str
    """The kernel source that the tests are from."""
    base: MachineFacts
    series: MachineFacts

    def differences(self, kernel: str) -> list[str]:
        """Tests that gave with this kernel what they never gave without the series.

        Once may be an accident: it counts when it came twice, or always.
        """
        found = []
        for name, by_kernel in self.outcomes.items():
            usual = set(by_kernel.get(BASE, ()))
            new = [one for one in by_kernel.get(kernel, ()) if one not in usual]
            if new and (len(new) > 1 or len(new) == len(by_kernel[kernel])):
                found.append(name)
        return found

    def flaky(self) -> list[str]:
        """Tests that did not always give the same, though the series makes no difference."""
        different = {*self.differences(OFF), *self.differences(ON)}
        return [name for name in self.unequal() if name not in different]

    def unequal(self) -> list[str]:
        """Tests that did not give the same in all their runs."""
        return [
            name
            for name, by_kernel in self.outcomes.items()
            if len({one for runs in by_kernel.values() for one in runs}) > 1
        ]

    def count(self, kernel: str) -> dict[str, int]:
        """How many tests gave which verdict in their first run."""
        counts: dict[str, int] = {}
        for by_kernel in self.outcomes.values():
            if runs := by_kernel.get(kernel):
                counts[runs[0].verdict] = counts.get(runs[0].verdict, 0) + 1
        return counts
