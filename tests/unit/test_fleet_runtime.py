# SPDX-License-Identifier: GPL-2.0-or-later
"""What is sent to a machine of a fleet."""

from __future__ import annotations

import json
from pathlib import Path

from harness.build.builds import Builds
from harness.build.images import Images
from harness.build.kernel import KernelBuild
from harness.build.qemu import QemuBuild
from harness.fleet.runtime import RUN, Runtime
from harness.settings import load_settings

SOME = Path("some")
BUILDS = Builds(
    KernelBuild(SOME, None, release="6.12.0", key="k", series="linux@1"),
    QemuBuild(SOME, SOME, version="10.0.0", key="q", series="qemu@1", libraries=()),
    Images(SOME, SOME, SOME, SOME, keys=SOME, key="i"),
)


def _sent(place: Path, description: str) -> str:
    settings = load_settings(description=description, reports=place, cache=place)
    Runtime(settings, BUILDS, site=SOME)._inputs(place / "run")
    saved: str = json.loads((place / "run" / "settings.json").read_bytes())["description"]
    return saved


def test_a_description_of_ours_goes_along(tmp_path: Path) -> None:
    ours = tmp_path / "mine.toml"
    ours.write_text('revision = "v7"\n')
    there = Path(_sent(tmp_path, str(ours)))
    assert str(there.parent) == RUN
    assert (tmp_path / "run" / there.name).read_text() == ours.read_text()


def test_one_that_comes_with_the_package_is_there(tmp_path: Path) -> None:
    assert _sent(tmp_path, "v7") == "v7"
    assert not list((tmp_path / "run").glob("*.toml"))
