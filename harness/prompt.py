# SPDX-License-Identifier: GPL-2.0-or-later
"""A prompt for a person who is the introspection tool of the kept guest.

QEMU connects to a port of ours, which the keeper's record names; whoever starts the prompt
listens there. When the prompt ends the guest runs on, and QEMU tries again until the next one.
Events are counted in shared memory, in ``<cache>/kept/counters``, so that ``inv watch`` shows
them from another terminal.
"""

from __future__ import annotations

import cmd
import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING

from harness.counters import SlotWriter, create
from harness.counters.view import watch_rates
from harness.errors import HarnessError, UsageError
from harness.keep import counters_path, guest_up, kept
from harness.tool import EventMessage, Hello, Listener, Session, receive_hello, send_answer
from harness.tool.session import State

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["Prompt", "introspect", "watch"]

_CONNECT_TIMEOUT_S = 15.0
_PAGE = 4096
_WIDTH = 16
#: Events that come by themselves once they are enabled. CR events need a register, too:
#: CR3 changes whenever the guest turns to another process.
_WATCHABLE = ("HYPERCALL", "BREAKPOINT", "CR", "XSETBV", "DESCRIPTOR")
_CR = 3


class Prompt(cmd.Cmd):
    """Commands of a person; see ``help``. A context manager."""

    intro = "This is the guest's introspection tool. `help` lists what it can do."
    prompt = "kvmi> "

    def __init__(
        self, port: int, *, slot: SlotWriter | None = None, stdin: IO[str] | None = None
    ) -> None:
        """Listen, and wait for QEMU.

        :param port: where the guest's QEMU looks for its tool.
        :param slot: counts the events.
        :param stdin: read lines from there instead of from a terminal.
        :raises InfraError: something else listens there, such as another prompt.
        :raises SilenceError: QEMU does not come.
        """
        super().__init__(stdin=stdin)
        self.use_rawinput = stdin is None
        self._port = port
        self._slot = slot
        self._session: Session | None = None
        self._hello: Hello | None = None
        self._held: dict[int, list[EventMessage]] = {}
        self._watched: list[str] = []
        self._show = False
        self._hook()

    def __exit__(self, *_: object) -> None:
        self._unhook()

    def __enter__(self) -> Prompt:
        return self

    # -- the session -------------------------------------------------------------------

    def _hook(self) -> None:
        # Listening only while it is waited for: QEMU is refused at once at other times.
        with Listener(port=self._port) as listener:
            sock = listener.accept(_CONNECT_TIMEOUT_S)
        self._hello = receive_hello(sock, _CONNECT_TIMEOUT_S)
        send_answer(sock)
        self._session = Session(sock, counters_slot=self._slot, on_event=self._on_event)
        self._session.handle("PAUSE", self._hold)
        self._wait_permitted(self._session)
        self._session.command("VM_CONTROL_EVENTS", event_id="UNHOOK", enable=1).ok()

    def _wait_permitted(self, session: Session) -> None:
        """QEMU allows commands and events one after the other, once the kernel has the socket."""
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        while session.command("VM_CHECK_EVENT", id="SINGLESTEP").err:
            if time.monotonic() > deadline:
                raise UsageError("this guest's object does not allow everything to its tool")
            time.sleep(0.05)  # nothing announces it

    def _unhook(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        with contextlib.suppress(HarnessError):
            self._switch(session, self._watched, enable=0)
        self._watched = []
        for vcpu in list(self._held):
            self._let_go(session, vcpu)
        with contextlib.suppress(HarnessError):
            session.close()

    def _on_event(self, event: EventMessage) -> str | tuple[str, Mapping[str, int]]:
        """In the session's reader thread: what is watched is shown, and goes on at once."""
        if self._show:
            fields = " ".join(
                f"{key}={_hex(value)}"
                for key, value in event.fields.items()
                if not key.startswith("padding")
            )
            self.stdout.write(
                f"{time.strftime('%H:%M:%S')} vCPU {event.vcpu} {event.name} {fields} "
                f"rip={event.regs.rip:#x}\n"
            )
        if event.name == "CR":
            return "CONTINUE", {"new_val": event.fields.new_value}
        return "CONTINUE"

    @property
    def _here(self) -> Session:
        if self._session is None:
            raise UsageError("the guest is not hooked", hint="`hook` does that")
        if self._session.closed:
            why = self._session.close_reason
            raise UsageError(f"the session has ended: {why}", hint="`hook` makes a new one")
        return self._session

    def _vcpus(self, line: str) -> list[int]:
        if line.strip():
            return [_number(line)]
        return list(range(self._here.command("VM_GET_INFO").ok().fields.vcpu_count))

    # -- commands ----------------------------------------------------------------------

    def do_list(self, _line: str) -> None:
        """list: the guest, and what each of its vCPUs is at."""
        hello, session = self._hello, self._here
        assert hello is not None
        started = time.strftime("%F %T", time.localtime(hello.start_time))
        self._say(
            f"{hello.name}, {hello.uuid}, started {started}, RAM below {hello.max_gpa or 0:#x}"
        )
        for vcpu in self._vcpus(""):
            fields = session.command("VCPU_GET_REGISTERS", vcpu=vcpu).ok().fields
            state = "held" if self._held.get(vcpu) else "running"
            self._say(
                f"vCPU {vcpu}: {state}, {8 * fields.mode}-bit code at {fields.regs.rip:#x}, "
                f"cr3 {fields.sregs.cr3:#x}"
            )
        self._say(f"watched: {' '.join(self._watched) or 'nothing'}")

    def do_regs(self, line: str) -> None:
        """regs VCPU: the general registers."""
        regs = self._here.command("VCPU_GET_REGISTERS", vcpu=_number(line)).ok().fields.regs
        for name, value in regs.items():
            self._say(f"{name:>7} {value:#018x}")

    def do_pause(self, line: str) -> None:
        """pause [VCPU]: hold one vCPU, or all."""
        session = self._here
        for vcpu in self._vcpus(line):
            session.command("VM_PAUSE_VCPU", vcpu=vcpu, wait=1).ok()
            self._say(f"vCPU {vcpu} is held; `resume` lets it go")

    def _hold(self, event: EventMessage) -> None:
        self._held.setdefault(event.vcpu or 0, []).append(event)

    def do_resume(self, line: str) -> None:
        """resume [VCPU]: let one vCPU go on, or all."""
        for vcpu in self._vcpus(line):
            self._let_go(self._here, vcpu)

    def _let_go(self, session: Session, vcpu: int) -> None:
        for event in self._held.pop(vcpu, []):
            with contextlib.suppress(HarnessError):
                session.answer(event, "CONTINUE")

    def do_read(self, line: str) -> None:
        """read ADDRESS [SIZE]: guest-physical memory; v:ADDRESS is virtual, as vCPU 0 has it."""
        words = shlex.split(line)
        if not words:
            raise UsageError("read what?", hint="such as: read 0x1000 64")
        session = self._here
        address, size = words[0], _number(words[1]) if len(words) > 1 else 64
        gpa = _number(address.removeprefix("v:"))
        if address.startswith("v:"):
            gpa = session.command("VCPU_TRANSLATE_GVA", vcpu=0, gva=gpa).ok().fields.gpa
        while size > 0:
            part = min(size, _WIDTH, _PAGE - gpa % _PAGE)
            data = session.command("VM_READ_PHYSICAL", gpa=gpa, size=part).ok().data
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
            self._say(f"{gpa:#012x}  {data.hex(' '):<{3 * _WIDTH}} {text}")
            gpa, size = gpa + part, size - part

    def do_watch(self, line: str) -> None:
        """watch [EVENT...]: show events as they come, until Enter; `watch off` disables them."""
        session = self._here
        names = line.upper().split()
        if names == ["OFF"]:
            self._switch(session, self._watched, enable=0)
            self._watched = []
            return
        if wrong := [name for name in names if name not in _WATCHABLE]:
            raise UsageError(
                f"{', '.join(wrong)} cannot be watched", hint=f"these can: {', '.join(_WATCHABLE)}"
            )
        self._switch(session, names, enable=1)
        self._watched = list(dict.fromkeys([*self._watched, *names]))
        self._show = True
        try:
            self._say(f"{' '.join(self._watched) or 'nothing'} is watched; Enter ends the display")
            self._read_line()
        finally:
            self._show = False

    def _switch(self, session: Session, names: list[str], *, enable: int) -> None:
        count = session.command("VM_GET_INFO").ok().fields.vcpu_count
        for vcpu in range(count):
            for name in names:
                session.command("VCPU_CONTROL_EVENTS", vcpu=vcpu, event_id=name, enable=enable).ok()
            if "CR" in names:
                session.command("VCPU_CONTROL_CR", vcpu=vcpu, cr=_CR, enable=enable).ok()

    def do_unhook(self, _line: str) -> None:
        """unhook: undo what this tool did, and close the session; the guest runs on alone."""
        self._unhook()
        self._say("unhooked; `hook` makes a new session")

    def do_hook(self, _line: str) -> None:
        """hook: wait for QEMU, and make a new session."""
        self._unhook()
        self._held.clear()
        self._hook()
        self._say("hooked")

    def do_quit(self, _line: str) -> bool:
        """quit: unhook and leave; the guest runs on."""
        return True

    do_EOF = do_quit

    # -- the loop ----------------------------------------------------------------------

    def onecmd(self, line: str) -> bool:
        """Run one line; what goes wrong is told, and is not the end."""
        try:
            return bool(super().onecmd(line))
        except HarnessError as error:
            self._say(f"{error.message}{f' ({error.hint})' if error.hint else ''}")
        except KeyboardInterrupt:
            self._say("")
        return False

    def precmd(self, line: str) -> str:
        """Tell what happened meanwhile."""
        if self._session is not None and self._session.state is State.UNHOOK_ANNOUNCED:
            self._say("the guest is about to be stopped or moved: `unhook` lets it go")
        return line

    def emptyline(self) -> bool:
        """An empty line does nothing."""
        return False

    def _read_line(self) -> None:
        read: Callable[[], object] = input if self.use_rawinput else self.stdin.readline
        with contextlib.suppress(EOFError):
            read()

    def _say(self, text: str) -> None:
        self.stdout.write(text + "\n")
        self.stdout.flush()


def introspect(settings: Settings) -> None:
    """Start a guest that can be introspected, and be its tool at a prompt, until ``quit``.

    :raises UsageError: there is a kept guest that looks for no tool.
    """
    record = guest_up(settings, introspect=True)
    stdin = None if sys.stdin.isatty() else sys.stdin
    with (
        create(counters_path(settings), slots=1) as counters,
        Prompt(record.tool_port, slot=counters.slot(0), stdin=stdin) as prompt,
    ):
        prompt.cmdloop()


def watch(settings: Settings, *, seconds: float | None = None) -> None:
    """Show the events of the kept guest as its tool meets them, with rates, until Ctrl-C.

    :param seconds: end after so long.
    :raises UsageError: nobody introspects a kept guest.
    """
    path = counters_path(settings)
    if kept(settings) is None or not path.exists():
        raise UsageError(
            "no kept guest is introspected", hint="`inv guest.up --introspect` in another terminal"
        )
    watch_rates(path, seconds=seconds)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise UsageError(f"{text.strip()!r} is not a number") from None


def _hex(value: object) -> object:
    return hex(value) if isinstance(value, int) and value > 9 else value
