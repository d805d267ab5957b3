# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that measures: built here, run in a host, spoken to line by line.

``guest-images/bench/kvmi-bench.c`` tells what it says and what its figures mean.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import msgspec

from harness.abi import Profile
from harness.abi.cheader import generate_header
from harness.build import cache
from harness.build.run import output_of, run_logged
from harness.counters.layout import c_header
from harness.errors import ConformanceError, DeadlineError, InfraError
from harness.paths import GUEST_IMAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.hosts import Host

__all__ = ["Block", "Facts", "KindFacts", "Pipe", "Program", "Stopped", "VcpuSamples", "build"]

_SOURCE = GUEST_IMAGES / "bench"
_RECIPE = "1"  # counted up when the code below makes something else of the same inputs
_COMPILE_TIMEOUT_S = 120
_PLACE = "/run/kvmi-bench"
_COUNTERS = "/run/kvmi-bench.counters"
_PATIENCE_S = 30.0
"""The program ends by itself at its limit; so long after that the way to it must be broken."""


def build(root: Path, profile: Profile) -> Path:
    """The program for hosts of this interface, static; made if the cache lacks it.

    :param root: the cache, as in ``settings.cache``.
    :raises BuildError: there is no C compiler, or it refuses the source.
    """
    abi, layout = generate_header(profile), c_header()
    inputs: dict[str, cache.Input] = {
        "source": _SOURCE,
        "abi": abi,
        "counters": layout,
        "compiler": output_of(["cc", "--version"]).splitlines()[0],
        "recipe": _RECIPE,
    }

    def make(into: Path) -> None:
        (into / "kvmi-abi.h").write_text(abi)
        (into / "counters-layout.h").write_text(layout)
        sources = (str(_SOURCE / "kvmi-bench.c"), str(_SOURCE / "guest.S"))
        run_logged(
            ["cc", "-std=gnu11", "-static", "-O2", "-s", "-pthread", "-Wall", "-Wextra",
             f"-I{into}", "-o", str(into / "kvmi-bench"), *sources],
            cwd=into,
            log=root / "logs" / "bench.log",
            timeout_s=_COMPILE_TIMEOUT_S,
            what="compiling kvmi-bench",
        )  # fmt: skip

    return cache.entry("bench", inputs, make, root=root) / "kvmi-bench"


class KindFacts(msgspec.Struct, kw_only=True):
    """What the program says about one kind of event: the ids of its events, and if the kernel
    lacks something that it takes, what that is and the error (negative) it answered."""

    events: list[int]
    samples: int
    """How many it can take at once, those for warming up included."""
    missing_event: int | None = None
    missing_command: int | None = None
    error: int = 0

    @property
    def missing(self) -> bool:
        """Whether the kernel cannot do it."""
        return self.error != 0


class Facts(msgspec.Struct, kw_only=True):
    """What the program says about its host."""

    pid: int
    """Its process in the host."""
    vendor: str
    cpus: int
    vcpus: int
    tsc_khz: int
    """The guest's TSC, in which samples are counted; 0 without a guest."""
    tsc_compares: bool
    """Whether the guest's TSC is the host's, so that the parts of a sample mean something."""
    apart: bool
    kernel_threads: int
    """How many threads of the kernel's introspection were pinned beside the tool."""
    version: int
    singlestep: int
    kinds: dict[str, KindFacts]


class VcpuSamples(msgspec.Struct, kw_only=True):
    """Samples of one vCPU in ticks of the TSC, see the program; a part may be missing."""

    events: int
    """How many came, those of warming up included."""
    expected: int
    """How many should have come, so that each sample is the time of its own."""
    hold: list[int]
    out: list[int] = []
    answer: list[int] = []

    def __post_init__(self) -> None:
        if not self.hold or any(part and len(part) != len(self.hold) for part in self._parts()):
            raise ValueError("parts of samples of different numbers")

    def _parts(self) -> Sequence[list[int]]:
        return self.out, self.answer


class Block(msgspec.Struct, kw_only=True):
    """The samples of one kind, taken in a row."""

    kind: str
    vcpus: list[VcpuSamples]


class _Failure(msgspec.Struct, kw_only=True):
    kind: str
    failed: str


class Stopped(ConformanceError):
    """The program gave up: ``message`` has its words. Its host may go on."""


_Answer = TypeVar("_Answer", bound=msgspec.Struct)


