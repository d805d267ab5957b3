# SPDX-License-Identifier: GPL-2.0-or-later
"""Many guests on one host, each with a tool of its own, all living as they like."""

from __future__ import annotations

import random
import struct
import threading
import time
from dataclasses import dataclass, field

import pytest

from harness.errors import ConformanceError
from harness.manager.payloads import Payload
from harness.manager.qemu import QemuGuest
from harness.plugin.timeline import Timeline
from harness.tool import Session

from .footprint import footprint, wait_for_footprint
from .stage import HYPERCALL, Stage, Tool

GUESTS = 8
#: Where the guest's firmware counts its hypercalls, and what it is (see pulse.S).
PULSES = 0x500
FIRMWARE = 0xFF00

#: Nine machines on two emulated CPUs: what takes a moment alone may take seconds here.
PATIENCE_S = 40.0


@dataclass
class Life:
    """One guest and its tool; :meth:`live` runs in a thread of its own."""

    tool: Tool
    guest: QemuGuest
    pulse: Payload
    dice: random.Random
    failure: str = ""
    events: int = 0
    deeds: list[str] = field(default_factory=list)

    def live(self, until: float) -> None:
        """Be hooked and unhooked until then (monotonic seconds); what goes wrong is kept."""
        try:
            while time.monotonic() < until:
                self._session()
            session = self._hooked()
            self._agree(session)
            self._over(session)
        except Exception as error:  # told by the test itself, in its own thread
            self.failure = f"{self.guest.name}: {error} (after {', '.join(self.deeds[-4:])})"

    def _hooked(self) -> Session:
        _, session = self.tool.hook(timeout_s=PATIENCE_S)
        session.handle(HYPERCALL, lambda event: "CONTINUE")
        session.command("VCPU_CONTROL_EVENTS", vcpu=0, event_id=HYPERCALL, enable=1).ok()
        return session

    def _over(self, session: Session) -> None:
        session.close()
        self.events += session.count(HYPERCALL)

    def _session(self) -> None:
        """One session: look on for a while, then end it in one of the ways that there are."""
        session = self._hooked()
        wants_to_know = self.dice.random() < 0.7
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=int(wants_to_know)).ok()
        for _ in range(self.dice.randrange(3)):
            self._agree(session)
        deed = self.dice.choice([self._leave, self._die, self._die_holding, self._reboot])
        if self.dice.random() < 0.3:
            deed = self._stop
        self.deeds.append(deed.__name__.strip("_"))
        deed(session, wants_to_know)
        self._over(session)

    def _leave(self, session: Session, wants_to_know: bool) -> None:
        session.close()

    def _die(self, session: Session, wants_to_know: bool) -> None:
        session.abort()

    def _die_holding(self, session: Session, wants_to_know: bool) -> None:
        session.handle(HYPERCALL, None)
        session.next_event(HYPERCALL, timeout_s=PATIENCE_S)
        session.abort()

    def _reboot(self, session: Session, wants_to_know: bool) -> None:
        self.guest.qmp("system_reset", timeout_s=PATIENCE_S)
        session.expect_close(timeout_s=PATIENCE_S)

    def _stop(self, session: Session, wants_to_know: bool) -> None:
        stop = self.guest.send("stop")
        if wants_to_know:
            session.next_event("UNHOOK", timeout_s=PATIENCE_S)
            session.close()
        else:
            session.expect_close(timeout_s=PATIENCE_S)
        stop.value(timeout_s=PATIENCE_S)
        if self.guest.status() != "paused":
            raise ConformanceError("stop was answered, but the guest is not paused")
        self.guest.qmp("cont", timeout_s=PATIENCE_S)

    def _agree(self, session: Session) -> None:
        """The guest's count of its hypercalls goes up as the tool's count of events does."""
        made, seen = self._counts(session)
        session.wait_count(HYPERCALL, seen + 3, timeout_s=PATIENCE_S)
        made_later, seen_later = self._counts(session)
        if made_later - made != seen_later - seen:
            raise ConformanceError(
                f"{made_later - made} hypercalls made {seen_later - seen} events"
            )

    def _counts(self, session: Session) -> tuple[int, int]:
        """Both counts at one moment, at which the vCPU is held."""
        session.command("VM_PAUSE_VCPU", vcpu=0, wait=1, timeout_s=PATIENCE_S).ok()
        paused = session.next_event("PAUSE", timeout_s=PATIENCE_S)
        read = session.command("VM_READ_PHYSICAL", gpa=PULSES, size=4, timeout_s=PATIENCE_S)
        (made,) = struct.unpack("<I", read.ok().data)
        # The event comes with the hypercall, the guest's own count one instruction later.
        on_the_way = paused.regs.rip & 0xFFFF == FIRMWARE + self.pulse.symbols["pulse_done"]
        seen = session.count(HYPERCALL)
        session.answer(paused)
        return made + on_the_way, seen


def live_together(stage: Stage, timeline: Timeline, *, duration_s: float) -> None:
    """Start the guests, let them live, and look at what is left."""
    seed = random.randrange(1 << 32)
    with timeline.step(f"start {GUESTS} guests", detail=f"seed {seed}"):
        before = footprint(stage.host)
        counted = stage.counted()[HYPERCALL]
        pulse = stage.payload("pulse")
        lives = []
        for number in range(GUESTS):
            tool = stage.tool(f"tool-{number}")
            # The first ones wait for their tool until the last ones have started.
            guest = stage.idle(
                tool,
                name=f"guest-{number}",
                code=pulse.code,
                handshake_timeout_s=60,
                unhook_timeout_s=5,
            )
            lives.append(Life(tool, guest, pulse, random.Random(seed + number)))
    with timeline.step(f"live for {duration_s:g} s"):
        until = time.monotonic() + duration_s
        threads = [
            threading.Thread(target=life.live, args=(until,), name=life.guest.name)
            for life in lives
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failures = [life.failure for life in lives if life.failure]
        if failures:
            raise ConformanceError("; ".join(failures), hint=f"the dice were thrown from {seed}")
    ended = sum(len(life.deeds) for life in lives)
    with timeline.step("every guest answers, every counter agrees", detail=f"{ended} sessions"):
        assert all(life.deeds for life in lives), "a guest was never hooked"
        assert {life.guest.status() for life in lives} == {"running"}
        assert stage.counted()[HYPERCALL] - counted == sum(life.events for life in lives)
    with timeline.step("the kernel holds nothing of any of them"):
        for life in lives:
            life.guest.quit(timeout_s=PATIENCE_S)
            life.guest.close()
        wait_for_footprint(stage.host, before)


CLAUSES = pytest.mark.clause(
    "HOOK-REHOOK", "UNHOOK-FREES", "UNHOOK-WAITS", "QEMU-DISC-UNHOOK", "QEMU-STOP-ASYNC",
    "QEMU-RESET-RECONNECT", "EVT-DISCONNECT-CONTINUE", "EV-HYPERCALL-TRIGGER",
)  # fmt: skip


@pytest.mark.lifecycle
@CLAUSES
def test_many_for_a_while(stage: Stage, timeline: Timeline) -> None:
    """Eight guests are hooked and unhooked at random, reboot, stop, and lose their tools."""
    live_together(stage, timeline, duration_s=20)


@pytest.mark.on_request
@pytest.mark.lifecycle
@pytest.mark.timeout(900)
@CLAUSES
def test_many_for_five_minutes(stage: Stage, timeline: Timeline) -> None:
    """The same, for long enough to meet what is rare."""
    live_together(stage, timeline, duration_s=300)
