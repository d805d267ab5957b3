# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run was started with, as each of its processes finds it again.

:func:`harness.conform.conform` builds once and leaves settings and builds in the run's
directory; the workers take them from there. Without them (pytest called by hand) a worker
reads the user's settings and has everything built, which is quick once it is cached.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from harness.report.store import MACHINE, write_atomically

if TYPE_CHECKING:
    from harness.build.builds import Builds
    from harness.hosts import MachineFacts, Target
    from harness.report.model import MachineRecord
    from harness.settings import Settings

__all__ = [
    "load_run_settings",
    "machine_record",
    "prepared_target",
    "save_builds",
    "save_machine",
    "save_settings",
]

SETTINGS = "settings.json"
BUILDS = "build.json"


def _plain(value: Any) -> Any:
    """JSON's types for a dataclass with paths in it."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=str))


def save_settings(run_dir: Path, settings: Settings) -> None:
    """Leave the settings for the workers and for the reader of the report."""
    write_atomically(run_dir / SETTINGS, msgspec.json.encode(_plain(settings)))


def load_run_settings(run_dir: Path, **overrides: Any) -> Settings:
    """The settings of the run, or else the user's; ``overrides`` count where not None."""
    from harness.settings import load_settings

    path = run_dir / SETTINGS
    saved = msgspec.json.decode(path.read_bytes()) if path.is_file() else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    return load_settings(**(saved | given))


def save_builds(run_dir: Path, builds: Builds) -> None:
    """Leave what was built for the workers."""
    write_atomically(run_dir / BUILDS, msgspec.json.encode(_plain(builds)))


def _load_builds(run_dir: Path, settings: Settings) -> Builds:
    from harness.build.builds import Builds, build_all

    path = run_dir / BUILDS
    if path.is_file():
        data = msgspec.json.decode(path.read_bytes())
        return msgspec.convert(data, Builds, dec_hook=lambda to, value: to(value))
    return build_all(settings)


def prepared_target(settings: Settings, run_dir: Path) -> Target:
    """The target of the settings with kernel and images in it, ready to start hosts."""
    from harness.hosts import target_for

    target = target_for(settings)
    builds = _load_builds(run_dir, settings)
    target.prepare(builds.kernel, builds.images)
    if not (run_dir / MACHINE).exists():
        save_machine(run_dir, target.facts())
    return target


def machine_record(facts: MachineFacts) -> MachineRecord:
    """A target's facts as a run records them; unknown ones are kept as text."""
    from harness.report.model import MachineRecord

    known = {field.name for field in msgspec.structs.fields(MachineRecord)}
    values: dict[str, Any] = {}
    extra: dict[str, str] = {}
    for field in dataclasses.fields(facts):
        value = getattr(facts, field.name)
        if field.name in known:
            values[field.name] = value
        else:
            extra[field.name] = str(value)
    return msgspec.convert(values | {"extra": extra}, MachineRecord)


def save_machine(run_dir: Path, facts: MachineFacts) -> None:
    """Leave the machine's facts where the report looks for them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / MACHINE, msgspec.json.encode(machine_record(facts)))
