# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker's hosts: started when first needed, watched during each test, replaced when broken.

A host serves test after test. It is replaced when it crashed, was lost, or its kernel
complained: most warnings are printed once per boot, so a host that has complained can no
longer be trusted to stay silent for the right reason. One broken host thus costs one test.

When no host can be started, twice in a row, the pool gives up: the tests that met the cause
report it, all later ones are MISS with a pointer to it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness.errors import ConformanceError, HarnessError
from harness.hosts.base import AS_USUAL, Boot
from harness.hosts.leaks import find_leaks
from harness.plugin.classify import HostsGivenUp

if TYPE_CHECKING:
    from harness.hosts import Host, Target

__all__ = ["HostPool", "Lease", "PerHost", "PooledHost"]

START_ATTEMPTS = 2
WATCH_INTERVAL_S = 0.1

T = TypeVar("T")


class PerHost:
    """Things that live as long as a host does, such as a device manager running on it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._things: dict[str, Any] = {}

    def get(
        self, name: str, make: Callable[[Host], T], *, usable: Callable[[T], bool] | None = None
    ) -> T:
        """The thing of this name, made by ``make(host)`` at first use.

        :param usable: asked about a thing made earlier; when it says no, the thing is closed
            and made anew.
        """
        thing = self._things.get(name)
        if thing is not None and usable is not None and not usable(thing):
            self.drop(name)
            thing = None
        if thing is None:
            thing = self._things[name] = make(self._host)
        return thing

    def drop(self, name: str) -> None:
        """Close and forget one thing; errors while closing it do not matter any more."""
        thing = self._things.pop(name, None)
        close = getattr(thing, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):
                close()

    def close(self) -> None:
        """Close all, newest first."""
        for name in reversed(list(self._things)):
            self.drop(name)


class PooledHost:
    """A host with what depends on it, and the watch over its console."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.per_host = PerHost(host)
        self.last_test = ""
        self.spoilt = ""

    def spoil(self, why: str) -> None:
        """Let the next test have another host."""
        self.spoilt = self.spoilt or why

    def close(self) -> None:
        """End the host and all that depends on it."""
        self.per_host.close()
        with contextlib.suppress(Exception):
            self.host.close()


class Lease:
    """One test's use of a host."""

    def __init__(self, pooled: PooledHost, *, test: str, fresh: bool) -> None:
        self.pooled = pooled
        self._test = test
        self._fresh = fresh
        self._mark = pooled.host.console.mark()

    def kernel_log(self) -> str:
        """What the host's kernel said since the test began."""
        return self.pooled.host.console.since(self._mark)

    def finish(self, *, watch_s: float = 0.0, leaks: bool = False) -> None:
        """Judge the host and give it back; one whose kernel complained is not lent again.

        :param watch_s: how long it stays under watch before.
        :param leaks: ask its kernel for memory that it lost, in whichever test it was.
        :raises ConformanceError: its kernel complained, or crashed during the test.
        :raises LostHostError: it went away otherwise.
        """
        __tracebackhide__ = True
        try:
            self._watch(watch_s)
            if leaks:
                self._look_for_leaks()
        except HarnessError as error:
            self.pooled.spoil(error.message)
            raise
        finally:
            self.pooled.last_test = self._test
            if self._fresh:
                self.pooled.close()

    def _look_for_leaks(self) -> None:
        __tracebackhide__ = True
        host = self.pooled.host
        if leaks := find_leaks(host):
            first = leaks.partition("\n")[0]
            raise ConformanceError(
                f"the kernel of host {host.name} lost memory: {first}",
                hint="in any test on this host; the traces of the allocations are in the details",
                details=leaks,
            )

    def _watch(self, watch_s: float) -> None:
        __tracebackhide__ = True
        host = self.pooled.host
        pause = threading.Event()
        deadline = time.monotonic() + watch_s
        while True:
            # A crash comes first: it explains all other complaints.
            host.check()
            complaints = host.console.complaints(self._mark)
            if complaints:
                raise self._complaint(complaints)
            if time.monotonic() >= deadline:
                return
            pause.wait(WATCH_INTERVAL_S)

    def _complaint(self, complaints: list[str]) -> ConformanceError:
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        last = self.pooled.last_test
        return ConformanceError(
            f"the kernel of host {self.pooled.host.name} complained: {complaints[0].strip()}{more}",
            hint="read this test's kernel log"
            + (f"; the test before it on this host was {last}" if last else ""),
            details="\n".join(complaints),
        )


class HostPool:
    """The hosts of one worker.

    :param run_dir: hosts leave their evidence in ``hosts/<name>`` below it.
    :param on_phase: told what the pool is doing, for the live view.
    """

    def __init__(
        self,
        target: Target,
        *,
        run_dir: Path,
        worker: str,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        self._target = target
        self._run_dir = run_dir
        self._worker = worker
        self._on_phase = on_phase or (lambda _phase: None)
        self._started = 0
        self._shared: PooledHost | None = None
        self._failures: list[str] = []

    def start(self, *, test: str, boot: Boot | None = None) -> PooledHost:
        """Start a host of its own for a test.

        :param boot: how to boot it, where not as usual.
        :raises HostsGivenUp: starting failed too often before; nothing was tried.
        :raises HarnessError: what the target raises; it is remembered.
        """
        if len(self._failures) >= START_ATTEMPTS:
            raise HostsGivenUp(
                f"no host on {self._worker}: {len(self._failures)} could not be started, "
                f"the last one in {self._failures[-1]}"
            )
        self._started += 1
        name = f"{self._worker}-{self._started}"
        evidence = self._run_dir / "hosts" / name
        evidence.mkdir(parents=True, exist_ok=True)
        self._on_phase(f"start host {name}")
        try:
            host = self._target.start(name=name, evidence=evidence, boot=boot or AS_USUAL)
        except BaseException:
            self._failures.append(test)
            raise
        self._failures.clear()
        return PooledHost(host)

    def lend(self, *, test: str, fresh: bool = False, boot: Boot | None = None) -> Lease:
        """Lend a host to one test; the lease must be finished whatever happens.

        :param fresh: start a host for this test alone, and end it with the test.
        :param boot: how to boot a fresh host, where not as usual.
        """
        pooled = self.start(test=test, boot=boot) if fresh else self._take(test)
        return Lease(pooled, test=test, fresh=fresh)

    def _take(self, test: str) -> PooledHost:
        """The shared host; another one when it is spoilt or no more."""
        pooled = self._shared
        if pooled is not None and not pooled.spoilt:
            try:
                pooled.host.check()
            except HarnessError as error:
                pooled.spoil(error.message)
        if pooled is not None and pooled.spoilt:
            self._shared = None
            pooled.close()
            pooled = None
        if pooled is None:
            pooled = self._shared = self.start(test=test)
        return pooled

    def close(self) -> None:
        """End the shared host."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
