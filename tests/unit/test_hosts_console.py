# SPDX-License-Identifier: GPL-2.0-or-later
"""What counts as a complaint on a host's console.

The logs under ``console`` are what a 6.12 kernel said in a host when it was made to, by
lkdtm (drivers/misc/lkdtm) or by a program; nothing in them is written by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import DeadlineError
from harness.hosts.console import Console, complaints_in, crash_in

LOGS = Path(__file__).with_name("console")


def _titles(log: str) -> list[str]:
    return [one.title for one in complaints_in((LOGS / f"{log}.log").read_text())]


@pytest.mark.parametrize(
    ("log", "titles"),
    [
        ("warning_message", ["warning"]),
        ("corrupt_list_add", ["list corruption", "warning"]),
        ("refcount_dec_zero", ["reference count", "warning"]),
        ("hung_task", ["hung task"] * 4),
        ("softlockup", ["RCU stall", "lockup", "RCU stall"]),
        ("oom", ["out of memory", "out of memory", "allocation failure"]),
    ],
)
def test_complaints_of_a_kernel_that_goes_on(log: str, titles: list[str]) -> None:
    """Each report counts by its first lines, not by its stack, and kills nobody."""
    assert _titles(log) == titles
    assert crash_in((LOGS / f"{log}.log").read_text()) is None


@pytest.mark.parametrize(
    ("log", "titles", "last_words"),
    [
        ("bug", ["kernel BUG", "oops", "panic"], "kernel BUG at drivers/misc/lkdtm/bugs.c:105!"),
        (
            "exception",
            ["page fault in the kernel", "oops", "panic"],
            "BUG: kernel NULL pointer dereference, address: 0000000000000000",
        ),
        ("exhaust_stack", ["BUG", "oops", "panic"], "Oops: stack guard page: 0000 [#1] SMP"),
        ("panic", ["panic"], "Kernel panic - not syncing: dumptest"),
    ],
)
def test_death_of_a_kernel(log: str, titles: list[str], last_words: str) -> None:
    """The crash is named by the report that began it, not by the panic that ends it."""
    assert _titles(log) == titles
    crash = crash_in((LOGS / f"{log}.log").read_text())
    assert crash is not None
    assert crash.fatal
    assert crash.line.endswith(last_words)


@pytest.mark.parametrize("log", ["clean", "segfault"])
def test_what_is_no_complaint(log: str) -> None:
    """A boot, guests, programs that crash, and programs that only say BUG on the console."""
    assert _titles(log) == []


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("BUG: KASAN: slab-use-after-free in kvmi_release+0x12/0x40", "KASAN"),
        ("BUG: sleeping function called from invalid context at mm/slab.c:1", "sleep in atomic"),
        ("BUG: scheduling while atomic: kvmi-recv/77/0x00000002", "sleep in atomic"),
        ("WARNING: possible circular locking dependency detected", "lock order"),
        ("WARNING: suspicious RCU usage", "lock order"),
        ("WARNING: inconsistent lock state", "lock order"),
        ("BUG kmalloc-64 (Not tainted): Poison overwritten", "slab corruption"),
        ("watchdog: CPU0: Watchdog detected hard LOCKUP on cpu 0", "lockup"),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "RCU stall"),
        ("general protection fault, probably for non-canonical address 0xdead", "general prot"),
        ("UBSAN: array-index-out-of-bounds in virt/kvm/kvm_main.c:1:2", "UBSAN"),
        ("kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)", "memory leak"),
    ],
)
def test_reports_of_other_configurations(line: str, title: str) -> None:
    """Kernels with more checks say more; the stamp may name the task."""
    for stamp in ("[   12.345678] ", "[    1.000001][   T77] ", "[12345.000001] "):
        (complaint,) = complaints_in(f"{stamp}{line}\r\n")
        assert complaint.title.startswith(title)
    assert complaints_in(line) == []


def test_marks_divide_the_console_into_whole_lines(tmp_path: Path) -> None:
    """A line that is being written belongs to what comes next; nothing is lost or doubled."""
    console = Console(tmp_path / "console.log")
    assert console.mark() == 0
    assert console.since(0) == ""
    with console.path.open("ab", buffering=0) as file:
        file.write(b"[    1.000000] one\r\n[    2.000000] WARN")
        mark = console.mark()
        assert console.complaints(0) == []
        file.write(b"ING: CPU: 0 PID: 1 at fs/x.c:1 f+0x1/0x2\r\n")
        assert console.since(mark).startswith("[    2.000000] WARNING")
        assert len(console.complaints(mark)) == 1
        later = console.mark()
        assert console.since(later) == ""
        file.write(b"[    3.000000] three\r\n")
        assert console.since(later) == "[    3.000000] three\n"
    assert console.tail(1) == "[    3.000000] three"
    assert console.crash() is None


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ("", "is empty"),
        ("[    1.250000] kvm: starts\r\n\r\n", "ends with: [    1.250000] kvm: starts"),
    ],
)
def test_a_host_that_does_not_come_up_says_how_far_it_came(
    tmp_path: Path, said: str, ends: str
) -> None:
    """The last line of its console is in the message, where a table of patches shows it."""
    console = Console(tmp_path / "console.log")
    (tmp_path / "console.log").write_text(said)
    error = DeadlineError("no SSH login within 120 s")
    console.explain(error, "h")
    assert error.message == f"host h did not come up: no SSH login within 120 s; its console {ends}"
    assert error.details == said.strip()
