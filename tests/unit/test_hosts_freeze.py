# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread of another process is held, and goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.hosts.freeze import frozen_thread


@pytest.fixture
def child() -> Iterator[int]:
    """A process that waits."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def _state(thread: int) -> str:
    return Path(f"/proc/{thread}/stat").read_text().rpartition(") ")[2][0]


def test_held_as_long_as_the_block(child: int) -> None:
    """After the block the thread goes on, and may be held again."""
    for _ in range(2):
        with frozen_thread(child):
            assert _state(child) == "t"
        assert _state(child) != "t"


def test_of_nobody() -> None:
    """What is not there, or not ours, is told."""
    with pytest.raises(UsageError, match="ptrace of thread 4194305 is refused: No such process"):
        frozen_thread(4194305).__enter__()  # above what kernel/pid.c gives out
