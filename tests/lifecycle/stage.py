# SPDX-License-Identifier: GPL-2.0-or-later
"""What every lifecycle test starts from: a host, a tool that listens, guests.

A test asks its :class:`Stage` for a tool (:meth:`Stage.tool`) and for guests that
are told where that tool listens (:meth:`Stage.idle`, :meth:`Stage.linux`). Whatever
the test leaves open the stage closes, last made first, and saves as evidence.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.abi import Profile
from harness.counters import Counters, SlotWriter
from harness.errors import ConformanceError, SessionClosed, SilenceError
from harness.hosts import Host
from harness.hosts.ssh import GuestShell
from harness.manager.describe import describe_session
from harness.manager.introspection import Introspection, ToolAddress
from harness.manager.payloads import Payload
from harness.manager.qemu import QemuGuest, reconnects_in_s
from harness.tool import (
    EventMessage,
    Hello,
    Listener,
    Session,
    Transcript,
    receive_hello,
    send_answer,
)

from .inguest import Calls, Traps, breakpoints, hypercalls
from .ways import Relay

__all__ = [
    "BREAKPOINT",
    "FIRST_COMMANDS",
    "FIRST_EVENTS",
    "HYPERCALL",
    "Stage",
    "Tool",
    "ended",
    "next_port",
    "refused_start",
    "wait_until",
]

HYPERCALL = "HYPERCALL"
BREAKPOINT = "BREAKPOINT"

#: The commands and events that every series has had from its first part on.
FIRST_COMMANDS = (
    "GET_VERSION",
    "VM_CHECK_COMMAND",
    "VM_CHECK_EVENT",
    "VM_GET_INFO",
    "VM_CONTROL_EVENTS",
    "VM_READ_PHYSICAL",
    "VM_WRITE_PHYSICAL",
    "VM_PAUSE_VCPU",
    "VCPU_GET_INFO",
    "VCPU_CONTROL_EVENTS",
    "VCPU_GET_REGISTERS",
    "VCPU_SET_REGISTERS",
)
FIRST_EVENTS = ("UNHOOK", "PAUSE", "HYPERCALL", "BREAKPOINT")

#: How long QEMU may take from an order to its handshake record. QEMU reconnects after
#: 0.3 s here; the rest is room for a host that is busy with a second guest.
CONNECT_TIMEOUT_S = 15.0

#: QEMU's reconnect time in these tests.
RECONNECT_MS = 300

#: No connection for this long, four reconnect times and more, means that there is none.
NO_CONNECTION_S = 1.5

# Guests of one worker follow each other on one host; a port that was just closed may not
# be free yet, so that each guest gets ports of its own.
_ports = itertools.count(20_000)


def next_port() -> int:
    """A TCP port of the host's loopback that no guest of this worker had yet."""
    return next(_ports)


