# SPDX-License-Identifier: GPL-2.0-or-later
"""The mutants are in order: known clauses, and patches that follow the series."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.mutants import load_mutants, run
from harness.paths import KERNEL_CONFIG
from harness.settings import load_settings

# Files that the series itself makes, so that they can be had without the kernel's source.
OWN = {
    "kernel": ("linux", ("virt/kvm/introspection/*", "arch/x86/kvm/kvmi*")),
    "qemu": ("qemu", ("target/i386/kvm/introspection.c", "include/system/kvm-introspection.h")),
}
ENOUGH = {"kernel": 60, "qemu": 20}


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files that each series adds, as they are after its last patch."""
    trees = {}
    for kind, (directory, own) in OWN.items():
        tree = trees[kind] = tmp_path_factory.mktemp(kind)
        _git(tree, "init", "-q")
        for patch in sorted((KERNEL_CONFIG / directory).glob("*.patch")):
            text = patch.read_text(errors="replace")
            if any(name.rstrip("*") in text for name in own):
                _git(tree, "apply", *(f"--include={name}" for name in own), str(patch))
    return trees


def _git(tree: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["git", *arguments], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_are_enough() -> None:
    """Sixty ways of breaking the kernel and twenty of QEMU, each with clauses to turn red."""
    mutants = load_mutants()
    for kind, enough in ENOUGH.items():
        assert sum(mutant.of == kind for mutant in mutants) >= enough
    assert all(mutant.red for mutant in mutants)


@pytest.mark.parametrize("name", [mutant.name for mutant in load_mutants()])
def test_mutant_applies(name: str, series: dict[str, Path]) -> None:
    """The patch applies to the series as it is now."""
    mutant = next(mutant for mutant in load_mutants() if mutant.name == name)
    changed = re.findall(r"^\+\+\+ b/(.*)$", mutant.patch.read_text(), re.MULTILINE)
    tree = series[mutant.of]
    if any(not (tree / file).is_file() for file in changed):
        pytest.skip("it changes a file of the kernel itself, whose source is not at hand here")
    _git(tree, "apply", "--check", str(mutant.patch))


def test_entry_and_patch_belong_together(tmp_path: Path) -> None:
    """A patch without entry, an entry without patch and an unknown clause are usage errors."""
    (tmp_path / "lonely.patch").write_text("")
    (tmp_path / "mutants.toml").write_text(
        '[missing]\nred = ["NO-SUCH-CLAUSE"]\n[empty]\nof = "bochs"\n'
    )
    with pytest.raises(UsageError) as caught:
        load_mutants(tmp_path)
    message = caught.value.message
    complaints = "missing.patch", "lonely.patch has no entry", "NO-SUCH-CLAUSE", "empty names no"
    for word in (*complaints, "bochs"):
        assert word in message


def test_unknown_mutant() -> None:
    """A name that is no mutant's is a usage error that lists those there are."""
    with pytest.raises(UsageError, match="no-such") as caught:
        run(load_settings(), select="no-such lost-pause")
    assert "lost-pause" in caught.value.hint
