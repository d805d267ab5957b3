# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker's side of the small device manager.

It makes virtual machines of a few pages in a host, lets their vCPUs run, reads and
writes their memory as a device manager can, and issues the introspection ioctls, right
and wrong ones. What the kernel answers is returned, not raised: the result of an ioctl
is the name of its errno (``"EINVAL"``), or ``"OK"``.
"""

from __future__ import annotations

import base64
import errno
import itertools
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.abi import Codec
from harness.errors import ConformanceError, DeadlineError, InfraError, SilenceError
from harness.manager.link import AgentLink
from harness.manager.payloads import (
    MAILBOX_WORDS,
    MAX_VCPUS,
    Machine,
    Mode,
    Payload,
    encode,
    mailbox,
)

if TYPE_CHECKING:
    from harness.abi import Profile
    from harness.hosts import Host
    from harness.tool import Listener

__all__ = ["Exit", "Slot", "SmallManager", "SmallVm"]

KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_REGS = 0x8090AE81
KVM_GET_SREGS = 0x8138AE83
KVM_SET_MSRS = 0x4008AE89
KVM_SET_GUEST_DEBUG = 0x4048AE9B
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2
PARAMETER = "/sys/module/kvm/parameters/"

STOP_TIMEOUT_S = 5.0
IOCTL_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A memory slot. ``flags`` as in struct kvm_userspace_memory_region."""

    slot: int
    gpa: int
    size: int
    flags: int = 0

    def record(self) -> dict[str, int]:
        """The slot in the agent's form."""
        return {"slot": self.slot, "gpa": self.gpa, "size": self.size, "flags": self.flags}


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


