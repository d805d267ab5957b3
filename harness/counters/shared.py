# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared-memory counters of a run: one file, mapped by all, one slot per worker.

Each slot has one writing process. It makes the slot's sequence counter odd, stores, and makes it
even again; each store is an aligned 64-bit word, which x86 neither tears nor reorders. A reader
copies the slot between two equal even values, and takes no lock. A writer that was killed in
mid-update leaves the counter odd: readers give up after a bounded time and say so (``torn``); the
slot's next writer repairs it. The file is no different from any other, so it can be read after
everybody is dead.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.abi import load_profile
from harness.counters.layout import (
    EVENT_IDS,
    HEADER_SIZE,
    LATENCY_BUCKETS,
    SLOT_SIZE,
    WORD,
    Header,
    pack_header,
    text_offsets,
    unpack_header,
)
from harness.counters.snapshot import SlotSnapshot, decode_slot
from harness.errors import InfraError, UsageError

__all__ = ["Counters", "SlotWriter", "attach", "create"]

_READ_TRIES = 200
#: How long a reader waits for a living writer that stands in mid-update: it may have been
#: preempted there on a busy machine.
_READ_PATIENCE_S = 0.25

_SEQUENCE = WORD["sequence"]
_HEARTBEAT = WORD["heartbeat_ns"]
_COMMANDS = WORD["commands"]
_REPLIES = WORD["replies"]
_FAILED = WORD["failed_replies"]
_EVENT_REPLIES = WORD["event_replies"]
_PROBLEMS = WORD["problems"]
_BYTES_IN = WORD["bytes_in"]
_BYTES_OUT = WORD["bytes_out"]
_EVENTS = WORD["events"]
_COMMAND_LATENCY = WORD["command_latency"]
_EVENT_LATENCY = WORD["event_latency"]
_LAST_BUCKET = LATENCY_BUCKETS - 1


def create(path: Path, *, slots: int, events: Mapping[int, str] | None = None) -> Counters:
    """Make the file with all counters zero, replacing an old one, and attach to it.

    :param slots: how many processes will write; a worker that replaces a dead one may take over
        its slot.
    :param events: names of the event ids; those of the v12 profile when None.
    :raises InfraError: no space, or no such directory.
    """
    names = events or {e.id: e.name for e in load_profile().events.values()}
    header = Header(slots, time.time_ns(), time.monotonic_ns(), names)
    size = HEADER_SIZE + slots * SLOT_SIZE
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            # A store into a hole of a mapped file kills the process when the disk is full.
            os.posix_fallocate(file.fileno(), 0, size)
            file.write(pack_header(header))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InfraError(
            f"cannot make the counters {path}: {error.strerror}", hint="the run's directory has to "
            "exist and to have some space",
        ) from error  # fmt: skip
    return attach(path)


def attach(path: Path) -> Counters:
    """Map an existing file, for reading and for writing to one's own slot.

    :raises UsageError: there is none, or it is something else.
    """
    return Counters(path)


