# SPDX-License-Identifier: GPL-2.0-or-later
"""The clauses as data: complete, and consistent with the profile."""

from __future__ import annotations

from collections import Counter

from harness.abi import load_clauses, load_profile, requirement_documents

CLAUSES = load_clauses()


def test_counts() -> None:
    """All 348, by where they stand and by the document that asks for them."""
    assert len(CLAUSES) == 348
    assert Counter(c.basis for c in CLAUSES.values()) == {
        "both": 196,
        "doc": 63,
        "impl": 40,
        "qemu": 40,
        "test": 9,
    }
    documents = Counter(d for c in CLAUSES.values() for d in c.documents)
    assert documents == {"S1": 9, "S2": 13, "S3": 26, "S4": 13}
    assert sum(bool(c.documents) for c in CLAUSES.values()) == 59
    assert set(documents) == set(requirement_documents())


def test_sides() -> None:
    """QEMU's and the lifecycle's clauses are told from the kernel's."""
    assert Counter(c.side for c in CLAUSES.values()) == {"kernel": 297, "qemu": 40, "lifecycle": 11}
    assert CLAUSES["QEMU-HSK-COOKIE"].side == "qemu"
    assert CLAUSES["LIFE-VMDESTROY"].side == "lifecycle"


def test_groups() -> None:
    """Groups come in the order of the interface's description, each clause in one."""
    groups = list(dict.fromkeys(c.group for c in CLAUSES.values()))
    assert len(groups) == 35
    assert groups[:2] == ["Capability and module parameter", "HOOK ioctl"]
    assert CLAUSES["PREUNHOOK-ENOENT-NOTSUBSCRIBED"].group == "PREUNHOOK ioctl"


def test_disagreements_have_readings() -> None:
    """Where text and reference code differ, the accepted readings are named."""
    assert set(CLAUSES["WRITEPHYS-SHORT-CLOSE"].readings) == {"closes", "einval"}
    assert sum(bool(c.readings) for c in CLAUSES.values()) == 8


def test_every_command_has_a_group() -> None:
    """Each command of the profile is named by the title of a group."""
    titles = " ".join(c.group for c in CLAUSES.values())
    assert all(name in titles for name in load_profile("v12").commands)
