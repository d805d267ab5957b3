# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that access memory as ordered, and the restrictions that they run into.

The payloads ``access`` (64-bit) and ``access32`` (no paging) run one routine an order; their
sources say what each routine touches.
"""

from __future__ import annotations

from typing import NamedTuple

from checks import enable, next_event_of, requires
from lab import Lab

from harness.manager.payloads import ALIAS, FREE
from harness.manager.smallvm import SmallVm
from harness.tool import EventMessage, Session

__all__ = [
    "ALL_ONES",
    "NONE",
    "PAGE",
    "RWX",
    "Access",
    "R",
    "Trace",
    "W",
    "X",
    "access_pair",
    "fetch_page",
    "linear",
    "next_access",
    "perform",
    "rest",
    "restrict",
]

PAGE = 4096
ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF
R, W, X = 1, 2, 4
NONE, RWX = 0, R | W | X


class Access(NamedTuple):
    """What a PF event tells, and where the vCPU was."""

    access: int
    gpa: int
    rip: int
    gva: int = ALL_ONES

    @classmethod
    def of(cls, event: EventMessage) -> Access:
        """Read it from an event."""
        fields = event.fields
        return cls(fields.access, fields.gpa, event.regs.rip, fields.gva)

    @property
    def where(self) -> tuple[int, int]:
        """The bit and the address."""
        return self.access, self.gpa


class Trace:
    """Answers all PF events of a session by CONTINUE, and keeps what they told, by vCPU."""

    def __init__(self, session: Session) -> None:
        self.seen: dict[int | None, list[Access]] = {}
        session.handle("PF", self._take)

    def _take(self, event: EventMessage) -> str:
        self.seen.setdefault(event.vcpu, []).append(Access.of(event))
        return "CONTINUE"

    def take(self, vcpu: int = 0) -> list[Access]:
        """Answer what came since the last call."""
        return self.seen.pop(vcpu, [])


def access_pair(
    lab: Lab, *, events: bool = True, payload: str = "access", **wanted: object
) -> tuple[SmallVm, Session]:
    """A running, hooked guest with PF events enabled on all vCPUs."""
    mode = "protected32" if payload == "access32" else "long"
    vm = lab.vm(payload=payload, mode=mode, **wanted)
    session = lab.hook(vm)
    requires(session, command="VM_SET_PAGE_ACCESS", event="PF")
    vm.run()
    for vcpu in range(vm.machine.vcpus if events else 0):
        enable(session, "PF", vcpu=vcpu)
    return vm, session


def restrict(session: Session, access: int, *gpas: int) -> None:
    """Allow these pages that access and no other, which has to succeed."""
    entries = [{"gpa": gpa, "access": access} for gpa in gpas]
    session.command("VM_SET_PAGE_ACCESS", entries=entries).ok()


def perform(vm: SmallVm, routine: str, first: int = 0, second: int = 0, *, vcpu: int = 0) -> int:
    """Run a routine to its end, and answer its result. Somebody has to answer events."""
    return vm.perform(routine, first, second, vcpu=vcpu)["result"]


def rest(vm: SmallVm, *, vcpu: int = 0) -> dict[str, int]:
    """End a routine that goes on until it is told; answer the mailbox then."""
    vm.set_word("kind", 1, vcpu=vcpu)
    words = vm.finish(vcpu=vcpu)
    vm.set_word("kind", 0, vcpu=vcpu)
    return words


def next_access(session: Session, *, vcpu: int = 0) -> tuple[EventMessage, Access]:
    """Wait for the next event, which has to be a PF event of that vCPU."""
    event = next_event_of(session, "PF", vcpu=vcpu)
    return event, Access.of(event)


def linear(vm: SmallVm, gpa: int) -> int:
    """A linear address of a guest-physical one; another number than it where there is paging."""
    return gpa if vm.machine.mode == "protected32" else gpa + ALIAS


def fetch_page(vm: SmallVm) -> int:
    """The page of the payload that is fetched from when ordered, and free otherwise."""
    page = vm.machine.address("slide")
    assert page % PAGE == 0
    assert page + PAGE < FREE
    return page
