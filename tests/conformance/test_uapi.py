# SPDX-License-Identifier: GPL-2.0-or-later
"""The C headers that the series adds, for those who write tools and device managers."""

from __future__ import annotations

import contextlib
import re

import pytest

from harness.abi import Profile
from harness.abi.cheader import check_headers
from harness.build.kernel import uapi_headers
from harness.errors import UsageError
from harness.plugin import skip_clause
from harness.plugin.fixtures import ClauseNotes
from harness.settings import Settings


@pytest.mark.clause(
    "CAP-NUMBER", "HOOK-ABI", "UNHOOK-ABI", "IOCCMD-ABI", "IOCEVT-ABI", "PREUNHOOK-ABI", "MSG-HDR",
    "EVT-VM-ID", "EVT-VCPU-ID",
)  # fmt: skip
@pytest.mark.needs("source")
@pytest.mark.timeout(900)  # another run may be compiling in the tree
def test_headers(settings: Settings, profile: Profile, clauses: ClauseNotes) -> None:
    """linux/kvm.h and linux/kvmi.h have the numbers, sizes and offsets of the interface.

    Of commands and events those are held to it that the headers name: which ones a kernel has
    to have is the matter of other clauses.
    """
    with contextlib.ExitStack() as stack:
        try:
            include = stack.enter_context(uapi_headers(settings))
        except UsageError as error:
            skip_clause(f"the kernel's source is not at hand: {error}")
        header = include[0] / "linux/kvmi.h"
        if not header.is_file():
            skip_clause("the series has no linux/kvmi.h")
        named = set(re.findall(r"\bKVMI_\w+", header.read_text()))
        checked = check_headers(
            profile,
            include,
            commands=[one.name for one in profile.commands.values() if one.c_name in named],
            events=[one.name for one in profile.events.values() if one.c_name in named],
        )
    clauses.note(f"{checked.assertions} assertions about the headers hold")
