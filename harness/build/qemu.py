# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU for the host: Debian's source package, a series, the least that serves a guest."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.build import cache
from harness.build.packages import find_firmware
from harness.build.progress import Step, step
from harness.build.run import output_of, run_logged
from harness.build.series import Series, load_series
from harness.build.sources import Source, qemu_source, unpack
from harness.build.tree import SourceTree
from harness.errors import BuildError
from harness.settings import Settings

__all__ = ["QemuBuild", "build_qemu", "patched_source"]

_TIMEOUT_S = 2 * 3600
_SPACE_FIRST_MB = 2000
_SPACE_AGAIN_MB = 200
_TARGET = "qemu-system-x86_64"

# A feature that is on needs its library in the host image and lengthens the build, so
# all are off but these. Cryptography needs no library: QEMU hashes with GLib, which is
# all that the introspection object's key asks for.
_CONFIGURE = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-system",
    "--enable-kvm",
    "--enable-slirp",  # the guests' network: no privileges, no bridge
    "--enable-vhost-kernel",  # vsock into a guest that runs an introspection tool
    "--disable-tcg",  # the host runs its guests with KVM
    "--disable-docs",
    "--disable-tools",
    "--disable-install-blobs",  # Debian removed them from the source
    "--disable-debug-info",  # half the size of the build directory, and some time
)
_TOOLS = ("meson>=1.5,<2", "ninja>=1.11")

# What the guests' machine loads, from Debian's packages of firmware: QEMU's own copies are
# not in Debian's source package.
_FIRMWARE = (
    "bios-256k.bin",
    "vgabios-stdvga.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "efi-virtio.rom",
    "efi-e1000.rom",
)


@dataclass(frozen=True)
class QemuBuild:
    """A QEMU in the cache."""

    binary: Path
    """``qemu-system-x86_64``, stripped."""
    firmware: Path
    """Directory for ``-L``."""
    version: str
    """QEMU's own version, such as ``10.0.2``."""
    key: str
    """The hash of all that went into it."""
    series: str
    """What reports call the series: ``qemu@`` and the start of its digest."""
    libraries: tuple[str, ...]
    """The shared libraries it needs, by soname, such as ``libslirp.so.0``."""


def build_qemu(settings: Settings) -> QemuBuild:
    """The QEMU of ``settings.qemu_series``, built if need be.

    :raises UsageError: the series is not there.
    :raises PatchError: a patch does not apply; the source tree is as it was.
    :raises BuildError: fetching, configuring or compiling failed.
    """
    series = load_series(settings.qemu_series)
    source = qemu_source(settings)
    inputs: dict[str, cache.Input] = {
        "source": f"{source.name} {source.version} {source.digest}",
        "series": series.digest,
        "recipe": json.dumps([_CONFIGURE, _TOOLS, _FIRMWARE]),
        "compiler": _compiler(),
        **{f"firmware {name}": _firmware(name) for name in _FIRMWARE},
    }

    def make(into: Path) -> None:
        with step("Build QEMU") as progress:
            _make(settings, into, source=source, series=series, progress=progress)

    place = cache.entry("qemu", inputs, make, root=settings.cache)
    record = json.loads((place / "build.json").read_text())
    return QemuBuild(
        binary=place / _TARGET,
        firmware=place / "firmware",
        version=source.upstream,
        key=place.name,
        series=series.id,
        libraries=tuple(record["libraries"]),
    )


def _compiler() -> str:
    compiler = output_of(["gcc", "--version"]).splitlines()[0]
    libraries = output_of(["pkg-config", "--modversion", "glib-2.0", "slirp"]).split()
    return "; ".join([compiler, *libraries])


def _firmware(name: str) -> Path:
    if (path := find_firmware(name)) is None:
        raise BuildError(
            f"firmware for guests is missing: {name}", hint="`inv doctor` says what to install"
        )
    return path


