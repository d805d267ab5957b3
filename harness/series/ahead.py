# SPDX-License-Identifier: GPL-2.0-or-later
"""Build what the next patch makes in a process of its own while this one's is tested.

``python -m harness.series.ahead SETTINGS PART``: it is nice, since tests have deadlines, and its
end ends the compilers. What comes of it is in the cache, or is found out again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.build.progress import step
from harness.build.run import bound_to_us
from harness.errors import HarnessError
from harness.series.parts import PARTS, Part
from harness.settings import Settings

__all__ = ["building_ahead"]

_NICE = 10
_GRACE_S = 20.0


@contextmanager
def building_ahead(part: Part, settings: Settings | None, place: Path) -> Iterator[None]:
    """Build that part of the settings while the block runs; nothing if they are None.

    After the block it is waited for; an exception ends it.

    :param place: a directory for its settings and its log.
    """
    if settings is None:
        yield
        return
    from harness.plugin.inputs import save_settings

    place.mkdir(parents=True, exist_ok=True)
    save_settings(place, settings)
    argv = [sys.executable, "-m", __spec__.name, str(place), part.name]
    with (place / "ahead.log").open("wb") as log:
        process = subprocess.Popen(
            bound_to_us(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            yield
            if process.poll() is None:
                with step("Build what is next"):
                    process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def main(place: Path, part: Part) -> int:
    """Build; failure is no news here."""
    from harness.plugin.inputs import load_run_settings

    os.nice(_NICE)
    # By an exception, so that the compilers are ended, and waited for, before we are gone.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))
    with contextlib.suppress(HarnessError):
        part.build(load_run_settings(place))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), PARTS[sys.argv[2]]))
