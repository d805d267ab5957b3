# SPDX-License-Identifier: GPL-2.0-or-later
"""The address of a machine that a user can log in to, and logging in as the user does.

What ``ssh`` on the command line knows counts here too: names and keys of
``~/.ssh/config``, the agent, and the machines of ``known_hosts``.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

import paramiko

from harness.errors import InfraError, UsageError
from harness.hosts.ssh import NotYet

__all__ = ["Address"]

_CONFIG = Path("~/.ssh/config")
_ADDRESS = re.compile(r"^(?:(?P<user>[^@\s]+)@)?(?P<name>\[[^\]]+\]|[^:@\s]+)(?::(?P<port>\d+))?$")
_KEEPALIVE_S = 5


@dataclass(frozen=True)
class Address:
    """Where to log in, and how."""

    text: str
    """As the user gave it."""
    name: str
    port: int
    user: str
    keys: tuple[str, ...] = ()
    known_hosts: tuple[str, ...] = ()
    proxy: str = ""
    strict: bool = True
    """Whether only machines that are known are logged in to."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that ``root@name:22`` or a name of ``~/.ssh/config`` means.

        :raises UsageError: it is no address, or the user's configuration cannot be read.
        """
        found = _ADDRESS.match(text)
        if found is None:
            raise UsageError(
                f"ssh_host = {text!r} is no address of a machine",
                hint='set it in kvmi-harness.toml or by --ssh-host, such as "root@name:22"',
            )
        name = found["name"].strip("[]")
        config = paramiko.SSHConfig()
        path = _CONFIG.expanduser()
        try:
            if path.is_file():
                config = paramiko.SSHConfig.from_path(str(path))
            given = config.lookup(name)
        except (OSError, paramiko.ConfigParseError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        return cls(
            text=text,
            name=given.get("hostname", name),
            port=int(found["port"] or given.get("port", 22)),
            user=found["user"] or given.get("user", "root"),
            keys=tuple(given.get("identityfile", ())),
            known_hosts=tuple(given.get("userknownhostsfile", "").split()),
            proxy=given.get("proxycommand", ""),
            strict=given.get("stricthostkeychecking", "yes") not in ("no", "off", "accept-new"),
        )

    def connect(self, *, timeout_s: float) -> paramiko.Transport:
        """Log in.

        :param timeout_s: for each step.
        :raises NotYet: nothing answers there.
        :raises UsageError: it is not known, or does not let us in.
        """
        client = paramiko.SSHClient()
        client.load_system_host_keys()
        for path in self.known_hosts:
            if Path(path).expanduser().is_file():
                client.load_host_keys(str(Path(path).expanduser()))
        client.set_missing_host_key_policy(paramiko.RejectPolicy() if self.strict else _Accept())
        by_hand = f"log in once by hand: {' '.join(self.command())}"
        try:
            client.connect(
                self.name,
                port=self.port,
                username=self.user,
                # Several are accepted, whatever the type's stub says.
                key_filename=list(self.keys) or None,  # type: ignore[arg-type]
                sock=paramiko.ProxyCommand(self.proxy) if self.proxy else None,
                timeout=timeout_s,
                banner_timeout=timeout_s,
                auth_timeout=timeout_s,
                channel_timeout=timeout_s,
            )
        except paramiko.AuthenticationException as error:
            raise UsageError(
                f"{self.text} does not let {self.user} in with a key: {error}", hint=by_hand
            ) from error
        except paramiko.BadHostKeyException as error:
            raise UsageError(
                f"{self.text} is not the machine it was: {error}", hint=by_hand
            ) from error
        except paramiko.SSHException as error:
            if "not found in known_hosts" in str(error):
                raise UsageError(f"{self.text} is not known: {error}", hint=by_hand) from error
            raise NotYet(str(error)) from error
        except socket.gaierror as error:
            raise UsageError(
                f"{self.text}: there is no machine of that name: {error.strerror}", hint=by_hand
            ) from error
        except (OSError, EOFError) as error:
            raise NotYet(str(error) or type(error).__name__) from error
        transport = client.get_transport()
        if transport is None:
            raise InfraError(f"{self.text}: the connection was lost during the login")
        transport.name = "host-ssh"
        transport.set_keepalive(_KEEPALIVE_S)
        # Its client would close the connection when nobody refers to it any more.
        transport.kvmi_client = client  # type: ignore[attr-defined]
        return transport

    def command(self) -> list[str]:
        """The command by which a person logs in."""
        keys = [word for key in self.keys for word in ("-i", key)]
        return ["ssh", *keys, "-p", str(self.port), f"{self.user}@{self.name}"]


class _Accept(paramiko.MissingHostKeyPolicy):
    """For users who switched the check off."""

    def missing_host_key(self, client: object, hostname: str, key: paramiko.PKey) -> None:
        """Take any key."""
