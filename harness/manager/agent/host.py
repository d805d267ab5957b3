# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests about the host, its processes and its kernel."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from .kernel import KVM_GET_API_VERSION, Request, libc, must

PR_SET_KEEPCAPS = 8


class HostRequests:
    """What this process is, and what it can read of the host."""

    @cached_property
    def kvm(self) -> int:
        """The descriptor of /dev/kvm."""
        return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)

    def op_hello(self, request: Request) -> Request:
        """Tell who we are and what KVM this is."""
        cpuinfo = Path("/proc/cpuinfo").read_text()
        return {
            "pid": os.getpid(),
            "api": must("KVM_GET_API_VERSION", self.kvm, KVM_GET_API_VERSION),
            "vendor": "AMD" if "AuthenticAMD" in cpuinfo else "Intel",
            "release": os.uname().release,
        }

    def op_read_file(self, request: Request) -> str:
        """Read a file of the host as text."""
        return Path(request["path"]).read_text(errors="replace")

    def op_write_file(self, request: Request) -> None:
        """Write text to a file of the host (a module parameter, say)."""
        Path(request["path"]).write_text(request["text"])

    def op_mode(self, request: Request) -> str:
        """Tell a file's permission bits in octal."""
        return f"{Path(request['path']).stat().st_mode & 0o7777:o}"

    def op_list(self, request: Request) -> list[str]:
        """List a directory of the host; a missing one is empty."""
        path = Path(request["path"])
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def op_affinity(self, request: Request) -> None:
        """Bind a thread, of ours or of the kernel, to some processors."""
        os.sched_setaffinity(request["thread"], request["cpus"])

    def op_own_credentials(self, request: Request) -> None:
        """Take credentials that are as they were, but shared with nobody."""
        libc.prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0)  # makes a copy, cap_task_prctl()

    def op_threads(self, request: Request) -> list[str]:
        """Name the processes and kernel threads, or only these, whose name starts so."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:  # it ended while we looked
                continue
            head, _, rest = text.rpartition(") ")  # the name may hold parentheses itself
            name, ended = head.partition("(")[2], rest[0] in "ZX"
            # PF_KTHREAD, include/linux/sched.h; "flags" is the seventh field from here.
            if request.get("kernel") and not int(rest.split()[6]) & 0x20_0000:
                continue
            if name.startswith(request["prefix"]) and not ended:
                found.append(f"{stat.parent.name} {name}")
        return found
