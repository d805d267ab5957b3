# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code of a guest for people: disassembled, the instruction at rip marked.

binutils' ``objdump`` reads it; payloads need binutils anyway. Without it the bytes are
shown. Nothing here fails: a listing is made when something else has gone wrong already.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["listing", "place"]

_MACHINES = {2: "i8086", 4: "i386", 8: "i386:x86-64"}
_LINE = re.compile(r"^\s*([0-9a-f]+):\t(.*)$")
_TIMEOUT_S = 10.0

# Bytes before rip that make some instructions.
_ENOUGH = 24


def listing(
    code: bytes,
    base: int,
    rip: int,
    *,
    bytes_mode: int = 8,
    labels: Mapping[str, int] | None = None,
) -> str:
    """Some instructions before rip and some after it, one a line.

    :param code: memory from ``base`` on, rip within it. :param bytes_mode: 2, 4 or 8, the
        size of code as the interface counts it. :param labels: addresses with a name; at
        which an instruction surely begins.
    """
    known = {address: name for name, address in (labels or {}).items()}
    sure = [address for address in known if base <= address <= rip] or [rip]
    start = max([address for address in sure if address <= rip - _ENOUGH] or [min(sure)])
    lines = _disassemble(code[start - base :], start, bytes_mode)
    if not any(address == rip for address, _ in lines):
        lines = _disassemble(code[rip - base :], rip, bytes_mode)
    at = next((number for number, (address, _) in enumerate(lines) if address == rip), None)
    if at is None:
        return _bytes(code, base, rip)
    text = []
    if at == 0 and rip > base:  # where the instructions before it begin, nobody knows
        row = code[max(0, rip - base - 16) : rip - base]
        text.append(f"  {rip - len(row):#010x}  {row.hex(' ')}")
    for address, instruction in lines[max(0, at - 6) : at + 8]:
        if address in known:
            text.append(f"  {known[address]}:")
        text.append(f"{'>' if address == rip else ' '} {address:#010x}  {instruction}")
    return "\n".join(text)


def place(rip: int, labels: Mapping[str, int]) -> str:
    """Where rip is by name, such as ``slide+0x2``; empty if no label is near."""
    before = [(address, name) for name, address in labels.items() if address <= rip]
    address, name = max(before, default=(0, ""))
    if not before or rip - address >= 4096:
        return ""
    return f"{name}+{rip - address:#x}" if rip > address else name


def _disassemble(code: bytes, base: int, bytes_mode: int) -> list[tuple[int, str]]:
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        Path(file.name).write_bytes(code)
        argv = ["objdump", "-D", "-b", "binary", "-m", _MACHINES.get(bytes_mode, "i386:x86-64"),
                "--insn-width=15", f"--adjust-vma={base:#x}", file.name]  # fmt: skip
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return []
    found: list[tuple[int, str]] = []
    for line in done.stdout.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        columns = match[2].split("\t")
        if len(columns) > 1:
            hexadecimal = columns[0].strip().replace(" ", "")
            found.append((int(match[1], 16), f"{hexadecimal:<20}  {columns[1].strip()}"))
    return found


def _bytes(code: bytes, base: int, rip: int) -> str:
    """Rows of 16 bytes, a mark at the one that rip points to."""
    rows = []
    first = max(base, (rip & -16) - 16)
    for address in range(first, min(base + len(code), (rip & -16) + 48), 16):
        row = code[address - base : address - base + 16]
        cells = [f"{'>' if address + n == rip else ' '}{byte:02x}" for n, byte in enumerate(row)]
        rows.append(f"  {address:#010x} {''.join(cells)}")
    return "\n".join(rows)
