# SPDX-License-Identifier: GPL-2.0-or-later
"""UNHOOK ioctl."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
from checks import (
    continues,
    enable,
    ends_dead,
    event_size,
    kernel_threads,
    near_misses,
    reply_size,
    requires,
    supported_commands,
)
from lab import Lab
from slabs import ROUNDS, leaves_nothing

from harness.manager.small import SmallManager
from harness.manager.smallvm import SmallVm, errno_name
from harness.plugin import skip_clause
from harness.tool import Session

# A kernel thread is still listed for a moment after whoever stopped it was told so.
THREAD_GONE_S = 2.0


@pytest.mark.clause("UNHOOK-ABI")
def test_abi(lab: Lab, vm: SmallVm) -> None:
    """Its request unhooks, whatever stands where other requests have an argument."""
    request = lab.profile.ioctl("UNHOOK").request
    for argument in ({}, {"value": 0xDEAD_BEEF}, {"bad": "unmapped"}):
        session = lab.hook(vm)
        for near_miss in near_misses(request):
            assert vm.request(near_miss, argument, what=f"{near_miss:#x}") == "ENOTTY"
        continues(session)
        assert vm.request(request, argument, what="UNHOOK") == "OK"
        session.expect_close(timeout_s=5)


@pytest.mark.clause("UNHOOK-EPERM-DISABLED")
def test_disabled(lab: Lab, vm: SmallVm, session: Session) -> None:
    """UNHOOK answers EPERM while introspection is off; the VM stays hooked."""
    with lab.introspection_off():
        assert vm.unhook() == "EPERM"
        assert lab.vm().unhook() == "EPERM"
    continues(session)
    assert vm.unhook() == "OK"
    session.expect_close(timeout_s=5)


@pytest.mark.clause("UNHOOK-OK-NOTHOOKED")
def test_not_hooked(lab: Lab, vm: SmallVm) -> None:
    """UNHOOK returns 0 on a VM that never was hooked, and a second time."""
    assert vm.unhook() == "OK"
    session = lab.hook(vm)
    continues(session)
    assert vm.unhook() == "OK"
    assert vm.unhook() == "OK"


@pytest.mark.clause("UNHOOK-SHUTDOWN")
def test_socket_is_shut_down(lab: Lab, vm: SmallVm, session: Session) -> None:
    """UNHOOK shuts the socket down both ways: the tool reads the end, both ends hang up."""
    assert vm.unhook() == "OK"
    session.expect_close(timeout_s=5)
    ends_dead(lab.manager, vm)


@pytest.mark.clause("UNHOOK-SHUTDOWN")
def test_local_socket_is_shut_down(lab: Lab, vm: SmallVm) -> None:
    """After UNHOOK the other end of a UNIX socket can neither read nor write."""
    name, fd = lab.manager.socketpair()
    peer = name + ".peer"
    assert vm.hook(fd) == "OK"
    assert vm.unhook() == "OK"
    answer = lab.manager.link.call("receive", name=peer, size=1, timeout_s=5)
    assert answer == {"hex": "", "end": True}
    # HUP is reported only when both directions are shut down.
    assert "HUP" in lab.manager.poll(peer, "HUP", within_s=1)


@pytest.mark.clause("UNHOOK-WAITS")
def test_waits(lab: Lab, manager: SmallManager) -> None:
    """When UNHOOK returns, a vCPU that waited for a reply is out, and KVM's thread is gone."""
    vm = lab.vm(vcpus=2)
    vm.run()
    vm.progresses(vcpu=1)
    before = kernel_threads(manager)
    session = lab.hook(vm)
    own = kernel_threads(manager) - before
    enable(session, "HYPERCALL", vcpu=1)
    vm.call_out(1, vcpu=1)
    session.next_event("HYPERCALL", vcpu=1, timeout_s=5)
    assert vm.unhook() == "OK"
    deadline = time.monotonic() + THREAD_GONE_S * manager.host.patience
    while left := own & kernel_threads(manager):
        assert time.monotonic() < deadline, f"still there after UNHOOK: {left}"
    vm.wait_word("done", 1, vcpu=1)
    vm.progresses(vcpu=0)
    vm.progresses(vcpu=1)


