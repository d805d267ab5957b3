# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel under wrong messages and ioctls."""

from __future__ import annotations

import pytest

from harness.fuzz import Fuzzer, load_plan
from harness.fuzz.plan import Batch
from harness.fuzz.run import add_figures
from harness.plugin.options import Session


@pytest.mark.timeout(600)
def test_batch(fuzzer: Fuzzer, batch: Batch, pytestconfig: pytest.Config) -> None:
    """No message or ioctl of these cases is answered wrongly, is lost, or harms the kernel."""
    run_dir = Session.of(pytestconfig).run_dir
    add_figures(run_dir, fuzzer.run(batch, seed=load_plan(run_dir).seed))
