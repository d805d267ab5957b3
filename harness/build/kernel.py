# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel: Debian's source, a series, a small configuration; one bzImage."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import paths
from harness.build import cache, kconfig
from harness.build.progress import Step, step
from harness.build.run import output_of, run_logged
from harness.build.series import Series, load_series
from harness.build.sources import Source, linux_source, unpack
from harness.build.tree import SourceTree
from harness.errors import UsageError
from harness.series.description import FILE_NAME, description_of
from harness.settings import Settings

__all__ = [
    "KernelBuild",
    "build_environment",
    "build_kernel",
    "compiler",
    "half_written_removed",
    "local_version",
    "make_variables",
    "patched_source",
    "resolve_options",
    "source_tree",
    "source_under_test",
    "uapi_headers",
]

_TIMEOUT_S = 4 * 3600
_CONFIGURE_TIMEOUT_S = 600
_SPACE_FIRST_MB = 3000
_SPACE_AGAIN_MB = 300
# Lines that make prints for the base configuration from nothing, to show how far it is.
_LINES_FROM_NOTHING = 2030

# What the configuration and the headers for user space are made of.
_WITHOUT_CODE = (
    "Kbuild",
    "Makefile",
    "*Kconfig*",
    "scripts/*",
    "arch/x86/Makefile*",
    "*include/uapi/*",
)

# Who built it and when would make every image differ from the last.
_VARIABLES = {
    "KBUILD_BUILD_USER": "kvmi",
    "KBUILD_BUILD_HOST": "harness",
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_VERSION": "1",
}


@dataclass(frozen=True)
class KernelBuild:
    """A kernel in the cache."""

    bzimage: Path
    config: Path | None
    """The configuration it was built with, complete; None if it was built elsewhere."""
    release: str
    """What ``uname -r`` says: the version, and the start of the series' digest."""
    key: str
    """The hash of all that went into it."""
    series: str
    """What reports call the series: ``linux@`` and the start of its digest.

    ``bzImage@`` and the start of the image's digest if it was built elsewhere.
    """


def build_kernel(settings: Settings) -> KernelBuild:
    """The kernel of ``settings.kernel_series`` and ``settings.flavour``, built if need be.

    With ``settings.kernel`` it is a copy of that image, which may change meanwhile.

    :raises UsageError: the series or the flavour is not there, or the image is no bzImage.
    :raises PatchError: a patch does not apply; the source tree is as it was.
    :raises ConfigError: an option that a fragment asks for got lost.
    :raises BuildError: fetching, unpacking or compiling failed.
    """
    if settings.kernel:
        return _built_elsewhere(settings.kernel, root=settings.cache)
    series = load_series(settings.kernel_series)
    asked = _asked(settings, series)
    source = linux_source(settings)
    inputs: dict[str, cache.Input] = {
        "source": f"{source.name} {source.version} {source.digest}",
        "series": series.digest,
        "configuration": "\n".join(f"CONFIG_{one.option}={one.value}" for one in asked),
        "recipe": json.dumps(["tinyconfig", "olddefconfig", "bzImage", _VARIABLES]),
        "compiler": compiler(),
    }

    def make(into: Path) -> None:
        with step("Build kernel") as progress:
            _make(settings, into, source=source, series=series, asked=asked, progress=progress)

    place = cache.entry("kernel", inputs, make, root=settings.cache)
    record = json.loads((place / "build.json").read_text())
    return KernelBuild(
        bzimage=place / "bzImage",
        config=place / "config",
        release=record["release"],
        key=place.name,
        series=series.id,
    )


def _built_elsewhere(image: Path, *, root: Path) -> KernelBuild:
    try:
        data = image.read_bytes()
        # Documentation/arch/x86/boot.rst: magic "HdrS" at 0x202; kernel_version, at 0x20e,
        # points to the version as text, counted from 0x200.
        if data[0x202:0x206] != b"HdrS":
            raise ValueError("it is no bzImage")
        start = 0x200 + int.from_bytes(data[0x20E:0x210], "little")
        release = data[start : data.index(0, start)].decode().partition(" ")[0]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{image} cannot be the kernel under test: {error}",
            hint="name arch/x86/boot/bzImage of a build tree",
        ) from error

    def copy(into: Path) -> None:
        (into / "bzImage").write_bytes(data)

    place = cache.entry("kernel-image", {"image": data}, copy, root=root)
    return KernelBuild(
        bzimage=place / "bzImage",
        config=None,
        release=release,
        key=place.name,
        series=f"bzImage@{hashlib.sha256(data).hexdigest()[:8]}",
    )