@pytest.mark.clause("UNHOOK-WAITS", "HOOK-REHOOK")
def test_waits_for_commands(lab: Lab) -> None:
    """UNHOOK and HOOK alternate safely while commands are under way and vCPUs run."""
    vm = lab.vm(vcpus=2)
    vm.run()
    for _ in range(12):
        session = lab.hook(vm)
        for vcpu in (0, 1) * 20:
            session.send("VCPU_GET_REGISTERS", vcpu=vcpu, nmsrs=0)
        assert vm.unhook() == "OK"
        session.expect_close(timeout_s=5)
        session.close()
    vm.progresses(vcpu=0)
    vm.progresses(vcpu=1)
    continues(lab.hook(vm))


@pytest.mark.clause("UNHOOK-PAGES-LIFTED")
def test_page_restrictions_are_lifted(lab: Lab, vm: SmallVm, session: Session) -> None:
    """UNHOOK removes a page restriction although automatic cleanup was switched off."""
    requires(session, command="VM_SET_PAGE_ACCESS")
    requires(session, event="PF")
    vm.run()
    enable(session, "PF")
    session.command("VM_CONTROL_CLEANUP", enable=0).ok()
    session.command("VM_SET_PAGE_ACCESS", entries=[{"gpa": 0, "access": "RX"}]).ok()
    session.next_event("PF", timeout_s=5)
    assert vm.unhook() == "OK"
    vm.progresses(rounds=50)


@pytest.mark.clause("UNHOOK-SINGLESTEP-OFF")
def test_single_stepping_ends(vm: SmallVm, session: Session) -> None:
    """UNHOOK switches single-stepping off: the guest runs on by itself."""
    requires(session, command="VCPU_CONTROL_SINGLESTEP", event="SINGLESTEP")
    if not session.command("GET_VERSION").ok().fields.features.singlestep:
        skip_clause("this processor cannot single-step (features.singlestep is 0)")
    vm.run()
    session.command("VCPU_CONTROL_SINGLESTEP", enable=1).ok()
    session.next_event("SINGLESTEP", timeout_s=5)
    assert vm.unhook() == "OK"
    vm.progresses(rounds=50)


CYCLES = 60


@pytest.mark.clause("UNHOOK-FREES")
@pytest.mark.timeout(180)
def test_frees(lab: Lab, manager: SmallManager) -> None:
    """Many lives of a session, with an event and a command pending, leave nothing behind."""
    vm = lab.vm(vcpus=3)
    vm.run(0, 1)  # vCPU 2 never runs: what it is asked waits until UNHOOK
    life = _life(lab, vm)
    _live(manager, life, times=1)
    _live(manager, life)
    before = _usage(manager)
    leaves_nothing(manager, lambda: _live(manager, life), lives=CYCLES)
    # These are counted per CPU and in batches, so only the whole way tells.
    for what, count in _usage(manager).items():
        assert count - before[what] < CYCLES * ROUNDS * 2 // 3, what


def _usage(manager: SmallManager) -> dict[str, int]:
    """What else the host's kernel has in use, as far as it tells."""
    return {
        "sockets": int(manager.read_file("/proc/net/sockstat").split()[2]),
        "threads": len(kernel_threads(manager)),
        "files": int(manager.read_file("/proc/sys/fs/file-nr").split()[0]),
    }


@dataclass(frozen=True)
class _Life:
    """Requests to the agent, and what each must answer."""

    requests: list[dict[str, Any]]
    results: list[Any]


def _live(manager: SmallManager, life: _Life, *, times: int = CYCLES) -> None:
    """Repeat a life, and check that the last one was what it is meant to be."""
    answers = manager.link.call(
        "batch", requests=life.requests, repeat=times, timeout_s=5 + 2 * times
    )
    for request, answer, expected in zip(life.requests, answers, life.results, strict=True):
        if request["op"] == "ioctl":
            assert errno_name(answer["errno"]) == expected
        elif request["op"] == "receive":
            assert len(answer["hex"]) // 2 == expected


