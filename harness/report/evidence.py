# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces of evidence, read for showing: messages, texts, timelines. Never fails on bad files.

Whatever a killed worker left half-written is shown as far as it goes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Excerpt", "Message", "evidence_files", "kind_of", "messages_of", "text_of"]

MESSAGES_SHOWN = 300
TEXT_LINES_SHOWN = 200
TEXT_BYTES_READ = 200_000


@dataclass(frozen=True)
class Message:
    """One line of a transcript. ``direction``: in, out, or empty for a remark."""

    at_s: float
    channel: int
    direction: str
    kind: str
    text: str
    error: bool = False
    more: str = ""


@dataclass(frozen=True)
class Excerpt:
    """Some of a longer text; ``left_out`` lines came before it."""

    text: str
    left_out: int = 0


def kind_of(path: Path) -> str:
    """How a file of evidence is shown: messages, timeline, text, or file (a link only)."""
    if path.name.startswith("timeline") and path.suffix == ".jsonl":
        return "timeline"
    if path.name.startswith("transcript") and path.suffix in (".jsonl", ".raw"):
        return "messages"
    if path.suffix in (".txt", ".log") or path.name.startswith("qmp"):
        return "text"
    return "file"


def text_of(path: Path, *, lines: int = TEXT_LINES_SHOWN) -> Excerpt:
    """The end of a text file; empty when it cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - TEXT_BYTES_READ))
            found = file.read().decode(errors="replace").splitlines()
    except OSError:
        return Excerpt("")
    left_out = max(0, len(found) - lines)
    return Excerpt("\n".join(found[left_out:]), left_out)


def messages_of(path: Path, *, limit: int = MESSAGES_SHOWN) -> tuple[list[Message], int]:
    """The last messages of a transcript, and how many came before them."""
    found: list[Message] = []
    with contextlib.suppress(Exception):
        found.extend(_message(entry) for entry in _entries(path) if entry.get("kind") in _KINDS)
    left_out = max(0, len(found) - limit)
    return found[left_out:], left_out


_KINDS = ("command", "reply", "event", "event-reply", "bytes", "note")


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a transcript in either form, as far as they can be read."""
    if path.suffix == ".raw":
        from harness.tool.transcript import read_raw

        yield from read_raw(path)
        return
    with path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _message(entry: dict[str, Any]) -> Message:
    kind = entry["kind"]
    more = ""
    if kind == "note":
        text = entry.get("text", "")
    elif kind == "bytes":
        shown = entry.get("hex", "")
        text = f"{entry.get('size', len(shown) // 2)} bytes"
        more = _hex(shown)
    else:
        from harness.tool.explain import one_line

        text = one_line(entry)
        more = _more(entry)
        if "latency_us" in entry:
            text += f"  [{entry['latency_us']:.0f} µs]"
    return Message(
        at_s=float(entry.get("t", 0.0)),
        channel=int(entry.get("channel", 0)),
        direction=entry.get("dir", ""),
        kind=kind,
        text=text,
        error=bool(entry.get("error")) or "malformed" in entry,
        more=more,
    )


def _more(entry: dict[str, Any]) -> str:
    """What the one line leaves out: registers, and bytes."""
    parts: list[str] = []
    arch = entry.get("arch")
    if isinstance(arch, dict):
        parts += _flat("", arch)
    parts += [_hex(entry[name]) for name in ("data", "hex") if entry.get(name)]
    return "\n".join(parts)


def _flat(prefix: str, value: dict[str, Any]) -> list[str]:
    lines = []
    short = {name: item for name, item in value.items() if not isinstance(item, dict)}
    if short:
        words = " ".join(f"{name}={item}" for name, item in short.items())
        lines.append(f"{prefix}{words}")
    for name, item in value.items():
        if isinstance(item, dict):
            lines += _flat(f"{prefix}{name}: ", item)
    return lines


def _hex(text: str) -> str:
    from harness.tool.explain import hex_lines

    with contextlib.suppress(ValueError):
        return hex_lines(bytes.fromhex(text), limit=512)
    return text


def evidence_files(evidence: dict[str, str], *, first: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Names and paths of a verdict's evidence, those named in ``first`` before the others."""
    rank = {name: number for number, name in enumerate(first)}
    return sorted(evidence.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))