def _asked(settings: Settings, series: Series) -> list[kconfig.Asked]:
    """The options of the base, of the series, and of the flavour."""

    def fragment(name: str) -> list[kconfig.Asked]:
        return kconfig.read_fragment(paths.KERNEL_CONFIG / f"{name}.config")

    own = fragment("introspection")
    if description := description_of(settings):
        own = [
            kconfig.Asked(symbol.removeprefix("CONFIG_"), "y", settings.description or FILE_NAME)
            for symbol in description.config
        ]
    # Without the series, or after its first patches only, there are no such options.
    if not series.options() & {one.option for one in own}:
        own = []
    flavour = fragment(settings.flavour) if settings.flavour != "base" else []
    return [*fragment("base"), *own, *flavour]


def compiler() -> str:
    """Compiler and linker with their versions: part of what a build depends on."""
    versions = [output_of([tool, "--version"]).splitlines()[0] for tool in ("gcc", "ld")]
    return "; ".join(versions)


def _make(
    settings: Settings,
    into: Path,
    *,
    source: Source,
    series: Series,
    asked: list[kconfig.Asked],
    progress: Step,
) -> None:
    tree = source_tree(settings, source)
    log = settings.cache / "logs" / "kernel.log"
    build = tree.place / f"build-{settings.flavour}"
    first = not build.is_dir()
    purpose = "building the kernel"
    cache.require_space(settings.cache, megabytes=_SPACE_AGAIN_MB, purpose=purpose)

    def unpack_source(src: Path) -> None:
        cache.require_space(settings.cache, megabytes=_SPACE_FIRST_MB, purpose=purpose)
        unpack(source, src, log=log, progress=progress)

    with tree.locked() as lock:
        log.unlink(missing_ok=True)
        progress.update(doing="unpacking the source")
        tree.prepare(unpack_source)
        progress.update(doing=f"applying {len(series.patches)} patches")
        tree.switch(series)
        build.mkdir(exist_ok=True)

        lines = 0

        def count(line: str) -> None:
            nonlocal lines
            lines += 1
            progress.update(done=lines, doing=line.strip().rpartition(" ")[2])

        def make(*targets: str, on_line: bool = False, **variables: str) -> None:
            run_logged(
                [
                    "make",
                    f"-j{settings.jobs}",
                    f"O={build}",
                    *make_variables(**variables),
                    *targets,
                ],
                cwd=tree.src,
                log=log,
                timeout_s=_TIMEOUT_S,
                env=build_environment(),
                what="kernel build",
                on_line=count if on_line else None,
                hold=[lock],
            )

        progress.update(doing="configuring")
        wanted = build / "wanted.config"
        make("tinyconfig", KCONFIG_CONFIG=str(wanted))
        with wanted.open("a") as file:
            file.writelines(f"CONFIG_{one.option}={one.value}\n" for one in asked)
        make("olddefconfig", KCONFIG_CONFIG=str(wanted))
        config = wanted.read_text()
        kconfig.check(asked, config, tree=tree.src, base=f"{source.name} {source.version}")
        current = build / ".config"
        if not current.exists() or current.read_text() != config:
            # Its time is what make goes by: left alone unless something changed.
            wanted.replace(current)

        if first:
            progress.update(total=_LINES_FROM_NOTHING)
        with half_written_removed(build):
            make("bzImage", on_line=True, LOCALVERSION=local_version(series))
        release = (build / "include/config/kernel.release").read_text().strip()
        shutil.copyfile(build / "arch/x86/boot/bzImage", into / "bzImage")
        shutil.copyfile(current, into / "config")
        (into / "build.json").write_text(json.dumps({"release": release}) + "\n")


def make_variables(**more: str) -> list[str]:
    """What each ``make`` has to be told, lest it make everything again."""
    return [f"{name}={value}" for name, value in (_VARIABLES | more).items()]


def local_version(series: Series) -> str:
    """How the kernel's release tells the series."""
    return f"-kvmi-{series.digest[:8] if series.patches else 'base'}"


def resolve_options(settings: Settings, lines: Iterable[str]) -> str:
    """What a configuration with just these lines becomes: all else has its default.

    The cache has it already for patches that change nothing about options.

    :param lines: as in a fragment, ``CONFIG_KVM=y``.
    :raises UsageError: the kernel was built elsewhere.
    """
    asked = "\n".join(lines) + "\n"
    with _without_code(settings) as src:

        def make(directory: Path) -> None:
            config = directory / "config"
            config.write_text(asked)
            build = src.with_name("build-configuration")
            build.mkdir(exist_ok=True)
            run_logged(
                ["make", f"O={build}", f"KCONFIG_CONFIG={config}", "olddefconfig"],
                cwd=src,
                log=settings.cache / "logs" / "kconfig.log",
                timeout_s=_CONFIGURE_TIMEOUT_S,
                env=build_environment(),
                what="kernel configuration",
            )

        inputs = {"asked": asked, "compiler": compiler(), "options": _options_digest(src)}
        place = cache.entry("configuration", inputs, make, root=settings.cache)
    return (place / "config").read_text()


