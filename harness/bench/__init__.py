# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a vCPU is held for one introspection event and its reply.

    bench_events(settings, Options())           # builds, boots, measures, reports
    bench_compare(before, after, Options())     # two kernels in turns: what got slower

What is measured runs in the host, in native code: ``guest-images/bench``. This package puts it
there, has it measure in rounds, and makes figures of its samples.
"""

from harness.bench.rounds import Options
from harness.bench.run import bench_compare, bench_events, kernel_named

__all__ = ["Options", "bench_compare", "bench_events", "kernel_named"]
