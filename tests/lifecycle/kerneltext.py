# SPDX-License-Identifier: GPL-2.0-or-later
"""A breakpoint that a tool puts into the text of a guest's kernel, as tools do."""

from __future__ import annotations

from harness.hosts.ssh import GuestShell
from harness.tool import Session

__all__ = ["TRIGGER", "KernelBreakpoint"]

#: A function that nothing but the command behind it calls in a guest of ours.
_FUNCTION = "__x64_sys_sethostname"
TRIGGER = "hostname {name}"

INT3 = b"\xcc"


class KernelBreakpoint:
    """An INT3 at the first instruction of a system call of the guest's kernel."""

    def __init__(self, session: Session, shell: GuestShell) -> None:
        """Find the place and what stands there; nothing is changed yet."""
        symbols = shell.run(f"grep ' {_FUNCTION}$' /proc/kallsyms").stdout.split()
        self.address = int(symbols[0], 16)
        self.gpa = session.command("VCPU_TRANSLATE_GVA", vcpu=0, gva=self.address).ok().fields.gpa
        self.original = self.read(session)

    def read(self, session: Session) -> bytes:
        """The byte that stands there now."""
        return session.command("VM_READ_PHYSICAL", gpa=self.gpa, size=1).ok().data

    def put(self, session: Session) -> None:
        """Put the breakpoint there."""
        session.command("VM_WRITE_PHYSICAL", gpa=self.gpa, data=INT3).ok()

    def take_out(self, session: Session) -> None:
        """Put back what stood there."""
        session.command("VM_WRITE_PHYSICAL", gpa=self.gpa, data=self.original).ok()
