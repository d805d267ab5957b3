# SPDX-License-Identifier: GPL-2.0-or-later
"""Target ``here``: the machine that this very process runs on, with its own kernel.

It is what a worker uses that the fleet started on a machine (:mod:`harness.fleet`), and is as
target ``ssh`` in all but the way: an SSH server of our own, on a port of the loopback, with
keys that are made for it and known to nobody else. It ends with this process.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko

from harness.errors import UsageError
from harness.hosts import process
from harness.hosts.address import Address
from harness.hosts.remote import RemoteMachine, SshTarget
from harness.hosts.seen import Nature, look_here

if TYPE_CHECKING:
    from harness.build.images import Images
    from harness.build.kernel import KernelBuild
    from harness.settings import Settings

__all__ = ["HereTarget"]

_SERVER = "/usr/sbin/sshd"
# The tool runs on the same emulated processor as the guests that wait for it.
_EMULATED_PATIENCE = 4.0

_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {place}/host
AuthorizedKeysFile {place}/client.pub
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM {pam}
UseDNS no
StrictModes no
PrintMotd no
PrintLastLog no
PidFile none
LogLevel ERROR
AllowTcpForwarding yes
MaxSessions 1000
MaxStartups 1000
"""


class HereMachine(RemoteMachine):
    """This machine while it is a host's."""

    def tool_address(self, port: int) -> tuple[str, int]:
        return "127.0.0.1", port


class HereTarget(SshTarget):
    """See the module's text. :meth:`prepare` before anything else."""

    name = "here"
    machine_type = HereMachine

    def __init__(self, settings: Settings) -> None:
        super().__init__(dataclasses.replace(settings, ssh_host="root@127.0.0.1"))
        self._place = settings.cache / "here"
        self._server: subprocess.Popen[bytes] | None = None
        if look_here().nature is Nature.EMULATED:
            self.patience = _EMULATED_PATIENCE

    def prepare(self, kernel: KernelBuild, images: Images) -> None:
        """Start the server, then as :meth:`SshTarget.prepare`."""
        if self._server is None:
            self._serve()
        super().prepare(kernel, images)

    def _serve(self) -> None:
        if not Path(_SERVER).is_file():
            raise UsageError(f"there is no {_SERVER} here", hint="apt-get install openssh-server")
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True, mode=0o700)
        keys = {name: paramiko.ECDSAKey.generate() for name in ("host", "client")}
        for name, key in keys.items():
            key.write_private_key_file(str(self._place / name))
            public = f"{key.get_name()} {key.get_base64()}\n"
            (self._place / f"{name}.pub").write_text(public)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        known = f"[127.0.0.1]:{port} {(self._place / 'host.pub').read_text()}"
        (self._place / "known").write_text(known)
        config = self._place / "config"
        config.write_text(_CONFIG.format(port=port, place=self._place, pam=_pam()))
        self._server = process.start(
            [_SERVER, "-D", "-e", "-f", str(config)], stderr=self._place / "log"
        )
        self.address = Address(
            text="this machine",
            name="127.0.0.1",
            port=port,
            user="root",
            keys=(str(self._place / "client"),),
            known_hosts=(str(self._place / "known"),),
        )

    def _hold(self) -> None:
        """Whoever started us here holds the machine."""


def _pam() -> str:
    """Whether the machine's own server asks PAM: without it, one that locked root's password
    lets nobody in as root."""
    done = subprocess.run([_SERVER, "-T"], capture_output=True, text=True, check=False)
    found = re.search(r"^usepam (\w+)$", done.stdout, re.MULTILINE)
    return found[1] if found else "no"
