# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tasks have: how they end, their settings, and the help of their options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invoke.exceptions import Exit
from invoke.tasks import task

from harness.errors import HarnessError
from harness.report import FORMATS as FORMATS_OF_REPORTS
from harness.series import FORMS
from harness.settings import Settings, load_settings, with_series

__all__ = ["harness_task", "ready", "settings_in"]

_INTERRUPTED = 130

_OPTIONS = {
    "target": "what provides the hosts: auto, kvm, tcg, bochs, ssh",
    "ssh_host": "the machine of target ssh, such as root@name:22",
    "workers": "test processes, each with a host of its own",
    "kernel_series": f"the kernel's patches: {FORMS}",
    "qemu_series": "QEMU's patches, likewise",
    "kernel_base": "what they are for, if not Debian's source: a tarball, or TREE:REF",
    "qemu_base": "likewise, for QEMU's patches",
    "flavour": "kernel configuration fragment on top of base",
    "kernel": "a bzImage that was built elsewhere, instead of the series",
    "abi": "version of the interface: v12, v7, v6 (default: what the series is described to speak)",
    "description": "what the series speaks: a TOML file, or v12, v7, v6 (default: its series.toml)",
    "reports": "directory of the reports",
    "select": "only these clauses (patterns), tests, or pytest's -k expression; of fuzz: a case; "
    "of mutants and revisions: their names (patterns)",
    "messages": "so many messages, at least",
    "sequences": "so many sequences of ioctls, at least",
    "repeat": "run each test so many times, until one is not good",
    "run": "directory of the run (default: the latest)",
    "which": "kernel or qemu",
    "directory": "of the tree (default: in the cache)",
    "series": "directory of the patches (default: that of the settings)",
    "command": "run this there instead of a shell",
    "rounds": "in each of which everything is measured once",
    "samples": "of each kind in each round",
    "vcpus": "how many raise events at the same time",
    "apart": "give the answering program a CPU of its own",
    "seed": "of the order in each round; of fuzz: any text (default: a new one)",
    "only": "these kinds, separated by blanks",
    "output": "write it to this file",
    "bisect": "find the first patch that changes this clause, without trying all",
    "shard": "run only this part, such as 2/3; inv report.merge makes one run of all parts",
    "known": "TOML file of known failures",
    "inventory": "TOML file of machines that the tests are spread over",
    "config": "TOML file of what a night is told; see examples/nightly.toml",
    "formats": f"of {', '.join(FORMATS_OF_REPORTS)} (default: all)",
    "against": "directory of an earlier run, to say in the mail what became of its verdicts",
    "before": "directory of a run; of bench.compare: a series or a bzImage",
    "after": "what is compared with it, likewise",
    "runs": "directories of runs, separated by blanks",
    "days": "keep what was used in so many days",
}


def harness_task(name: str | None = None, *, default: bool = False) -> Callable[..., Any]:
    """A task whose errors are told and whose options are explained."""

    def decorate(function: Callable[..., int | None]) -> Any:
        help_text = _explained(function)
        return task(name=name, default=default, help=help_text)(_told(function))

    return decorate


def _told(function: Callable[..., int | None]) -> Callable[..., None]:
    """End with one clear message and the error's exit code, never with a traceback of ours."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> None:
        try:
            code = function(*arguments, **options)
        except HarnessError as error:
            parts = [f"error: {error.message}"]
            if error.details:
                parts.insert(0, error.details)
            if error.hint:
                parts.append(f"  next: {error.hint}")
            raise Exit("\n".join(parts), code=error.exit_code) from error
        except KeyboardInterrupt:
            raise Exit("interrupted", code=_INTERRUPTED) from None
        if code:
            raise Exit(code=code)

    return wrapper


def _explained(function: Callable[..., Any]) -> dict[str, str]:
    """The options of a task, each with its line of help."""
    names = inspect.signature(function).parameters
    return {name: text for name, text in _OPTIONS.items() if name in names}


def ready(path: Path | None = None, **options: Any) -> Settings:
    """The settings, on a machine that has the packages: installed now if we may."""
    from harness.build.packages import ensure_packages, packages_for

    settings = load_settings(path, **options)
    ensure_packages(settings.cache / "logs" / "packages.log", packages_for(settings))
    return with_series(settings)


def settings_in(options: dict[str, Any]) -> dict[str, Any]:
    """Those of a task's options that are settings."""
    known = {field.name for field in dataclasses.fields(Settings)}
    return {name: value for name, value in options.items() if name in known}
