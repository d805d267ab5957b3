# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens when the kernel gets no memory: each allocation on the way fails once.

The kernel's own fault injection makes the n-th allocation of a thread fail. Every n is
tried until there is none left, so that each place where memory can be missing is met.
"""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from checks import continues, enable, requires
from lab import Lab
from pages import PAGE, RWX, R, Trace, W, X, access_pair, linear, perform, restrict
from slabs import leaves_nothing

from harness.abi import Reply
from harness.errors import ConformanceError
from harness.manager.payloads import FREE
from harness.manager.small import SmallManager
from harness.plugin import skip_clause
from harness.plugin.fixtures import ClauseNotes
from harness.tool import Listener

FAILSLAB = "/sys/kernel/debug/failslab"
MOST = 200
"""No path of these has more allocations."""

CYCLES = 60


@pytest.fixture(autouse=True)
def fault_injection(manager: SmallManager) -> None:
    """Prepare the kernel's fault injection, or skip."""
    if "ignore-gfp-wait" not in manager.list_dir(FAILSLAB):
        skip_clause(
            "this kernel has no fault injection (CONFIG_FAILSLAB, CONFIG_FAULT_INJECTION_DEBUG_FS)"
        )
    # Ordinary allocations, which may wait, count too; none of them is told on the console.
    for name, value in (("ignore-gfp-wait", "N"), ("verbose", "0")):
        manager.write_file(f"{FAILSLAB}/{name}", value)


def _receiver(manager: SmallManager) -> int:
    """The kernel thread that receives the messages of the one session there is."""
    found = manager.threads("kvmi")
    assert len(found) == 1, f"receiver threads: {found}"
    return int(found[0].split()[0])


def _each_fails_once(
    manager: SmallManager, thread: int, command: Callable[[], Reply]
) -> Counter[str | None]:
    """Give a command again and again, with another allocation of a thread failing each time.

    Answers how often each error came (None: success although an allocation failed).
    """
    file = f"/proc/{thread}/fail-nth"
    found: Counter[str | None] = Counter()
    for nth in range(1, MOST):
        manager.write_file(file, str(nth))
        reply = command()
        left = int(manager.read_file(file))
        manager.write_file(file, "0")
        if left:
            reply.ok()
            return found
        found[reply.error] += 1
    raise ConformanceError(f"{MOST} allocations, and there is no end of them")


@contextlib.contextmanager
def _first_fail(manager: SmallManager, thread: int, number: int) -> Iterator[None]:
    """Let that many allocations of a thread fail, the first ones from now on."""
    settings = {"task-filter": "Y", "interval": 1, "space": 0, "times": number, "probability": 100}
    marked = f"/proc/{thread}/make-it-fail"
    for name, value in settings.items():
        manager.write_file(f"{FAILSLAB}/{name}", str(value))
    manager.write_file(marked, "1")
    try:
        yield
    finally:
        manager.write_file(marked, "0")
        for name, value in {"probability": 0, "times": 1, "task-filter": "N"}.items():
            manager.write_file(f"{FAILSLAB}/{name}", str(value))


@pytest.mark.clause("HOOK-ENOMEM", "HOOK-FAIL-NOSTATE")
def test_hook(lab: Lab, clauses: ClauseNotes) -> None:
    """HOOK answers ENOMEM, leaves nothing behind, and works when memory is there again."""
    vm = lab.vm()
    with Listener() as listener:
        for nth in range(1, MOST):
            name, fd, sock = lab.manager.connect(listener)
            result, injected = vm.failing_hook(fd, nth=nth)
            if not injected:
                break
            with contextlib.closing(sock):
                if result == "OK":
                    assert vm.unhook() == "OK"
                    continue
                assert result == "ENOMEM", f"{nth}: {result}"
                assert vm.command(-1) == "EFAULT"
                assert lab.manager.threads("kvmi") == []
                # The tool sees the end of its stream: the kernel kept no reference.
                lab.manager.close_fd(name)
                sock.settimeout(5)
                assert sock.recv(1) == b""
    assert result == "OK"
    assert nth > 1, "HOOK allocates nothing"
    clauses.note(f"{nth - 1} places where something can fail")
    session = lab.session(sock)
    continues(session)
    assert vm.command(-1) == "OK"
    vm.run()
    session.command("VCPU_GET_INFO").ok()


