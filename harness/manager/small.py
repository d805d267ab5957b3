# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker's side of the small device manager.

It makes virtual machines of a few pages in a host (:mod:`harness.manager.smallvm`), and
the descriptors that HOOK is given, right and wrong ones.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.abi import Codec
from harness.errors import AbsentError, ConformanceError, DeadlineError
from harness.hosts.stacks import stacks_in_kvm
from harness.manager.link import AgentLink
from harness.manager.payloads import MAX_VCPUS, Machine, Mode, Payload, encode
from harness.manager.smallvm import Slot, SmallVm, errno_name

if TYPE_CHECKING:
    from harness.abi import Profile
    from harness.hosts import Host
    from harness.tool import Listener

__all__ = ["KVM_CHECK_EXTENSION", "PARAMETER", "SmallManager"]

KVM_CHECK_EXTENSION = 0xAE03
PARAMETER = "/sys/module/kvm/parameters/"
"""Directory of the module parameters in a host."""

RESET_TIMEOUT_S = 5.0


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
        self._unknown: set[str] | None = None

    @property
    def alive(self) -> bool:
        """Whether the agent still runs."""
        return self.link.alive

    def batch(self, requests: Iterable[Mapping[str, Any]], *, timeout_s: float = 10.0) -> list[Any]:
        """Let the agent perform requests one after another; answer their results."""
        answers: list[Any] = self.link.call("batch", requests=list(requests), timeout_s=timeout_s)
        return answers

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

    def threads(self, prefix: str, *, kernel: bool = False) -> list[str]:
        """List the host's processes and kernel threads by beginning of name, "PID NAME".

        :param kernel: kernel threads only.
        """
        found: list[str] = self.link.call("threads", prefix=prefix, kernel=kernel)
        return found

    def bind(self, thread: int, *, cpu: int) -> None:
        """Let a thread, of ours or of the kernel, run on one of the host's processors only."""
        self.link.call("affinity", thread=thread, cpus=[cpu])

    def introspection(self, on: bool) -> None:
        """Switch the module parameter; it is a property of the whole host.

        :raises AbsentError: this version of the interface has none.
        """
        if not self.profile.module_parameter:
            raise AbsentError(f"{self.profile.name} has no module parameter")
        self.write_file(PARAMETER + self.profile.module_parameter, "Y" if on else "N")

    def capability(self, number: int, *, on: str = "kvm") -> int:
        """Ask KVM_CHECK_EXTENSION on /dev/kvm ("kvm") or a VM ("vm:NAME")."""
        answer = self.link.call("ioctl", on=on, request=KVM_CHECK_EXTENSION, arg={"value": number})
        value: int = answer["ret"]
        return value

    def requires(self, *ioctls: str) -> None:
        """Make sure that the host's kernel knows these ioctls: HOOK, COMMAND, EVENT.

        It is asked once. Without it each test would find out by itself, and slowly.

        :raises ConformanceError: it does not.
        """
        if self._unknown is None:
            vm = self.create_vm()
            try:
                answers = {"HOOK": vm.hook(-1), "COMMAND": vm.command(-1), "EVENT": vm.event(-1)}
            finally:
                vm.close()
            self._unknown = {name for name, answer in answers.items() if answer == "ENOTTY"}
        if lacks := self._unknown.intersection(ioctls):
            number = self.profile.capability
            raise ConformanceError(
                f"the kernel of host {self.host.name} does not know the ioctl "
                f"{' and '.join(sorted(lacks))} (ENOTTY)",
                hint=f"KVM_CHECK_EXTENSION({number}) answers {self.capability(number)}",
            )

    # -- descriptors for HOOK

    def new_name(self, kind: str) -> str:
        """A name that no other VM or descriptor of this manager has."""
        return kind + next(self._names)

    def connect(self, listener: Listener) -> tuple[str, int, socket.socket]:
        """Connect from the host to the tool: (name and number there, the tool's end here)."""
        name = self.new_name("tool")
        address, port = self.host.tool_address(listener.port)
        fd = self.link.call("connect", name=name, host=address, port=port, timeout_s=10)
        return name, fd, listener.accept(timeout_s=10 * self.host.patience)

    def socketpair(self, *, kind: str = "stream") -> tuple[str, int]:
        """Make a local socket (name, number); its other end is called NAME.peer."""
        name = self.new_name("pair")
        fds = self.link.call("socketpair", name=name, kind=kind)
        return name, fds[0]

    def shutdown(self, name: str, how: int = socket.SHUT_RDWR) -> str:
        """Shut a socket down, as a device manager does; the answer is as for ioctls."""
        return errno_name(self.link.call("shutdown", name=name, how=how))

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
        smap: bool = False,
        interrupts: bool = True,
        registers: Mapping[str, int] | None = None,
        irqchip: bool = False,
        dirty_ring: int = 0,
        memory_kb: int = 256,
        slots: Sequence[Slot] = (),
        flags: int = 0,
        memory: Iterable[tuple[int, bytes]] = (),
    ) -> SmallVm:
        """Make a VM that does not run yet.

        :param irqchip: with the in-kernel interrupt controllers; vCPUs but the first are
            then uninitialised until they get INIT and SIPI.
        :param dirty_ring: log dirty pages in a ring of so many bytes for each vCPU, which
            nobody empties.
        :param memory_kb: size of slot 0, which begins at address 0.
        :param slots: further memory slots. :param flags: those of slot 0.
        :param memory: what to put where, beside the payload and what it needs.
        """
        if vcpus > MAX_VCPUS:
            raise ValueError(f"at most {MAX_VCPUS} vCPUs")
        code = Payload.load(payload, vendor=self.vendor, root=self._cache)
        machine = Machine(
            payload=code, vcpus=vcpus, mode=mode, cpl=cpl, alias=alias, smap=smap,
            interrupts=interrupts, registers=registers or {},
        )  # fmt: skip
        all_slots = [Slot(slot=0, gpa=0, size=memory_kb << 10, flags=flags), *slots]
        name = self.new_name("vm")
        created = self.link.call(
            "create_vm",
            vm=name,
            irqchip=irqchip,
            dirty_ring=dirty_ring,
            slots=[slot.record() for slot in all_slots],
            memory=encode([*machine.memory(), *memory]),
            vcpus=[machine.state(index) for index in range(vcpus)],
        )
        return SmallVm(self, name, machine, fd=created["fd"], statistics=created["statistics"])

    def reset(self, *, timeout_s: float = RESET_TIMEOUT_S) -> None:
        """End and close everything that was made here, whatever state it is in.

        :raises ConformanceError: UNHOOK does not return although the socket is shut down, or
            a vCPU thread stays in the kernel although its VM was unhooked and it was signalled,
            or a descriptor cannot be closed.
        """
        # Where nothing unhooks, sessions end with their sockets, which are shut down.
        ends = self.profile.has("ioctl UNHOOK")
        unhook = self.profile.ioctl("UNHOOK").request if ends else None
        timeout_s *= self.host.patience
        try:
            stuck = self.link.call("reset", timeout_s=timeout_s, unhook=unhook)
        except DeadlineError as error:
            raise ConformanceError(
                "the device manager cannot close what it has, though its sockets are shut down",
                details=error.details,
            ) from error
        if stuck["hooked"]:
            raise ConformanceError(
                f"UNHOOK of {', '.join(stuck['hooked'])} does not return {timeout_s:.0f} s after "
                "shutdown of the socket",
                details=stacks_in_kvm(self.host),
            )
        if stuck["running"]:
            raise ConformanceError(
                f"vCPU threads of {', '.join(stuck['running'])} stay in KVM_RUN {timeout_s:.0f} s "
                "after unhook, shutdown of the socket and a signal",
                details=stacks_in_kvm(self.host),
            )

    def close(self) -> None:
        """End the agent in good order: the connection to it closes."""
        self.link.close()

    def kill(self) -> None:
        """End the agent by SIGKILL, as a device manager that crashes."""
        self.host.run(f"kill -9 {self.pid}")
