# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from tasks.common import harness_task, ready, settings_in

if TYPE_CHECKING:
    from harness.bench import Options as BenchOptions

__all__ = ["bench_compare", "bench_events"]


def _bench_options(options: dict[str, Any]) -> BenchOptions:
    from harness.bench import Options

    known = {field.name for field in dataclasses.fields(Options)}
    given = {name: value for name, value in options.items() if name in known}
    return Options(**given | {"only": tuple(given["only"].split())})


@harness_task("events")
def bench_events(
    _context: Context,
    *,
    target: str | None = None,
    kernel: str | None = None,
    kernel_series: str | None = None,
    flavour: str | None = None,
    reports: str | None = None,
    rounds: int = 12,
    samples: int = 200,
    vcpus: int = 1,
    apart: bool = False,
    seed: int = 0,
    only: str = "",
) -> int:
    """Measure how long one event holds a vCPU, next to a plain exit to user space."""
    from harness.bench import bench_events as run

    given = dict(locals())
    options = _bench_options(given)
    return run(ready(**settings_in(given)), options)


@harness_task("compare")
def bench_compare(
    _context: Context,
    before: str,
    after: str,
    *,
    target: str | None = None,
    flavour: str | None = None,
    reports: str | None = None,
    rounds: int = 30,
    samples: int = 200,
    vcpus: int = 1,
    apart: bool = False,
    seed: int = 0,
    only: str = "",
) -> int:
    """Measure two kernels in turns, each a series or a bzImage; tell what got slower."""
    from harness.bench import bench_compare as run
    from harness.bench import kernel_named

    given = dict(locals())
    options = _bench_options(given)
    one, other = (
        ready(**(settings_in(given) | kernel_named(kernel))) for kernel in (before, after)
    )
    return run(one, other, options)
