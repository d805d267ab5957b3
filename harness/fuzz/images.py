# SPDX-License-Identifier: GPL-2.0-or-later
"""The guests of the fuzzer: what the executor in the host makes virtual machines of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.fuzz.values import MEMORY, Shape
from harness.fuzz.wire import image
from harness.manager.payloads import CODE, Machine, Payload

__all__ = ["GUESTS", "Guest", "encode_guests"]


@dataclass(frozen=True, slots=True)
class Guest:
    """One kind of guest."""

    payload: str
    vcpus: int
    weight: int
    """How often it is chosen, compared with the others."""
    irqchip: bool = False
    """With the kernel's interrupt controllers: later vCPUs wait for SIPI, a halt is for ever."""
    cpl: int = 0
    touched: int = 0x40000
    """Where the pages are that its code touches (``events.S``)."""

    @property
    def shape(self) -> Shape:
        """What the values of fields depend on."""
        return Shape(self.vcpus, CODE, uninitialised=self.irqchip and self.vcpus > 1)


GUESTS = (
    Guest("events", 1, weight=6),
    Guest("events", 2, weight=6),
    Guest("events", 3, weight=3),
    Guest("events", 2, weight=2, irqchip=True),
    # It never leaves the guest by itself.
    Guest("calls", 1, weight=1, cpl=3),
)


def encode_guests(*, vendor: str, cache: Path) -> list[bytes]:
    """The frames that tell the executor about all of them, in their order.

    :raises BuildError: a payload cannot be assembled.
    """
    frames = []
    for number, guest in enumerate(GUESTS):
        code = Payload.load(guest.payload, vendor=vendor, root=cache)
        machine = Machine(payload=code, vcpus=guest.vcpus, cpl=guest.cpl)
        states = []
        for vcpu in range(guest.vcpus):
            state = machine.state(vcpu)
            patches = [(at, bytes.fromhex(data)) for at, data in state["sregs"]]
            states.append((bytes.fromhex(state["regs"]), patches))
        frames.append(
            image(number, memory=MEMORY, irqchip=guest.irqchip, chunks=machine.memory(),
                  states=states)
        )  # fmt: skip
    return frames