class Counters:
    """The mapped file. Use as a context manager, or :meth:`close` it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writable = os.access(path, os.W_OK)
        try:
            with path.open("r+b" if self.writable else "rb") as file:
                self.header = unpack_header(file.read(HEADER_SIZE), str(path))
                size = HEADER_SIZE + self.header.slots * SLOT_SIZE
                access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
                self._map = mmap.mmap(file.fileno(), size, access=access)
        except OSError as error:
            raise UsageError(f"cannot read the counters {path}: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{path} is shorter than its header says") from error
        self._view = memoryview(self._map)

    def slot(self, index: int) -> SlotWriter:
        """Take a slot for writing; its counts go on from where they are.

        :raises UsageError: no such slot, or another living process writes to it.
        """
        if not 0 <= index < self.header.slots:
            raise UsageError(f"{self.path} has no slot {index}", hint=f"slots: {self.header.slots}")
        if not self.writable:
            raise UsageError(f"{self.path} cannot be written")
        return SlotWriter(self._view[self._place(index)], index)

    def read(self) -> list[SlotSnapshot]:
        """All slots, each consistent in itself (or marked as torn)."""
        return [self.read_slot(i) for i in range(self.header.slots)]

    def read_slot(self, index: int) -> SlotSnapshot:
        """One slot. Takes no lock, and at most 0.25 s when the writer stands in mid-update."""
        view = self._view[self._place(index)]
        words = view.cast("Q")
        give_up = time.monotonic() + _READ_PATIENCE_S
        tries = 0
        while True:
            before = words[_SEQUENCE]
            data = bytes(view)
            consistent = before % 2 == 0 and words[_SEQUENCE] == before
            tries += 1
            if consistent or (tries >= _READ_TRIES and time.monotonic() > give_up):
                break
            if tries % _READ_TRIES == 0:
                if not process_lives(words[WORD["pid"]]):
                    break
                time.sleep(0.001)  # let the writer, who holds nothing of ours, go on
        words.release()
        view.release()
        return decode_slot(index, data, self.header, torn=not consistent)

    def copy(self, data: bytes) -> None:
        """Show what the file of another machine has counted, whose content ``data`` is.

        Processes and clocks of that machine mean nothing here, so a slot in use gets this
        process and this moment. Nobody else may write to this file.
        """
        now_ns = time.monotonic_ns()
        for index in range(self.header.slots):
            place = self._place(index)
            new = memoryview(bytearray(data[place])).cast("Q")
            if new[WORD["pid"]]:
                new[WORD["pid"]] = os.getpid()
            if new[WORD["generation"]]:
                new[_HEARTBEAT] = now_ns
                new[WORD["started_ns"]] = now_ns
            words = self._view[place].cast("Q")
            sequence = words[_SEQUENCE] | 1
            words[_SEQUENCE] = sequence
            words[_SEQUENCE + 1 :] = new[_SEQUENCE + 1 :]
            words[_SEQUENCE] = sequence + 1
            words.release()

    @staticmethod
    def _place(index: int) -> slice:
        start = HEADER_SIZE + index * SLOT_SIZE
        return slice(start, start + SLOT_SIZE)

    def close(self) -> None:
        """Unmap; writers of this object must not be used any more. The file stays."""
        self._view.release()
        # When a slot writer still has the mapping, it goes away with the writer.
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SlotWriter:
    """The writing side of one slot. Threads of the one process may share it."""

    def __init__(self, view: memoryview, index: int) -> None:
        self.index = index
        self._view = view
        self._words = words = view.cast("Q")
        self._lock = threading.Lock()
        self._acquire, self._lock_release = self._lock.acquire, self._lock.release
        pid = words[WORD["pid"]]
        if pid != os.getpid() and process_lives(pid):
            raise UsageError(f"slot {index} is in use by process {pid}")
        # Rounded up to even: the one before may have died in mid-update.
        self._sequence = words[_SEQUENCE] + words[_SEQUENCE] % 2
        words[_SEQUENCE] = self._sequence
        now_ns = time.monotonic_ns()
        with self._lock:
            self._begin()
            words[WORD["pid"]] = os.getpid()
            words[WORD["generation"]] += 1
            words[WORD["started_ns"]] = now_ns
            words[_HEARTBEAT] = now_ns
            self._store_text("phase", "")
            self._store_text("test", "")
            self._end()

    def _begin(self) -> None:
        self._sequence += 1
        self._words[_SEQUENCE] = self._sequence

    def _end(self) -> None:
        self._sequence += 1
        self._words[_SEQUENCE] = self._sequence

    # The following four are on the way of every message. They avoid what costs: calls, the context
    # manager of the lock, reading the sequence counter back.

    def event(self, id: int, size: int, ns: int = 0) -> None:
        """An event was received. :param size: bytes of its message. :param ns: when (monotonic)."""
        words = self._words
        self._acquire()
        try:
            sequence = self._sequence
            words[_SEQUENCE] = sequence + 1
            words[_EVENTS + (id if id < EVENT_IDS else EVENT_IDS - 1)] += 1
            words[_BYTES_IN] += size
            if ns:
                words[_HEARTBEAT] = ns
            words[_SEQUENCE] = self._sequence = sequence + 2
        finally:
            self._lock_release()

    def event_reply(self, size: int, latency_ns: int) -> None:
        """An event was answered, that long after it was received."""
        words = self._words
        bucket = latency_ns.bit_length() - 1 if latency_ns > 0 else 0
        self._acquire()
        try:
            sequence = self._sequence
            words[_SEQUENCE] = sequence + 1
            words[_EVENT_REPLIES] += 1
            words[_BYTES_OUT] += size
            words[_EVENT_LATENCY + (bucket if bucket < _LAST_BUCKET else _LAST_BUCKET)] += 1
            words[_SEQUENCE] = self._sequence = sequence + 2
        finally:
            self._lock_release()

    def command(self, size: int) -> None:
        """A command was sent."""
        words = self._words
        self._acquire()
        try:
            sequence = self._sequence
            words[_SEQUENCE] = sequence + 1
            words[_COMMANDS] += 1
            words[_BYTES_OUT] += size
            words[_SEQUENCE] = self._sequence = sequence + 2
        finally:
            self._lock_release()

    def reply(self, size: int, latency_ns: int, *, failed: bool = False, ns: int = 0) -> None:
        """A reply was received, that long after its command was sent."""
        words = self._words
        bucket = latency_ns.bit_length() - 1 if latency_ns > 0 else 0
        self._acquire()
        try:
            sequence = self._sequence
            words[_SEQUENCE] = sequence + 1
            words[_REPLIES] += 1
            if failed:
                words[_FAILED] += 1
            words[_BYTES_IN] += size
            words[_COMMAND_LATENCY + (bucket if bucket < _LAST_BUCKET else _LAST_BUCKET)] += 1
            if ns:
                words[_HEARTBEAT] = ns
            words[_SEQUENCE] = self._sequence = sequence + 2
        finally:
            self._lock_release()

    def problem(self) -> None:
        """A message broke the interface."""
        with self._lock:
            self._begin()
            self._words[_PROBLEMS] += 1
            self._end()

    def beat(self) -> None:
        """A sign of life."""
        with self._lock:
            self._begin()
            self._words[_HEARTBEAT] = time.monotonic_ns()
            self._end()

    def phase(self, text: str) -> None:
        """What the worker is at; also a sign of life."""
        self._text("phase", text)

    def test(self, name: str) -> None:
        """The name of the running test, "" between tests; also a sign of life."""
        self._text("test", name)

    def _text(self, field: str, text: str) -> None:
        with self._lock:
            self._begin()
            self._words[_HEARTBEAT] = time.monotonic_ns()
            self._store_text(field, text)
            self._end()

    def _store_text(self, field: str, text: str) -> None:
        offset, size = text_offsets()[field]
        # Cut between characters, not within one.
        cut = text.encode()[: size - 1].decode(errors="ignore").encode()
        self._view[offset : offset + size] = cut.ljust(size, b"\0")

    def release(self) -> None:
        """Give the slot up: its pid becomes 0, its counts stay. The object is unusable then."""
        with self._lock:
            self._begin()
            self._words[WORD["pid"]] = 0
            self._end()
            self._words.release()
            self._view.release()


def process_lives(pid: int) -> bool:
    """Whether there is a process of that id that has not ended (a zombie has)."""
    if pid <= 0:
        return False
    try:
        # State is the first word after the command's name, which ends with the last parenthesis.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")
