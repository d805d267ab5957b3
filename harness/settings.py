# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings of a run: parsed and checked once, at the edge, then passed down.

They come from three places, the later winning: the defaults below, the file
``kvmi-harness.toml`` of the working directory (if there is one), and the options of
the command. A name that nobody knows or a value of the wrong kind is a
:class:`~harness.errors.UsageError` that names file and key.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from harness import paths
from harness.errors import UsageError
from harness.resources import fitting_workers, free_cores
from harness.series import anchored, description_of, fetched, found_beside

__all__ = ["FILE_NAME", "Settings", "load_settings", "with_series"]

FILE_NAME = "kvmi-harness.toml"
_OPTIONS = "options"

_Count = Annotated[int, msgspec.Meta(ge=1, le=256)]
_Megabytes = Annotated[int, msgspec.Meta(ge=256, le=1 << 20)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
_NameOrNone = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9][a-z0-9_-]*)?$")]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told. Paths are absolute after :func:`load_settings`."""

    target: _Name = "auto"
    """What provides the hosts; ``auto`` is the best that this machine can do."""
    ssh_host: str = ""
    """The machine of target ``ssh``: ``root@name:22``, or a name in ``~/.ssh/config``."""
    workers: _Count = field(default_factory=lambda: fitting_workers(1024))
    """Test processes, each with its own host; by default what fits into the machine."""
    abi: _NameOrNone = ""
    """The version of the interface that the kernel under test is held to: v12, v7, v6. By default
    that which its description names, or else v12."""
    description: str = ""
    """What the kernel's series speaks: a TOML file, or v12, v7, v6 for the published series; by
    default ``series.toml`` beside its patches. See :mod:`harness.series.description`."""
    kernel_series: Path | str = paths.KERNEL_CONFIG / "linux"
    """The kernel's patches: a directory of them, applied in the order of their names. Before
    :func:`with_series` it may be another form that :mod:`harness.series` knows."""
    qemu_series: Path | str = paths.KERNEL_CONFIG / "qemu"
    """QEMU's patches, in the same forms."""
    kernel_base: Path | None = None
    """What the kernel's patches are applied to instead of Debian's source: a tarball, or
    ``TREE:REF`` of a git tree here."""
    qemu_base: Path | None = None
    """What QEMU's patches are applied to, likewise."""
    flavour: _Name = "base"
    """Kernel configuration: ``base``, or a further fragment of this name on top of it."""
    kernel: Path | None = None
    """A bzImage that was built elsewhere, to be tested instead of series and flavour."""
    jobs: _Count = field(default_factory=free_cores)
    """Compilers that run at once."""
    reports: Path = Path("reports")
    """Where each run leaves its report, in a directory of its own."""
    cache: Path = field(default_factory=paths.cache_dir)
    """What was fetched and built; see :mod:`harness.build.cache`."""
    host_memory_mb: _Megabytes = 1024
    """Memory of each host, in MiB."""
    host_cpus: _Count = 2
    """CPUs of each host."""
    boot_s: _Seconds = 120.0
    """How long a host may take to boot, in seconds."""
    bochs: Literal["debian", "built"] = "debian"
    """For target ``bochs``: Debian's package, or a newer one that is built from source and
    three times as fast."""
    known: Path | None = None
    """A list of known failures; see :mod:`harness.report.known`."""
    quiet_s: _Seconds = 2.0
    """How long a host stays under watch after each sequence, in seconds."""


_FLAVOURS: dict[str, dict[str, Any]] = {
    # Checkers keep books about all memory, and look at each access to it.
    "debug": {"host_memory_mb": 2048, "boot_s": 900.0},
}
"""Defaults of a flavour, where they are not those of all."""


_TYPES: dict[str, Any] = typing.get_type_hints(Settings, include_extras=True)


def load_settings(path: Path | None = None, **overrides: object) -> Settings:
    """The settings from ``path`` (default: the working directory's file), then ``overrides``.

    An override that is None counts as not given, so that options can be handed on as
    they are. Paths in the file are relative to the file, others to the working directory.

    :raises UsageError: the file is not there though named, is no TOML, or a key or value
        is wrong; the message names the file and the key.
    """
    source = (path or Path(FILE_NAME)).absolute()
    values: dict[str, Any] = {}
    if path is not None or source.exists():
        values = _checked(_read(source), where=str(source), base=source.parent)
    given = {key: value for key, value in overrides.items() if value is not None}
    values |= _checked(given, where=_OPTIONS, base=Path.cwd())
    values.setdefault("reports", Path.cwd() / Settings.reports)
    for key, value in _FLAVOURS.get(values.get("flavour", ""), {}).items():
        values.setdefault(key, value)
    memory_mb = values.get("host_memory_mb", Settings.host_memory_mb)
    values.setdefault("workers", fitting_workers(memory_mb))
    return Settings(**values)


def with_series(settings: Settings) -> Settings:
    """The settings with both series as directories of patches, fetched where need be.

    A kernel series that is described is held to the interface that its description names.

    :raises UsageError: a series is not there, or not whole, or its description is wrong.
    :raises BuildError: it could not be fetched.
    """
    kernel = fetched(settings.kernel_series, root=settings.cache)
    settings = dataclasses.replace(
        settings,
        kernel_series=kernel,
        qemu_series=fetched(settings.qemu_series, root=settings.cache),
        description=settings.description or found_beside(kernel) or _beside_mbox(settings),
    )
    description = description_of(settings)
    return dataclasses.replace(
        settings, abi=settings.abi or (description.revision if description else "v12")
    )


def _beside_mbox(settings: Settings) -> str:
    """As :func:`found_beside`, for a series that is a file: what was made of it is in the cache."""
    mbox = Path(str(settings.kernel_series).partition("#")[0])
    return found_beside(mbox.parent) if mbox.is_file() else ""


def _read(source: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"settings file {source} cannot be read: {error.strerror}",
            hint="name a file that exists, or leave it out to run with the defaults",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"settings file {source} is not valid TOML: {error}",
            hint="correct that line; a setting looks like: workers = 2",
        ) from error


def _checked(values: dict[str, Any], *, where: str, base: Path) -> dict[str, Any]:
    """The values of one source, each of its field's type; relative paths from ``base``."""
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _TYPES:
            raise UsageError(
                f"{where}: unknown setting {key!r}", hint=f"known are: {', '.join(sorted(_TYPES))}"
            )
        if _TYPES[key] in (Path, Path | None, Path | str):
            if not isinstance(value, str | Path):
                raise UsageError(
                    f"{where}: {key} = {value!r} is not a path", hint='a path is text: "…"'
                )
            series = _TYPES[key] == Path | str
            checked[key] = (
                anchored(str(value), base=base) if series else base / Path(value).expanduser()
            )
            continue
        if key == "description" and isinstance(value, str) and (base / value).is_file():
            checked[key] = str(base / value)
            continue
        try:
            # Options of a command are all text; a file says what is a number.
            checked[key] = msgspec.convert(value, _TYPES[key], strict=where != _OPTIONS)
        except msgspec.ValidationError as error:
            default = getattr(Settings, key, None)
            raise UsageError(
                f"{where}: {key} = {value!r}: {str(error)[:1].lower()}{str(error)[1:]}",
                hint=f"for example: {key} = {4 if default is None else repr(default)}",
            ) from error
    return checked
