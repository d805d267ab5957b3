# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m harness.report [RUN]``: make the documents of a stored run again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.errors import HarnessError
from harness.report import FORMATS, render
from harness.report.store import last_run


def main(arguments: list[str] | None = None) -> int:
    """Render a run; the exit code is that of errors, not of the run's verdicts."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description="Make the documents of a run again."
    )
    parser.add_argument(
        "run", nargs="?", type=Path, help="the run's directory (default: reports/latest)"
    )
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="only this document; repeatable"
    )
    options = parser.parse_args(arguments)
    try:
        run_dir = options.run or last_run(Path("reports"))
        view = render(run_dir, options.format or FORMATS)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if "html" in (options.format or FORMATS):
        print(f"Report: {view.run.path / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
