# SPDX-License-Identifier: GPL-2.0-or-later
"""The executor in a host: started there once, then fed with cases."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from harness.abi import Profile
from harness.build import cache as build_cache
from harness.errors import BuildError, InfraError, SilenceError
from harness.fuzz.images import encode_guests
from harness.fuzz.wire import Op, Outcome, config, encode_cases, form, read_outcomes
from harness.paths import GUEST_IMAGES
from harness.tool import Listener

if TYPE_CHECKING:
    from harness.hosts import Host

__all__ = ["Executor", "build_executor"]

_SOURCES = GUEST_IMAGES / "fuzz"
_PLACE = "/run/kvmi-fuzz"
_AHEAD = 2
"""So many frames with cases are on their way: the executor never waits for us."""

Case = tuple[int, Sequence[Op]]

_PREPARE = r"""
if [ -d /sys/kernel/debug/failslab ]; then
  echo 0 >/sys/kernel/debug/failslab/verbose
  echo N >/sys/kernel/debug/failslab/ignore-gfp-wait
fi
echo 5 >/proc/sys/kernel/printk
grep -o -m1 -E 'AuthenticAMD|GenuineIntel' /proc/cpuinfo
"""
"""Failures on request come without a word each, sleeping allocations among them; of the
console, which is slow, only warnings are wanted."""


def build_executor(cache: Path) -> Path:
    """Compile the executor, or find it made already.

    :raises BuildError: there is no compiler, or it refuses.
    """

    def make(directory: Path) -> None:
        options = ["-static", "-O2", "-s", "-Wall", "-Wextra", "-pthread", "-o", "executor"]
        argv = ["cc", *options, *map(str, sorted(_SOURCES.glob("*.c")))]
        try:
            subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise BuildError(f"cannot compile {_SOURCES}: there is no cc") from error
        except subprocess.CalledProcessError as error:
            raise BuildError(f"cc refuses {_SOURCES}", details=error.stderr) from error

    return build_cache.entry("fuzz", {"source": _SOURCES}, make, root=cache) / "executor"


class Executor:
    """One executor process in a host.

    :param deadline_s: after so long without any progress the host counts as stuck.
    """

    def __init__(self, host: Host, *, profile: Profile, cache: Path, deadline_s: float) -> None:
        self.host = host
        self.profile = profile
        self._deadline_s = deadline_s
        vendor = "AMD" if "AMD" in host.run(_PREPARE, check=False).text else "Intel"
        host.put(_PLACE, build_executor(cache).read_bytes(), mode=0o755)
        with Listener() as listener:
            address, port = host.tool_address(listener.port)
            self._process = host.spawn(f"echo $$; exec {_PLACE} {address} {port}")
            try:
                self.pid = int(self._process.stdout.readline(timeout_s=20 + deadline_s))
                self._sock = listener.accept(20 + deadline_s)
            except BaseException:
                self._process.close()
                raise
        self._sock.settimeout(deadline_s * 4 + 60)
        self.under_way: list[Case] = []
        self._broken = False
        self._unread = 0
        unhook = profile.ioctl("UNHOOK").request
        parameter = f"/sys/module/kvm/parameters/{profile.module_parameter}"
        self._send(
            config(deadline_s=deadline_s, unhook=unhook, event_message=profile.vcpu_event,
                   parameter=parameter)
        )  # fmt: skip
        for frame in (*_forms(profile), *encode_guests(vendor=vendor, cache=cache)):
            self._send(frame)

    @property
    def alive(self) -> bool:
        """Whether more cases can be run: nothing is stuck, and whoever ran some took all outcomes.

        Those that were left, as when one of them is a failure, would be taken for later ones'.
        """
        return not self._broken and self._unread == 0

    def run(self, cases: Iterable[Case], *, together: int = 1) -> Iterator[tuple[Case, Outcome]]:
        """Run cases one after another; their outcomes come in the same order.

        Each case is drawn only when it is sent, a little before its turn. After the outcome
        of one that is stuck none follows.

        :param together: so many are sent at once; for short ones.
        :raises HarnessError: the executor is lost; what became of the host, if that is gone.
            :attr:`under_way` are the cases one of which did it.
        """
        if not self.alive:
            raise InfraError("the executor has ended, or answers somebody else still")
        source = iter(cases)
        frames: deque[list[Case]] = deque()
        self.under_way = []
        while True:
            while len(frames) < _AHEAD and (some := list(islice(source, together))):
                frames.append(some)
                self._send(encode_cases(some))
                self._unread += 1
            if not frames:
                return
            self.under_way = frames.popleft()
            outcomes = read_outcomes(self._receive())
            self._unread -= 1
            by_number = {case[0]: case for case in self.under_way}
            for outcome in outcomes:
                self._broken = self._broken or bool(outcome.stuck)
                yield by_number[outcome.number], outcome
            if self._broken:
                return
            self.under_way = []

    def _send(self, frame: bytes) -> None:
        try:
            self._sock.sendall(frame)
        except OSError as error:
            raise self._lost(str(error)) from error

    def _receive(self) -> bytes:
        size = int.from_bytes(self._exactly(4), "little")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        at = 0
        while at < size:
            try:
                got = self._sock.recv_into(view[at:])
            except TimeoutError:
                self._broken = True
                self.host.check()
                raise SilenceError(
                    f"the executor in host {self.host.name} says nothing any more"
                ) from None
            except OSError as error:
                raise self._lost(str(error)) from error
            if not got:
                raise self._lost("its connection ended")
            at += got
        return bytes(data)

    def _lost(self, why: str) -> Exception:
        """What became of the executor: the host's own error if that is gone."""
        self._broken = True
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and self.host.alive():
            time.sleep(0.1)  # a dying host's connections go first
        self.host.check()
        said = self._process.read_stderr().decode(errors="replace")
        status = self._process.status(timeout_s=5)
        return InfraError(
            f"the executor in host {self.host.name} is gone: {why}, exit status {status}",
            details=said,
        )

    def close(self) -> None:
        """End it, and with it all its virtual machines."""
        self._broken = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._process.close()


def _forms(profile: Profile) -> Iterator[bytes]:
    """How each event is answered."""
    actions = profile.names["action"]
    start = profile.structs["kvmi_event_hdr"].size + profile.structs["kvmi_vcpu_event"].size
    for event in profile.events.values():
        if not event.actions:
            continue
        extra = value_at = 0
        if event.reply is not None and event.payload is not None:
            extra = event.reply.size
            # Answer with what the guest wanted to write.
            value_at = start + event.payload.field("new_value").offset
        yield form(
            event.id, (actions[name] for name in event.actions), extra=extra, value_at=value_at
        )
