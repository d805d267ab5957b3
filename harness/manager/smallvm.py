# SPDX-License-Identifier: GPL-2.0-or-later
"""One virtual machine of the small device manager.

What the kernel answers is returned, not raised: the result of an ioctl is the name of
its errno (``"EINVAL"``), or ``"OK"``.
"""

from __future__ import annotations

import base64
import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import ConformanceError, DeadlineError, InfraError, SilenceError
from harness.hosts.stacks import stacks_in_kvm
from harness.manager.payloads import MAILBOX_STEP, MAILBOX_WORDS, Machine, mailbox

if TYPE_CHECKING:
    from harness.manager.small import SmallManager

__all__ = [
    "KVM_GET_REGS",
    "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_MEM_READONLY",
    "KVM_SET_GUEST_DEBUG",
    "KVM_SET_REGS",
    "Exit",
    "Slot",
    "SmallVm",
    "errno_name",
]

KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_MSRS = 0x4008AE89
KVM_GET_LAPIC = 0x8400AE8E
KVM_SET_LAPIC = 0x4400AE8F
KVM_SIGNAL_MSI = 0x4020AEA5
KVM_SET_GUEST_DEBUG = 0x4048AE9B
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2

STOP_TIMEOUT_S = 5.0
IOCTL_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A memory slot. ``flags`` as in struct kvm_userspace_memory_region.

    With ``huge`` the device manager asks for huge pages behind it; the host may have none.
    """

    slot: int
    gpa: int
    size: int
    flags: int = 0
    huge: bool = False

    def record(self) -> dict[str, int]:
        """The slot in the agent's form."""
        return dict(vars(self))


@dataclass(frozen=True)
class Exit:
    """Why KVM_RUN returned: the exit reason's name without KVM_EXIT_, or STOPPED or ERROR.

    STOPPED means that our own signal ended it; ERROR that the ioctl failed with ``errno``.
    """

    reason: str
    errno: int = 0
    number: int = -1
    io: Mapping[str, Any] | None = None
    mmio: Mapping[str, Any] | None = None


