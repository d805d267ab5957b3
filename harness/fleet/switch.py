# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine gets the kernel under test, and is held to it.

That it is another run of a kernel shows in the boot id, that it is the kernel in its release,
and that it is the one which we started in a word on its command line.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko

from harness.errors import DeadlineError, HarnessError, InfraError
from harness.fleet import kexec
from harness.hosts.remote import Control
from harness.hosts.ssh import NotYet, login_until

if TYPE_CHECKING:
    from harness.build.kernel import KernelBuild
    from harness.fleet.inventory import Machine

__all__ = ["PLACE", "still_there", "switch", "wait_for_other_boot"]

PLACE = "/var/tmp/kvmi-harness-fleet"
"""Where all lies on a machine that the fleet brought there; swept when the next run begins."""

_WORD = "kvmi_harness.boot"
# A kernel that panics on a machine that nobody looks at has to come back by itself.
_PANIC = "panic=30"
_COPY_TIMEOUT_S = 600.0
_LOAD_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0
_STEP_S = 15.0


def switch(machine: Machine, kernel: KernelBuild) -> None:
    """Have the machine run the kernel.

    :raises UsageError: it does not let us in.
    :raises DeadlineError: it does not answer, or did not come back in time.
    :raises InfraError: it cannot start the kernel, or came back with another.
    """
    word = ""
    with contextlib.closing(Control(machine.where(), timeout_s=_ANSWER_TIMEOUT_S)) as control:
        before = control.boot_id()
        if machine.switch == "kexec":
            word = f"{_WORD}={secrets.token_hex(8)}"
            _kexec(control, machine, kernel, word)
        elif machine.command:
            _order(machine, kernel)
        else:
            _require(control, machine, kernel)
            return
    wait_for_other_boot(machine, before)
    with contextlib.closing(Control(machine.where(), timeout_s=_ANSWER_TIMEOUT_S)) as control:
        _require(control, machine, kernel, word=word)


def _kexec(control: Control, machine: Machine, kernel: KernelBuild, word: str) -> None:
    control.run(f"mkdir -p {PLACE}")
    image, initrd = f"{PLACE}/bzImage", ""
    control.put(image, kernel.bzimage.read_bytes(), timeout_s=_COPY_TIMEOUT_S)
    if machine.initrd:
        initrd = f"{PLACE}/initrd"
        control.put(initrd, Path(machine.initrd).read_bytes(), timeout_s=_COPY_TIMEOUT_S)
    cmdline = machine.cmdline
    if cmdline is None:
        running = control.run("cat /proc/cmdline").text.split()
        cmdline = " ".join(one for one in running if not one.startswith(f"{_WORD}="))
    if "panic=" not in cmdline:
        cmdline += f" {_PANIC}"
    program = Path(kexec.__file__).read_text(encoding="utf-8")
    arguments = shlex.join(["-c", program, image, initrd, f"{cmdline} {word}"])
    try:
        control.run(f"{shlex.quote(machine.python)} {arguments}", timeout_s=_LOAD_TIMEOUT_S)
    except InfraError as error:
        raise InfraError(
            f"machine {machine.name} does not start another kernel",
            hint="the reason is what its kernel answered",
            details=error.details or error.message,
        ) from error


def _order(machine: Machine, kernel: KernelBuild) -> None:
    """Run the user's own command, which makes the machine boot the kernel."""
    environment = os.environ | {
        "KVMI_MACHINE": machine.name,
        "KVMI_KERNEL": str(kernel.bzimage),
        "KVMI_RELEASE": kernel.release,
    }
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", machine.command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=machine.return_s,
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(
            f"machine {machine.name}: its command did not end within {machine.return_s:g} s"
        ) from error
    if done.returncode:
        raise InfraError(
            f"machine {machine.name}: its command ended with status {done.returncode}",
            details=done.stdout + done.stderr,
        )


def wait_for_other_boot(machine: Machine, before: str, *, within_s: float | None = None) -> str:
    """Wait until the machine answers with another boot id than ``before``, which is given.

    :param within_s: how long; what the inventory says if None.
    :raises DeadlineError: it did not come back in time.
    :raises UsageError: it came back as one that we do not know, or that does not let us in.
    """
    within_s = machine.return_s if within_s is None else within_s
    address = machine.where()
    found = ""
    started = time.monotonic()

    def attempt(step_s: float) -> paramiko.Transport:
        nonlocal found
        connection = address.connect(timeout_s=max(step_s, _STEP_S))
        try:
            channel = connection.open_session(timeout=_STEP_S)
            channel.settimeout(_STEP_S)
            channel.exec_command("cat /proc/sys/kernel/random/boot_id")
            found = channel.makefile().read().decode().strip()
        except (paramiko.SSHException, OSError, EOFError) as error:
            connection.close()
            raise NotYet(str(error) or type(error).__name__) from error
        if not found or found == before:
            connection.close()
            raise NotYet("it has not restarted yet")
        return connection

    try:
        login_until(attempt, timeout_s=within_s, check=lambda: None).close()
    except DeadlineError as error:
        waited = time.monotonic() - started
        raise DeadlineError(
            f"machine {machine.name} did not come back within {waited:.0f} s: {error.__cause__}",
            hint="look at its console; return_s in the inventory is how long it may take",
        ) from error
    return found


def _require(control: Control, machine: Machine, kernel: KernelBuild, *, word: str = "") -> None:
    """Hold the machine to the kernel.

    :raises InfraError: it runs another one, or the right one not by our doing.
    """
    release = control.run("uname -r").text
    if release != kernel.release:
        how = "came back with" if word or machine.command else "runs"
        raise InfraError(
            f"machine {machine.name} {how} kernel {release} instead of {kernel.release}",
            hint='switch = "kexec" has us start the kernel there'
            if machine.switch != "kexec"
            else "did the kernel under test fail to boot, and the machine start its usual one?",
        )
    if word and word not in control.run("cat /proc/cmdline").text.split():
        raise InfraError(
            f"machine {machine.name} came back with a kernel of this release that is not the "
            "one we started",
            hint="something restarted it meanwhile",
        )


def still_there(machine: Machine, *, within_s: float = _STEP_S) -> str:
    """The boot id of the machine; empty if it does not answer in time."""
    with contextlib.suppress(HarnessError):
        control = Control(machine.where(), timeout_s=within_s)
        with contextlib.closing(control):
            return control.boot_id()
    return ""
