# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a test's evidence lies, and what of it there is."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["evidence_name", "files_in"]


def evidence_name(nodeid: str) -> str:
    """A directory's name for a test: readable, unique enough, fit for any file system."""
    short = nodeid.removeprefix("tests/").replace(".py::", "/").replace("::", "/")
    return "/".join(re.sub(r"[^\w.=+-]+", "_", part)[:120] for part in short.split("/"))


def files_in(folder: Path, run_dir: Path, prefix: str = "") -> dict[str, str]:
    """The files of a directory as evidence: name to path."""
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = prefix + path.relative_to(folder).with_suffix("").as_posix()
            found[name if name not in found else name + path.suffix] = path.relative_to(
                run_dir
            ).as_posix()
    return found
