# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache: directories named by a hash of all that went into them.

::

    <root>/<kind>/<key>/            complete, never changed again
    <root>/<kind>/<key>/inputs.json what it was made from
    <root>/<kind>/<key>.partial/    being made, or left behind by a process that was killed
    <root>/<kind>/lock              held by whoever makes something of this kind

An entry appears under its name by one rename, so whatever has its name is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.build.progress import note
from harness.build.run import without_space
from harness.errors import BuildError, DeadlineError

__all__ = ["Input", "clean", "digest_of", "entry", "full_disk", "key_of", "lock", "require_space"]

Input = str | bytes | Path
"""Text and bytes as they are; a path stands for the content below it."""

_LOCK_TIMEOUT_S = 7200.0
_SHORT = 4000
# Each changed patch makes a new kernel, and from it images and a saved host of hundreds
# of megabytes; whoever works on a series all day should not fill his disk with them.
_KEPT_OF_A_KIND = 8
_MAYBE_IN_USE_S = 3 * 3600.0


def entry(
    kind: str,
    inputs: Mapping[str, Input],
    make: Callable[[Path], None],
    *,
    root: Path,
) -> Path:
    """The directory made from ``inputs``; made now if the cache does not have it.

    :param kind: what it is (``kernel``, ``qemu``, ``host``, ...); a directory's name.
    :param inputs: all that can change the result: text and bytes count as they are, a
        path counts by the content of that file, or of all files below that directory.
    :param make: fills the empty directory that it is given. It must not make another
        entry of the same kind: makers of one kind wait for each other.
    :param root: the cache, as in ``settings.cache``.
    :raises BuildError: the cache cannot be written (full, read-only, not ours); and
        whatever ``make`` raises. Nothing is left then that looks complete.

    Making an entry deletes the oldest of its kind: those that nobody asked for in the last
    hours, except the newest few.
    """
    digests = {name: digest_of(value) for name, value in sorted(inputs.items())}
    key = key_of(digests)
    place = root / kind / key
    if (place / "inputs.json").is_file():
        _mark_used(place)
        return place
    with full_disk(root, f"making {kind} {key}"), lock(root / kind / "lock", what=kind):
        if (place / "inputs.json").is_file():  # somebody made it while we waited
            return place
        for stale in (root / kind).glob("*.partial"):
            shutil.rmtree(stale)
        partial = place.with_suffix(".partial")
        partial.mkdir()
        try:
            make(partial)
            record = {
                name: {
                    "sha256": digests[name],
                    "value": value if isinstance(value, str) and len(value) < _SHORT else None,
                }
                for name, value in sorted(inputs.items())
            }
            (partial / "inputs.json").write_text(json.dumps(record, indent=1) + "\n")
            if place.exists():  # damaged: it has the name but not the record
                shutil.rmtree(place)
            partial.rename(place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _delete(root / kind, unused_s=_MAYBE_IN_USE_S, keep=_KEPT_OF_A_KIND)
    return place


def key_of(digests: Mapping[str, str]) -> str:
    """The name of what is made from inputs with these digests: 16 hexadecimal digits."""
    text = json.dumps(digests, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(value: Input) -> str:
    """SHA-256 of an input, in hexadecimal digits."""
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if value.is_dir():
        summary = hashlib.sha256()
        for path in sorted(value.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                mode = "x" if os.access(path, os.X_OK) else "-"
                line = f"{path.relative_to(value)}\0{mode}\0{digest_of(path)}\n"
                summary.update(line.encode())
        return summary.hexdigest()
    with value.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: Path, *, what: str, timeout_s: float = _LOCK_TIMEOUT_S) -> Iterator[int]:
    """Hold the lock file ``path``; yields its descriptor.

    The kernel frees the lock when the last process that has the descriptor is gone, so
    a killed holder blocks nobody, and one that hands the descriptor to its children
    (see :func:`harness.build.run.run_logged`) keeps others out until these are gone too.

    :raises DeadlineError: another process held it for ``timeout_s`` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + timeout_s
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "?"
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"{path} was still held by process {holder} after {timeout_s:.0f} s",
                        hint=f"another run is at work on {what}; wait for it or end it",
                    ) from None
                if not told:
                    note(f"waiting for process {holder}, which is at work on {what}")
                    told = True
                # flock has no timeout of its own, and a signal would disturb the caller.
                time.sleep(0.1)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def full_disk(root: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's refusals to write below ``root`` into clear errors.

    :raises BuildError: says what was being done, where, and how to make room.
    """
    try:
        yield
    except OSError as error:
        if without_space(error):
            raise BuildError(
                f"no space left in {root} while {doing}",
                hint=(
                    "a first run needs about 6 GB there: free some, drop what is old with "
                    "`inv build.clean`, or set KVMI_CACHE to a directory on a larger disk"
                ),
                details=str(error),
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise BuildError(
                f"the cache {root} cannot be written while {doing}: {error}",
                hint="set KVMI_CACHE to a directory of your own",
            ) from error
        raise


def require_space(root: Path, *, megabytes: int, purpose: str) -> None:
    """Check that ``root`` has room before work begins that would fail after minutes.

    :raises BuildError: less than ``megabytes`` MiB are free there.
    """
    with full_disk(root, f"looking for room for {purpose}"):
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free >> 20
    if free < megabytes:
        raise BuildError(
            f"{purpose} needs {megabytes} MB in {root}, where {free} MB are free",
            hint="free some, drop what is old with `inv build.clean`, or set KVMI_CACHE",
        )


def _mark_used(place: Path) -> None:
    """Leave the time of use for :func:`clean`; a cache that cannot be written may be read."""
    try:
        os.utime(place)
    except OSError:
        return


def clean(root: Path, *, unused_days: float) -> int:
    """Delete entries and source trees that nobody asked for in so many days.

    What is being made or built in is left alone, and so are fetched sources.

    :returns: how many were deleted.
    """
    unused_s = unused_days * 86400
    count = 0
    for guard in sorted(root.glob("*/lock")):
        with suppress(DeadlineError), lock(guard, what=guard.parent.name, timeout_s=0):
            count += _delete(guard.parent, unused_s=unused_s, keep=0)
    for guard in sorted(root.glob("trees/*/lock")):
        # Whoever takes the lock writes into it, so its time is that of the last use.
        if time.time() - guard.stat().st_mtime < unused_s:
            continue
        with suppress(DeadlineError), lock(guard, what=guard.parent.name, timeout_s=0):
            shutil.rmtree(guard.parent)
            count += 1
    return count


def _delete(kind: Path, *, unused_s: float, keep: int) -> int:
    """Delete what was not used for ``unused_s``, except the ``keep`` newest; their lock is held."""
    used = {record.parent: record.parent.stat().st_mtime for record in kind.glob("*/inputs.json")}
    newest_first = sorted(used, key=lambda place: used[place], reverse=True)
    old = [place for place in newest_first[keep:] if used[place] < time.time() - unused_s]
    for place in old:
        (place / "inputs.json").unlink()  # first: a directory without it is no entry
        shutil.rmtree(place)
    return len(old)
