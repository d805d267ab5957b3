# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP of one QEMU, for code that is not asynchronous.

``qemu.qmp`` is QEMU's own client, and it is asyncio code. :class:`QmpLink` is the
synchronous face of one connection; its event loop runs in a thread that ends with it.
Every message of both directions is kept in a file of JSON lines, one object each:
``time_s`` (monotonic), ``direction`` (``>`` to QEMU, ``<`` from QEMU), ``message``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError

from harness.errors import ConformanceError, InfraError, SilenceError

__all__ = ["PendingAnswer", "QmpLink"]

T = TypeVar("T")

#: How long QEMU may take for a command that does its work at once. Generous: two
#: levels of emulation lie below, and a host may be busy with a second guest.
COMMAND_TIMEOUT_S = 20.0


class _LoopThread:
    """An event loop in a thread of its own, for as long as one link lives."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start ``work`` in the loop, from any other thread.

        :raises InfraError: the loop is closed.
        """
        if self._loop.is_closed():
            work.close()
            raise InfraError("the QMP link is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the thread; what still runs in the loop is cancelled. Idempotent."""
        if self._loop.is_closed():
            return
        leaving = self.submit(_cancel_all())
        with contextlib.suppress(Exception):
            leaving.result(2.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _RecordingClient(QMPClient):
    """A client that shows each message of both directions to ``observe``."""

    def __init__(self, name: str, observe: Callable[[str, Message], None]) -> None:
        super().__init__(name)
        self._observe = observe

    def _cb_outbound(self, msg: Message) -> Message:
        self._observe(">", msg)
        return super()._cb_outbound(msg)

    def _cb_inbound(self, msg: Message) -> Message:
        self._observe("<", msg)
        return super()._cb_inbound(msg)


class PendingAnswer:
    """The answer to a command that was sent; QEMU may be holding it back."""

    def __init__(
        self, command: str, future: concurrent.futures.Future[object], lost: Callable[[], None]
    ) -> None:
        self.command = command
        self._future = future
        self._lost = lost

    @property
    def arrived(self) -> bool:
        """True once QEMU has answered, well or badly, or the link has ended."""
        return self._future.done()

    def value(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """Wait for the answer and return its ``return`` member.

        :raises ConformanceError: QEMU answered with an error.
        :raises SilenceError: no answer in ``timeout_s``; it may still come later.
        :raises InfraError: the link ended before the answer came; or what the link was told
            to raise in that case.
        """
        try:
            return self._future.result(timeout_s)
        except (TimeoutError, concurrent.futures.TimeoutError):
            raise SilenceError(
                f"QEMU did not answer QMP '{self.command}' within {timeout_s:g} s"
            ) from None
        except ExecuteError as error:
            raise ConformanceError(
                f"QEMU refused QMP '{self.command}': {error.error_class}: {error}"
            ) from error
        except (concurrent.futures.CancelledError, EOFError, OSError, QMPError) as error:
            self._lost()
            raise InfraError(
                f"the QMP link ended while '{self.command}' waited for its answer",
                details=str(error),
            ) from error

    def refusal(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Wait for the answer, which has to be an error; return its description.

        :raises ConformanceError: QEMU did what was asked.
        :raises SilenceError: no answer in ``timeout_s``.
        """
        try:
            value = self._future.result(timeout_s)
        except ExecuteError as error:
            return str(error)
        except Exception:
            self.value(timeout_s=0)
            raise
        raise ConformanceError(
            f"QEMU accepted QMP '{self.command}' (answer: {value!r}) where an error was due"
        )


class QmpLink:
    """One QMP connection, negotiated and ready for commands.

    Thread-safe. After :meth:`close`, or after QEMU has gone, every call raises
    InfraError; events that arrived before stay readable.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name: str,
        transcript: Path,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over ``sock`` and negotiate.

        :param name: the guest's name, for messages.
        :param lost: called when a command meets the end of the link; may raise what is
            known about it, such as that QEMU crashed.
        :param transcript: file that gets the messages; appended to.
        :raises InfraError: no QMP greeting came from the other side.
        """
        self.name = name
        self._lost = lost
        self._file: IO[str] | None = transcript.open("a", encoding="utf-8", buffering=1)
        self._news = threading.Condition()
        self._events: list[dict[str, Any]] = []
        self._client = _RecordingClient(name, self._observe)
        self._loop = _LoopThread(f"qmp-{name}")
        connecting = self._loop.submit(self._client.connect(sock))
        try:
            connecting.result(COMMAND_TIMEOUT_S)
        except Exception as error:
            connecting.cancel()
            self._loop.close()
            sock.close()
            self._close_file()
            raise InfraError(f"no QMP greeting from {name}: {error}") from error

    def _observe(self, direction: str, message: Message) -> None:
        content = dict(message)
        with self._news:
            if self._file is not None:
                record = {
                    "time_s": round(time.monotonic(), 6),
                    "direction": direction,
                    "message": content,
                }
                self._file.write(json.dumps(record) + "\n")
            if direction == "<" and "event" in content:
                self._events.append(content)
                self._news.notify_all()

    # -- commands ------------------------------------------------------------------

    def send(
        self, command: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False
    ) -> PendingAnswer:
        """Send a command and return at once; its answer is waited for elsewhere."""

        async def work() -> object:
            # Called in here because the client's own check of its state may raise
            # before there is anything to await.
            return await self._client.execute(command, arguments or {}, oob=oob)

        return PendingAnswer(command, self._loop.submit(work()), self._lost)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Any:
        """Send a command and wait for its answer; errors as :meth:`PendingAnswer.value`."""
        return self.send(command, arguments).value(timeout_s=timeout_s)

    def refusal(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> str:
        """Send a command that QEMU has to refuse; return the error's description."""
        return self.send(command, arguments).refusal(timeout_s=timeout_s)

    # -- events --------------------------------------------------------------------

    def mark(self) -> int:
        """The number of events so far: pass it to :meth:`event` to skip them."""
        with self._news:
            return len(self._events)

    def events(self, *, since: int = 0) -> list[dict[str, Any]]:
        """The events from number ``since`` on, oldest first."""
        with self._news:
            return self._events[since:]

    def event(
        self,
        name: str,
        *,
        since: int = 0,
        timeout_s: float = COMMAND_TIMEOUT_S,
        where: Callable[[Mapping[str, Any]], bool] = lambda data: True,
    ) -> dict[str, Any]:
        """The first event of that name whose data satisfies ``where``; waits for it.

        :param since: what :meth:`mark` returned; older events do not count.
        :raises SilenceError: there is none within ``timeout_s``.
        """

        def found() -> dict[str, Any] | None:
            for event in self._events[since:]:
                if event["event"] == name and where(event.get("data", {})):
                    return event
            return None

        with self._news:
            event = self._news.wait_for(found, timeout_s)
        if event is None:
            raise SilenceError(f"no QMP event {name} from {self.name} within {timeout_s:g} s")
        return event

    # -- end -----------------------------------------------------------------------

    def close(self) -> None:
        """End the link. Never raises; calling it again does nothing."""
        # A loop that is closed means that this was called before. The peer may be gone
        # already, which disconnect() reports as an error.
        with contextlib.suppress(Exception):
            self._loop.submit(self._client.disconnect()).result(5.0)
        self._loop.close()
        self._close_file()

    def _close_file(self) -> None:
        with self._news:
            if self._file is not None:
                self._file.close()
                self._file = None
