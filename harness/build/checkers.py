# SPDX-License-Identifier: GPL-2.0-or-later
"""The trees' own checkers of patches and of C: checkpatch, and sparse of the kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from harness.build.kernel import (
    build_environment,
    local_version,
    make_variables,
    source_under_test,
)
from harness.build.series import Patch, load_series
from harness.errors import BuildError
from harness.settings import Settings

__all__ = ["checkpatch", "sparse"]

_TIMEOUT_S = 600
_REMARK = re.compile(r"^[^:\n]*:(?P<line>\d+): (?P<what>(?:ERROR|WARNING|CHECK):.*)$", re.MULTILINE)
_SPARSE = re.compile(
    r"^(?P<file>\S+\.[ch]):(?P<line>\d+):\d+: (?P<what>(?:warning|error): .*)$", re.MULTILINE
)


def checkpatch(src: Path, patch: Patch, *options: str) -> list[str]:
    """What the source's own ``scripts/checkpatch.pl`` says about a patch, a line each: its kind,
    its line in the patch, its words. Nothing, if it has nothing to say.

    :param options: that not every such script has.
    :raises BuildError: it cannot be run.
    """
    if shutil.which("perl") is None:
        raise BuildError("checkpatch needs perl", hint="apt-get install perl")
    # From its standard input: in a git tree it takes a file's name for that of a source.
    done = subprocess.run(
        ["perl", "scripts/checkpatch.pl", "--terse", "--no-summary", "--color=never", *options,
         "-"],
        cwd=src,
        input=patch.content,
        capture_output=True,
        timeout=_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    said = done.stdout.decode(errors="replace")
    found = [f"{one['what']} (line {one['line']})" for one in _REMARK.finditer(said)]
    if done.returncode != 0 and not found:
        words = done.stderr.decode(errors="replace").strip() or said.strip()
        raise BuildError(f"checkpatch failed: {words.splitlines()[0] if words else '?'}")
    return found


def sparse(settings: Settings, patch: Patch) -> list[str]:
    """What sparse says about the lines of C that the patch adds, as far as they are compiled.

    :param settings: whose series ends with the patch, and was built.
    :raises BuildError: sparse is not installed.
    :raises UsageError: the series was not built here.
    """
    if shutil.which("sparse") is None:
        raise BuildError("sparse is not installed", hint="apt-get install sparse")
    series = load_series(settings.kernel_series)
    with source_under_test(settings) as (tree, build, _lock):
        objects = [
            str(Path(file).with_suffix(".o"))
            for file in sorted(patch.touched())
            if file.endswith(".c") and (build / file).with_suffix(".o").exists()
        ]
        if not objects:
            return []
        variables = make_variables(LOCALVERSION=local_version(series))
        done = subprocess.run(
            ["make", f"-j{settings.jobs}", f"O={build}", "C=2", *variables, *objects],
            cwd=tree.src,
            env=build_environment(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    said = done.stderr.decode(errors="replace")
    added = patch.added()
    found: dict[str, None] = {}
    for one in _SPARSE.finditer(said):
        # Paths have detours in them, such as arch/x86/kvm/../../../virt/kvm.
        file = os.path.relpath(os.path.normpath(one["file"]), tree.src)
        if int(one["line"]) in added.get(file, ()):
            found[f"{file}:{one['line']}: {one['what']}"] = None
    return list(found)
