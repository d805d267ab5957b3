# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest does on request, and what it says it did.

The program ``kvmi-guest`` of the guest's image does the work and answers in JSON; its
counts are made inside the guest, by nobody who knows what the tool saw.
"""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from harness.errors import InfraError, SilenceError
from harness.hosts.ssh import GuestShell, RemoteProcess

__all__ = [
    "Background",
    "Calls",
    "LastingPage",
    "NestedGuest",
    "Page",
    "Rounds",
    "Ticks",
    "Traps",
    "breakpoints",
    "hypercalls",
    "ticks",
]


@dataclass(frozen=True)
class Calls:
    """The guest's account of its hypercalls: how many, and how often each value came back."""

    made: int
    returned: dict[int, int]


@dataclass(frozen=True)
class Traps:
    """The guest's account of its breakpoints: how many, and how many came back as SIGTRAP."""

    made: int
    trapped: int


@dataclass(frozen=True)
class Ticks:
    """The state of the guest's clockwork.

    ``wrong`` counts what must never be: that time or the count went backwards, or that
    memory did not hold what was written into it.
    """

    ticks: int
    wrong: int


def hypercalls(shell: GuestShell, count: int) -> Calls:
    """Make ``count`` hypercalls that ask for the tool."""
    return _calls(_run(shell, f"kvmi-guest hypercall {count}"))


def breakpoints(shell: GuestShell, count: int) -> Traps:
    """Run into ``count`` breakpoints."""
    account = _run(shell, f"kvmi-guest breakpoint {count}")
    return Traps(made=account["made"], trapped=account["trapped"])


def start_ticking(shell: GuestShell) -> None:
    """Start the clockwork, which notices when it loses or repeats something."""
    shell.run("kvmi-guest counter")


def ticks(shell: GuestShell) -> Ticks:
    """Read the clockwork."""
    state = _run(shell, "cat /run/counter")
    return Ticks(ticks=state["ticks"], wrong=state["went_back"] + state["lost"])


def _calls(account: dict[str, Any]) -> Calls:
    returned = {int(value): count for value, count in account["returned"].items()}
    return Calls(made=account["made"], returned=returned)


def _run(shell: GuestShell, command: str) -> dict[str, Any]:
    done = shell.run(command, timeout_s=60)
    return _last_line(done.stdout)


def _last_line(output: bytes) -> dict[str, Any]:
    lines = output.decode().strip().splitlines()
    if not lines:
        raise InfraError("kvmi-guest in the guest said nothing", hint="look at its console")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


class Background:
    """A command of the guest that we do not wait for: its vCPU may be held in an event."""

    def __init__(self, shell: GuestShell, command: str) -> None:
        self.command = command
        self._shell = shell
        self._process: RemoteProcess | None = None
        self._output = b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"guest: {command}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # The way to the guest may end before the command does: with the guest.
        with contextlib.suppress(Exception):
            # Not even this returns while all vCPUs are held.
            self._process = self._shell.spawn(self.command)
            for line in self._process.stdout:
                self._output += line
            self._process.status(timeout_s=1.0)
            self._ended.set()

    def finished(self, *, within_s: float) -> bool:
        """True if the command ends within ``within_s``."""
        return self._ended.wait(within_s)

    def account(self, *, timeout_s: float) -> Calls:
        """Wait for the end of ``kvmi-guest hypercall``; return what it says.

        :raises SilenceError: it has not ended after ``timeout_s``.
        """
        if not self.finished(within_s=timeout_s):
            raise SilenceError(f"'{self.command}' in the guest still runs after {timeout_s:g} s")
        return _calls(_last_line(self._output))

    def close(self) -> None:
        """Give the command up. Idempotent."""
        if self._process is not None:
            self._process.close()
        self._thread.join(5.0)


@dataclass(frozen=True)
class Rounds:
    """What a guest of the guest did.

    Each round ends with one exit, and has one breakpoint. ``strange`` exits had another number
    than they should have; ``failed`` is the step of the round whose result was wrong, or 0.
    """

    rounds: int
    breakpoints: int
    strange: int
    failed: int
    exit: int
    """The last exit of KVM in the guest: KVM_EXIT_IO (2) if all went well."""


class NestedGuest:
    """A guest of the guest, made and not yet started; see ``guest-images/guest/nested.c``.

    ``gpa`` is where the guest keeps the page that the nested guest counts its rounds in.
    """

    def __init__(self, shell: GuestShell, rounds: int) -> None:
        self._process = shell.spawn(f"kvmi-guest nested {rounds}")
        self.gpa = int(_last_line(self._process.stdout.readline(timeout_s=20))["gpa"])

    def run(self, *, timeout_s: float) -> Rounds:
        """Let it make its rounds, and end."""
        self._process.write(b"go\n")
        return Rounds(**_last_line(self._process.stdout.readline(timeout_s=timeout_s)))

    def close(self) -> None:
        """End it. Idempotent."""
        self._process.close()


class Page:
    """A page of a guest program's memory, and its guest-physical address.

    The program owns and locks the page while this is open, and shows it on request.
    """

    def __init__(self, shell: GuestShell) -> None:
        self._process = shell.spawn("kvmi-guest memory")
        self.gpa = int(self._line()["gpa"])
        self.contents = self.look()

    def _line(self) -> dict[str, Any]:
        return _last_line(self._process.stdout.readline(timeout_s=20))

    def look(self) -> bytes:
        """What the program itself sees in its page now."""
        self._process.write(b"show\n")
        return bytes.fromhex(self._line()["hex"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.close()


class LastingPage:
    """A page like :class:`Page`, whose program outlives the way to it: it moves with its guest."""

    def __init__(self, shell: GuestShell) -> None:
        shell.run(
            "mkfifo /run/ask && { sleep 99999 >/run/ask & "
            "kvmi-guest memory </run/ask >/run/page 2>&1 & }"
        )
        self.gpa = int(_answer(shell, lines=1)["gpa"])
        self._answers = 1

    def look(self, shell: GuestShell) -> bytes:
        """What the program sees in its page now, by whatever shell reaches it."""
        self._answers += 1
        shell.run("echo show >/run/ask")
        return bytes.fromhex(_answer(shell, lines=self._answers)["hex"])


def _answer(shell: GuestShell, *, lines: int) -> dict[str, Any]:
    """The last of so many lines in /run/page, which may have to be waited for."""
    done = shell.run(
        f"until [ $(wc -l </run/page) -ge {lines} ]; do sleep 0.1; done; tail -n 1 /run/page"
    )
    return _last_line(done.stdout)
