# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts another kernel on the machine it runs on.

This file is sent to machines as text and executed there, so it is complete in itself and uses
the standard library alone: no kexec-tools are needed. Arguments: the image, an initrd or an
empty word, the command line. It prints ``loaded`` once the kernel has been taken, and leaves
a second later, in which whoever started it can log out.
"""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

KEXEC_FILE_LOAD = 320
"""Its number on x86-64: arch/x86/entry/syscalls/syscall_64.tbl."""
NO_INITRAMFS = 4
"""include/uapi/linux/kexec.h: KEXEC_FILE_NO_INITRAMFS."""
REBOOT = 169
MAGIC1, MAGIC2 = 0xFEE1DEAD, 672274793
REBOOT_KEXEC = 0x45584543
"""include/uapi/linux/reboot.h: LINUX_REBOOT_CMD_KEXEC."""

HINTS = {
    1: " (no root, or the kernel is locked down)",
    8: " (the kernel to be started needs CONFIG_RELOCATABLE: see kernel-config/kexec.config)",
    38: " (the running kernel needs CONFIG_KEXEC_FILE)",
}
"""What is behind an error, by its number."""

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> None:
    """A system call; a failed one ends this program with its reason."""
    if libc.syscall(ctypes.c_long(number), *arguments) != 0:
        number = ctypes.get_errno()
        sys.exit(f"kexec: {os.strerror(number)}{HINTS.get(number, '')}")


def main(image: str, initrd: str, cmdline: str) -> None:
    """Load the kernel, say so, and go."""
    kernel = os.open(image, os.O_RDONLY)
    disk = os.open(initrd, os.O_RDONLY) if initrd else -1
    text = cmdline.encode() + b"\0"
    call(
        KEXEC_FILE_LOAD,
        ctypes.c_int(kernel),
        ctypes.c_int(disk),
        ctypes.c_ulong(len(text)),
        ctypes.c_char_p(text),
        ctypes.c_ulong(0 if initrd else NO_INITRAMFS),
    )
    print("loaded", flush=True)
    if os.fork():
        return
    # Our standard streams are the connection: whoever waits for their end is let go.
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    time.sleep(1)
    os.sync()
    # An init that knows of a loaded kernel ends services and mounts in order first.
    if Path("/run/systemd/system").exists():
        subprocess.run(["systemctl", "kexec"], check=False)
        return
    call(
        REBOOT,
        ctypes.c_uint(MAGIC1),
        ctypes.c_uint(MAGIC2),
        ctypes.c_uint(REBOOT_KEXEC),
        ctypes.c_void_p(None),
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
