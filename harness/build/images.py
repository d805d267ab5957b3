# SPDX-License-Identifier: GPL-2.0-or-later
"""Images: what hosts and guests run besides the kernel under test.

::

    base        a minimal Debian with a few packages, as a tar file     (mmdebstrap)
    keys        SSH keys of hosts and guests, and the one that opens them
    initrd      the guest's user space: busybox, SSH server, kvmi-guest
    host disk   base, our QEMU, init                   ext4, /dev/vda of a host
    guest disk  kernel and initrd for guests           ext4, /dev/vdb of a host

Each is cached by itself, so a new kernel only makes a new guest disk, in a second. File
systems are written by ``mke2fs -d``: nothing is mounted, no loop device is used, and an
ordinary user can do it where user namespaces are allowed.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from harness.build import archive, cache, progress
from harness.build.cpio import CpioWriter
from harness.build.run import output_of, run_logged
from harness.errors import BuildError
from harness.paths import GUEST_IMAGES

if TYPE_CHECKING:
    from harness.build.kernel import KernelBuild
    from harness.build.qemu import QemuBuild
    from harness.settings import Settings

__all__ = [
    "LIBRARIES",
    "LOADER",
    "Images",
    "build_base",
    "build_images",
    "build_keys",
    "libraries_of",
    "unpack_base",
    "write_busybox",
]

_HOST = GUEST_IMAGES / "host"
_GUEST = GUEST_IMAGES / "guest"

# Counted up, each for itself, when the code below makes something else of the same inputs.
_RECIPES = {"base": "1", "keys": "1", "initrd": "1", "host-disk": "2", "guest-disk": "1"}

_BASE_TIMEOUT_S = 1800
_STEP_TIMEOUT_S = 300
_BASE_NEEDS_MB = 1500

# Never read in a host, and a third of a minimal Debian.
_USELESS = (
    "usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale",
    "usr/share/zoneinfo", "usr/share/lintian", "usr/share/bash-completion",
    "usr/lib/x86_64-linux-gnu/gconv", "var/cache", "var/log",
)  # fmt: skip


@dataclass(frozen=True)
class Images:
    """The images in the cache."""

    host_disk: Path
    """Raw ext4: the host's system, with our QEMU under /opt/qemu."""
    guest_disk: Path
    """Raw ext4: what guests boot; mounted at /opt/guest in the host."""
    guest_kernel: Path
    guest_initrd: Path
    keys: Path
    """Directory of the SSH keys; see :class:`harness.hosts.ssh.Keys`."""
    key: str
    """The hash of all that went into them."""


def build_images(settings: Settings, *, kernel: KernelBuild, qemu: QemuBuild) -> Images:
    """The images for this kernel and this QEMU; whatever the cache lacks is made.

    :raises BuildError: the Debian archive, a tool or the disk failed; the message says what.
    """
    root = settings.cache
    keys = build_keys(settings)
    base = build_base(settings)
    initrd = _build_initrd(root, base=base, keys=keys)
    host = _build_host_disk(root, base=base, keys=keys, qemu=qemu)
    guest = _build_guest_disk(root, kernel=kernel, initrd=initrd)
    return Images(
        host_disk=host / "disk",
        guest_disk=guest / "disk",
        guest_kernel=kernel.bzimage,
        guest_initrd=initrd / "initrd",
        keys=keys,
        key=f"{host.name}-{guest.name}",
    )


# -- base ---------------------------------------------------------------------------


def packages() -> list[str]:
    """The Debian packages of the host image, beyond the minimal system."""
    lines = (_HOST / "packages").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def build_base(settings: Settings) -> Path:
    """The directory with ``base.tar``, made from the machine's own Debian release.

    It depends on the release and the list of packages alone. A newer state of the same
    release is fetched when the cache is cleaned, not whenever the archive moves on.
    """
    release = archive.machine_codename()
    inputs: dict[str, cache.Input] = {
        "release": release,
        "packages": " ".join(packages()),
        "recipe": _RECIPES["base"],
    }

    def make(into: Path) -> None:
        cache.require_space(settings.cache, megabytes=_BASE_NEEDS_MB, purpose="the host image")
        with progress.step(f"Fetch Debian {release} for the host image") as step:
            _mmdebstrap(release, into, log=settings.cache / "logs" / "base.log", step=step)

    return cache.entry("base", inputs, make, root=settings.cache)