def _life(lab: Lab, vm: SmallVm) -> _Life:
    """One life of a session: refused hooks, the hook, commands, an event, unhook."""
    codec = lab.codec
    commands: list[tuple[str, dict[str, Any], int | None]] = [
        ("GET_VERSION", {}, reply_size(lab.profile, "GET_VERSION")),
        ("VM_READ_PHYSICAL", {"gpa": 0x20000, "size": 4096}, 8 + 4096),
        ("VM_WRITE_PHYSICAL", {"gpa": 0x20000, "data": b"x" * 64}, 8),
        ("VCPU_GET_REGISTERS", {"vcpu": 0, "nmsrs": 0}, 480),
        ("VCPU_GET_REGISTERS", {"vcpu": 0, "msrs_idx": [0xC0000080] * 40}, 480 + 40 * 16),
        ("VCPU_GET_REGISTERS", {"vcpu": 0, "msrs_idx": [0xDEADBEEF]}, 8),
        ("VCPU_GET_CPUID", {"vcpu": 0, "function": 0, "index": 0},
         reply_size(lab.profile, "VCPU_GET_CPUID")),
        ("VCPU_GET_XSAVE", {"vcpu": 0}, reply_size(lab.profile, "VCPU_GET_XSAVE")),
        ("VCPU_SET_XSAVE", {"vcpu": 0}, 8),
        ("VCPU_CONTROL_MSR", {"vcpu": 1, "msr": 0xC0000082, "enable": 1}, 8),
        ("VM_SET_PAGE_ACCESS", {"entries": [{"gpa": 0x21000, "access": "RX"}]}, 8),
        ("VCPU_CONTROL_EVENTS", {"vcpu": 1, "event_id": "BREAKPOINT", "enable": 1}, 8),
        ("VCPU_GET_INFO", {"vcpu": 2}, None),
        ("VM_PAUSE_VCPU", {"vcpu": 2, "wait": 0}, 8),
        ("VM_PAUSE_VCPU", {"vcpu": 1, "wait": 0}, 8),
    ]  # fmt: skip
    session = lab.hook(vm)
    requires(session, command="VM_PAUSE_VCPU")
    there = supported_commands(session, lab.profile)
    commands = [one for one in commands if one[0] in there]
    assert vm.unhook() == "OK"
    session.close()
    # The number that each new descriptor has is the first free one.
    name, fd = lab.manager.socketpair()
    lab.manager.close_fd(name)
    lab.manager.close_fd(name + ".peer")
    peer = name + ".peer"
    pause_event = 8 + event_size(lab.profile, "PAUSE")
    stream = b"".join(
        codec.frame(*codec.encode_command(command, **fields), seq)
        for seq, (command, fields, _) in enumerate(commands)
    )
    replies = sum(8 + size for _, _, size in commands if size is not None)

    def ioctl(what: str, **fields: Any) -> dict[str, Any]:
        request, data = codec.encode_ioctl(what, **fields)
        arg = {"hex": data.hex()} if data else {}
        return {"op": "ioctl", "on": f"vm:{vm.name}", "request": request, "arg": arg}

    hook = ioctl("HOOK", fd=fd, uuid=bytes(16))
    steps: list[tuple[dict[str, Any], Any]] = [
        ({"op": "own_credentials"}, None),
        ({"op": "open", "name": name, "path": "/dev/null"}, None),
        (hook, "EINVAL"),
        ({"op": "close", "name": name}, None),
        ({"op": "socketpair", "name": name}, None),
        (hook, "OK"),
        (hook, "EEXIST"),
        (ioctl("COMMAND", allow=1, id=-1), "OK"),
        (ioctl("EVENT", allow=1, id=-1), "OK"),
        ({"op": "send", "name": peer, "hex": stream.hex()}, None),
        ({"op": "receive", "name": peer, "size": replies + pause_event, "limit_s": 5},
         replies + pause_event),
        (ioctl("UNHOOK"), "OK"),
        ({"op": "close", "name": name}, None),
        ({"op": "close", "name": peer}, None),
    ]  # fmt: skip
    return _Life([request for request, _ in steps], [result for _, result in steps])
