# SPDX-License-Identifier: GPL-2.0-or-later
"""What is still open: commands without their replies, errors that nobody has met."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.abi import Reply
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.tool.inbox import Inbox

__all__ = ["Pending", "Problem"]


@dataclass(eq=False)
class Problem:
    """An error that the reader found, until somebody has met it."""

    error: HarnessError
    reply: Reply | None = None
    met: bool = False

    def meet(self) -> HarnessError:
        """The error, to be raised; it counts as met from now on."""
        self.met = True
        return self.error


class Pending:
    """A command that was sent and may not have been answered yet."""

    def __init__(self, inbox: Inbox, id: int, seq: int, request: bytes) -> None:
        self._inbox = inbox
        self.id = id
        self.seq = seq
        self.request = request
        self.sent_ns = time.monotonic_ns()
        self.result: Reply | Problem | None = None

    @property
    def name(self) -> str:
        """Name of the command, ``id N`` when there is none."""
        command = self._inbox.codec.profile.command_by_id.get(self.id)
        return command.name if command else f"id {self.id}"

    def __str__(self) -> str:
        return f"{self.name} (seq {self.seq})"

    @property
    def done(self) -> bool:
        """Whether the answer came, right or malformed."""
        return self.result is not None

    def reply(self, timeout_s: float = 10) -> Reply:
        """Wait for the answer. May be called again.

        :raises SilenceError: not in time; the answer may still come, and can be waited for again.
        :raises SessionClosed: the socket ended before. :raises MalformedMessage: a wrong answer.
        """
        return self._inbox.wait(self._ready, timeout_s, f"reply to {self}")

    def _ready(self) -> Reply | None:
        if isinstance(self.result, Problem):
            raise self.result.meet()
        return self.result

    def unanswered(self, within_s: float) -> None:
        """Watch for a while that no answer comes. :raises ConformanceError: it came."""
        self._inbox.watch(lambda: f"the reply to {self}" if self.done else None, within_s)
