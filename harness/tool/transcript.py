# SPDX-License-Identifier: GPL-2.0-or-later
"""Transcripts: every message of both directions, kept as evidence of a test.

While sessions run, messages are appended undecoded to a file beside the transcript (NAME.raw),
one write each: cheap, in order, complete up to the last message when the process is killed, and
nothing piles up in memory. On close, the transcript itself is made of it: one JSON object per
line, decoded, with a first line that describes the run. ``python -m harness.tool.transcript FILE``
shows either form.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from harness.abi import Codec, Profile, load_profile
from harness.errors import HarnessError, InfraError, UsageError
from harness.tool.explain import explain, hex_lines, one_line

__all__ = ["Channel", "Transcript", "convert", "read_raw", "render"]

_MAGIC = b"KVMITRC1"
#: Time (ns, CLOCK_MONOTONIC), payload bytes, channel, kind, 0, message id, 0, seq.
_RECORD = struct.Struct("<QIHBBHHI")
#: Where a vCPU event has the index of its vCPU.
_VCPU = slice(10, 12)
_RECEIVED, _SENT, _BYTES_IN, _BYTES_OUT, _NOTE = range(5)


class Transcript:
    """The transcript of one test, which may have several sessions (channels).

    :param path: where the JSON lines go on :meth:`close`; ``path``.raw exists until then.
    :param name: what it is the transcript of, for its first line.
    :raises InfraError: the file cannot be written.
    """

    def __init__(self, path: Path, *, profile: Profile | None = None, name: str = "") -> None:
        self.path = path
        self.raw_path = path.with_name(path.name + ".raw")
        self.profile = profile or load_profile()
        self._lock = threading.Lock()
        self._channels = 0
        self._failure: InfraError | None = None
        head = {
            "kind": "transcript",
            "abi": self.profile.name,
            "name": name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "monotonic_ns": time.monotonic_ns(),
        }
        try:
            self._file = os.open(
                self.raw_path,
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC,
                0o644,
            )
        except OSError as error:
            raise InfraError(f"cannot write {self.raw_path}: {error.strerror}") from error
        self._open = True
        text = json.dumps(head).encode()
        self._write(_MAGIC + len(text).to_bytes(4, "little"), text)

    def channel(self, name: str = "") -> Channel:
        """A channel for one connection; ``name`` is noted at its beginning."""
        with self._lock:
            self._channels += 1
            number = self._channels
        channel = Channel(self, number)
        channel.note(f"begin {name}".rstrip())
        return channel

    def _write(self, head: bytes, payload: bytes) -> None:
        # O_APPEND and a single call keep records whole and in order, whichever thread writes.
        if not self._open or self._failure is not None:
            return
        try:
            done = os.writev(self._file, (head, payload))
            if done != len(head) + len(payload):
                raise OSError(28, os.strerror(28))
        except OSError as error:
            # A session must not fail in the middle because its evidence cannot be kept.
            self._failure = InfraError(
                f"the transcript {self.raw_path} is not complete: {error.strerror}",
                hint="free some space there",
            )

    def close(self) -> None:
        """Make the JSON lines of what was kept, and remove the raw file. Idempotent.

        :raises InfraError: the disk was full, or is now. What was kept stays as it is.
        """
        with self._lock:
            if not self._open:
                return
            self._open = False
            os.close(self._file)
        convert(self.raw_path, self.path)
        if self._failure is not None:
            raise self._failure
        self.raw_path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except HarnessError as failure:
            if error is None:
                raise
            error.add_note(str(failure))


class Channel:
    """Where one connection puts its messages. Safe to share between threads, never raises."""

    def __init__(self, transcript: Transcript, number: int) -> None:
        self.transcript = transcript
        self.number = number
        self._write = transcript._write

    def received(self, ns: int, id: int, seq: int, payload: bytes) -> None:
        """A message from the kernel."""
        self._write(_RECORD.pack(ns, len(payload), self.number, _RECEIVED, 0, id, 0, seq), payload)

    def sent(self, ns: int, id: int, seq: int, payload: bytes) -> None:
        """A message of the tool."""
        self._write(_RECORD.pack(ns, len(payload), self.number, _SENT, 0, id, 0, seq), payload)

    def raw(self, outgoing: bool, data: bytes) -> None:
        """Bytes that are no message: a handshake, or what is sent wrong on purpose."""
        kind = _BYTES_OUT if outgoing else _BYTES_IN
        head = _RECORD.pack(time.monotonic_ns(), len(data), self.number, kind, 0, 0, 0, 0)
        self._write(head, data)

    def note(self, text: str) -> None:
        """A remark, such as the end of the stream."""
        data = text.encode()
        head = _RECORD.pack(time.monotonic_ns(), len(data), self.number, _NOTE, 0, 0, 0, 0)
        self._write(head, data)


# -- from the raw file to JSON lines -------------------------------------------------------------


def read_raw(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a raw file, decoded, the first line of the transcript first.

    A record that is cut at the end of the file (its writer was killed) is left out.

    :raises UsageError: the file is no raw transcript.
    """
    with path.open("rb") as file:
        start = file.read(len(_MAGIC) + 4)
        if start[: len(_MAGIC)] != _MAGIC:
            raise UsageError(f"{path} is no raw transcript")
        head = json.loads(file.read(int.from_bytes(start[len(_MAGIC) :], "little")))
        yield head
        yield from _decode(file, Codec(load_profile(head["abi"])), head["monotonic_ns"])


