# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest is doing, in words: for the evidence of a failure.

Told when the test is over, so vCPUs that run are got out of the guest for it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.errors import ConformanceError, HarnessError
from harness.manager.listing import listing, place
from harness.manager.payloads import REGS
from harness.tool import EventMessage, Session

if TYPE_CHECKING:
    from harness.manager.smallvm import SmallVm

__all__ = ["describe", "describe_session"]

_BITS = {2: "16-bit", 4: "32-bit", 8: "64-bit"}
_MODES = {"real16": 2, "protected32": 4, "compat32": 4, "long": 8}
_BEFORE, _AFTER = 256, 64
_STOP_TIMEOUT_S = 1.0
_COMMAND_TIMEOUT_S = 2.0
_PAGE = 4096


def describe(vm: SmallVm, vcpu: int, event: EventMessage | None) -> str:
    """One vCPU: what state it is in, its registers, and the code around rip.

    :param event: the last event of the vCPU in its session, if there was one. When it has no
        answer, the vCPU waits in it and the registers are those.
    """
    head = f"Guest {vm.name}, vCPU {vcpu}"
    try:
        how, registers, size = _registers(vm, vcpu, event)
        rip = registers["rip"]
        labels = {name: vm.machine.linear(name) for name in vm.machine.payload.symbols}
        where = place(rip, labels)
        text = [f"{head}: {how}, {_BITS[size]} code", f"  rip {rip:#x} {where and f'({where})'}"]
        text += _table({name: registers[name] for name in REGS if name != "rip"})
        at = vm.machine.physical(rip)
        before = min(_BEFORE, at)
        code = vm.read(at - before, before + _AFTER)
        text.append(listing(code, rip - before, rip, bytes_mode=size, labels=labels))
    except HarnessError as error:
        return f"{head}: {error}"
    return "\n".join(text)


def describe_session(session: Session) -> str:
    """The same of any guest, as far as its open session tells it, for vCPUs that had events.

    Of a session that is closed, or whose vCPU does not answer, the last event is shown.
    """
    last = {message.vcpu: message for message in session.log if isinstance(message, EventMessage)}
    return "\n\n".join(
        _through(session, vcpu, event) for vcpu, event in last.items() if vcpu is not None
    )


def _through(session: Session, vcpu: int, event: EventMessage) -> str:
    how = f"as of its last event, {event.name} (seq {event.seq})"
    registers, size, code, base = _of_event(event), event.mode, b"", 0
    try:
        if event.answered:
            found = session.command(
                "VCPU_GET_REGISTERS", vcpu=vcpu, nmsrs=0, timeout_s=_COMMAND_TIMEOUT_S
            ).ok()
            how, size = "when it was asked", found.fields.mode
            registers = {name: getattr(found.fields.regs, name) for name in REGS}
        rip = registers["rip"]
        gpa = session.command(
            "VCPU_TRANSLATE_GVA", vcpu=vcpu, gva=rip, timeout_s=_COMMAND_TIMEOUT_S
        ).ok().fields.gpa  # fmt: skip
        before = min(_BEFORE, gpa % _PAGE)
        length = min(before + _AFTER, _PAGE - gpa % _PAGE + before)
        code = session.command(
            "VM_READ_PHYSICAL", gpa=gpa - before, size=length, timeout_s=_COMMAND_TIMEOUT_S
        ).ok().data  # fmt: skip
        base = rip - before
    except HarnessError as error:
        how += f"; its code cannot be read: {error}"
    text = [f"{session.name}, vCPU {vcpu}: {how}, {_BITS[size]} code"]
    text += [f"  rip {registers['rip']:#x}"]
    text += _table({name: registers[name] for name in REGS if name != "rip"})
    if code:
        text.append(listing(code, base, registers["rip"], bytes_mode=size))
    return "\n".join(text)


def _registers(
    vm: SmallVm, vcpu: int, event: EventMessage | None
) -> tuple[str, Mapping[str, int], int]:
    """How the vCPU is, its registers, and the size of its code."""
    if event is not None and not event.answered:
        how = f"waits for the reply to the event {event.name} (seq {event.seq})"
        return how, _of_event(event), event.mode
    how = "does not run"
    if vm.running(vcpu):
        how = "ran until it was stopped to be shown here"
        try:
            vm.stop(vcpu, timeout_s=_STOP_TIMEOUT_S)
        except ConformanceError as error:
            if event is None:
                raise
            how = f"{error}; as of its last event, {event.name} (seq {event.seq})"
            return how, _of_event(event), event.mode
    values = struct.unpack("<18Q", vm.registers(vcpu=vcpu))
    return how, dict(zip(REGS, values, strict=True)), _MODES[vm.machine.mode]


def _of_event(event: EventMessage) -> dict[str, int]:
    return {name: getattr(event.regs, name) for name in REGS}


def _table(registers: Mapping[str, int]) -> list[str]:
    """Registers, four in a line."""
    cells = [f"{name:>6} {value:#018x}" for name, value in registers.items()]
    return [" ".join(cells[at : at + 4]) for at in range(0, len(cells), 4)]