def _mmdebstrap(release: str, into: Path, *, log: Path, step: progress.Step) -> None:
    archives = archive.machine_archives(release)
    archive.primary(archives, release)  # says so if the machine's Debian is not among them
    sources = into / "debian.sources"
    sources.write_text("\n".join(one.stanza() for one in archives))
    # mmdebstrap has apt read a configuration of its own; the way to the network (a
    # proxy, a certificate) is in the machine's.
    network = into / "network.conf"
    network.write_text(
        "".join(
            f"{line}\n"
            for line in output_of(["apt-config", "dump"]).splitlines()
            if line.startswith(("Acquire::http", "Acquire::https", "Acquire::Retries"))
        )
    )
    environment = dict(os.environ)
    if os.geteuid() == 0:
        # What it unpacks goes into the cache's own directory, which is removed if we fail.
        # Without root it works in a user namespace that cannot enter our home directory.
        environment["TMPDIR"] = str(into)
    run_logged(
        [
            "mmdebstrap", "--variant=minbase", "--format=tar",
            f"--include={','.join(packages())}",
            f"--aptopt={network}",
            *(f"--dpkgopt=path-exclude=/{path}/*" for path in _USELESS if "share" in path),
            release, str(into / "base.tar"), str(sources),
        ],
        cwd=into,
        log=log,
        timeout_s=_BASE_TIMEOUT_S,
        env=environment,
        on_line=lambda line: step.update(doing=line.removeprefix("I: ")),
    )  # fmt: skip
    sources.unlink()
    network.unlink()


def _as_root(*argv: str) -> list[str]:
    """``argv`` where it may own files as root: really, or in a user namespace."""
    return list(argv) if os.geteuid() == 0 else ["unshare", "--map-root-user", "--", *argv]


def unpack_base(base: Path, into: Path, *, log: Path) -> None:
    """Unpack the base into the directory ``into``, which is made; without what is useless."""
    into.mkdir()
    run_logged(
        _as_root(
            "tar", "--extract", "--file", str(base / "base.tar"), "--directory", str(into),
            # devtmpfs has the devices, and nobody but root may make them.
            "--no-same-owner", "--preserve-permissions", "--exclude=./dev/*",
            *(f"--exclude=./{path}/*" for path in _USELESS),
        ),
        cwd=into,
        log=log,
        timeout_s=_STEP_TIMEOUT_S,
    )  # fmt: skip


# -- keys ---------------------------------------------------------------------------


def build_keys(settings: Settings) -> Path:
    """The directory with the SSH keys, made once for this cache.

    ``client`` opens all hosts and guests; ``host`` and ``dropbear`` are the one key that
    these show, in the formats of their two servers. Each with its public half (``.pub``).
    """
    return cache.entry("keys", {"recipe": _RECIPES["keys"]}, _make_keys, root=settings.cache)