def _decode(file: BinaryIO, codec: Codec, start_ns: int) -> Iterator[dict[str, Any]]:
    asked: dict[tuple[int, int], tuple[int, bytes]] = {}  # commands without reply, by channel, seq
    waiting: dict[tuple[int, int], int] = {}  # events without reply
    last: dict[tuple[int, bytes], bytes] = {}  # the last event of each vCPU
    while len(head := file.read(_RECORD.size)) == _RECORD.size:
        ns, length, channel, kind, _, id, _, seq = _RECORD.unpack(head)
        payload = file.read(length)
        if len(payload) < length:
            return
        at = {"t": round((ns - start_ns) / 1e9, 6), "channel": channel}
        if kind == _NOTE:
            yield {**at, "kind": "note", "text": payload.decode(errors="replace")}
        elif kind in (_BYTES_IN, _BYTES_OUT):
            yield {**at, "dir": "out" if kind == _BYTES_OUT else "in", "kind": "bytes",
                   "size": length, "hex": payload.hex()}  # fmt: skip
        else:
            key = (channel, seq)
            outgoing = kind == _SENT
            vcpu = (channel, payload[_VCPU])
            entry = explain(
                codec,
                outgoing=outgoing,
                id=id,
                seq=seq,
                payload=payload,
                request=asked.get(key, (0, None))[1],
                previous=last.get(vcpu),
            )
            begun = None
            if entry["kind"] == "command":
                asked[key] = (ns, payload)
            elif entry["kind"] == "event":
                waiting[key] = ns
                last[vcpu] = payload
            elif entry["kind"] == "event-reply":
                begun = waiting.pop(key, None)
            else:
                begun = asked.pop(key, (None, b""))[0]
            if begun is not None:
                entry["latency_us"] = round((ns - begun) / 1e3, 1)
            yield {**at, "dir": "out" if outgoing else "in", **entry}


def convert(raw: Path, path: Path) -> None:
    """Write the JSON lines of a raw file; ``path`` appears only when it is complete.

    :raises InfraError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w") as file:
            for entry in read_raw(raw):
                file.write(json.dumps(entry, separators=(",", ":")) + "\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InfraError(
            f"cannot write {path}: {error.strerror}", hint=f"the messages are in {raw}"
        ) from error


# -- for people ----------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        raw = file.read(len(_MAGIC)) == _MAGIC
    if raw:
        yield from read_raw(path)
        return
    with path.open() as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:  # a cut last line
                return


def render(source: Path | Iterable[dict[str, Any]], *, full: bool = False) -> str:
    """A transcript for people: one line per message, in seconds since its beginning.

    :param source: a transcript in either form, or its entries.
    :param full: show all registers and all bytes, too.
    """
    entries = _entries(source) if isinstance(source, Path) else iter(source)
    lines = []
    for entry in entries:
        if entry["kind"] == "transcript":
            lines.append(
                f"# {entry['name']} {entry['started']} ({entry['abi']})".replace("  ", " ")
            )
            continue
        lines.append(_line(entry))
        if full and "hex" in entry:
            lines.append(hex_lines(bytes.fromhex(entry["hex"]), indent=" " * 14))
        if full and "arch" in entry:
            lines.append(" " * 14 + json.dumps(entry["arch"]))
        if full and "data" in entry:
            lines.append(hex_lines(bytes.fromhex(entry["data"]), indent=" " * 14))
    return "\n".join(lines) + "\n"


def _line(entry: dict[str, Any]) -> str:
    arrow = {"in": "<-", "out": "->"}.get(entry.get("dir", ""), "--")
    start = f"{entry['t']:11.6f} {entry['channel']}{arrow} "
    if entry["kind"] == "note":
        return f"{start}{entry['text']}"
    if entry["kind"] == "bytes":
        shown = entry["hex"][:64] + ("..." if len(entry["hex"]) > 64 else "")
        return f"{start}{entry['size']} bytes: {shown}"
    after = f"  [{entry['latency_us']:.1f} us]" if "latency_us" in entry else ""
    return start + one_line(entry) + after


def main(argv: list[str] | None = None) -> int:
    """Show a transcript: ``python -m harness.tool.transcript [--full] FILE``."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.tool.transcript", description=main.__doc__
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--full", action="store_true", help="all registers and all bytes")
    options = parser.parse_args(argv)
    try:
        sys.stdout.write(render(options.file, full=options.full))
    except OSError as error:
        print(f"{options.file}: {error.strerror}", file=sys.stderr)
        return UsageError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
