# SPDX-License-Identifier: GPL-2.0-or-later
"""Page access on the other ways in which KVM can map a guest's memory.

Each needs a host that is booted with other options, so one test does a choice of the
others' work on it. What the usual host has (two-dimensional paging with the TDP MMU) is
what all other files run on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import test_cr as cr
import test_page_access as access
import test_page_faults as faults
import test_page_memory as memory
import test_page_races as races
from lab import Lab
from pages import NONE, R, X

from harness.manager.small import PARAMETER
from harness.plugin import skip_clause
from harness.plugin.fixtures import ClauseNotes, OnFailure

TWO_DIMENSIONAL = {"AMD": "/sys/module/kvm_amd/parameters/npt",
                   "Intel": "/sys/module/kvm_intel/parameters/ept"}  # fmt: skip

Part = Callable[[Lab], None]
CORE: list[Part] = [
    *(partial(access.check_accesses, access=allowed) for allowed in range(8)),
    *(partial(access.check_accesses, access=allowed, payload="access32") for allowed in (NONE, R)),
    access.test_slot_is_moved,
    access.test_slot_is_made_anew,
    partial(access.test_lifted_at_the_end, how="unhook in an event", cleanup=1),
    partial(faults.test_fetches_in_a_row, alias=True),
    partial(faults.test_kinds_of_instructions, routine="sse_write"),
    partial(faults.test_kinds_of_instructions, routine="exchange16"),
    partial(faults.test_delivery_of_an_exception, what="stack"),
    faults.test_two_pages,
    faults.test_retry,
    partial(races.test_no_access_without_event, routines=["hammer_sse", "hammer"], access=R | X),
    races.test_in_force_with_the_reply,
    partial(memory.test_dirty_log, routine="sse_write"),
    *(partial(memory.test_huge_page_is_split, number=number) for number in (5, 511)),
]


# With shadow paging the processor does not look at the guest's page tables.
TWO_DIMENSIONAL_ONLY: list[Part] = [partial(faults.test_page_tables, allowed=X)]
# With shadow paging KVM itself needs to know of each write of CR3.
SHADOW_ONLY: list[Part] = [
    partial(cr.test_changes_are_reported, cr=3),
    partial(cr.test_deselect, cr=3),
    cr.test_new_page_tables,
]


def _run(lab: Lab, parts: list[Part], clauses: ClauseNotes, on_failure: OnFailure) -> None:
    """Do all parts, one after another; those that fail are told together."""
    guests: list[str] = []
    on_failure("guests", lambda: "\n\n".join(guests))
    failures: list[Exception] = []
    skipped: list[str] = []
    for part in parts:
        try:
            part(lab)
        except pytest.skip.Exception as reason:
            skipped.append(str(reason))
        except Exception as error:
            function = part.func if isinstance(part, partial) else part
            given = part.keywords if isinstance(part, partial) else {}
            error.add_note(f"in {function.__module__}.{function.__name__}({given})")
            failures.append(error)
            guests.append(f"{function.__name__}\n{lab.guests()}")
        lab.reset()
    if len(skipped) == len(parts):
        skip_clause(skipped[0])
    for text in dict.fromkeys(skipped):
        clauses.note(f"not all of it could be done: {text}")
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(parts)} parts", failures)


_CLAUSES = pytest.mark.clause(
    "SETPAGE-OK", "SETPAGE-FORGET", "SETPAGE-SLOTMOVE", "UNHOOK-PAGES-LIFTED", "EV-PF-CONTINUE",
    "EV-PF-RETRY", "EV-PF-MULTI", "EV-PF-ONLYTRACKED", "EV-PF-FETCH-RIP",
)  # fmt: skip


@_CLAUSES
@pytest.mark.timeout(300)
@pytest.mark.boot_with("kvm.tdp_mmu=0")
@pytest.mark.usefixtures("exact")
def test_without_tdp_mmu(other_lab: Lab, clauses: ClauseNotes, on_failure: OnFailure) -> None:
    """Two-dimensional paging by the older code (kvm.tdp_mmu=0)."""
    assert other_lab.manager.read_file(PARAMETER + "tdp_mmu").strip() == "N"
    _run(other_lab, CORE + TWO_DIMENSIONAL_ONLY, clauses, on_failure)


@_CLAUSES
@pytest.mark.timeout(300)
@pytest.mark.clause("CTLCR-OK", "CTLCR-OFF", "EV-CR-PAYLOAD", "EV-CR-NEWVAL")
@pytest.mark.boot_with("kvm_amd.npt=0", "kvm_intel.ept=0")
@pytest.mark.usefixtures("exact")
def test_shadow_paging(other_lab: Lab, clauses: ClauseNotes, on_failure: OnFailure) -> None:
    """Shadow paging (npt=0, ept=0): KVM keeps page tables of its own beside the guest's."""
    file = TWO_DIMENSIONAL[other_lab.manager.vendor]
    if other_lab.manager.read_file(file).strip() != "N":
        skip_clause(f"{file} says that shadow paging cannot be had here")
    _run(other_lab, CORE + SHADOW_ONLY, clauses, on_failure)
