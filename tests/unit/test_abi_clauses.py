# SPDX-License-Identifier: GPL-2.0-or-later
"""The clauses as data: complete, and consistent with the profile."""

from __future__ import annotations

from collections import Counter

import pytest

from harness.abi import all_clauses, load_clauses, load_profile, requirement_documents

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


@pytest.mark.parametrize("version", ["v12", "v7", "v6"])
def test_what_a_clause_needs_is_there(version: str) -> None:
    """Of each version's clauses nothing is left that speaks of what it does not have."""
    profile = load_profile(version)
    clauses = load_clauses(version)
    assert not {one.id: why for one in clauses.values() if (why := one.unclaimed(profile))}
    assert clauses.keys() <= all_clauses().keys()


@pytest.mark.parametrize(
    ("version", "has", "lacks", "numbers"),
    [
        ("v7", "MAXGFN-OK CHKCMD-EINVAL-UNKNOWN PREUNHOOK-SENDS", "CHKCMD-ENOENT CLEANUP-OK", 304),
        ("v6", "NOTIFY-SENDS HOOK-WAITS EVT-SEQ", "PREUNHOOK-SENDS UNHOOK-FREES GVA-OK", 217),
    ],
)
def test_older_versions_have_their_own(version: str, has: str, lacks: str, numbers: int) -> None:
    """New clauses beside those of v12, others gone, others in other words; ids keep meanings."""
    clauses = load_clauses(version)
    assert clauses.keys() >= set(has.split())
    assert not clauses.keys() & set(lacks.split())
    assert len(clauses) == numbers
    assert "0x4018AEFF" in clauses["HOOK-ABI"].text
    assert "0x4018AEC8" in load_clauses()["HOOK-ABI"].text
    assert clauses["HOOK-ABI"].group == load_clauses()["HOOK-ABI"].group
    # What a group has of its own stands with the rest of the group.
    order = [one.group for one in clauses.values()]
    assert len(set(order)) == sum(a != b for a, b in zip(order, ["", *order], strict=False))


def test_claims_of_a_series() -> None:
    """Of less than the whole, clauses say what is missing; the whole can still be read."""
    whole = load_profile("v12")
    part = whole.claimed(
        capability=500,
        commands=[name for name in whole.commands if name != "VM_SET_PAGE_ACCESS"],
        events=[name for name in whole.events if name != "PF"],
        requests={"HOOK": 0x4018AED8, "UNHOOK": 0xAEC9},
    )
    assert (part.capability, part.ioctl("HOOK").nr) == (500, 0xD8)
    assert part.unclaimed == (
        "VM_SET_PAGE_ACCESS", "event PF", "ioctl COMMAND", "ioctl EVENT", "ioctl PREUNHOOK",
    )  # fmt: skip
    assert CLAUSES["SETPAGE-OK"].unclaimed(part) == "not claimed: VM_SET_PAGE_ACCESS"
    assert CLAUSES["EV-PF-RETRY"].unclaimed(part) == "not claimed: event PF"
    assert CLAUSES["READPHYS-OK"].unclaimed(part) == ""
    assert part.event_by_id[whole.events["PF"].id].name == "PF"
