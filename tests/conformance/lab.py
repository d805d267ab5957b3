# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests and sessions of one test."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from checks import RawTool, kernel_threads

from harness.abi import Codec, Profile
from harness.counters import SlotWriter
from harness.manager.describe import describe
from harness.manager.small import PARAMETER, SmallManager
from harness.manager.smallvm import SmallVm
from harness.plugin import skip_clause
from harness.tool import EventMessage, Listener, Session, Transcript

__all__ = ["Lab"]


class Lab:
    """Guests and sessions of one test."""

    def __init__(
        self, manager: SmallManager, *, evidence: Path, counters: SlotWriter | None
    ) -> None:
        self.manager = manager
        self.profile: Profile = manager.profile
        self.codec: Codec = manager.codec
        self.listener = Listener()
        self._transcript = Transcript(evidence / "transcript.jsonl")
        self._counters = counters
        self._numbers = itertools.count(1)
        self._open: list[Session | RawTool] = []
        self._parameters: dict[str, str] = {}
        self._guests: list[tuple[SmallVm, list[Session]]] = []

    def vm(self, **wanted: Any) -> SmallVm:
        """Make a guest; see :meth:`SmallManager.create_vm`."""
        vm = self.manager.create_vm(**wanted)
        self._guests.append((vm, []))
        return vm

    def connect(self, vm: SmallVm) -> tuple[int, socket.socket]:
        """Connect a socket that is meant for that guest: (number in the host, our end)."""
        name, fd, sock = self.manager.connect(self.listener)
        vm.socket = name
        return fd, sock

    def session(self, sock: socket.socket) -> Session:
        """Speak the protocol on a socket; the transcript becomes evidence."""
        session = Session(
            sock,
            profile=self.profile,
            transcript=self._transcript,
            counters_slot=self._counters,
            patience=self.manager.host.patience,
            name=f"session {next(self._numbers)}",
        )
        self._open.append(session)
        return session

    def hook(self, vm: SmallVm, *, allow: bool = True) -> Session:
        """Hook a guest, and allow all commands and events unless told otherwise."""
        fd, sock = self.connect(vm)
        self._hook(vm, fd, allow=allow)
        session = self.session(sock)
        for known, sessions in self._guests:
            if known is vm:
                sessions.append(session)
        return session

    def hook_apart(self, vm: SmallVm, *, cpu: int, run: bool = True) -> Session:
        """:meth:`hook` a guest and let it run, on one processor of the host; KVM's own thread
        for the session gets the other, so that it does not get the vCPU out of the guest."""
        if len(self.manager.list_dir("/sys/bus/cpu/devices")) < 2:
            skip_clause("this host has one processor only")
        before = kernel_threads(self.manager)
        session = self.hook(vm)
        for thread in kernel_threads(self.manager) - before:
            self.manager.bind(int(thread.split()[0]), cpu=1 - cpu)
        if run:
            vm.run()
            self.manager.bind(vm.vcpu_thread(), cpu=cpu)
        return session

    def _hook(self, vm: SmallVm, fd: int, *, allow: bool) -> None:
        if allow:
            self.manager.requires("COMMAND", "EVENT")
            assert vm.hook_and_allow(fd) == ["OK", "OK", "OK"]
        else:
            assert vm.hook(fd) == "OK"

    def raw(self, vm: SmallVm, *, allow: bool = True) -> RawTool:
        """Like :meth:`hook`, for a test that writes and reads the bytes itself."""
        fd, sock = self.connect(vm)
        self._hook(vm, fd, allow=allow)
        raw = RawTool(sock, codec=self.codec, patience=self.manager.host.patience)
        self._open.append(raw)
        return raw

    def pair(self, *, run: bool = True, **wanted: Any) -> tuple[SmallVm, Session]:
        """Make a guest, hook it with everything allowed, and let its vCPUs run."""
        self.manager.requires("COMMAND", "EVENT")
        vm = self.vm(**wanted)
        session = self.hook(vm)
        if run:
            vm.run()
        return vm, session

    def end(self, vm: SmallVm, session: Session, how: str) -> None:
        """End a session: the tool closes, the device manager unhooks, or shuts the socket down.

        :param how: ``close``, ``unhook`` or ``shutdown``.
        """
        if how == "close":
            session.close()
        elif how == "unhook":
            assert vm.unhook() == "OK"
        else:
            assert self.manager.shutdown(vm.socket) == "OK"

    def set_parameter(self, name: str, value: str) -> None:
        """Set a parameter of the host's KVM until the end of the test.

        :raises InfraError: there is none of that name.
        """
        path = PARAMETER + name
        self._parameters.setdefault(path, self.manager.read_file(path).strip())
        self.manager.write_file(path, value)

    @contextmanager
    def introspection_off(self) -> Iterator[None]:
        """Switch introspection off in the whole host for a while."""
        self.manager.introspection(False)
        try:
            yield
        finally:
            self.manager.introspection(True)

    def guests(self) -> str:
        """Tell of each vCPU there is what it is doing, its registers and the code around rip.

        Stops the vCPUs that run: for the end of a test that failed.
        """
        parts = []
        for vm, sessions in self._guests:
            if vm.closed:
                continue
            events = {
                message.vcpu: message
                for session in sessions
                for message in session.log
                if isinstance(message, EventMessage)
            }
            parts += [describe(vm, vcpu, events.get(vcpu)) for vcpu in range(vm.machine.vcpus)]
        return "\n\n".join(parts)

    def reset(self) -> None:
        """End all guests, and go on with none."""
        self.manager.reset()
        self._guests.clear()

    def close(self) -> None:
        """Close the sessions and end all guests."""
        with ExitStack() as stack:
            stack.callback(self._transcript.close)
            for path, value in self._parameters.items():
                stack.callback(self.manager.write_file, path, value)
            stack.callback(self.manager.reset)
            stack.callback(self.listener.close)
            for session in self._open:
                stack.callback(session.close)
