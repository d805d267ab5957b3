# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire of a session: a reader thread, and sends that never block for ever.

The reader delivers whole messages in order. Whoever sends from another thread waits, up to a
deadline, until the peer took all bytes. The reader itself must not wait (it would stop draining
what the peer sends, and both would wait for each other): what it cannot send at once goes into a
backlog that it sends between reads.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from harness.errors import HarnessError, InfraError, SessionClosed, SilenceError, UsageError
from harness.tool.framing import Deframer

__all__ = ["Wire"]

_CHUNK = 65536
_JOIN_TIMEOUT_S = 10


class Wire:
    """One stream socket, owned from construction to :meth:`close`.

    :param on_message: called in the reader thread with (received_ns, id, seq, payload).
    :param on_end: called once in the reader thread when the stream ended, with the reason and the
        bytes of a message that had begun.
    :param on_send: called with (sent_ns, bytes) in the order of the stream, before the bytes go.
    :param on_problem: called when what the reader thread had to send was not taken in time.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str,
        on_message: Callable[[int, int, int, bytes], None],
        on_end: Callable[[str, bytes], None],
        on_send: Callable[[int, bytes], None],
        on_problem: Callable[[HarnessError], object],
        send_timeout_s: float,
    ) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._on_message = on_message
        self._on_end = on_end
        self._on_send = on_send
        self._on_problem = on_problem
        self._send_timeout_s = send_timeout_s
        self._lock = threading.Lock()
        self._backlog = bytearray()
        self._backlog_since = 0.0
        self._queued = 0  # bytes ever given to send(), and of these, bytes that went out
        self._sent = 0
        self._broken: HarnessError | None = None
        self._closing = False
        self.reader = threading.Thread(target=self._run, name=f"kvmi-reader-{name}", daemon=True)

    def start(self) -> None:
        """Begin to read. Before this, nothing is delivered."""
        self.reader.start()

    @property
    def in_reader(self) -> bool:
        """Whether the caller is the reader thread (which must not wait)."""
        return threading.current_thread() is self.reader

    # -- sending -------------------------------------------------------------------------------

    def send(self, data: bytes, *, timeout_s: float | None = None) -> None:
        """Send all of ``data``; in the reader thread: as much as goes, the rest soon.

        :raises SilenceError: the peer did not take it in time. The stream is broken then, since a
            part may have gone: all later sends raise the same.
        :raises SessionClosed: the peer closed the socket. :raises UsageError: it was closed here.
        """
        with self._lock:
            if self._broken is not None:
                raise self._broken
            if self._closing:
                raise UsageError("the session was closed here, nothing can be sent any more")
            self._on_send(time.monotonic_ns(), data)
            self._queued += len(data)
            if not self._backlog:
                gone = self._send_now(data)
                if gone == len(data):
                    return
                data = data[gone:]
                self._backlog_since = time.monotonic()
            self._backlog += data
            upto = self._queued
        if not self.in_reader:
            self._wait_sent(upto, self._send_timeout_s if timeout_s is None else timeout_s)

    def _send_now(self, data: bytes | bytearray) -> int:
        """How many bytes the socket took without waiting. The lock is held."""
        try:
            gone = self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._broken = SessionClosed(f"cannot send, the socket is closed: {error.strerror}")
            self._backlog.clear()
            raise self._broken from error
        self._sent += gone
        return gone

    def _flush(self) -> None:
        with self._lock:
            if self._backlog and self._broken is None:
                gone = self._send_now(self._backlog)
                if gone:
                    del self._backlog[:gone]
                    self._backlog_since = time.monotonic()

    def _wait_sent(self, upto: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        poller = select.poll()
        try:
            poller.register(self._sock, select.POLLOUT)
        except ValueError:
            raise UsageError("the session was closed here while it was sending") from None
        while self._sent < upto:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._give_up(timeout_s)
            poller.poll(min(left_s, 1.0) * 1000)
            self._flush()
            if self._broken is not None:
                raise self._broken

    def _give_up(self, timeout_s: float) -> None:
        with self._lock:
            if self._broken is None:
                self._broken = SilenceError(
                    f"the peer does not read: {len(self._backlog)} bytes were not taken "
                    f"within {timeout_s:g} s"
                )
                self._backlog.clear()
            raise self._broken

    # -- receiving -----------------------------------------------------------------------------

    def _run(self) -> None:
        deframer = Deframer()
        reason = "end of stream"
        recv, feed, deliver, clock = (
            self._sock.recv,
            deframer.feed,
            self._on_message,
            time.monotonic_ns,
        )
        while True:
            try:
                if self._backlog and not self._send_backlog():
                    continue
                data = recv(_CHUNK)
            except (OSError, ValueError) as error:  # ValueError: closed here, no descriptor left
                reason = getattr(error, "strerror", None) or str(error)
                break
            if not data:
                break
            now_ns = clock()
            for id, seq, payload in feed(data):
                deliver(now_ns, id, seq, payload)
        self._on_end("closed here" if self._closing else reason, deframer.incomplete)

    def _send_backlog(self) -> bool:
        """Send of the backlog what goes; whether there is something to read."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | select.POLLOUT)
        ready = poller.poll(1000)
        try:
            self._flush()
            if self._backlog and time.monotonic() - self._backlog_since > self._send_timeout_s:
                self._give_up(self._send_timeout_s)
        except HarnessError as error:
            self._on_problem(error)
        return any(events & ~select.POLLOUT for _, events in ready)

    # -- the end -------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """Shut down one or both directions (``socket.SHUT_WR``...); the reader goes on."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(how)

    def close(self, *, abort: bool = False) -> None:
        """Close the socket and wait for the reader to end. Idempotent.

        :param abort: TCP: reset the connection instead of ending it in order.
        :raises InfraError: the reader is stuck in one of the callbacks.
        """
        with self._lock:
            self._closing = True
        if abort and self._sock.fileno() >= 0 and self._sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        elif self._sock.fileno() >= 0:
            self.shutdown(socket.SHUT_RDWR)
        if abort:
            # Shutting down first would end the connection in order; only the read side is woken.
            self.shutdown(socket.SHUT_RD)
        if self.reader.ident is None or self.in_reader:
            self._sock.close()
            return
        self.reader.join(_JOIN_TIMEOUT_S)
        if self.reader.is_alive():
            raise InfraError(
                f"the session's reader is stuck in a handler for {_JOIN_TIMEOUT_S} s",
                hint="handlers must not wait",
            )
        self._sock.close()