def _make(
    settings: Settings, into: Path, *, source: Source, series: Series, progress: Step
) -> None:
    tree = _tree(settings, source)
    log = settings.cache / "logs" / "qemu.log"
    options = json.dumps([_CONFIGURE, _TOOLS, _compiler()])
    build = tree.place / f"build-{cache.key_of({'options': options})}"
    configured = build / ".configured"
    purpose = "building QEMU"
    cache.require_space(settings.cache, megabytes=_SPACE_AGAIN_MB, purpose=purpose)

    def unpack_source(src: Path) -> None:
        cache.require_space(settings.cache, megabytes=_SPACE_FIRST_MB, purpose=purpose)
        unpack(source, src, log=log, progress=progress)

    with tree.locked() as lock:
        log.unlink(missing_ok=True)
        progress.update(doing="fetching meson and ninja")
        tools = _tools(settings, log)
        environment = _environment(tools)
        progress.update(doing="unpacking the source")
        tree.prepare(unpack_source)
        progress.update(doing=f"applying {len(series.patches)} patches")
        tree.switch(series)

        def run(argv: list[str], what: str, on_line: bool = False) -> None:
            run_logged(
                argv,
                cwd=build,
                log=log,
                timeout_s=_TIMEOUT_S,
                env=environment,
                what=what,
                on_line=count if on_line else None,
                hold=[lock],
            )

        def count(line: str) -> None:
            if found := re.match(r"\[(\d+)/(\d+)\] (.*)", line):
                name = found[3].rpartition("/")[2]
                progress.update(done=int(found[1]), total=int(found[2]), doing=name)

        if not configured.exists():
            progress.update(doing="configuring")
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir()
            python = f"--python={tools / 'bin/python3'}"
            ninja = f"--ninja={tools / 'bin/ninja'}"
            run([str(tree.src / "configure"), python, ninja, *_CONFIGURE], "configuring QEMU")
            configured.touch()
        ninja = str(tools / "bin/ninja")
        run([ninja, f"-j{settings.jobs}", _TARGET], "QEMU build", on_line=True)
        progress.update(doing="strip")
        binary = into / _TARGET
        run(["strip", "-o", str(binary), str(build / _TARGET)], "stripping QEMU")
    firmware = into / "firmware"
    firmware.mkdir()
    for name in _FIRMWARE:
        shutil.copyfile(_firmware(name), firmware / name)
    record = {"libraries": _needed(binary)}
    (into / "build.json").write_text(json.dumps(record) + "\n")


@contextmanager
def patched_source(settings: Settings) -> Iterator[Path]:
    """The source with the series applied, unpacked now if it never was. Nobody changes it until
    the block ends.

    :raises PatchError: a patch does not apply.
    """
    source = qemu_source(settings)
    series = load_series(settings.qemu_series)
    log = settings.cache / "logs" / "qemu.log"
    with _tree(settings, source).patched(source, series, log=log) as src:
        yield src


def _tree(settings: Settings, source: Source) -> SourceTree:
    place = settings.cache / "trees" / f"qemu-{source.upstream}-{source.digest[:8]}"
    return SourceTree(place, kind="qemu", base=f"qemu {source.version}")


def _tools(settings: Settings, log: Path) -> Path:
    """A virtual environment with meson and ninja: Debian 12's meson is too old for QEMU 10."""
    key = cache.key_of({"tools": json.dumps(_TOOLS), "python": sys.version + sys.base_prefix})
    # No cache entry: a virtual environment has its path written into it, so it is made
    # at its final place, and a mark says that it is complete.
    home = settings.cache / "tools" / key
    complete = home / ".complete"
    with cache.lock(home.parent / "lock", what="meson and ninja"):
        if complete.exists() and (home / "bin/python3").exists():
            return home
        shutil.rmtree(home, ignore_errors=True)
        try:
            run_logged(
                [sys.executable, "-m", "venv", str(home)],
                cwd=home.parent,
                log=log,
                timeout_s=300,
                what="making a virtual environment",
            )
        except BuildError as error:
            error.hint = f"is the package python3-venv there? {error.hint}"
            raise
        pip = [str(home / "bin/python3"), "-m", "pip", "install", "--quiet", *_TOOLS]
        run_logged(
            pip, cwd=home, log=log, timeout_s=600, what="installing meson and ninja from PyPI"
        )
        complete.touch()
    return home


def _environment(tools: Path) -> dict[str, str]:
    """Ours, without what would quietly change the build."""
    unwanted = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CC", "CXX", "LD", "MAKEFLAGS", "PYTHONPATH",
                "PYTHONHOME", "VIRTUAL_ENV", "NINJA", "PYTHON", "MESON")  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    return kept | {"PATH": f"{tools / 'bin'}:{kept.get('PATH', '')}", "LC_ALL": "C.UTF-8"}


def _needed(binary: Path) -> list[str]:
    """The sonames that the program asks the dynamic linker for."""
    listing = output_of(["objdump", "-p", str(binary)])
    return sorted(re.findall(r"^\s+NEEDED\s+(\S+)$", listing, re.MULTILINE))
