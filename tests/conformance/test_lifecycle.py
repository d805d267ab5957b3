# SPDX-License-Identifier: GPL-2.0-or-later
"""Lifecycle clauses that need no QEMU."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
from causes import LSTAR, select_cr, select_msr
from checks import (
    ALWAYS_ALLOWED,
    RawTool,
    continues,
    enable,
    ends_dead,
    gone,
    next_event_of,
    silent,
    supported_commands,
    supported_events,
)
from lab import Lab
from slabs import leaves_nothing

from harness.abi import Profile
from harness.hosts import Host
from harness.manager.payloads import FREE
from harness.manager.small import SmallManager
from harness.manager.smallvm import KVM_SET_REGS, SmallVm
from harness.settings import Settings
from harness.tool import Listener, Session

DEBUGFS = "/sys/kernel/debug/kvm"
GONE_S = 10.0
MEMORY_KB = 64 << 10


def _vm_directories(manager: SmallManager) -> set[str]:
    """KVM's debugfs directories of VMs, named PID-FD."""
    return {name for name in manager.list_dir(DEBUGFS) if "-" in name and name[0].isdigit()}


def _sockets(manager: SmallManager) -> int:
    """How many sockets of all kinds exist in the host."""
    return int(manager.read_file("/proc/net/sockstat").split()[2])


def _anonymous_kb(manager: SmallManager) -> int:
    """How much memory of processes the host has to back, guests' memory among it."""
    line = next(
        line
        for line in manager.read_file("/proc/meminfo").splitlines()
        if line.startswith("AnonPages:")
    )
    return int(line.split()[1])


VMS = 8


@pytest.mark.clause("LIFE-VMDESTROY")
@pytest.mark.timeout(240)
def test_many_vms_leave_nothing(lab: Lab, manager: SmallManager, profile: Profile) -> None:
    """VMs that were introspected in every way come and go, and the kernel holds nothing of them."""

    def live() -> None:
        for number in range(VMS):
            vm, session = lab.pair(payload="system", vcpus=2)
            there = supported_commands(session, profile)
            events = supported_events(session, profile)
            for vcpu in (0, 1):
                for name in {"BREAKPOINT", "DESCRIPTOR", "CR", "MSR"} & events:
                    enable(session, name, vcpu=vcpu)
                if "VCPU_CONTROL_CR" in there:
                    select_cr(session, 3, vcpu=vcpu)
                if "VCPU_CONTROL_MSR" in there:
                    select_msr(session, LSTAR, vcpu=vcpu)
            if "VM_SET_PAGE_ACCESS" in there:
                entries = [{"gpa": FREE, "access": "RX"}]
                session.command("VM_SET_PAGE_ACCESS", entries=entries).ok()
            for vcpu in (0, 1):
                vm.stop(vcpu)
            if number % 2:
                assert vm.unhook() == "OK"
            vm.close()
            manager.close_fd(vm.socket)
            session.close()

    leaves_nothing(manager, live, lives=VMS)


@pytest.mark.clause("LIFE-TOOLCLOSE-HUP")
def test_hang_up(lab: Lab, vm: SmallVm, session: Session) -> None:
    """When the tool closes, the device manager's poll of the socket shows a hang-up."""
    assert lab.manager.poll(vm.socket, "HUP", "ERR", within_s=0.2) == []
    session.close()
    ends_dead(lab.manager, vm)


@pytest.mark.clause("LIFE-TOOLCLOSE-HUP")
def test_hang_up_of_local_socket(lab: Lab, vm: SmallVm) -> None:
    """A tool that only shuts its writing side down is closed as well: the kernel shuts both."""
    tool = lab.raw(vm)
    tool.socket.shutdown(1)
    tool.ended()
    ends_dead(lab.manager, vm)


@pytest.mark.clause("LIFE-TOOLCLOSE-RECEIVER-ENDS")
def test_nothing_is_read_or_sent(lab: Lab, vm: SmallVm) -> None:
    """After the end KVM neither reads commands nor sends events, though the guest causes them."""
    tool = lab.raw(vm)
    vm.run()
    # Enable HYPERCALL, then end the stream in the middle of the next command.
    wanted = {"event_id": "HYPERCALL", "enable": 1}
    assert tool.command("VCPU_CONTROL_EVENTS", seq=1, **wanted) == bytes(8)
    tool.socket.sendall(b"\x02\0")
    tool.socket.shutdown(1)
    tool.ended()
    ends_dead(lab.manager, vm)
    vm.wait_word("done", vm.call_out(3))
    assert vm.preunhook() == gone(vm)
    tool.ended(timeout_s=1)


