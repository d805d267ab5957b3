# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts and guests that stay."""

from __future__ import annotations

import subprocess
import sys

from invoke.context import Context

from harness.errors import UsageError
from harness.settings import load_settings
from tasks.common import harness_task, ready

__all__ = ["guest_ssh", "guest_up", "host_down", "host_ssh", "host_up", "watch"]


@harness_task("up")
def host_up(
    _context: Context,
    kernel_series: str | None = None,
    qemu_series: str | None = None,
    flavour: str | None = None,
) -> None:
    """Start a host and keep it until host.down."""
    from harness.keep import up

    up(ready(kernel_series=kernel_series, qemu_series=qemu_series, flavour=flavour))
    print("the host is up: inv host.ssh logs in, inv host.down ends it")


@harness_task("down")
def host_down(_context: Context) -> None:
    """End the kept host."""
    from harness.keep import down

    print("ended" if down(load_settings()) else "there was none")


def _log_in(which: str, command: str | None) -> int:
    from harness.keep import kept

    record = kept(load_settings())
    login = getattr(record, which) if record else []
    if not login:
        raise UsageError(f"no {which} is kept", hint=f"start one: inv {which}.up")
    terminal = ["-t"] if sys.stdin.isatty() and not command else []
    argv = [*login[:-1], *terminal, login[-1], *([command] if command else [])]
    try:
        return subprocess.run(argv, check=False).returncode
    except FileNotFoundError:
        raise UsageError(f"{login[0]} is missing", hint="apt-get install openssh-client") from None


@harness_task("ssh")
def host_ssh(_context: Context, command: str | None = None) -> int:
    """Log in to the kept host."""
    return _log_in("host", command)


@harness_task("up")
def guest_up(_context: Context, introspect: bool = False) -> None:
    """Start a guest on the kept host (and the host, if none is kept); be its tool."""
    from harness.keep import guest_up as up
    from harness.prompt import introspect as be_tool

    if introspect:
        be_tool(ready())
        return
    up(ready())
    print("the guest is up: inv guest.ssh logs in; it ends with the host")


@harness_task("ssh")
def guest_ssh(_context: Context, command: str | None = None) -> int:
    """Log in to the guest on the kept host."""
    return _log_in("guest", command)


@harness_task()
def watch(_context: Context, seconds: int = 0) -> None:
    """Show the events of the kept guest as they come, with rates; Ctrl-C ends it."""
    from harness.prompt import watch as run

    run(load_settings(), seconds=seconds or None)
