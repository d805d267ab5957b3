# SPDX-License-Identifier: GPL-2.0-or-later
"""Do the numbers that a series defines agree with those that it is going to be held to?

A look at the text of its patches, before anything is built: a kernel with another number for HOOK
would fail every test, and none of them could say why.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from harness.build.series import Series, load_series
from harness.errors import UsageError
from harness.series.description import FILE_NAME, description_of, interface

if TYPE_CHECKING:
    from harness.settings import Settings

__all__ = ["defined_numbers", "require_numbers"]

_CAPABILITY = "KVM_CAP_INTROSPECTION"
_DEFINED = re.compile(
    r"^#define (?P<name>KVM_CAP_INTROSPECTION|KVM_INTROSPECTION_\w+)\s+\\?\s*"
    r"(?:_IO\w*\(KVMIO,\s*)?(?P<number>0x[0-9a-fA-F]+|\d+)\b",
    re.MULTILINE,
)


def defined_numbers(series: Series) -> dict[str, int]:
    """Numbers of the capability and of the ioctls, by their names in C: the last ones of each."""
    numbers = {}
    for patch in series.patches:
        lines = patch.content.decode(errors="replace").splitlines()
        # With what is around: of a definition of two lines one may have changed.
        after = "\n".join(line[1:] for line in lines if line.startswith(("+", " ")))
        for found in _DEFINED.finditer(after):
            numbers[found["name"]] = int(found["number"], 0)
    return numbers


def require_numbers(settings: Settings) -> None:
    """Check the kernel series of the settings, if it is what runs.

    Not where the settings demand another version of the interface than it is described to have:
    to differ is the matter then.

    :raises UsageError: its headers have other numbers than those that it is held to.
    """
    description = description_of(settings)
    profile = interface(settings)
    if settings.kernel or (description and description.revision != profile.name):
        return
    series = load_series(settings.kernel_series)
    wanted = {one.c_name: one.nr for one in profile.ioctls.values()}
    wanted[_CAPABILITY] = profile.capability
    differing = [
        f"{name} is {number:#x} there and {wanted[name]:#x} here"
        if name != _CAPABILITY
        else f"{name} is {number} there and {wanted[name]} here"
        for name, number in defined_numbers(series).items()
        if name in wanted and number != wanted[name]
    ]
    if differing:
        here = settings.description or f"the profile {profile.name}"
        raise UsageError(
            f"the series in {series.directory} has other numbers than {here}: "
            + "; ".join(differing),
            hint=f"describe it: inv series.describe --kernel-series {series.directory} "
            f"--output {series.directory / FILE_NAME}",
        )