@pytest.mark.clause("LIFE-TOOLCLOSE-STILLHOOKED")
def test_still_hooked(lab: Lab, vm: SmallVm, session: Session) -> None:
    """After the tool closed, the VM counts as hooked until UNHOOK."""
    session.close()
    ends_dead(lab.manager, vm)
    fd, sock = lab.connect(vm)
    assert vm.hook(fd) == "EEXIST"
    assert vm.command(-1) == "OK"
    assert vm.event(-1) == "OK"
    assert vm.unhook() == "OK"
    assert vm.command(-1) == "EFAULT"
    assert vm.hook(fd) == "OK"
    continues(lab.session(sock))


@pytest.mark.clause("LIFE-VMDESTROY")
@pytest.mark.parametrize("in_event", [False, True])
def test_vm_is_destroyed(lab: Lab, in_event: bool) -> None:
    """Closing all descriptors of a hooked VM ends the session, and nothing of the VM is left."""
    before = _vm_directories(lab.manager)
    vm, session = lab.pair(vcpus=2)
    if in_event:
        enable(session, "HYPERCALL")
        vm.call_out(1)
        event = next_event_of(session, "HYPERCALL")
        vm.kick()
        session.answer(event)
    for vcpu in (0, 1):
        vm.stop(vcpu)
    assert _vm_directories(lab.manager) != before
    vm.close()
    session.expect_close(timeout_s=5)
    ends_dead(lab.manager, vm)
    deadline = time.monotonic() + GONE_S * lab.manager.host.patience
    while left := _vm_directories(lab.manager) - before:
        assert time.monotonic() < deadline, f"debugfs still shows {left}"


def _wait_until_gone(lab: Lab, doomed: SmallManager, before: set[str]) -> None:
    """Wait until nothing is left of a device manager and its VMs."""
    deadline = time.monotonic() + GONE_S * lab.manager.host.patience
    while left := (
        [line for line in lab.manager.threads("python3") if line.startswith(f"{doomed.pid} ")]
        or _vm_directories(lab.manager) - before
    ):
        assert time.monotonic() < deadline, f"still there: {left}"


@pytest.mark.clause("LIFE-VMDESTROY")
@pytest.mark.parametrize("in_event", [False, True])
def test_manager_is_killed(
    lab: Lab, host: Host, profile: Profile, settings: Settings, in_event: bool
) -> None:
    """kill -9 of a device manager with a hooked, running VM ends the session and frees all."""
    before = _vm_directories(lab.manager)
    sockets = _sockets(lab.manager)
    doomed = SmallManager(host, profile=profile, cache=settings.cache)
    vm = doomed.create_vm(vcpus=2, memory_kb=MEMORY_KB)
    used = _anonymous_kb(lab.manager)
    doomed.link.call("fill", vm=vm.name, gpa=FREE, size=(MEMORY_KB << 10) - FREE, byte=1)
    with Listener() as listener:
        _, fd, sock = doomed.connect(listener)
    assert vm.hook(fd) == "OK"
    assert vm.command(-1) == "OK"
    assert vm.event(-1) == "OK"
    session = lab.session(sock)
    vm.run()
    vm.progresses(vcpu=1)
    if in_event:
        enable(session, "HYPERCALL", vcpu=1)
        vm.call_out(1, vcpu=1)
        next_event_of(session, "HYPERCALL", vcpu=1)
    session.command("VM_READ_PHYSICAL", gpa=FREE, size=4096).ok()
    session.command("VM_WRITE_PHYSICAL", gpa=FREE, data=bytes(4096)).ok()
    assert _anonymous_kb(lab.manager) > used + MEMORY_KB // 2
    doomed.kill()
    session.expect_close(timeout_s=GONE_S)
    doomed.close()
    deadline = time.monotonic() + GONE_S * lab.manager.host.patience
    _wait_until_gone(lab, doomed, before)
    session.close()
    while (now := _sockets(lab.manager)) > sockets:
        assert time.monotonic() < deadline, f"{now} sockets are in use, before it were {sockets}"
    while (kept := _anonymous_kb(lab.manager)) > used + MEMORY_KB // 2:
        assert time.monotonic() < deadline, f"{kept - used} kB of the guest's memory are kept"
    continues(lab.hook(lab.vm()))


@pytest.mark.clause("LIFE-VMDESTROY")
def test_manager_is_killed_while_a_vcpu_has_much_to_do(
    lab: Lab, host: Host, profile: Profile, settings: Settings
) -> None:
    """kill -9 also ends a vCPU that waits for the tool and has commands left to execute."""
    # The signal has to come while some are left: again and again.
    for _ in range(4):
        _kill_a_busy_manager(lab, SmallManager(host, profile=profile, cache=settings.cache))


