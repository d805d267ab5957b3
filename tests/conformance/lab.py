# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests and sessions of one test."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from checks import RawTool

from harness.abi import Codec, Profile
from harness.counters import SlotWriter
from harness.manager.small import SmallManager
from harness.manager.smallvm import SmallVm
from harness.tool import Listener, Session, Transcript

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

    def vm(self, **wanted: Any) -> SmallVm:
        """Make a guest; see :meth:`SmallManager.create_vm`."""
        return self.manager.create_vm(**wanted)

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
            name=f"session {next(self._numbers)}",
        )
        self._open.append(session)
        return session

    def hook(self, vm: SmallVm, *, allow: bool = True) -> Session:
        """Hook a guest, and allow all commands and events unless told otherwise."""
        fd, sock = self.connect(vm)
        if allow:
            assert vm.hook_and_allow(fd) == ["OK", "OK", "OK"]
        else:
            assert vm.hook(fd) == "OK"
        return self.session(sock)

    def raw(self, vm: SmallVm, *, allow: bool = True) -> RawTool:
        """Like :meth:`hook`, for a test that writes and reads the bytes itself."""
        fd, sock = self.connect(vm)
        if allow:
            assert vm.hook_and_allow(fd) == ["OK", "OK", "OK"]
        else:
            assert vm.hook(fd) == "OK"
        raw = RawTool(sock)
        self._open.append(raw)
        return raw

    def pair(self, *, run: bool = True, **wanted: Any) -> tuple[SmallVm, Session]:
        """Make a guest, hook it with everything allowed, and let its vCPUs run."""
        vm = self.vm(**wanted)
        session = self.hook(vm)
        if run:
            vm.run()
        return vm, session

    @contextmanager
    def introspection_off(self) -> Iterator[None]:
        """Switch introspection off in the whole host for a while."""
        self.manager.introspection(False)
        try:
            yield
        finally:
            self.manager.introspection(True)

    def close(self) -> None:
        """Close the sessions and end all guests."""
        with ExitStack() as stack:
            stack.callback(self._transcript.close)
            stack.callback(self.manager.reset)
            stack.callback(self.listener.close)
            for session in self._open:
                stack.callback(session.close)