class SmallVm:
    """One virtual machine of the small device manager."""

    def __init__(
        self, manager: SmallManager, name: str, machine: Machine, *, fd: int, statistics: str
    ) -> None:
        self.manager = manager
        self.name = name
        self.machine = machine
        self.fd = fd
        self._statistics = statistics
        self.socket = ""
        """Name of the descriptor handed to HOOK last."""
        self.closed = False

    def _call(self, op: str, *, timeout_s: float = 10.0, **fields: Any) -> Any:
        return self.manager.link.call(op, timeout_s=timeout_s, vm=self.name, **fields)

    def _wait(self, op: str, *, timeout_s: float, **fields: Any) -> Any:
        """A wait that only a failure lets run out: longer where the host is slow."""
        return self._call(op, timeout_s=timeout_s * self.manager.host.patience, **fields)

    # -- running

    def run(self, *vcpus: int, interrupt_window: bool = False) -> None:
        """Let vCPUs enter the guest; without arguments all of them.

        :param interrupt_window: ask KVM to return as soon as the guest takes interrupts.
        """
        self.manager.batch(
            {"op": "run", "vm": self.name, "vcpu": vcpu, "interrupt_window": interrupt_window}
            for vcpu in vcpus or range(self.machine.vcpus)
        )

    def stop(self, vcpu: int = 0, *, timeout_s: float = STOP_TIMEOUT_S) -> Exit:
        """Signal a vCPU out of KVM_RUN.

        :raises ConformanceError: it does not come.
        """
        found = self._wait("stop", vcpu=vcpu, timeout_s=timeout_s)
        if found is None:
            raise ConformanceError(
                f"vCPU {vcpu} stays in KVM_RUN {timeout_s:.0f} s after a signal",
                details=stacks_in_kvm(self.manager.host),
            )
        return _exit(found)

    def kick(self, vcpu: int = 0) -> None:
        """Signal a vCPU out of KVM_RUN without waiting."""
        self._call("kick", vcpu=vcpu)

    def wait_exit(self, vcpu: int = 0, *, timeout_s: float = 5.0) -> Exit:
        """Wait until KVM_RUN returns by itself.

        :raises SilenceError: it did not in time.
        """
        found = self._wait("wait_exit", vcpu=vcpu, timeout_s=timeout_s)
        if found is None:
            raise SilenceError(f"vCPU {vcpu} is still in KVM_RUN after {timeout_s:g} s")
        return _exit(found)

    def running(self, vcpu: int = 0) -> bool:
        """Whether the vCPU's thread is in KVM_RUN (also when it waits for an event reply)."""
        flags: list[bool] = self._call("running")
        return flags[vcpu]

    def close(self, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the vCPU threads and close all descriptors, hooked or not.

        :raises ConformanceError: a thread stays in the kernel.
        """
        stuck = self._wait("close_vm", timeout_s=timeout_s)
        if stuck:
            raise ConformanceError(
                f"vCPUs {stuck} stay in KVM_RUN {timeout_s:.0f} s after a signal",
                details=stacks_in_kvm(self.manager.host),
            )
        self.closed = True

    # -- memory, as the device manager sees it

    def read(self, gpa: int, size: int) -> bytes:
        """Read guest memory through the manager's mapping."""
        return base64.b64decode(self._call("read", gpa=gpa, size=size))

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory through the manager's mapping."""
        self._call("write", gpa=gpa, data=base64.b64encode(data).decode())

    def word(self, name: str, *, vcpu: int = 0) -> int:
        """Read a word of a vCPU's mailbox (``layout.inc`` says what they mean)."""
        data = self.read(mailbox(vcpu) + MAILBOX_WORDS[name], 8)
        return int.from_bytes(data, "little")

    def set_word(self, name: str, value: int, *, vcpu: int = 0) -> None:
        """Write a word of a vCPU's mailbox."""
        self.write(mailbox(vcpu) + MAILBOX_WORDS[name], struct.pack("<Q", value))

    def call_out(self, count: int = 1, *, kind: int = 0, vcpu: int = 0) -> int:
        """Ask a running payload for that many more calls; answer how many that makes in all.

        :param kind: 0 hypercalls, 1 breakpoints, 2 breakpoints with a prefix.
        """
        box, kind_word = mailbox(vcpu), struct.pack("<Q", kind)
        answers = self.manager.batch(
            [
                {"op": "write", "vm": self.name, "gpa": box + MAILBOX_WORDS["kind"],
                 "data": base64.b64encode(kind_word).decode()},
                {"op": "add_u64", "vm": self.name, "gpa": box + MAILBOX_WORDS["want"],
                 "value": count},
            ]
        )  # fmt: skip
        wanted: int = answers[1]
        return wanted

    def order(self, routine: str, first: int = 0, second: int = 0, *, vcpu: int = 0) -> None:
        """Have a running payload call one of its routines, by label; does not wait.

        :param first: goes into rdi. :param second: goes into rsi.
        """
        self.manager.batch(self._ordering(routine, first, second, vcpu))

    def finish(self, *, vcpu: int = 0, timeout_s: float = 5.0) -> dict[str, int]:
        """Wait until the payload has done what was ordered; answer its mailbox.

        :raises SilenceError: it has not in time.
        """
        return self._finished(self._finishing(vcpu, timeout_s), vcpu, timeout_s)

    def perform(
        self,
        routine: str,
        first: int = 0,
        second: int = 0,
        *,
        vcpu: int = 0,
        timeout_s: float = 5.0,
    ) -> dict[str, int]:
        """:meth:`order` and :meth:`finish` in one, where nothing holds the vCPU meanwhile."""
        steps = self._ordering(routine, first, second, vcpu) + self._finishing(vcpu, timeout_s)
        return self._finished(steps, vcpu, timeout_s)

    def perform_all(self, *calls: tuple[str, int, int], vcpu: int = 0) -> list[dict[str, int]]:
        """:meth:`perform` several calls (routine, rdi, rsi), one after another, in one go.

        Answers the mailbox after each of them.
        """
        steps: list[dict[str, Any]] = []
        for call in calls:
            steps += self._ordering(*call, vcpu) + self._finishing(vcpu, 5.0)
        answers = self.manager.batch(steps, timeout_s=5.0 * len(calls))
        return [self._mailbox(answers[i], answers[i + 1], vcpu) for i in range(2, len(answers), 4)]

    def count_exits(self, routine: str, first: int = 0, second: int = 0) -> int:
        """:meth:`perform` on vCPU 0; answer how often the VM's vCPUs left the guest meanwhile."""
        look = {"op": "read_file", "path": self._statistics + "exits"}
        order, finish = self._ordering(routine, first, second, 0), self._finishing(0, 5.0)
        before, *_, after = self.manager.batch([look, *order, *finish, look])
        return int(after) - int(before)

    def _ordering(self, routine: str, first: int, second: int, vcpu: int) -> list[dict[str, Any]]:
        box, address = mailbox(vcpu), self.machine.linear(routine)
        data = base64.b64encode(struct.pack("<QQQ", address, first, second)).decode()
        return [
            {"op": "write", "vm": self.name, "gpa": box + MAILBOX_WORDS["arg_nr"], "data": data},
            {"op": "add_u64", "vm": self.name, "gpa": box + MAILBOX_WORDS["want"], "value": 1},
        ]

    def _finishing(self, vcpu: int, timeout_s: float) -> list[dict[str, Any]]:
        box = mailbox(vcpu)
        return [
            {"op": "wait_u64", "vm": self.name, "gpa": box + MAILBOX_WORDS["done"],
             "compare": "eq", "value_at": box + MAILBOX_WORDS["want"],
             "limit_s": timeout_s * self.manager.host.patience},
            {"op": "read", "vm": self.name, "gpa": box, "size": MAILBOX_STEP},
        ]  # fmt: skip

    def _finished(self, steps: list[dict[str, Any]], vcpu: int, timeout_s: float) -> dict[str, int]:
        *_, waited, data = self.manager.batch(steps, timeout_s=timeout_s)
        return self._mailbox(waited, data, vcpu)

    @staticmethod
    def _mailbox(waited: Mapping[str, Any], data: str, vcpu: int) -> dict[str, int]:
        words = _words(base64.b64decode(data))
        if not waited["met"]:
            raise SilenceError(
                f"vCPU {vcpu} did {words['done']} of {words['want']} calls when its time was up"
            )
        return words

    def words(self, *, vcpu: int = 0) -> dict[str, int]:
        """Read all words of a vCPU's mailbox."""
        return _words(self.read(mailbox(vcpu), MAILBOX_STEP))

    def wait_word(
        self, name: str, value: int, *, compare: str = "ge", vcpu: int = 0, timeout_s: float = 5.0
    ) -> int:
        """Wait until a mailbox word is (ge, eq, ne) a value; answer it.

        :raises SilenceError: the guest did not get there in time.
        """
        limit_s = timeout_s * self.manager.host.patience
        found = self.poll_word(name, value, compare=compare, vcpu=vcpu, timeout_s=limit_s)
        if found is None:
            raise SilenceError(
                f"vCPU {vcpu}: the guest's word '{name}' is {self.word(name, vcpu=vcpu)}, "
                f"not {compare} {value}, after {timeout_s:g} s"
            )
        return found

    def poll_word(
        self, name: str, value: int, *, compare: str, vcpu: int = 0, timeout_s: float
    ) -> int | None:
        """Like :meth:`wait_word`, with None when it did not happen in time."""
        answer = self._call(
            "wait_u64", gpa=mailbox(vcpu) + MAILBOX_WORDS[name], compare=compare, value=value,
            timeout_s=timeout_s,
        )  # fmt: skip
        return int(answer["value"]) if answer["met"] else None

    def progresses(self, *, vcpu: int = 0, rounds: int = 2, timeout_s: float = 5.0) -> None:
        """Wait until the payload went round again, which proves that guest code runs.

        :raises SilenceError: it does not.
        """
        answer = self._wait(
            "wait_u64", gpa=mailbox(vcpu) + MAILBOX_WORDS["ticks"], compare="ge", value=rounds,
            relative=True, timeout_s=timeout_s,
        )  # fmt: skip
        if not answer["met"]:
            raise SilenceError(f"vCPU {vcpu} ran no guest code for {timeout_s:g} s")

    def stands_still(self, *, vcpu: int = 0, for_s: float = 0.15) -> None:
        """Check that the payload does not go round during that time.

        :raises ConformanceError: it does, so guest code ran.
        """
        answer = self._call(
            "wait_u64", gpa=mailbox(vcpu) + MAILBOX_WORDS["ticks"], compare="ne", value=0,
            relative=True, timeout_s=for_s,
        )  # fmt: skip
        if answer["met"]:
            raise ConformanceError(
                f"vCPU {vcpu} ran guest code: its counter became {answer['value']}"
            )

    def set_slot(self, slot: Slot) -> None:
        """Create, move, change or (size 0) delete a memory slot."""
        self._call("set_slot", **slot.record())

    def huge_pages_back(self, slot: Slot) -> bool:
        """Fill a slot with zeroes, and tell whether the host backs any memory with huge pages."""
        self.manager.link.call("fill", vm=self.name, gpa=slot.gpa, size=slot.size, byte=0)
        rollup = self.manager.read_file(f"/proc/{self.manager.pid}/smaps_rollup")
        found = next((line for line in rollup.splitlines() if "AnonHugePages:" in line), "x 0 kB")
        return int(found.split()[1]) > 0

    def statistic(self, name: str) -> int:
        """One of the numbers that KVM keeps on this VM and its vCPUs, such as ``pages_2m``."""
        return int(self.manager.read_file(self._statistics + name))

    def dirty_pages(self, slot: int = 0) -> set[int]:
        """Fetch and clear a slot's dirty log: the numbers of its dirty pages."""
        return set(self._call("dirty_log", slot=slot))

    # -- ioctls

    def vcpu_ioctl(
        self, request: int, data: bytes = b"", *, vcpu: int = 0, out: bool = False
    ) -> tuple[str, bytes]:
        """Issue an ordinary KVM ioctl on a vCPU that does not run: (result, argument after)."""
        answer = self.manager.link.call(
            "ioctl", on=f"vcpu:{self.name}:{vcpu}", request=request,
            arg={"hex": data.hex()} if data else {}, out=out,
        )  # fmt: skip
        return errno_name(answer["errno"]), bytes.fromhex(answer["out"] or "")

    def guest_debug(self, *, breakpoints: bool, vcpu: int = 0) -> str:
        """KVM_SET_GUEST_DEBUG: claim or give up breakpoints for user space."""
        control = 0x1_0001 if breakpoints else 0  # KVM_GUESTDBG_ENABLE, _USE_SW_BP
        result, _ = self.vcpu_ioctl(
            KVM_SET_GUEST_DEBUG, struct.pack("<II64x", control, 0), vcpu=vcpu
        )
        return result

    def registers(self, *, vcpu: int = 0) -> bytes:
        """KVM_GET_REGS of a vCPU that does not run: struct kvm_regs."""
        return self._get(KVM_GET_REGS, bytes(144), vcpu)

    def special_registers(self, *, vcpu: int = 0) -> bytes:
        """KVM_GET_SREGS of a vCPU that does not run: struct kvm_sregs."""
        return self._get(KVM_GET_SREGS, bytes(312), vcpu)

    def set_msrs(self, values: Mapping[int, int], *, vcpu: int = 0) -> None:
        """KVM_SET_MSRS on a vCPU that does not run.

        :raises InfraError: KVM refuses one of them.
        """
        data = struct.pack("<II", len(values), 0)
        data += b"".join(struct.pack("<IIQ", msr, 0, value) for msr, value in values.items())
        answer = self.manager.link.call(
            "ioctl", on=f"vcpu:{self.name}:{vcpu}", request=KVM_SET_MSRS, arg={"hex": data.hex()}
        )
        if answer["ret"] != len(values):
            raise InfraError(f"KVM_SET_MSRS took {answer['ret']} of {len(values)} MSRs")

    def enable_apic(self, *, vcpu: int = 0) -> None:
        """Enable the local APIC of a vCPU that does not run, as its guest does at boot.

        :raises InfraError: the machine has no interrupt controllers in the kernel.
        """
        registers = bytearray(self._get(KVM_GET_LAPIC, bytes(1024), vcpu))
        registers[0xF1] |= 1  # the spurious-interrupt vector register, bit 8
        result, _ = self.vcpu_ioctl(KVM_SET_LAPIC, bytes(registers), vcpu=vcpu)
        if result != "OK":
            raise InfraError(f"KVM_SET_LAPIC answered {result}")

    def message_interrupt(self, vector: int) -> None:
        """Send an interrupt to vCPU 0 the way a device does, by a message (KVM_SIGNAL_MSI).

        :raises InfraError: KVM does not take it.
        """
        data = struct.pack("<IIII16x", 0xFEE0_0000, 0, vector, 0)
        answer = self.manager.link.call(
            "ioctl", on=f"vm:{self.name}", request=KVM_SIGNAL_MSI, arg={"hex": data.hex()}
        )
        if answer["ret"] != 1:
            raise InfraError(f"KVM_SIGNAL_MSI returned {answer['ret']} (errno {answer['errno']})")

    def _get(self, request: int, room: bytes, vcpu: int) -> bytes:
        result, data = self.vcpu_ioctl(request, room, vcpu=vcpu, out=True)
        if result != "OK":
            raise InfraError(f"vCPU ioctl {request:#x} answered {result}")
        return data

    def ioctl(
        self,
        name: str,
        *,
        raw: bytes | None = None,
        bad: str | None = None,
        timeout_s: float = IOCTL_TIMEOUT_S,
        **fields: Any,
    ) -> str:
        """Issue an introspection ioctl on the VM; answer the errno's name, OK for success.

        :param raw: the argument's bytes instead of the fields.
        :param bad: pass an address that cannot be read: ``null``, ``unmapped`` or
            ``edge`` (readable up to the middle of the argument).
        :raises SilenceError: the call did not return in time.
        :raises ConformanceError: it returned something else than 0 or -1.
        """
        request, data = self.manager.codec.encode_ioctl(name, **fields)
        data = data if raw is None else raw
        arg: dict[str, Any] = {"hex": data.hex()} if data else {}
        if bad is not None:
            arg["bad"] = bad
        return self.request(request, arg, what=name, timeout_s=timeout_s)

    def request(
        self,
        request: int,
        arg: Mapping[str, Any],
        *,
        what: str,
        timeout_s: float = IOCTL_TIMEOUT_S,
    ) -> str:
        """Issue any ioctl on the VM's descriptor by number; answer the errno's name or OK."""
        link = self.manager.link
        number = link.send("ioctl", on=f"vm:{self.name}", request=request, arg=arg)
        try:
            answer = link.wait(number, what=f"ioctl {what}", timeout_s=timeout_s)
        except DeadlineError as error:
            raise SilenceError(f"ioctl {what} did not return in {timeout_s:g} s") from error
        return _result(answer, what)

    def failing_hook(self, fd: int, *, nth: int) -> tuple[str, bool]:
        """HOOK, with the n-th allocation failing: (result, whether there was such a one)."""
        request, data = self.manager.codec.encode_ioctl("HOOK", fd=fd, uuid=bytes(16))
        answer = self.manager.link.call(
            "failing_ioctl", on=f"vm:{self.name}", request=request, arg={"hex": data.hex()},
            nth=nth,
        )  # fmt: skip
        return _result(answer, "HOOK"), answer["injected"]

    def vcpu_thread(self, vcpu: int = 0) -> int:
        """The number of the thread in which a vCPU runs."""
        number: int = self._call("vcpu_thread", vcpu=vcpu)
        return number

    def hook(
        self, fd: int, *, padding: int = 0, uuid: bytes = bytes(16), bad: str | None = None
    ) -> str:
        """HOOK with a descriptor number of the agent; an errno's name or OK."""
        return self.ioctl("HOOK", fd=fd, padding=padding, uuid=uuid, bad=bad)

    def hook_and_allow(self, fd: int) -> list[str]:
        """HOOK, and COMMAND and EVENT for everything: the results of the three."""
        wanted: list[tuple[str, dict[str, Any]]] = [
            ("HOOK", {"fd": fd, "uuid": bytes(16)}),
            ("COMMAND", {"allow": 1, "id": -1}),
            ("EVENT", {"allow": 1, "id": -1}),
        ]
        requests = []
        for name, fields in wanted:
            request, data = self.manager.codec.encode_ioctl(name, **fields)
            requests.append(
                {"op": "ioctl", "on": f"vm:{self.name}", "request": request,
                 "arg": {"hex": data.hex()}}
            )  # fmt: skip
        answers = self.manager.batch(requests)
        return [_result(answer, name) for answer, (name, _) in zip(answers, wanted, strict=True)]

    def unhook(self, *, timeout_s: float = IOCTL_TIMEOUT_S) -> str:
        """UNHOOK; an errno's name or OK."""
        return self.ioctl("UNHOOK", timeout_s=timeout_s)

    def preunhook(self) -> str:
        """PREUNHOOK; an errno's name or OK."""
        return self.ioctl("PREUNHOOK")

    def command(self, which: int | str, allow: int = 1) -> str:
        """COMMAND: allow or disallow a command by name or number (-1: all); returns as above."""
        number = which if isinstance(which, int) else self.manager.profile.command(which).id
        return self.ioctl("COMMAND", allow=allow, id=number)

    def event(self, which: int | str, allow: int = 1) -> str:
        """EVENT: allow or disallow an event by name or number (-1: all); returns as above."""
        number = which if isinstance(which, int) else self.manager.profile.event(which).id
        return self.ioctl("EVENT", allow=allow, id=number)


def _words(data: bytes) -> dict[str, int]:
    return {name: int.from_bytes(data[at : at + 8], "little") for name, at in MAILBOX_WORDS.items()}


def errno_name(number: int) -> str:
    """Name of an errno as results give it: ``EINVAL``, and ``OK`` for 0."""
    return errno.errorcode.get(number, f"errno {number}") if number else "OK"


def _result(answer: Mapping[str, Any], what: str) -> str:
    if answer["ret"] not in (0, -1):
        raise ConformanceError(f"ioctl {what} returned {answer['ret']}, expected 0 or -1")
    return errno_name(answer["errno"])


def _exit(found: Mapping[str, Any]) -> Exit:
    return Exit(
        reason=found["reason"],
        errno=found["errno"],
        number=found.get("number", -1),
        io=found.get("io"),
        mmio=found.get("mmio"),
    )