def _kill_a_busy_manager(lab: Lab, doomed: SmallManager) -> None:
    before = _vm_directories(lab.manager)
    patience = doomed.host.patience
    vm = doomed.create_vm()
    with Listener() as listener:
        _, fd, sock = doomed.connect(listener)
    assert vm.hook_and_allow(fd) == ["OK", "OK", "OK"]
    raw = RawTool(sock, codec=lab.codec, patience=patience)
    vm.run()
    raw.command("VCPU_CONTROL_EVENTS", seq=1, vcpu=0, event_id="HYPERCALL", enable=1)
    vm.call_out(1)
    assert raw.receive().id == lab.profile.vcpu_event
    # It takes the vCPU longer to execute these than the receiver to put them into its queue.
    much = lab.codec.frame(*lab.codec.encode_command("VCPU_GET_XSAVE", vcpu=0), 1)

    def ask() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(much * 100)

    asking = threading.Thread(target=ask, name="much to do", daemon=True)
    asking.start()
    killing = threading.Thread(target=doomed.kill, name="kill -9", daemon=True)
    sock.settimeout(GONE_S * patience)
    try:
        for _ in range(100):
            sock.recv(65536)
        killing.start()
        deadline = time.monotonic() + GONE_S * patience
        while sock.recv(65536):
            assert time.monotonic() < deadline, "the session goes on after SIGKILL"
    except ConnectionError:
        pass  # it ended while there was something to read
    finally:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        asking.join()
        if killing.ident:
            killing.join()
    doomed.close()
    _wait_until_gone(lab, doomed, before)
    continues(lab.hook(lab.vm()))


@pytest.mark.clause("LIFE-RESET")
def test_restart_of_the_guest(lab: Lab) -> None:
    """At a guest restart the device manager unhooks, resets and hooks again: a clean start."""
    vm, session = lab.pair(registers={"r12": 1})
    enable(session, "HYPERCALL")
    enable(session, "BREAKPOINT")
    vm.progresses()
    assert vm.unhook() == "OK"
    session.expect_close(timeout_s=5)
    vm.stop()
    state = bytes.fromhex(vm.machine.state(0)["regs"])
    assert vm.vcpu_ioctl(KVM_SET_REGS, state)[0] == "OK"
    vm.set_word("ticks", 0)
    vm.run()
    again = lab.hook(vm)
    vm.wait_word("done", vm.call_out(1))
    vm.wait_word("done", vm.call_out(1, kind=1))
    silent(again, vcpus=[0])
    enable(again, "HYPERCALL")
    vm.call_out(1)
    again.answer(next_event_of(again, "HYPERCALL"))
    vm.wait_word("done", 3)


@pytest.mark.clause("LIFE-QUERY-FIRST")
def test_queries_first(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """Right after the hand-over the tool can ask version and permissions, and only that."""
    session = lab.hook(vm, allow=False)
    assert session.command("GET_VERSION").ok().fields.version == profile.version
    answers = {
        one.common: session.command("VM_CHECK_COMMAND", id=one.id).error
        for one in profile.commands.values()
    }
    lacks = profile.unknown_query
    assert {name for name, error in answers.items() if error is None} == ALWAYS_ALLOWED
    assert set(answers.values()) <= {None, "KVM_EPERM", lacks}
    events = {name: session.command("VM_CHECK_EVENT", id=name).error for name in profile.events}
    assert set(events.values()) <= {"KVM_EPERM", lacks}


def test_socket_that_does_not_wait(lab: Lab, vm: SmallVm) -> None:
    """A receive timeout that the device manager set costs no processor time, and ends nothing."""
    tool = lab.raw(vm)
    lab.manager.link.call("receive_timeout", name=vm.socket, seconds=-1)
    tool.command("GET_VERSION", seq=1)
    receivers = lab.manager.threads("kvmi-")
    before = [_ticks(lab.manager, thread) for thread in receivers]
    time.sleep(1.0)
    after = [_ticks(lab.manager, thread) for thread in receivers]
    # Documentation/filesystems/proc.rst: in ticks, of which there are 100 in a second.
    assert max(b - a for a, b in zip(before, after, strict=True)) < 30
    tool.command("GET_VERSION", seq=2)


def _ticks(manager: SmallManager, thread: str) -> int:
    """Processor time of a thread of the host, ``PID NAME``, in ticks."""
    stat = manager.read_file(f"/proc/{thread.split(maxsplit=1)[0]}/stat")
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
