# SPDX-License-Identifier: GPL-2.0-or-later
"""Shards: one of several parts of the tests, for whoever distributes them over machines.

The parts depend on the collected tests alone, so machines that collect the same tests need not
speak with each other.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from harness.errors import UsageError

__all__ = ["in_part", "part_of"]


def part_of(text: str) -> tuple[int, int]:
    """The number of a part (from 1 on) and of all parts, from ``2/3``.

    :raises UsageError: it is no such thing.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"{text!r} is no shard", hint="the second of three is 2/3")
    return int(found[1]), int(found[2])


def in_part(tests: Iterable[str], shard: str) -> set[str]:
    """Those of the tests that are in the part. Each is in exactly one.

    Tests of one file take about the same time, and so are dealt out in turn; where a file's
    begin is by its name, so that short files do not all begin with the first part.
    """
    number, count = part_of(shard)
    seen: dict[str, int] = {}
    chosen = set()
    for test in sorted(tests):
        file = test.partition("::")[0]
        place = seen[file] = seen.get(file, zlib.crc32(file.encode())) + 1
        if place % count == number - 1:
            chosen.add(test)
    return chosen
