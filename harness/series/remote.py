# SPDX-License-Identifier: GPL-2.0-or-later
"""Where series come from that are not files here: git trees, and mailing lists by way of b4."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.build import cache
from harness.build.progress import step
from harness.build.run import output_of, run_logged
from harness.errors import BuildError, UsageError

__all__ = ["clone", "commit_of", "nearest_release", "require_tree", "thread"]

_CLONE_TIMEOUT_S = 2 * 3600
_B4_TIMEOUT_S = 300


@contextmanager
def clone(url: str, *, root: Path) -> Iterator[Path]:
    """A bare clone of ``url`` in the cache, up to date; nobody changes it until the block ends.

    File contents are fetched when they are needed, where the server can do that.

    :raises BuildError: it cannot be reached, or is no git tree.
    """
    place = root / "git" / cache.key_of({"url": url})
    log = root / "logs" / "clone.log"
    # Nobody sits there to type a password.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    with (
        cache.full_disk(root, f"cloning {url}"),
        cache.lock(place.with_suffix(".lock"), what=f"the clone of {url}"),
    ):
        log.unlink(missing_ok=True)
        if not (place / "HEAD").is_file():
            partial = place.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            argv = ["git", "clone", "-q", "--mirror", "--filter=blob:none", url, str(partial)]
        else:
            argv = ["git", f"--git-dir={place}", "fetch", "-q", "--prune", "origin"]
        with step(f"Fetch {url}"):
            try:
                run_logged(
                    argv,
                    cwd=place.parent,
                    log=log,
                    timeout_s=_CLONE_TIMEOUT_S,
                    env=environment,
                    what=f"fetching {url}",
                )
            except BuildError as error:
                error.hint = f"is it a git tree, and the network there? {error.hint}"
                raise
        if argv[1] == "clone":
            partial.rename(place)
        yield place


def require_tree(tree: Path) -> None:
    """:raises UsageError: git knows no repository in that directory."""
    done = subprocess.run(
        ["git", "rev-parse", "--git-dir"], cwd=tree, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise UsageError(
            f"{tree} is no git tree",
            hint="name a work tree or a bare repository",
            details=done.stderr.decode(errors="replace").strip(),
        )


def commit_of(tree: Path, name: str, *, what: str) -> str:
    """The id of the commit ``name`` of a git tree.

    :param what: whose name it is, for the message.
    :raises UsageError: there is none.
    """
    done = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"],
        cwd=tree,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise UsageError(
            f"{what}: there is no commit {name} in {tree}",
            hint="name a branch, a tag, or a commit's id of a git tree",
        )
    return done.stdout.decode().strip()


def nearest_release(tree: Path, tip: str) -> str:
    """The newest release tag that ``tip`` descends from, such as ``v6.12``.

    :raises UsageError: there is none, so nobody can tell where the series begins.
    """
    try:
        return output_of(
            ["git", "describe", "--tags", "--abbrev=0", "--match=v[0-9]*", f"--exclude={tip}", tip],
            cwd=tree,
            timeout_s=_CLONE_TIMEOUT_S,
        ).strip()
    except BuildError as error:
        raise UsageError(
            f"where the series {tip} begins cannot be told: it descends from no tag v…",
            hint="name its base, too: URL#BASE..TIP",
            details=error.details,
        ) from error


def thread(message: str, scratch: Path) -> Path:
    """The mbox of the thread with that message id, or of that archive's URL, fetched by b4.

    :param scratch: a directory of ours, where it is left.
    :raises UsageError: b4 is not installed.
    :raises BuildError: b4 could not fetch it; ``details`` has its words.
    """
    beside = Path(sys.executable).with_name("b4")
    program = shutil.which("b4") or (str(beside) if beside.is_file() else None)
    if program is None:
        raise UsageError(
            f"to fetch {message} from a list's archive, b4 is needed and is not installed",
            hint="pip install b4; or save the thread as an mbox and give that file",
        )
    argv = [program, "mbox", "--no-cache", "-o", str(scratch), "-n", "thread", message]
    try:
        done = subprocess.run(
            argv,
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_B4_TIMEOUT_S,
            check=False,
        )
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        failed = f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        said, failed = "", f"not done after {_B4_TIMEOUT_S} s"
    mbox = next(iter(sorted(scratch.glob("thread*"))), None)
    if failed or mbox is None:
        raise BuildError(
            f"b4 could not fetch {message}: {failed or 'it found nothing'}",
            hint="is the network there, and the id right? An mbox of the thread serves as well",
            details=said,
        )
    return mbox
