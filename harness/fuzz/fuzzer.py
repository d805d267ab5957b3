# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases run on one host, and held against what is promised."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.abi import Codec, Profile
from harness.errors import AbsentError, ConformanceError, HarnessError
from harness.fuzz.calls import CallCases
from harness.fuzz.executor import Executor
from harness.fuzz.expect import Rules
from harness.fuzz.holdings import look, wait_until_given_back
from harness.fuzz.judge import judge
from harness.fuzz.messages import MessageCases, Session
from harness.fuzz.plan import MESSAGES_PER_CASE, Batch
from harness.fuzz.tell import tell
from harness.fuzz.wire import Arg, Kind, Mode, Op, Outcome, Sock, Streamed

if TYPE_CHECKING:
    from harness.hosts import Host

__all__ = ["Figures", "Fuzzer"]

_DEADLINE_S = 20.0
_TOGETHER = {"messages": 1, "calls": 25}


@dataclass
class Figures:
    """What a batch amounted to."""

    batch: str = ""
    cases: int = 0
    sessions: int = 0
    messages: int = 0
    events: int = 0
    calls: int = 0
    restarts: int = 0
    """vCPUs that had gone astray and were started again."""
    seconds: float = 0.0

    @property
    def lives(self) -> int:
        """So many guests came and went."""
        return self.sessions or self.cases


