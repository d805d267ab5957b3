# SPDX-License-Identifier: GPL-2.0-or-later
"""The tasks. Each calls one function of the package; ``inv --list`` shows them all.

Settings come from ``kvmi-harness.toml``, if there is one, and from a task's options.
"""

from __future__ import annotations

import os

from invoke.collection import Collection

from tasks.bench import bench_compare, bench_events
from tasks.build import (
    build_all,
    build_clean,
    build_images,
    build_kernel,
    build_packages,
    build_qemu,
    build_sources,
    doctor,
)
from tasks.keep import guest_ssh, guest_up, host_down, host_ssh, host_up, watch
from tasks.report import report_all, report_compare, report_merge, report_render
from tasks.series import series_check, series_describe, tree_edit, tree_refresh
from tasks.suite import conform, fuzz, mutants, nightly, revisions, selftests

namespace = Collection(
    doctor,
    conform,
    nightly,
    mutants,
    revisions,
    fuzz,
    selftests,
    watch,
    build=Collection(
        build_all,
        build_kernel,
        build_qemu,
        build_images,
        build_sources,
        build_packages,
        build_clean,
    ),
    bench=Collection(bench_events, bench_compare),
    tree=Collection(tree_edit, tree_refresh),
    series=Collection(series_describe, series_check),
    report=Collection(report_all, report_render, report_compare, report_merge),
    host=Collection(host_up, host_ssh, host_down),
    guest=Collection(guest_up, guest_ssh),
)
# Output of ours comes line by line also through a pipe, in step with that of children.
os.environ.setdefault("PYTHONUNBUFFERED", "1")
