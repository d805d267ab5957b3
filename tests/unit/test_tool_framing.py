# SPDX-License-Identifier: GPL-2.0-or-later
"""Framing: any cut of a stream gives the same messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from harness.tool.framing import Deframer, frame

MESSAGES = st.lists(
    st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=40), st.integers(0, 0xFFFFFFFF)),
    max_size=6,
)


@given(messages=MESSAGES, cuts=st.lists(st.integers(1, 50), max_size=40))
def test_any_cut(messages: list[tuple[int, bytes, int]], cuts: list[int]) -> None:
    """Bytes may come in any pieces."""
    stream = b"".join(frame(id, payload, seq) for id, payload, seq in messages)
    deframer = Deframer()
    got = []
    for cut in [*cuts, len(stream)]:
        got += deframer.feed(stream[:cut])
        stream = stream[cut:]
    assert got == [(id, seq, payload) for id, payload, seq in messages]
    assert deframer.incomplete == b""


def test_incomplete() -> None:
    """What has begun is known."""
    deframer = Deframer()
    assert deframer.feed(frame(1, b"abc", 2) + b"\1\0\3") == [(1, 2, b"abc")]
    assert deframer.incomplete == b"\1\0\3"


def test_headers_that_lie() -> None:
    """The size field is overridden on request, and only there."""
    assert frame(1, b"abc", 2, size=9) == bytes.fromhex("0100 0900 02000000") + b"abc"