def wait_until(
    reason: str, done: Callable[[], bool], *, timeout_s: float, interval_s: float = 0.1
) -> None:
    """Ask again and again until ``done()``; for what nothing announces.

    :raises SilenceError: not done after ``timeout_s``; says ``reason``.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise SilenceError(f"waited {timeout_s:g} s in vain for this: {reason}")
        time.sleep(interval_s)


def ended(sock: socket.socket, *, timeout_s: float) -> bool:
    """Wait for the peer: True if it closes the stream, False if it sends something.

    :raises SilenceError: neither within ``timeout_s``.
    """
    sock.settimeout(timeout_s)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except ConnectionResetError:
        return True
    except TimeoutError:
        raise SilenceError(f"the connection stayed silent and open for {timeout_s:g} s") from None


class Tool:
    """The introspection tool's end: a listening socket, and sessions made on it."""

    def __init__(
        self,
        stage: Stage,
        *,
        name: str,
        key: bytes | None,
        port: int = 0,
        way: Relay | None = None,
    ) -> None:
        self.name = name
        self.key = key
        self.listener: Listener | Relay = way or Listener(port=port)
        #: connections that QEMU ended without saying anything
        self.dropped = 0
        self._stage = stage

    @property
    def address(self) -> ToolAddress:
        """Where a program in the host reaches this tool."""
        if isinstance(self.listener, Relay):
            return self.listener.address
        return self._stage.host.tool_address(self.listener.port)

    def introspection(self, **options: Any) -> Introspection:
        """The options of a guest that belongs to this tool."""
        options.setdefault("reconnect_ms", RECONNECT_MS)
        options.setdefault("reconnect_in_s", reconnects_in_s(self._stage.host))
        return Introspection(address=self.address, key=self.key, **options)

    def connection(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
        """Accept one connection; it is closed with the stage at the latest.

        :raises SilenceError: nobody connects within ``timeout_s``.
        """
        try:
            sock = self.listener.accept(timeout_s)
        except SilenceError:
            self._stage.host.check()
            raise
        self._stage.keep(sock.close)
        sock.settimeout(timeout_s)
        return sock

    def hello(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> tuple[socket.socket, Hello]:
        """Accept connections until QEMU introduces itself on one.

        Connections that end without a byte are counted in ``dropped``.

        :raises SilenceError: no handshake record within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s

        def left_s() -> float:
            return max(deadline - time.monotonic(), 0.05)

        while True:
            sock = self.connection(timeout_s=left_s())
            if not ended(sock, timeout_s=left_s()):
                hello = receive_hello(sock, left_s())
                return sock, hello
            self.dropped += 1

    def silent(self, *, within_s: float = NO_CONNECTION_S) -> bool:
        """True if nobody connects and introduces himself for ``within_s``."""
        try:
            sock, _ = self.hello(timeout_s=within_s)
        except SilenceError:
            return True
        sock.close()
        return False

    def answer(self, sock: socket.socket) -> None:
        """Send the tool's part of the handshake."""
        send_answer(sock, key=self.key)

    def hook(
        self, *, timeout_s: float = CONNECT_TIMEOUT_S, permitted: str | int = "UNHOOK"
    ) -> tuple[Hello, Session]:
        """Accept QEMU, shake hands, and wait until it has given its permissions.

        :param permitted: an event that the guest's object allows, the last one it lists:
            permissions are set after the hook, one by one, while commands are already
            answered, and this one comes last.
        """
        sock, hello = self.hello(timeout_s=timeout_s)
        self.answer(sock)
        session = self._stage.session(sock, self.name)
        wait_until(
            f"QEMU allows event {permitted}",
            lambda: session.command("VM_CHECK_EVENT", id=permitted).err == 0,
            timeout_s=5,
            interval_s=0.05,
        )
        return hello, session

    def hook_restarted(self, guest: QemuGuest, *, timeout_s: float = 30.0) -> tuple[Hello, Session]:
        """Hook a guest with an operating system that is about to restart for the first time.

        The firmware, SeaBIOS, finds itself as the operating system left it and resets the machine
        again. QEMU may connect between the two resets, which is over at once.
        """

        def resets() -> int:
            return sum(one["event"] == "RESET" for one in guest.link.events())

        wait_until(
            "the firmware resets the machine again", lambda: resets() > 1, timeout_s=timeout_s
        )
        with contextlib.suppress(SessionClosed, ConnectionError):
            return self.hook()
        return self.hook()

    def greeted(self, sock: socket.socket) -> Session:
        """After an answer by hand: the kernel has the connection and speaks on it."""
        session = self._stage.session(sock, self.name)
        session.command("GET_VERSION").ok()
        return session

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self.listener.close()


class Stage:
    """One host, and what a test put on it."""

    def __init__(
        self,
        host: Host,
        *,
        profile: Profile,
        evidence: Path,
        slot: SlotWriter,
        seen: Counters,
        cache: Path,
        transcript: str = "transcript",
    ) -> None:
        """Take what a test was given.

        :param cache: where built things are kept, as in ``settings.cache``.
        :param transcript: the name of the file of its messages.
        :param slot: the worker's slot of the event counter, which sessions count into.
        :param seen: the same counter, attached by itself, which the test reads.
        """
        self.host = host
        self.profile = profile
        self.evidence = evidence
        self.slot = slot
        self._seen = seen
        self._cache = cache
        self.transcript = Transcript(evidence / f"{transcript}.jsonl", profile=profile)
        self._sessions: list[Session] = []
        self._open = contextlib.ExitStack()
        self._open.callback(self.transcript.close)

    def tool(
        self,
        name: str = "tool",
        *,
        key: bytes | None = None,
        port: int = 0,
        way: Relay | None = None,
    ) -> Tool:
        """A tool that listens.

        :param key: the secret it shares with its guest.
        :param port: where, on the worker's loopback; 0: anywhere.
        :param way: it listens elsewhere instead, and its connections are passed on to us.
        """
        tool = Tool(self, name=name, key=key, port=port, way=way)
        self._open.callback(tool.close)
        return tool

    def session(self, sock: socket.socket, name: str) -> Session:
        """Speak on a connection whose handshake is done; its messages are evidence."""
        session = Session(
            sock,
            profile=self.profile,
            transcript=self.transcript,
            counters_slot=self.slot,
            name=name,
            patience=self.host.patience,
        )
        self._open.callback(session.close)
        self._sessions.append(session)
        return session

    def guests(self) -> str:
        """Tell of the guests of all sessions what their vCPUs are doing."""
        return "\n\n".join(filter(None, map(describe_session, self._sessions)))

    def idle(
        self, tool: Tool | None, *, name: str = "idle", start: bool = True, **options: Any
    ) -> QemuGuest:
        """A machine that runs but has no operating system: all that QEMU's own part needs.

        Options that :class:`Introspection` has go there, the others to :class:`QemuGuest`.
        """
        options.setdefault("memory_mb", 16)
        return self._guest(tool, name=name, start=start, **options)

    def payload(self, name: str) -> Payload:
        """Firmware of ours, for the ``code`` of an idle machine on this host."""
        amd = b"AuthenticAMD" in self.host.run("cat /proc/cpuinfo").stdout
        return Payload.load(name, vendor="AMD" if amd else "Intel", root=self._cache)

    def linux(self, tool: Tool | None, *, name: str = "guest", **options: Any) -> QemuGuest:
        """A guest that boots Linux; it is on its way when this returns."""
        options.setdefault("ssh_port", next(_ports))
        return self._guest(tool, name=name, start=True, **options)

    def _guest(self, tool: Tool | None, *, name: str, start: bool, **options: Any) -> QemuGuest:
        fields = Introspection.__dataclass_fields__
        own = {key: options.pop(key) for key in list(options) if key in fields}
        guest = QemuGuest(
            self.host,
            name=name,
            evidence=self.evidence,
            qmp_port=next(_ports),
            introspection=tool.introspection(**own) if tool is not None else None,
            **options,
        )
        self._open.callback(guest.close)
        return guest.start() if start else guest

    # -- what a tool does --------------------------------------------------------------

    def watch(self, session: Session, *, vcpus: int) -> None:
        """Enable unhook, hypercall and breakpoint events, and let each vCPU go on at once."""
        for kind in (HYPERCALL, BREAKPOINT):
            session.handle(kind, lambda event: "CONTINUE")
        session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()
        self._switch(session, vcpus, enable=1)

    def unwatch(self, session: Session, *, vcpus: int) -> None:
        """Undo what :meth:`watch` did to the vCPUs."""
        self._switch(session, vcpus, enable=0)

    def _switch(self, session: Session, vcpus: int, *, enable: int) -> None:
        for vcpu in range(vcpus):
            for kind in (HYPERCALL, BREAKPOINT):
                session.command("VCPU_CONTROL_EVENTS", vcpu=vcpu, event_id=kind, enable=enable).ok()

    def pause(self, session: Session, vcpus: int) -> list[EventMessage]:
        """Pause all vCPUs; return their PAUSE events, which are not answered yet."""
        for vcpu in range(vcpus):
            session.command("VM_PAUSE_VCPU", vcpu=vcpu, wait=1).ok()
        return [session.next_event("PAUSE", vcpu=vcpu, timeout_s=5) for vcpu in range(vcpus)]

    def instruction_pointers(self, session: Session, vcpus: int) -> list[int]:
        """Where each vCPU is."""
        replies = [session.command("VCPU_GET_REGISTERS", vcpu=vcpu) for vcpu in range(vcpus)]
        return [reply.ok().fields.regs.rip for reply in replies]

    def counted(self) -> Counter[str]:
        """This worker's events by kind, read from the shared memory as any process could."""
        return Counter(self._seen.read_slot(self.slot.index).events)

    def exchange(self, shell: GuestShell, *, calls: int = 0, traps: int = 0) -> None:
        """Have the guest cause that many events, and hold its account against the counter.

        The guest counts for itself, the counter counts what the sessions of this worker
        received; both have to be exact. CONTINUE gives 0 to a hypercall, and gives a
        breakpoint back to the guest, whose program meets it as SIGTRAP.

        :raises ConformanceError: an event was lost, doubled, or answered wrongly.
        """
        before = self.counted()
        made = hypercalls(shell, calls) if calls else Calls(made=0, returned={})
        met = breakpoints(shell, traps) if traps else Traps(made=0, trapped=0)
        after = self.counted()
        facts = (
            ("hypercalls made", calls, made.made),
            ("hypercalls that returned 0", calls, made.returned.get(0, 0)),
            ("hypercall events counted", calls, after[HYPERCALL] - before[HYPERCALL]),
            ("breakpoints met", traps, met.made),
            ("breakpoints that came back to the guest", traps, met.trapped),
            ("breakpoint events counted", traps, after[BREAKPOINT] - before[BREAKPOINT]),
        )
        wrong = [f"{what}: {found}, not {due}" for what, due, found in facts if found != due]
        if wrong:
            raise ConformanceError("; ".join(wrong), details=f"{made}\n{met}")

    def beside(self, host: Host, *, transcript: str) -> Stage:
        """The same on another host."""
        return Stage(
            host,
            profile=self.profile,
            evidence=self.evidence,
            slot=self.slot,
            seen=self._seen,
            cache=self._cache,
            transcript=transcript,
        )

    # -- end ---------------------------------------------------------------------------

    def keep(self, close: Callable[[], object]) -> None:
        """Have ``close`` called when the test is over."""
        self._open.callback(close)

    def close(self) -> None:
        """Close all that the test left open."""
        self._open.close()


def refused_start(stage: Stage, tool: Tool | None, **options: Any) -> str:
    """Start a machine that QEMU has to refuse; return what QEMU says.

    :raises ConformanceError: QEMU ran, or ended otherwise than with exit status 1.
    """
    guest = stage.idle(tool, label="refused", start=False, **options)
    command = f"{guest.preparation()} && timeout -s KILL 10 {shlex.join(guest.arguments())}"
    done = stage.host.run(command, check=False)
    said = (done.stdout + done.stderr).decode(errors="replace").strip()
    if done.returncode != 1:
        raise ConformanceError(
            f"QEMU ended with status {done.returncode}, expected a refusal (1)", details=said
        )
    return said