def _options_digest(src: Path) -> str:
    """Stands for all that a configuration is resolved by: the tree but for its headers."""
    files = (path for path in src.rglob("*") if path.is_file() and "uapi" not in path.parts)
    return cache.key_of({str(path.relative_to(src)): cache.digest_of(path) for path in files})


@contextmanager
def uapi_headers(settings: Settings) -> Iterator[tuple[Path, Path]]:
    """The directories of the headers for user space, of ``linux`` and of ``asm``, in the source
    with the series applied. Nobody changes them until the block ends.

    :raises UsageError: there is no unpacked source, as when the kernel was built elsewhere.
    """
    with _without_code(settings) as src:
        yield src / "include/uapi", src / "arch/x86/include/uapi"


@contextmanager
def _without_code(settings: Settings) -> Iterator[Path]:
    """As :func:`patched_source`, without what is compiled.

    It is a tree of its own: tests need not wait for a build in the other one, and do not switch
    it away from what is built there next.
    """
    _require_source(settings)
    source = linux_source(settings)
    tree = source_tree(settings, source, only=_WITHOUT_CODE)
    log = settings.cache / "logs" / "kconfig.log"
    with tree.patched(source, load_series(settings.kernel_series), log=log) as src:
        yield src


@contextmanager
def patched_source(settings: Settings) -> Iterator[Path]:
    """The source with the series applied, unpacked now if it never was. Nobody changes it until
    the block ends.

    :raises UsageError: the kernel was built elsewhere.
    :raises PatchError: a patch does not apply.
    """
    _require_source(settings)
    source = linux_source(settings)
    series = load_series(settings.kernel_series)
    log = settings.cache / "logs" / "kernel.log"
    with source_tree(settings, source).patched(source, series, log=log) as src:
        yield src


def _require_source(settings: Settings) -> None:
    if settings.kernel:
        raise UsageError(
            f"{settings.kernel} was built elsewhere", hint="test the series to have its source"
        )


def source_tree(settings: Settings, source: Source, *, only: Sequence[str] = ()) -> SourceTree:
    """The tree in the cache that this source, or a part of it, is unpacked into, now or later."""
    place = settings.cache / "trees" / f"linux-{source.upstream}-{source.digest[:8]}"
    if only:
        place = place.with_name(f"{place.name}-{cache.key_of({'only': repr(only)})[:8]}")
    base = f"{source.name} {source.version}"
    return SourceTree(place, kind="kernel", base=base, only=only)


@contextmanager
def source_under_test(settings: Settings) -> Iterator[tuple[SourceTree, Path, int]]:
    """The source with the series applied, where it was built, and the lock that we hold on it."""
    _require_source(settings)
    series = load_series(settings.kernel_series)
    source = linux_source(settings)
    tree = source_tree(settings, source)
    build = tree.place / f"build-{settings.flavour}"
    if not build.is_dir():
        raise UsageError(f"{tree.place} has no build directory", hint="`inv build.kernel` makes it")
    with tree.locked() as lock:
        tree.switch(series)
        yield tree, build, lock


def build_environment() -> dict[str, str]:
    """Our environment, without what would quietly change a kernel build."""
    unwanted = ("KBUILD_", "KCONFIG_", "KCFLAGS", "KAFLAGS", "MAKEFLAGS", "MAKELEVEL", "ARCH",
                "CROSS_COMPILE", "LOCALVERSION", "CC", "LD", "CFLAGS", "LLVM")  # fmt: skip
    return {
        **{
            key: value
            for key, value in os.environ.items()
            if not any(
                key == name or (name[-1] == "_" and key.startswith(name)) for name in unwanted
            )
        },
        "LC_ALL": "C",
    }


@contextmanager
def half_written_removed(build: Path) -> Iterator[None]:
    """Build in ``build``; should we be killed, the next build starts without half objects.

    make removes what it was writing when it is ended by a signal that it can catch. After
    SIGKILL or a power cut an object may be cut short and yet look up to date. Kbuild
    writes an object's ``.cmd`` file after the object, which tells which ones are whole.
    """
    mark = build / ".unfinished"
    if mark.exists():
        for record in build.rglob(".*.cmd"):
            target = record.with_name(record.name[1:-4])
            if target.exists() and target.stat().st_mtime_ns > record.stat().st_mtime_ns:
                target.unlink()
    mark.touch()
    yield
    mark.unlink()
