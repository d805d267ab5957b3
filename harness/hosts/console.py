# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's console: all its kernel ever said, and what of it is a complaint.

The emulator writes the console into a file of the evidence; this module only reads it.
A *complaint* is a report by which a kernel says that something is wrong in itself;
a *crash* is one after which it does not go on. Lines that mean neither never count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import DeadlineError

__all__ = ["Complaint", "Console", "complaints_in", "crash_in"]

# A kernel line on the console: `[   12.345678] text`, with CONFIG_PRINTK_CALLER also
# `[   12.345678][  T123] text`. What programs of the host write has no such stamp.
_STAMP = re.compile(r"^\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? ?")


# More than any line of a kernel's console.
_LONGEST_LINE = 8192


@dataclass(frozen=True)
class _Sign:
    """What a report's first line looks like, and what to call it."""

    title: str
    pattern: re.Pattern[str]
    fatal: bool = False


def _sign(title: str, pattern: str, *, fatal: bool = False) -> _Sign:
    return _Sign(title, re.compile(pattern), fatal)


# The order matters: the first that matches names the line.
_SIGNS = (
    # kernel/panic.c; with panic=-1 and oops=panic the machine restarts after it.
    _sign("panic", r"^Kernel panic - not syncing", fatal=True),
    # arch/x86/mm/fault.c, arch/x86/kernel/dumpstack.c and traps.c
    _sign("page fault in the kernel", r"^BUG: (unable to handle|kernel NULL pointer)", fatal=True),
    _sign("oops", r"^(Oops: |Oops\b|invalid opcode: 0000|stack segment: 0000)", fatal=True),
    _sign("general protection fault", r"^general protection fault\b", fatal=True),
    _sign("double fault", r"^(traps: )?PANIC: double fault|^double fault: ", fatal=True),
    _sign("kernel BUG", r"^kernel BUG at ", fatal=True),
    # mm/kasan, mm/kfence, lib/ubsan.c, kernel/kcsan
    _sign("KASAN", r"^BUG: KASAN: "),
    _sign("KFENCE", r"^BUG: KFENCE: "),
    _sign("KCSAN", r"^BUG: KCSAN: "),
    _sign("UBSAN", r"^UBSAN: "),
    _sign("memory leak", r"^kmemleak: \d+ new suspected memory leaks"),
    # kernel/locking/lockdep.c
    _sign(
        "lock order",
        r"^WARNING: (possible (circular|recursive|irq lock inversion|deadlock)|inconsistent lock"
        r"|bad unlock balance|lock held when returning|suspicious RCU usage"
        r"|[A-Z-]+-safe -> )",
    ),
    _sign("lock order", r"^INFO: possible (circular|recursive) locking"),
    _sign("locks held at exit", r"^BUG: .* still has locks held"),
    # kernel/sched/core.c
    _sign("sleep in atomic context", r"^BUG: (sleeping function called|scheduling while atomic)"),
    # lib/refcount.c; the WARNING that comes with it stands in the next line.
    _sign("reference count", r"^refcount_t: "),
    # lib/list_debug.c
    _sign("list corruption", r"^list_(add|del) corruption"),
    # mm/slub.c, mm/page_alloc.c
    _sign("slab corruption", r"^BUG [\w-]+( \(.*\))?: |^Slab .* Objects remaining"),
    _sign("bad page", r"^BUG: Bad (page|rss-counter|page state)"),
    _sign("out of memory", r"^Out of memory: |invoked oom-killer:"),
    _sign("allocation failure", r"page allocation failure: order:"),
    # kernel/hung_task.c, kernel/watchdog.c, kernel/rcu/tree_stall.h, kernel/workqueue.c
    _sign("hung task", r"^INFO: task .* blocked for more than \d+ seconds"),
    _sign("lockup", r"^watchdog: (BUG: soft|.*hard LOCKUP)|^BUG: workqueue lockup"),
    _sign(
        "RCU stall",
        r"^rcu: INFO: rcu_\w+ (self-)?detected|^rcu: .*kthread (starved|timer wakeup didn't)"
        r"|^rcu: INFO: .*detected (expedited )?stalls",
    ),
    # kernel/panic.c __warn(); the words after WARNING: vary between versions.
    _sign("warning", r"^WARNING: "),
    _sign("BUG", r"^BUG: "),
)


@dataclass(frozen=True)
class Complaint:
    """One report of the kernel's."""

    title: str
    """What kind it is, such as ``warning`` or ``RCU stall``."""
    line: str
    """Its first line as it stands on the console."""
    fatal: bool
    """Whether the kernel does not go on after it."""


def complaints_in(text: str) -> list[Complaint]:
    """The complaints in a piece of console, in order.

    Only lines with the kernel's time stamp count. A report's own further lines (the stack,
    the registers) are part of it and no complaints of their own.
    """
    return list(_complaints(text))


def _complaints(text: str) -> Iterator[Complaint]:
    for line in text.splitlines():
        stamp = _STAMP.match(line)
        if stamp is None:
            continue
        said = line[stamp.end() :].strip()
        for sign in _SIGNS:
            if sign.pattern.search(said):
                yield Complaint(sign.title, line.strip(), sign.fatal)
                break


def crash_in(text: str) -> Complaint | None:
    """The first complaint after which the kernel did not go on, if there is one."""
    return next((one for one in _complaints(text) if one.fatal), None)


class Console:
    """A console that is being written to a file by somebody else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self) -> int:
        """Where the last whole line ends now; for :meth:`since` and :meth:`complaints`.

        A line that is just being written counts as said after the mark, so that between
        two marks no line is lost, cut or counted twice.
        """
        try:
            with self.path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                start = max(0, end - _LONGEST_LINE)
                file.seek(start)
                return start + file.read(end - start).rfind(b"\n") + 1
        except FileNotFoundError:
            return 0

    def since(self, mark: int = 0) -> str:
        """What was said since ``mark``."""
        try:
            with self.path.open("rb") as file:
                file.seek(mark)
                data = file.read()
        except FileNotFoundError:
            return ""
        # A serial console ends its lines with CR LF.
        return data.decode(errors="replace").replace("\r", "")

    def tail(self, lines: int = 40) -> str:
        """The last ``lines`` lines, for messages."""
        return "\n".join(self.since().splitlines()[-lines:])

    def explain(self, error: DeadlineError, name: str) -> None:
        """Let an error for a host that did not come up say how far it came."""
        lines = self.tail().strip().splitlines()
        error.message = f"host {name} did not come up: {error.message}; its console " + (
            f"ends with: {lines[-1]}" if lines else "is empty"
        )
        error.details = "\n".join(lines)

    def complaints(self, mark: int = 0) -> list[str]:
        """First lines of all complaints since ``mark``."""
        return [one.line for one in complaints_in(self.since(mark))]

    def crash(self) -> Complaint | None:
        """The report of this kernel's death, if it is dead."""
        return crash_in(self.since())
