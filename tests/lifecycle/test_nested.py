# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that is a hypervisor itself: its guests run on, and are none of the tool's business.

The tool watches all that it can while the guest runs a guest of its own, which does what the
tool watches for with values that occur nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from harness.plugin import skip_clause
from harness.tool import EventMessage, Session

from .inguest import NestedGuest, Rounds
from .stage import Stage

ROUNDS = 100
SYSENTER_ESP = 0x175
# What the nested guest uses, see guest-images/guest/nested.c.
STRANGE_CR3 = 0x7E5A5000
STRANGE_MSR = 0x7E57AB1E
STRANGE_RIPS = range(0x400, 0x600)

IO_EXIT = 2
ALL_WELL = Rounds(rounds=ROUNDS, breakpoints=ROUNDS, strange=0, failed=0, exit=IO_EXIT)


class Watcher:
    """Lets everything go on and notes what comes."""

    KINDS = ("CR", "MSR", "DESCRIPTOR", "BREAKPOINT", "HYPERCALL", "XSETBV")

    def __init__(self, session: Session) -> None:
        self.seen: list[EventMessage] = []
        for kind in self.KINDS:
            session.handle(kind, self._take)
            session.command("VCPU_CONTROL_EVENTS", event_id=kind, enable=1).ok()
        for register in (0, 3, 4):
            session.command("VCPU_CONTROL_CR", cr=register, enable=1).ok()
        session.command("VCPU_CONTROL_MSR", msr=SYSENTER_ESP, enable=1).ok()

    def _take(self, event: EventMessage) -> str:
        self.seen.append(event)
        return "CONTINUE"

    def of_nested(self) -> list[str]:
        """What the tool saw of the nested guest, which should be nothing."""
        return [
            f"{event.name} at {event.regs.rip:#x}"
            for event in self.seen
            if event.regs.rip in STRANGE_RIPS
            or (event.name == "CR" and event.fields.new_value == STRANGE_CR3)
            or (event.name == "MSR" and event.fields.new_value == STRANGE_MSR)
        ]


@contextlib.contextmanager
def nested_guest(stage: Stage) -> Iterator[tuple[Session, NestedGuest]]:
    """A hooked guest with a guest of its own, which has not started."""
    tool = stage.tool()
    guest = stage.linux(tool)
    _, session = tool.hook()
    shell = guest.wait_booted()
    if b"kvm" not in shell.run("ls /dev").stdout.split():
        skip_clause("the guest has no KVM of its own: this host does not nest guests in guests")
    nested = NestedGuest(shell, ROUNDS)
    try:
        yield session, nested
    finally:
        nested.close()


@pytest.mark.clause("EVT-CONTINUE", "CTLCR-OK", "EV-BP-CONTINUE", "EV-DESC-PAYLOAD")
def test_watched(stage: Stage) -> None:
    """With everything watched a nested guest does its work, and the tool sees nothing of it."""
    with nested_guest(stage) as (session, nested):
        watcher = Watcher(session)
        assert nested.run(timeout_s=60) == ALL_WELL
        assert watcher.of_nested() == []
        # The guest's own writes to CR3, of which there is one a context switch, came.
        assert any(event.name == "CR" and event.fields.cr == 3 for event in watcher.seen)


@pytest.mark.clause("SETPAGE-OK", "EV-PF-CONTINUE", "EV-PF-PAYLOAD")
def test_restricted_page(stage: Stage) -> None:
    """A page is restricted for the guest's guest, too; each of its writes passes alone."""
    with nested_guest(stage) as (session, nested):
        page = nested.gpa
        seen: list[tuple[int, int]] = []

        def take(event: EventMessage) -> str:
            seen.append((event.fields.gpa, event.fields.access))
            return "CONTINUE"

        session.handle("PF", take)
        session.command("VCPU_CONTROL_EVENTS", event_id="PF", enable=1).ok()
        session.command("VM_SET_PAGE_ACCESS", entries=[{"gpa": page, "access": 5}]).ok()
        assert nested.run(timeout_s=60) == ALL_WELL
        # Two writes a round: the number of the round, and that of the breakpoint.
        assert seen == [(page + 4, 2), (page, 2)] * ROUNDS
