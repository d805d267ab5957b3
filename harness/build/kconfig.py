# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel configuration fragments: what is asked for, and whether it was granted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError, UsageError

__all__ = ["Asked", "check", "read_fragment"]

_SET = re.compile(r"^CONFIG_(\w+)=(.+)$")
_NOT_SET = re.compile(r"^# CONFIG_(\w+) is not set$")


@dataclass(frozen=True)
class Asked:
    """One line of a fragment."""

    option: str
    """The name without ``CONFIG_``."""
    value: str
    """``y``, ``n``, a number or a quoted text, as in the file."""
    where: str
    """``file:line`` of the request."""


def read_fragment(path: Path) -> list[Asked]:
    """The options that the fragment asks for.

    :raises UsageError: it cannot be read, or a line is neither an option nor a comment.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        names = sorted(one.stem for one in path.parent.glob("*.config"))
        raise UsageError(
            f"kernel configuration {path} cannot be read: {error.strerror}",
            hint=f"flavours are the fragments there: {', '.join(names) or 'none'}",
        ) from error
    asked = []
    for number, line in enumerate(lines, 1):
        where = f"{path.name}:{number}"
        if found := _SET.match(line.rstrip()):
            asked.append(Asked(found[1], found[2], where))
        elif found := _NOT_SET.match(line.rstrip()):
            asked.append(Asked(found[1], "n", where))
        elif line.strip() and not line.startswith("#"):
            raise UsageError(
                f"{path}:{number} is no option: {line.strip()!r}",
                hint="a line is CONFIG_NAME=value, or a comment that begins with #",
            )
    return asked


def check(asked: Iterable[Asked], config: str, *, tree: Path, base: str) -> None:
    """Check that the finished ``config`` grants everything; a later request wins.

    :param tree: the kernel's source, to say where an option that got lost is defined.
    :param base: what the source is called in messages.
    :raises ConfigError: names the first option that got lost; the others in the details.
    """
    granted = {}
    for line in config.splitlines():
        if found := _SET.match(line):
            granted[found[1]] = found[2]
    final = {one.option: one for one in asked}
    lost = [one for one in final.values() if granted.get(one.option, "n") != one.value]
    if not lost:
        return
    reasons = {one: _reason(one, granted, tree) for one in lost}
    first = lost[0]
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    raise ConfigError(
        f"the configuration of {base} lacks CONFIG_{first.option}={first.value}, "
        f"asked for in {first.where}: {reasons[first]}{more}",
        hint="add what it depends on to the fragment, or drop the line; "
        "an option of a series is there only if the series is complete",
        details="\n".join(
            f"{one.where}: CONFIG_{one.option}={one.value}: {reasons[one]}" for one in lost
        ),
    )


def _reason(one: Asked, granted: dict[str, str], tree: Path) -> str:
    """Why the option may have got lost, as far as the Kconfig files tell."""
    entry = re.compile(rf"^[ \t]*(?:menu)?config {re.escape(one.option)}[ \t]*$", re.MULTILINE)
    for path in sorted(tree.rglob("Kconfig*")):
        text = path.read_text(errors="replace")
        if found := entry.search(text):
            line = text.count("\n", 0, found.start()) + 1
            body = re.split(r"\n(?:menu)?config |\n(?:end)?(?:if|menu|choice)\b|\n\s*help\b",
                            text[found.end():], maxsplit=1)[0]  # fmt: skip
            needs = re.findall(r"^\s+depends on (.+)$", body, re.MULTILINE)
            got = granted.get(one.option)
            became = f"it became {got}; " if got else ""
            depends = f", depends on {' && '.join(needs)}" if needs else ""
            return f"{became}defined at {path.relative_to(tree)}:{line}{depends}"
    return "this kernel has no such option"
