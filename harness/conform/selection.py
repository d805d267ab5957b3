# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tests run: clauses, files and words, made arguments of pytest."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence

from harness import paths
from harness.abi import load_profile
from harness.errors import UsageError
from harness.series import interface
from harness.settings import Settings

__all__ = ["KERNEL_SUITES", "QEMU_SUITES", "SUITES", "selection", "speaks_to_qemu", "suites_for"]

KERNEL_SUITES = ("tests/conformance",)
"""Tests of the kernel alone: QEMU's patches do not change what they say."""

QEMU_SUITES = ("tests/lifecycle",)
"""Tests of both together."""

SUITES = (*KERNEL_SUITES, *QEMU_SUITES)


def selection(select: str | None, suites: Sequence[str] = SUITES) -> list[str]:
    """Arguments for pytest that choose what ``select`` names.

    :raises UsageError: a clause or file that does not exist.
    """
    if not select or not select.strip():
        return list(suites)
    # Blanks within the brackets of a parametrised test are part of its name.
    words = [word for word in re.split(r"[\s,]+(?![^\[]*\])", select.strip()) if word]
    if all(
        re.fullmatch(r"[A-Z][A-Z0-9]*-[A-Z0-9*?-]*|[A-Z0-9?-]*\*[A-Z0-9*?-]*", w) for w in words
    ):
        for word in words:
            _check_clause(word)
        return [*(f"--kvmi-clause={word}" for word in words), *suites]
    if all("::" in word or word.endswith(".py") or "/" in word for word in words):
        for word in words:
            if not (paths.ROOT / word.partition("::")[0]).exists():
                raise UsageError(f"there is no {word.partition('::')[0]} in {paths.ROOT}")
        return words
    if all(re.fullmatch(r"\w+", word) and word not in {"and", "or", "not"} for word in words):
        select = " or ".join(words)
    return ["-k", select, *suites]


def _check_clause(pattern: str) -> None:
    from harness.abi import all_clauses

    known = all_clauses()
    if not fnmatch.filter(known, pattern):
        near = difflib.get_close_matches(pattern, known, n=3)
        raise UsageError(
            f"there is no clause {pattern}",
            hint=f"did you mean {', '.join(near)}?" if near else "see harness/abi/clauses.toml",
        )


def suites_for(settings: Settings, asked: Sequence[str] = SUITES) -> tuple[Sequence[str], str]:
    """Those of the suites that were asked for that can be run with the kernel under test.

    :returns: them, and what is left out of the whole and why, for the report.
    """
    if set(asked) <= set(KERNEL_SUITES):
        return asked, "the QEMU side, as only the kernel's was asked for"
    if set(asked) <= set(QEMU_SUITES):
        return asked, "the kernel's side, as only QEMU's was asked for"
    if not speaks_to_qemu(settings):
        return KERNEL_SUITES, "the QEMU side, as QEMU has other numbers than the kernel"
    return asked, ""


def speaks_to_qemu(settings: Settings) -> bool:
    """Whether the kernel under test has the numbers that QEMU was built with, as far as known.

    They are known of this project's own QEMU series, which speaks to this project's own kernel.
    """
    if settings.qemu_series != Settings.qemu_series:
        return True
    own, under_test = load_profile("v12"), interface(settings)
    return (
        under_test.name == own.name
        and all(
            under_test.has(f"ioctl {one.common}") and under_test.ioctl(one.common) == one
            for one in own.ioctls.values()
        )
        and under_test.capability == own.capability
    )