class SmallManager:
    """One agent process in a host and the virtual machines in it.

    :param profile: the interface whose ioctls are issued.
    :param cache: where assembled payloads are kept.
    """

    def __init__(self, host: Host, *, profile: Profile, cache: Path) -> None:
        self.host = host
        self.profile = profile
        self.codec = Codec(profile)
        self._cache = cache
        self._names = map(str, itertools.count(1))
        self.link = AgentLink(host)
        hello = self.link.call("hello", timeout_s=60)
        self.pid: int = hello["pid"]
        self.vendor: str = hello["vendor"]

    @property
    def alive(self) -> bool:
        """Whether the agent still runs."""
        return self.link.alive

    # -- the host

    def read_file(self, path: str) -> str:
        """Read a text file of the host."""
        text: str = self.link.call("read_file", path=path)
        return text

    def write_file(self, path: str, text: str) -> None:
        """Write a text file of the host."""
        self.link.call("write_file", path=path, text=text)

    def list_dir(self, path: str) -> list[str]:
        """List a directory of the host; empty when there is none."""
        names: list[str] = self.link.call("list", path=path)
        return names

    def threads(self, prefix: str) -> list[str]:
        """List the host's processes and kernel threads by beginning of name, "PID NAME"."""
        found: list[str] = self.link.call("threads", prefix=prefix)
        return found

    def introspection(self, on: bool) -> None:
        """Switch the module parameter; it is a property of the whole host."""
        self.write_file(PARAMETER + self.profile.module_parameter, "Y" if on else "N")

    def capability(self, number: int, *, on: str = "kvm") -> int:
        """Ask KVM_CHECK_EXTENSION on /dev/kvm ("kvm") or a VM ("vm:NAME")."""
        answer = self.link.call("ioctl", on=on, request=KVM_CHECK_EXTENSION, arg={"value": number})
        value: int = answer["ret"]
        return value

    # -- descriptors for HOOK

    def new_name(self, kind: str) -> str:
        """A name that no other VM or descriptor of this manager has."""
        return kind + next(self._names)

    def connect(self, listener: Listener) -> tuple[str, int, socket.socket]:
        """Connect from the host to the tool: (name and number there, the tool's end here)."""
        name = self.new_name("tool")
        address, port = self.host.tool_address(listener.port)
        fd = self.link.call("connect", name=name, host=address, port=port, timeout_s=10)
        return name, fd, listener.accept(timeout_s=10)

    def socketpair(self, *, kind: str = "stream") -> tuple[str, int]:
        """Make a local socket (name, number); its other end is called NAME.peer."""
        name = self.new_name("pair")
        fds = self.link.call("socketpair", name=name, kind=kind)
        return name, fds[0]

    def shutdown(self, name: str) -> str:
        """Shut a socket down in both directions, as a device manager does; as for ioctls."""
        return errno_name(self.link.call("shutdown", name=name))

    def close_fd(self, name: str) -> None:
        """Close the agent's own descriptor."""
        self.link.call("close", name=name)

    def poll(self, name: str, *wanted: str, within_s: float) -> list[str]:
        """Poll a descriptor for HUP, RDHUP, ERR, IN; answer those that came."""
        found: list[str] = self.link.call("poll", name=name, wanted=wanted, timeout_s=within_s)
        return found

    # -- virtual machines

    def create_vm(
        self,
        *,
        payload: str = "calls",
        vcpus: int = 1,
        mode: Mode = "long",
        cpl: int = 0,
        alias: bool = False,
        interrupts: bool = False,
        registers: Mapping[str, int] | None = None,
        irqchip: bool = False,
        memory_kb: int = 256,
        slots: Sequence[Slot] = (),
        flags: int = 0,
    ) -> SmallVm:
        """Make a VM that does not run yet.

        :param irqchip: with the in-kernel interrupt controllers; vCPUs but the first are
            then uninitialised until they get INIT and SIPI.
        :param memory_kb: size of slot 0, which begins at address 0.
        :param slots: further memory slots. :param flags: those of slot 0.
        """
        if vcpus > MAX_VCPUS:
            raise ValueError(f"at most {MAX_VCPUS} vCPUs")
        code = Payload.load(payload, vendor=self.vendor, root=self._cache)
        machine = Machine(
            payload=code, vcpus=vcpus, mode=mode, cpl=cpl, alias=alias, interrupts=interrupts,
            registers=registers or {},
        )  # fmt: skip
        all_slots = [Slot(slot=0, gpa=0, size=memory_kb << 10, flags=flags), *slots]
        name = self.new_name("vm")
        created = self.link.call(
            "create_vm",
            vm=name,
            irqchip=irqchip,
            slots=[slot.record() for slot in all_slots],
            memory=encode(machine.memory()),
            vcpus=[machine.state(index) for index in range(vcpus)],
        )
        return SmallVm(self, name, machine, fd=created["fd"])

    def reset(self, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End and close everything that was made here, whatever state it is in.

        :raises ConformanceError: a vCPU thread does not come out of the kernel although
            its VM was unhooked, its socket shut down and the thread signalled.
        """
        try:
            stuck = self.link.call(
                "reset", timeout_s=timeout_s, unhook=self.profile.ioctls["UNHOOK"].request
            )
        except DeadlineError as error:
            raise ConformanceError(
                "the device manager does not come out of UNHOOK, though its sockets are shut down"
            ) from error
        if stuck:
            raise ConformanceError(
                f"vCPU threads of {', '.join(stuck)} stay in KVM_RUN {timeout_s:.0f} s after "
                "unhook, shutdown of the socket and a signal"
            )

    def close(self) -> None:
        """End the agent in good order: its standard input closes."""
        self.link.close()

    def kill(self) -> None:
        """End the agent by SIGKILL, as a device manager that crashes."""
        self.host.run(f"kill -9 {self.pid}")


class SmallVm:
    """One virtual machine of the small device manager."""

    def __init__(self, manager: SmallManager, name: str, machine: Machine, *, fd: int) -> None:
        self.manager = manager
        self.name = name
        self.machine = machine
        self.fd = fd
        self.socket = ""
        """Name of the descriptor handed to HOOK last."""

    def _call(self, op: str, *, timeout_s: float = 10.0, **fields: Any) -> Any:
        return self.manager.link.call(op, timeout_s=timeout_s, vm=self.name, **fields)

    # -- running

    def run(self, *vcpus: int) -> None:
        """Let vCPUs enter the guest; without arguments all of them."""
        for vcpu in vcpus or range(self.machine.vcpus):
            self._call("run", vcpu=vcpu)

    def stop(self, vcpu: int = 0, *, timeout_s: float = STOP_TIMEOUT_S) -> Exit:
        """Signal a vCPU out of KVM_RUN.

        :raises ConformanceError: it does not come.
        """
        found = self._call("stop", vcpu=vcpu, timeout_s=timeout_s)
        if found is None:
            raise ConformanceError(f"vCPU {vcpu} stays in KVM_RUN {timeout_s:.0f} s after a signal")
        return _exit(found)

    def kick(self, vcpu: int = 0) -> None:
        """Signal a vCPU out of KVM_RUN without waiting."""
        self._call("kick", vcpu=vcpu)

    def wait_exit(self, vcpu: int = 0, *, timeout_s: float = 5.0) -> Exit:
        """Wait until KVM_RUN returns by itself.

        :raises SilenceError: it did not in time.
        """
        found = self._call("wait_exit", vcpu=vcpu, timeout_s=timeout_s)
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
        stuck = self._call("close_vm", timeout_s=timeout_s)
        if stuck:
            raise ConformanceError(
                f"vCPUs {stuck} stay in KVM_RUN {timeout_s:.0f} s after a signal"
            )

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
        wanted = self.word("want", vcpu=vcpu) + count
        self.set_word("kind", kind, vcpu=vcpu)
        self.set_word("want", wanted, vcpu=vcpu)
        return wanted

    def wait_word(
        self, name: str, value: int, *, compare: str = "ge", vcpu: int = 0, timeout_s: float = 5.0
    ) -> int:
        """Wait until a mailbox word is (ge, eq, ne) a value; answer it.

        :raises SilenceError: the guest did not get there in time.
        """
        found = self.poll_word(name, value, compare=compare, vcpu=vcpu, timeout_s=timeout_s)
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
        self.wait_word(
            "ticks", self.word("ticks", vcpu=vcpu) + rounds, vcpu=vcpu, timeout_s=timeout_s
        )

    def stands_still(self, *, vcpu: int = 0, for_s: float = 0.15) -> None:
        """Check that the payload does not go round during that time.

        :raises ConformanceError: it does, so guest code ran.
        """
        ticks = self.word("ticks", vcpu=vcpu)
        later = self.poll_word("ticks", ticks, compare="ne", vcpu=vcpu, timeout_s=for_s)
        if later is not None:
            raise ConformanceError(
                f"vCPU {vcpu} ran guest code: its counter went from {ticks} to {later}"
            )

    def set_slot(self, slot: Slot) -> None:
        """Create, move, change or (size 0) delete a memory slot."""
        self._call("set_slot", **slot.record())

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
        if answer["ret"] not in (0, -1):
            raise ConformanceError(f"ioctl {what} returned {answer['ret']}, expected 0 or -1")
        return errno_name(answer["errno"])

    def hook(
        self, fd: int, *, padding: int = 0, uuid: bytes = bytes(16), bad: str | None = None
    ) -> str:
        """HOOK with a descriptor number of the agent; an errno's name or OK."""
        return self.ioctl("HOOK", fd=fd, padding=padding, uuid=uuid, bad=bad)

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


def errno_name(number: int) -> str:
    """Name of an errno as results give it: ``EINVAL``, and ``OK`` for 0."""
    return errno.errorcode.get(number, f"errno {number}") if number else "OK"


def _exit(found: Mapping[str, Any]) -> Exit:
    return Exit(
        reason=found["reason"],
        errno=found["errno"],
        number=found.get("number", -1),
        io=found.get("io"),
        mmio=found.get("mmio"),
    )