@pytest.mark.clause("HOOK-ENOMEM", "HOOK-FAIL-NOSTATE")
def test_failed_hooks_leak_nothing(lab: Lab, manager: SmallManager) -> None:
    """Many failed hooks do not make the kernel hold more memory."""
    vm = lab.vm()
    _, fd = lab.manager.socketpair()
    codec = lab.codec
    on = f"vm:{vm.name}"
    hook, data = codec.encode_ioctl("HOOK", fd=fd, uuid=bytes(16))
    unhook, _ = codec.encode_ioctl("UNHOOK")
    places = range(1, 6)
    requests = []
    for nth in places:
        requests += [
            {"op": "failing_ioctl", "on": on, "request": hook, "arg": {"hex": data.hex()},
             "nth": nth},
            {"op": "ioctl", "on": on, "request": unhook},
        ]  # fmt: skip

    def hook_often() -> None:
        answers = manager.link.call("batch", requests=requests, repeat=CYCLES, timeout_s=60)
        assert [answer["errno"] for answer in answers[::2]].count(errno.ENOMEM) >= 2

    leaves_nothing(manager, hook_often, lives=CYCLES)


@pytest.mark.clause("GETREGS-ENOMEM")
@pytest.mark.parametrize("who", ["vcpu", "receiver"])
def test_get_registers(lab: Lab, who: str) -> None:
    """VCPU_GET_REGISTERS answers KVM_ENOMEM, whichever of its allocations fails."""
    vm, session = lab.pair()
    vm.progresses()
    thread = vm.vcpu_thread() if who == "vcpu" else _receiver(lab.manager)
    found = _each_fails_once(
        lab.manager, thread, lambda: session.command("VCPU_GET_REGISTERS", msrs_idx=[0xC0000080])
    )
    assert set(found) <= {None, "KVM_ENOMEM"}
    assert found["KVM_ENOMEM"]
    vm.progresses()


@pytest.mark.clause("GETXSAVE-ENOMEM")
@pytest.mark.parametrize("who", ["vcpu", "receiver"])
def test_get_xsave(lab: Lab, who: str) -> None:
    """VCPU_GET_XSAVE answers KVM_ENOMEM, whichever of its allocations fails."""
    vm, session = lab.pair()
    requires(session, command="VCPU_GET_XSAVE")
    vm.progresses()
    thread = vm.vcpu_thread() if who == "vcpu" else _receiver(lab.manager)
    found = _each_fails_once(lab.manager, thread, lambda: session.command("VCPU_GET_XSAVE"))
    assert set(found) <= {None, "KVM_ENOMEM"}
    assert found["KVM_ENOMEM"]
    vm.progresses()


@pytest.mark.clause("SETPAGE-ENOMEM", "SETPAGE-ALLTRIED")
def test_set_page_access(lab: Lab) -> None:
    """VM_SET_PAGE_ACCESS answers KVM_ENOMEM if one of its entries is not set, the others are.

    A kernel may try twice before it gives up, so the first so many allocations fail here.
    """
    vm, session = access_pair(lab)
    trace = Trace(session)
    pages = [FREE + number * PAGE for number in range(3)]
    entries = [{"gpa": page, "access": R | X} for page in pages]
    thread = _receiver(lab.manager)
    errors: Counter[str | None] = Counter()
    for number in range(1, 8):
        restrict(session, RWX, *pages)
        with _first_fail(lab.manager, thread, number):
            reply = session.command("VM_SET_PAGE_ACCESS", entries=entries)
        for page in pages:
            perform(vm, "write", linear(vm, page), number)
        seen = [access.where for access in trace.take()]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= {(W, page) for page in pages}
        assert (len(seen) == 3) == (reply.err == 0), f"{number} allocations: {reply.error}, {seen}"
        errors[reply.error] += 1
    assert set(errors) <= {None, "KVM_ENOMEM"}
    assert errors["KVM_ENOMEM"]
    session.command("VM_SET_PAGE_ACCESS", entries=entries).ok()
    assert vm.unhook() == "OK"
    again = lab.hook(vm)
    enable(again, "PF")
    trace = Trace(again)
    for page in pages:
        perform(vm, "write", linear(vm, page), 1)
    assert trace.take() == []