class Pipe(Protocol):
    """A running program's standard input and output, as of a process in a host."""

    def write(self, data: bytes) -> None:
        """Write to its standard input."""

    def readline(self, timeout_s: float) -> bytes:
        """One line of its output; empty at its end."""

    def last_words(self) -> str:
        """What it wrote to its standard error."""

    def kill(self, pid: int) -> None:
        """End its process, which does not end by itself."""

    def close(self) -> None:
        """End its standard input."""


class _InHost:
    def __init__(self, host: Host, command: str) -> None:
        self._host = host
        self._process = host.spawn(command)

    def write(self, data: bytes) -> None:
        self._process.write(data)

    def readline(self, timeout_s: float) -> bytes:
        return self._process.stdout.readline(timeout_s=timeout_s)

    def last_words(self) -> str:
        return self._process.read_stderr().decode(errors="replace").strip()

    def kill(self, pid: int) -> None:
        self._host.run(f"kill -9 {pid}", check=False)

    def close(self) -> None:
        self._process.close()


class Program:
    """The running program. Use as a context manager; it ends with its standard input."""

    def __init__(self, pipe: Pipe, *, limit_s: int) -> None:
        """Take over a program that was just started.

        :param limit_s: what it was given as its limit.
        :raises Stopped: it could not start, as where introspection is off.
        :raises InfraError: it ended without a word, or cannot be reached.
        """
        self._pipe = pipe
        self._limit_s = limit_s
        self._facts: Facts | None = None
        self._facts = self._receive(Facts)

    @property
    def facts(self) -> Facts:
        """What it said when it started."""
        assert self._facts is not None
        return self._facts

    @classmethod
    def install(cls, host: Host, program: Path, *, counters: bytes) -> None:
        """Put the program and the file of its counters into a host."""
        host.put(_PLACE, program.read_bytes(), mode=0o755)
        host.put(_COUNTERS, counters)

    @classmethod
    def start(cls, host: Host, *, limit_s: int, vcpus: int = 1, apart: bool = False) -> Program:
        """Start the installed program."""
        options = f"--counters {_COUNTERS} --vcpus {vcpus} --limit {limit_s}"
        # exec: nothing but it holds the pipes.
        command = f"exec {_PLACE} {options}{' --apart' if apart else ''}"
        return cls(_InHost(host, command), limit_s=limit_s)

    @staticmethod
    def counters(host: Host) -> bytes:
        """The file of the counters as it is now."""
        return host.run(f"cat {_COUNTERS}").stdout

    def measure(self, kind: str, *, samples: int, warm: int) -> Block:
        """Have it take so many samples of a kind, after ``warm`` ones that do not count.

        :raises Stopped: it could not, or not in time; it has ended.
        :raises InfraError: it died, or the way to it is broken.
        """
        with contextlib.suppress(OSError):  # what it said before it ended tells more
            self._pipe.write(f"{kind} {samples} {warm}\n".encode())
        block = self._receive(Block)
        if block.kind != kind:
            raise InfraError(f"kvmi-bench answered about {block.kind} when asked for {kind}")
        return block

    def _receive(self, answer: type[_Answer]) -> _Answer:
        try:
            line = self._pipe.readline(self._limit_s + _PATIENCE_S)
        except DeadlineError as error:
            overdue = f"silent for {self._limit_s + _PATIENCE_S:.0f} s"
            if self._facts is None:
                raise InfraError(f"kvmi-bench is {overdue} after its start") from error
            # Its own limit is by the clock of its host, which may be slow where it is emulated.
            self._pipe.kill(self._facts.pid)
            raise Stopped(f"kvmi-bench was ended: {overdue}") from error
        if not line.endswith(b"\n"):
            raise InfraError(
                "kvmi-bench ended in the middle of its work",
                details=f"{line.decode(errors='replace')}\n{self._pipe.last_words()}".strip(),
            )
        with contextlib.suppress(msgspec.MsgspecError):
            failure = msgspec.json.decode(line, type=_Failure)
            raise Stopped(
                f"{failure.kind or 'kvmi-bench'}: {failure.failed}",
                hint="is introspection on in the host's kernel?" if not failure.kind else "",
            )
        try:
            return msgspec.json.decode(line, type=answer)
        except (msgspec.MsgspecError, ValueError) as error:
            raise InfraError(
                f"kvmi-bench's answer cannot be read: {error}", details=line[:400].decode()
            ) from error

    def close(self) -> None:
        """End it. Idempotent."""
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
