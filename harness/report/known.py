# SPDX-License-Identifier: GPL-2.0-or-later
"""Known failures: promises that are known to be broken, and where that is tracked.

::

    [[known]]
    clause = "EV-PF-*"                 # an id, or a pattern
    tracked = "https://…/issues/12"
    reason = "one line"                # optional
    series = "linux@1a2b3c*"           # optional: a pattern of the series' id
    kernel = ">=6.12, <6.12.80"        # optional: a range of the kernel under test

They are reported as FAIL and as known, and do not make a run fail.
"""

from __future__ import annotations

import fnmatch
import operator
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from harness.errors import UsageError
from harness.report.model import RunFacts

__all__ = ["FILE_NAME", "Known", "known_for", "load_known"]

FILE_NAME = "known.toml"
"""Of the copy in a run's directory."""

_Comparison = Callable[[tuple[int, ...], tuple[int, ...]], bool]
_COMPARISONS: dict[str, _Comparison] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_BOUND = re.compile(r"\s*(?P<how>>=|<=|>|<|==)\s*(?P<version>\d+(?:\.\d+)*)\s*")


class Known(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry; see the top of this module."""

    clause: str
    tracked: str
    reason: str = ""
    series: str = "*"
    kernel: str = ""

    def covers(self, facts: RunFacts) -> bool:
        """Whether it is about the series and the kernel of a run."""
        words = [*facts.series.split(), facts.kernel.get("series", "")]
        if not any(fnmatch.fnmatchcase(word, self.series) for word in words):
            return False
        release = _version(facts.kernel.get("release", ""))
        return all(
            _COMPARISONS[bound["how"]](release, _version(bound["version"]))
            for bound in _bounds(self.kernel)
        )


class _File(msgspec.Struct, forbid_unknown_fields=True):
    known: list[Known] = []


def load_known(path: Path) -> list[Known]:
    """Read a list of known failures.

    :raises UsageError: no such file, or something in it is wrong; the message says what.
    """
    try:
        entries = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File).known
    except OSError as error:
        raise UsageError(f"the known failures {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            f"the known failures {path} are wrong: {error}",
            hint='an entry is: [[known]], clause = "HOOK-OK", tracked = "https://…"',
        ) from error
    from harness.abi import all_clauses

    for one in entries:
        if not fnmatch.filter(all_clauses(), one.clause):
            raise UsageError(f"{path}: there is no clause {one.clause}")
        if not one.tracked.strip():
            raise UsageError(
                f"{path}: {one.clause} does not say where it is tracked",
                hint='an address, or words that lead there: tracked = "https://…"',
            )
        if one.kernel and not _bounds(one.kernel):
            raise UsageError(
                f"{path}: {one.clause}: {one.kernel!r} is no range of kernels",
                hint='write bounds: ">=6.12, <6.12.80"',
            )
    return entries


def known_for(
    entries: Iterable[Known], clauses: Iterable[str], facts: RunFacts
) -> dict[str, Known]:
    """For each of the clauses that an entry covers in this run, the first such entry."""
    here = [one for one in entries if one.covers(facts)]
    found = {}
    for clause in clauses:
        for one in here:
            if fnmatch.fnmatchcase(clause, one.clause):
                found[clause] = one
                break
    return found


def _bounds(text: str) -> list[re.Match[str]]:
    """The bounds in a range; none if it cannot be read as a whole."""
    found = [_BOUND.fullmatch(part) for part in text.split(",")]
    return [one for one in found if one] if all(found) else []


def _version(text: str) -> tuple[int, ...]:
    """The numbers of a version that can be compared: 6.12 is 6.12.0."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
