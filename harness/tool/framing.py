# SPDX-License-Identifier: GPL-2.0-or-later
"""Framing: bytes of a stream into messages, and exact reads with a deadline.

A message is an 8-byte header (id, size, seq; size counts what follows) and its payload.
"""

from __future__ import annotations

import select
import socket
import time

from harness.abi import HEADER, frame
from harness.errors import SessionClosed, SilenceError

__all__ = ["HEADER", "Deframer", "frame", "read_exactly"]


class Deframer:
    """Collects the bytes of a stream and gives out whole messages as (id, seq, payload)."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def incomplete(self) -> bytes:
        """Bytes of a message that has begun and not ended."""
        return self._rest

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The messages that ``data`` completes, in order."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        messages = []
        at, end = 0, len(data)
        while end - at >= HEADER.size:
            id, size, seq = HEADER.unpack_from(data, at)
            after = at + HEADER.size + size
            if after > end:
                break
            messages.append((id, seq, data[at + HEADER.size : after]))
            at = after
        if at < end:
            self._rest = data[at:]
        return messages


def read_exactly(sock: socket.socket, count: int, *, deadline: float, what: str) -> bytes:
    """``count`` bytes from a blocking or non-blocking socket.

    :param deadline: on time.monotonic().
    :param what: what the bytes are, for errors.
    :raises SilenceError: not there in time; :raises SessionClosed: the stream ended before. Both
        say how many bytes came. The bytes read so far are lost.
    """
    data = b""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    while len(data) < count:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise SilenceError(
                f"{what}: {len(data)} of {count} bytes came in time", details=data.hex(" ")
            )
        try:
            chunk = sock.recv(count - len(data), socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        except ConnectionError as error:
            chunk = b""
            reason = f" ({error.strerror})"
        else:
            reason = ""
        if not chunk:
            raise SessionClosed(
                f"{what}: the stream ended after {len(data)} of {count} bytes{reason}",
                details=data.hex(" "),
            )
        data += chunk
    return data
