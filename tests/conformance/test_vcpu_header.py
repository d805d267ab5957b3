# SPDX-License-Identifier: GPL-2.0-or-later
"""The header that vCPU commands begin with."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from causes import CAUSES, cause, pair_for, went_on
from checks import all_fail, continues, requires, silent
from lab import Lab

from harness.abi import load_clauses

EINVAL = -22

# For each vCPU command: how its clauses begin, and fields with which it succeeds where a
# vCPU can be introspected.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "VCPU_GET_INFO": ("VCPUINFO", {}),
    "VCPU_CONTROL_EVENTS": ("VCPUCTLEVT", {"event_id": "HYPERCALL", "enable": 1}),
    "VCPU_GET_REGISTERS": ("GETREGS", {"nmsrs": 0}),
    "VCPU_SET_REGISTERS": ("SETREGS", {}),
    "VCPU_GET_CPUID": ("CPUID", {"function": 0, "index": 0}),
    "VCPU_CONTROL_CR": ("CTLCR", {"cr": 3, "enable": 1}),
    "VCPU_INJECT_EXCEPTION": ("INJECT", {"nr": 6}),
    "VCPU_GET_XCR": ("GETXCR", {"xcr": 0}),
    "VCPU_GET_XSAVE": ("GETXSAVE", {}),
    "VCPU_SET_XSAVE": ("SETXSAVE", {}),
    "VCPU_GET_MTRR_TYPE": ("MTRR", {"gpa": 0}),
    "VCPU_CONTROL_MSR": ("CTLMSR", {"msr": 0xC0000082, "enable": 1}),
    "VCPU_TRANSLATE_GVA": ("GVA", {"gva": 0}),
}


def _each(promise: str) -> pytest.MarkDecorator:
    """Run a test for each vCPU command, which has a clause of its own for the same promise.

    Some commands promise the same of padding and index in one clause.
    """
    known = load_clauses()
    params = []
    for name, (prefix, _) in COMMANDS.items():
        clause = f"{prefix}-{promise}"
        if clause not in known:
            clause = f"{prefix}-EINVAL-VCPU"
        params.append(pytest.param(name, marks=pytest.mark.clause(clause)))
    return pytest.mark.parametrize("name", params)


@pytest.mark.clause("VCPUHDR-LAYOUT")
def test_layout(lab: Lab) -> None:
    """A vCPU command begins with vcpu(u16), padding1(u16) and padding2(u32)."""
    vm = lab.vm(vcpus=2)
    tool = lab.raw(vm)
    vm.run(1)
    control, get_info, event = (
        lab.profile.command("VCPU_CONTROL_EVENTS").id,
        lab.profile.command("VCPU_GET_INFO").id,
        lab.profile.event("HYPERCALL").id,
    )
    enable_hypercall = struct.pack("<HHIHBBI", 1, 0, 0, event, 1, 0, 0)
    assert tool.ask(control, enable_hypercall, seq=1) == bytes(8)
    vm.call_out(1, vcpu=1)
    start = lab.profile.event_header.size if lab.profile.event_header else 0
    assert struct.unpack_from("<HH", tool.receive().payload, start)[1] == 1
    for wrong in (struct.pack("<HHI", 1, 1, 0), struct.pack("<HHI", 1, 0, 1)):
        assert tool.ask(get_info, wrong, seq=2) == struct.pack("<iI", EINVAL, 0)


@pytest.mark.clause("VCPUHDR-EINVAL-PADDING")
@_each("EINVAL-PADDING")
def test_padding(lab: Lab, name: str) -> None:
    """Each byte of padding, of the header and the command, answers KVM_EINVAL."""
    vm, session = lab.pair()
    requires(session, command=name)
    fields = COMMANDS[name][1]
    wrongs = [*session.codec.wrong_paddings(name)]
    wrongs += [{"hdr_padding1": 0x80 << 8 * byte} for byte in range(2)]
    wrongs += [{"hdr_padding2": 0x80 << 8 * byte} for byte in range(4)]
    all_fail(session, name, "KVM_EINVAL", [fields | wrong for wrong in wrongs])
    vm.wait_word("done", vm.call_out(1))  # an event, had CONTROL_EVENTS had an effect
    assert vm.word("faults") == 0
    silent(session, vcpus=[0])


@pytest.mark.clause("VCPUHDR-EINVAL-INDEX")
@_each("EINVAL-VCPU")
def test_index(lab: Lab, name: str) -> None:
    """An index that is not below the number of vCPUs makes a vCPU command answer KVM_EINVAL."""
    _, session = lab.pair(vcpus=2)
    requires(session, command=name)
    fields = COMMANDS[name][1]
    wrongs = [{**fields, "vcpu": index} for index in (2, 3, 0x100, 0x8000, 0xFFFF)]
    all_fail(session, name, "KVM_EINVAL", wrongs)
    session.command("VCPU_GET_INFO", vcpu=1).ok()
    continues(session)


@pytest.mark.clause("VCPUHDR-EAGAIN")
@_each("EAGAIN")
def test_not_ready(lab: Lab, name: str) -> None:
    """A vCPU that waits to be started (INIT, SIPI) answers KVM_EAGAIN; the first one does not."""
    vm, session = lab.pair(vcpus=2, irqchip=True)
    requires(session, command=name)
    vm.progresses(vcpu=0)
    all_fail(session, name, "KVM_EAGAIN", [{**COMMANDS[name][1], "vcpu": 1}] * 3)
    session.command("VCPU_GET_INFO", vcpu=0).ok()
    vm.stands_still(vcpu=1)
    continues(session)


@pytest.mark.clause("VCPUHDR-INEVENT-OK")
@pytest.mark.parametrize("name", CAUSES)
def test_in_event(lab: Lab, name: str) -> None:
    """A vCPU that waits for the reply to any of its events accepts all commands."""
    vm, session = pair_for(lab, name)
    event = cause(vm, session, name)
    registers = session.command("VCPU_GET_REGISTERS", nmsrs=0).ok().fields.regs
    assert registers.rip == event.regs.rip
    for command, (_, fields) in COMMANDS.items():
        supported = session.command("VM_CHECK_COMMAND", id=command).err == 0
        # These change what the guest does next; others have tests of just that.
        if supported and command not in ("VCPU_SET_REGISTERS", "VCPU_INJECT_EXCEPTION"):
            session.command(command, **fields).ok()
    session.answer(event)
    went_on(vm, name)
    silent(session, vcpus=[0])


@pytest.mark.clause("VCPUHDR-ORDER")
def test_order_of_checks(lab: Lab) -> None:
    """Checks come in the order support, permission, padding, index, readiness, the command's own.

    Each command here is wrong in several ways; the answer tells which was looked at first.
    """
    vm = lab.vm(vcpus=2, irqchip=True)
    session = lab.hook(vm, allow=False)
    vm.run()
    vm.progresses(vcpu=0)
    everything = {"vcpu": 7, "hdr_padding1": 1, "event_id": 77, "padding2": 1}
    _, payload = session.codec.encode_command("VCPU_CONTROL_EVENTS", **everything)
    session.reply_to(session.send_raw(0x7777, payload)).fails("KVM_ENOSYS")
    session.command("VCPU_CONTROL_EVENTS", **everything).fails("KVM_EPERM")
    session.command("VCPU_CONTROL_EVENTS", vcpu=1, event_id=77).fails("KVM_EPERM")
    assert vm.command(-1) == "OK"
    # Padding and index share an errno; both come before the vCPU's readiness ...
    session.command("VCPU_CONTROL_EVENTS", **everything).fails("KVM_EINVAL")
    session.command("VCPU_CONTROL_EVENTS", vcpu=1, hdr_padding2=1).fails("KVM_EINVAL")
    # ... which comes before anything of the command itself: its padding, event id, permission.
    session.command("VCPU_CONTROL_EVENTS", vcpu=1, padding2=1).fails("KVM_EAGAIN")
    session.command("VCPU_CONTROL_EVENTS", vcpu=1, event_id=77).fails("KVM_EAGAIN")
    session.command("VCPU_CONTROL_EVENTS", vcpu=1, event_id="HYPERCALL").fails("KVM_EAGAIN")
    session.command("VCPU_CONTROL_EVENTS", vcpu=0, event_id="HYPERCALL").fails("KVM_EPERM")
    session.command("VCPU_SET_REGISTERS", vcpu=1, length=8).fails("KVM_EAGAIN")
    continues(session)


@pytest.mark.clause("VCPUHDR-WAKE")
def test_running_vcpu_answers(lab: Lab) -> None:
    """A vCPU that stays in the guest is got out of it to answer, and goes back."""
    vm, session = lab.pair(vcpus=2)
    for _ in range(10):
        for vcpu in (0, 1):
            vm.progresses(vcpu=vcpu, rounds=1)
            session.command("VCPU_GET_INFO", vcpu=vcpu, timeout_s=5).ok()
    vm.progresses(vcpu=0)
    vm.progresses(vcpu=1)


COMMANDS_A_ROUND, ROUNDS = 60, 5


@pytest.mark.clause("VCPUHDR-WAKE")
@pytest.mark.parametrize("cpu", [0, 1])
def test_running_vcpu_is_called(lab: Lab, cpu: int) -> None:
    """A vCPU in the guest is got out of it for a command; it does not wait for the host's timer.

    So the processor that executes the guest gets other interrupts, too. (That of the network's
    device is one of them, on one of the two.)
    """
    vm = lab.vm(payload="system")  # which does not leave the guest by itself
    session = lab.hook_apart(vm, cpu=cpu)
    vm.progresses()
    most = 0
    for _ in range(ROUNDS):
        before = _interrupts(lab, cpu)
        for _ in range(COMMANDS_A_ROUND):
            session.command("VCPU_GET_INFO").ok()
        most = max(most, _interrupts(lab, cpu) - before)
    # It may be out of the guest already, most often so on a busy machine.
    assert most >= COMMANDS_A_ROUND // 4, f"{most} interrupts for {COMMANDS_A_ROUND} commands"


def _interrupts(lab: Lab, cpu: int) -> int:
    """How many a processor of the host has had, but for those of its timer."""
    heads, *lines = lab.manager.read_file("/proc/interrupts").splitlines()
    place = heads.split().index(f"CPU{cpu}") + 1
    each = [line.split() for line in lines]
    return sum(
        int(words[place])
        for words in each
        if words[0] != "LOC:" and len(words) > place and words[place].isdigit()
    )


@pytest.mark.clause("VCPUHDR-WAKE", "MSG-LONG-OK")
def test_commands_without_end(lab: Lab) -> None:
    """What a vCPU has executed makes room: it takes any number of commands in a session."""
    vm, session = lab.pair()
    id, payload = session.codec.encode_command("VCPU_GET_INFO")
    largest = payload.ljust(session.profile.max_message_size, b"\xff")
    for _ in range(40):  # 2.6 MB in all
        for seq in [session.send_raw(id, largest) for _ in range(8)]:
            session.reply_to(seq).ok()
    vm.progresses()


@pytest.mark.clause("VCPUHDR-WAKE")
@pytest.mark.parametrize("interrupts", [False, True])
def test_halted_vcpu_answers(lab: Lab, interrupts: bool) -> None:
    """A vCPU that is halted in the kernel answers, and stays halted."""
    vm, session = lab.pair(payload="halt", irqchip=True, interrupts=interrupts)
    vm.wait_word("ticks", 1)
    for _ in range(5):
        vm.stands_still(for_s=0.05)
        session.command("VCPU_GET_INFO", timeout_s=5).ok()
        registers = session.command("VCPU_GET_REGISTERS", nmsrs=0, timeout_s=5).ok()
        assert registers.fields.regs.rip == vm.machine.linear("halt_site") + 1
    vm.stands_still()
    assert vm.word("ticks") == 1
    assert vm.running()


@pytest.mark.clause("VCPUHDR-WAKE")
def test_vcpu_in_user_space_answers_when_it_runs(lab: Lab) -> None:
    """Commands for a vCPU that is outside KVM_RUN are answered, in order, when it enters."""
    vm, session = lab.pair(run=False)
    sent = [session.send("VCPU_GET_INFO"), session.send("VCPU_GET_REGISTERS", nmsrs=0)]
    continues(session)
    vm.run()
    for pending in sent:
        pending.reply(5).ok()
    vm.progresses()
