# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code in words: instructions, labels, and the mark at rip."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.manager.listing import listing, place

# nop; xor %eax,%eax; movabs $..., %rax; ret
CODE = bytes.fromhex("9031c048b88877665544332211c3")
LABELS = {"start": 0x1000, "load": 0x1003}


def test_marks_the_instruction() -> None:
    """The instruction at rip has the mark, labels stand before theirs, long ones stay whole."""
    lines = listing(CODE, 0x1000, 0x1003, labels=LABELS).splitlines()
    assert [line.split()[0] for line in lines[:1] + lines[3:4]] == ["start:", "load:"]
    marked = [line for line in lines if line.startswith(">")]
    assert len(marked) == 1
    assert "0x00001003" in marked[0]
    assert "48b88877665544332211" in marked[0]
    assert "movabs" in marked[0]
    assert lines[-1].split()[-1] == "ret"


def test_without_labels_or_within_an_instruction() -> None:
    """A rip that no label leads to is where the listing begins."""
    for labels, rip in ((LABELS, 0x1002), (None, 0x1001)):
        before, first, *_ = listing(CODE, 0x1000, rip, labels=labels).splitlines()
        assert before == f"  0x00001000  {CODE[: rip - 0x1000].hex(' ')}"
        assert first.startswith(f"> {rip:#010x}")
    assert "%ax,%ax" in listing(bytes.fromhex("31c0c3"), 0, 0, bytes_mode=2)


def test_without_a_disassembler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bytes are better than nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    text = listing(CODE, 0x1000, 0x1001, labels=LABELS)
    assert "0x00001000  90>31 c0 48" in text


def test_place() -> None:
    """A place is told from the label before it, if that is near."""
    assert place(0x1000, LABELS) == "start"
    assert place(0x1005, LABELS) == "load+0x2"
    assert place(0xFFF, LABELS) == ""
    assert place(0x9000, LABELS) == ""