def _make_keys(into: Path) -> None:
    for name in ("client", "host"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        _write_private(into / name, private)
        (into / f"{name}.pub").write_bytes(public + b" kvmi-harness\n")
        if name == "host":
            _write_private(into / "dropbear", _for_dropbear(key))


def _write_private(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(data)


def _for_dropbear(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as dropbear keeps it: the public blob of RFC 5656, then the secret number."""
    point = key.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    secret = key.private_numbers().private_value
    # An mpint of RFC 4251: signed, so a leading zero byte where the top bit is set.
    number = secret.to_bytes(secret.bit_length() // 8 + 1)
    fields = (b"ecdsa-sha2-nistp256", b"nistp256", point, number)
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)


# -- initrd -------------------------------------------------------------------------


def _build_initrd(root: Path, *, base: Path, keys: Path) -> Path:
    inputs: dict[str, cache.Input] = {
        "base": base.name,
        "keys": keys.name + (keys / "host.pub").read_text() + (keys / "client.pub").read_text(),
        "guest": _GUEST,
        "compiler": output_of(["cc", "--version"]).splitlines()[0],
        "recipe": _RECIPES["initrd"],
    }

    def make(into: Path) -> None:
        with (
            progress.step("Build the guest's user space"),
            tempfile.TemporaryDirectory(dir=into) as scratch,
        ):
            log = root / "logs" / "initrd.log"
            program = Path(scratch) / "kvmi-guest"
            _compile(sorted(_GUEST.glob("*.c")), program, log=log)
            system = Path(scratch) / "system"
            unpack_base(base, system, log=log)
            with (into / "initrd").open("wb") as out:
                _write_initrd(CpioWriter(out), system=system, program=program, keys=keys)

    return cache.entry("initrd", inputs, make, root=root)


def _compile(sources: Iterable[Path], program: Path, *, log: Path) -> None:
    argv = ["cc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-o", str(program)]
    run_logged(
        [*argv, *map(str, sources)],
        cwd=program.parent,
        log=log,
        timeout_s=_STEP_TIMEOUT_S,
        what=f"compiling {program.name}",
    )


def write_busybox(archive: CpioWriter, system: Path) -> None:
    """What every initramfs starts with: a console, places to mount on, and busybox."""
    # The kernel opens it for init before init can mount anything.
    archive.device("dev/console", major=5, minor=1)
    for name in ("proc", "sys", "run", "tmp"):
        archive.directory(name)
    busybox = system / "usr/bin/busybox"
    archive.copy("bin/busybox", busybox)
    for applet in output_of([str(busybox), "--list"]).split():
        if applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")


def _write_initrd(archive: CpioWriter, *, system: Path, program: Path, keys: Path) -> None:
    """Uncompressed: QEMU copies it into the guest's memory; unpacking it there costs more."""
    archive.copy("init", _GUEST / "init")
    write_busybox(archive, system)
    archive.copy("bin/kvmi-guest", program)
    archive.copy("bin/dropbear", system / "usr/sbin/dropbear")
    archive.copy(f"lib64/{LOADER}", system / LIBRARIES / LOADER)
    for library in libraries_of(system, system / "usr/sbin/dropbear"):
        archive.copy(f"lib/{library.name}", library)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/shells", b"/bin/sh\n")
    archive.file("etc/dropbear/host", (keys / "dropbear").read_bytes(), mode=0o600)
    # dropbear looks at the owner and the mode of all directories on the way.
    archive.directory("root", mode=0o700)
    archive.directory("root/.ssh", mode=0o700)
    archive.file("root/.ssh/authorized_keys", (keys / "client.pub").read_bytes(), mode=0o600)
    archive.finish()


# In a merged /usr all libraries are here, the loader under its own name too.
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = "ld-linux-x86-64.so.2"


def libraries_of(system: Path, program: Path) -> list[Path]:
    """The shared libraries of the unpacked ``system`` that ``program`` is linked with."""
    place = system / LIBRARIES
    # The system's own loader, told to look there first. It goes on to look in this
    # machine's directories, so what it finds outside counts as missing.
    loader = [str(place / LOADER), "--inhibit-cache", "--library-path", str(place)]
    found = []
    for line in output_of([*loader, "--list", str(program)]).splitlines():
        name, arrow, where = line.strip().partition(" => ")
        if not arrow:
            continue
        path = Path(where.partition(" (")[0])
        if path.parent != place:
            raise BuildError(
                f"{program.name} of the host image needs {name}, which is not in it",
                hint=f"add the Debian package that has it to {_HOST / 'packages'}",
            )
        found.append(path)
    return [path for path in found if path.name != LOADER]


# -- disks --------------------------------------------------------------------------


def _build_host_disk(root: Path, *, base: Path, keys: Path, qemu: QemuBuild) -> Path:
    inputs: dict[str, cache.Input] = {
        "base": base.name,
        "keys": keys.name + (keys / "host.pub").read_text() + (keys / "client.pub").read_text(),
        "qemu": qemu.key,
        "host": _HOST,
        "recipe": _RECIPES["host-disk"],
    }

    def fill(system: Path) -> None:
        for name in ("host", "guest", "qemu/bin", "host/ssh"):
            (system / "opt" / name).mkdir(parents=True, exist_ok=True)
        for name in ("init", "sshd_config"):
            shutil.copy(_HOST / name, system / "opt/host" / name)
        shutil.copy(keys / "host", system / "opt/host/ssh/host")
        shutil.copy(keys / "client.pub", system / "opt/host/ssh/authorized_keys")
        # Each command runs in root's shell, and dash starts in half the time of bash.
        passwd = system / "etc/passwd"
        passwd.write_text(passwd.read_text().replace(":/root:/bin/bash", ":/root:/bin/sh"))
        program = system / "opt/qemu/bin/qemu-system-x86_64"
        shutil.copy(qemu.binary, program)
        shutil.copytree(qemu.firmware, system / "opt/qemu/share")
        libraries_of(system, program)  # all there?

    def make(into: Path) -> None:
        log = root / "logs" / "host-disk.log"
        with progress.step("Write the host image"):
            system = into / "system"
            unpack_base(base, system, log=log)
            fill(system)
            _write_disk(system, into / "disk", log=log)
            shutil.rmtree(system)

    return cache.entry("host-disk", inputs, make, root=root)


def _build_guest_disk(root: Path, *, kernel: KernelBuild, initrd: Path) -> Path:
    inputs: dict[str, cache.Input] = {
        "kernel": kernel.key, "initrd": initrd.name, "recipe": _RECIPES["guest-disk"],
    }  # fmt: skip

    def make(into: Path) -> None:
        files = into / "files"
        files.mkdir()
        shutil.copyfile(kernel.bzimage, files / "bzImage")
        shutil.copyfile(initrd / "initrd", files / "initrd")
        _write_disk(files, into / "disk", log=root / "logs" / "guest-disk.log")
        shutil.rmtree(files)

    return cache.entry("guest-disk", inputs, make, root=root)


def _write_disk(content: Path, disk: Path, *, log: Path) -> None:
    """Write a directory as an ext4 file system that nobody will ever write to."""
    blocks = 0
    count = 0
    for path in content.rglob("*"):
        blocks += -(-path.lstat().st_size // 4096) + 1
        count += 1
    # Room for the inodes (256 bytes each), the block groups' tables and rounding.
    megabytes = (blocks * 4096 + count * 256) * 21 // 20 // (1 << 20) + 8
    run_logged(
        _as_root(
            "mke2fs", "-q", "-t", "ext4", "-d", str(content), "-E", "root_owner=0:0",
            # Read-only: no journal to replay, nothing kept back for root.
            "-O", "^has_journal", "-m", "0", "-N", str(count + 64),
            str(disk), f"{megabytes}M",
        ),
        cwd=disk.parent,
        log=log,
        timeout_s=_STEP_TIMEOUT_S,
        # mke2fs is in /sbin, which users' PATH lacks on Debian.
        env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
        what="writing an ext4 image",
    )  # fmt: skip