class Fuzzer:
    """Runs cases on a host, whose kernel it asks what it can do."""

    def __init__(self, host: Host, *, profile: Profile, cache: Path) -> None:
        if profile.event_header is None:
            raise AbsentError(
                f"the fuzzer does not know the messages of {profile.name}",
                hint="it attacks kernels that speak v12",
            )
        self.profile = profile
        self._codec = Codec(profile)
        self.executor = Executor(
            host, profile=profile, cache=cache, deadline_s=_DEADLINE_S * host.patience
        )
        self._host = host
        self._sessions = 0
        try:
            self.rules = self._ask()
            self._forget()
            self._base = look(host, pid=self.executor.pid)
        except BaseException:
            self.executor.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether more cases can be run."""
        return self.executor.alive

    def close(self) -> None:
        """End the executor in the host."""
        self.executor.close()

    def run(self, batch: Batch, *, seed: str) -> Figures:
        """Run the cases of a batch.

        :raises ConformanceError: the kernel broke a promise, does not come back, or died; the
            message names the case, and the details tell it.
        """
        start = time.monotonic()
        figures = self._play(batch, seed)
        self._given_back(figures, again=lambda: self._play(batch, seed).lives)
        figures.seconds = round(time.monotonic() - start, 3)
        return figures

    def _play(self, batch: Batch, seed: str) -> Figures:
        make = self._maker(batch, seed)
        numbers = range(batch.first, batch.first + batch.count)
        figures = Figures(str(batch))
        faults: list[str] = []
        try:
            cases = ((number, make(number)) for number in numbers)
            for (number, ops), outcome in self.executor.run(cases, together=_TOGETHER[batch.kind]):
                _count(figures, ops, outcome)
                faults = judge(self.profile, ops, outcome)
                if faults:
                    case = Batch(batch.kind, number, 1)
                    raise self._failure(case, seed, ops, faults, outcome)
        except HarnessError as error:
            if not faults and (suspects := self.executor.under_way):  # the host was lost
                some = Batch(batch.kind, suspects[0][0], len(suspects))
                error.hint = "; ".join(filter(None, (error.hint, f"run {_repeat(some, seed)}")))
                error.details += self._suspects(batch)
            raise
        self._forget()
        return figures

    def _maker(self, batch: Batch, seed: str) -> Callable[[int], Sequence[Op]]:
        if batch.kind == "messages":
            return MessageCases(self.profile, self.rules, seed=seed, size=MESSAGES_PER_CASE).case
        return CallCases(self.profile, seed=seed).case

    def _failure(
        self, case: Batch, seed: str, ops: Sequence[Op], faults: Sequence[str], outcome: Outcome
    ) -> ConformanceError:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        first = faults[0].partition("\n")[0]
        return ConformanceError(
            f"case {case} of seed {seed!r}: {first}{more}",
            hint=f"run {_repeat(case, seed)}",
            details="\n".join(faults) + "\n\n" + tell(self.profile, ops, outcome),
        )

    def _suspects(self, batch: Batch) -> str:
        """The cases one of which ran when the host was lost."""
        return "".join(
            f"\n\ncase {batch.kind}-{number}:\n{tell(self.profile, ops)}"
            for number, ops in self.executor.under_way
        )

    def _given_back(self, figures: Figures, *, again: Callable[[], int]) -> None:
        """See to it that what the sessions so far took was given back."""
        self._sessions += figures.lives
        base = wait_until_given_back(
            self._host,
            self._base,
            pid=self.executor.pid,
            sessions=self._sessions,
            again=again,
        )
        if base is not self._base:
            self._base, self._sessions = base, 0

    def _forget(self) -> None:
        """Close the virtual machines that wait for their next case."""
        for _ in self.executor.run([(0, [Op(Kind.FORGET, b"")])]):
            pass

    # -- what the kernel can do

    def _ask(self) -> Rules:
        """Ask which commands and events there are, by the commands that are always allowed.

        :raises ConformanceError: it is not answered, or nothing can be hooked at all.
        """
        commands: list[int] = []
        events: list[int] = []
        asked: list[tuple[int, list[int]]] = []
        frames = []
        for name, ids, found in (
            ("VM_CHECK_COMMAND", [c.id for c in self.profile.commands.values()], commands),
            ("VM_CHECK_EVENT", [e.id for e in self.profile.events.values()], events),
        ):
            for id in ids:
                command, payload = self._codec.encode_command(name, id=id)
                frames.append(self._codec.frame(command, payload, len(asked)))
                asked.append((id, found))
        hook, argument = self._codec.encode_ioctl("HOOK", fd=0)
        hooked = [
            Op.vm(0, 0, expect={0}),
            Op.sock(0, Sock.UNIX_STREAM, expect={0}),
            Op.ioctl(0, hook, argument, arg=Arg.OURS, expect={0}),
        ]
        ask = Op.stream(0, frames, Mode.REPLIES, expected=len(asked))
        # Hooked for its own sake first: where that fails, nobody would answer, which takes long.
        for _case, outcome in self.executor.run([(0, hooked)]):
            if faults := judge(self.profile, hooked, outcome):
                raise ConformanceError(
                    f"a guest cannot be hooked: {faults[0]}",
                    details=tell(self.profile, hooked, outcome),
                )
        for _case, outcome in self.executor.run([(0, [*hooked, ask])]):
            stream = outcome.lanes[0][-1]
            assert isinstance(stream, Streamed)
            if len(stream.replies) != len(asked):
                raise ConformanceError(
                    f"VM_CHECK_COMMAND and VM_CHECK_EVENT gave {len(stream.replies)} answers to "
                    f"{len(asked)} questions",
                    details=tell(self.profile, [*hooked, ask], outcome),
                )
            absent = -self.profile.errno["KVM_ENOENT"]
            for reply in stream.replies:
                id, found = asked[reply.seq]
                if int.from_bytes(reply.head[:4], "little", signed=True) != absent:
                    found.append(id)
        return Rules(self.profile, commands=frozenset(commands), events=frozenset(events))


def _repeat(cases: Batch, seed: str) -> str:
    return f"inv fuzz --seed {shlex.quote(seed)} --select {cases}"


def _count(figures: Figures, ops: Iterable[Op], outcome: Outcome) -> None:
    figures.cases += 1
    figures.restarts += outcome.restarts
    for op in ops:
        if isinstance(op.expect, Session):
            figures.sessions += 1
            figures.messages += len(op.expect.sent) + bool(op.expect.tail)
        elif op.kind.name == "IOCTL":
            figures.calls += 1
    for results in outcome.lanes.values():
        for result in results:
            if isinstance(result, Streamed):
                figures.events += result.events
