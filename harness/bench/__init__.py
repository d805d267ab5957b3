# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a vCPU is held for one introspection event and its reply.

    bench_events(settings, Options())      # builds, boots, measures, reports

What is measured runs in the host, in native code: ``guest-images/bench``. This package puts it
there, has it measure in rounds, and makes figures of its samples.
"""

from harness.bench.run import Options, bench_events

__all__ = ["Options", "bench_events"]
