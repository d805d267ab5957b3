# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers that a series defines, and what it is held to: found out before anything is built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness import paths
from harness.build.kernel import _asked
from harness.build.series import load_series
from harness.conform import speaks_to_qemu
from harness.errors import UsageError
from harness.revisions import REVISIONS, load_revisions
from harness.series import interface
from harness.series.numbers import defined_numbers, require_numbers
from harness.settings import Settings, load_settings, with_series

OWN = paths.KERNEL_CONFIG / "linux"


def _settings(place: Path, series: Path, **more: object) -> Settings:
    given = {"kernel_series": series, "qemu_series": series, "cache": place} | more
    return with_series(load_settings(None, **given))


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """The own series with other numbers for the capability and HOOK, not described."""
    series = tmp_path / "series"
    shutil.copytree(OWN, series)
    for patch in load_series(REVISIONS / "numbers").patches:
        shutil.copy(patch.path, series / f"9{patch.name}")
    return series


def test_numbers_are_read_from_the_text_of_patches(changed: Path) -> None:
    numbers = defined_numbers(load_series(OWN))
    assert numbers == {
        "KVM_CAP_INTROSPECTION": 999,
        "KVM_INTROSPECTION_HOOK": 0xC8,
        "KVM_INTROSPECTION_UNHOOK": 0xC9,
        "KVM_INTROSPECTION_COMMAND": 0xCA,
        "KVM_INTROSPECTION_EVENT": 0xCB,
        "KVM_INTROSPECTION_PREUNHOOK": 0xCC,
    }
    mine = {"KVM_CAP_INTROSPECTION": 998, "KVM_INTROSPECTION_HOOK": 0xD8}
    assert defined_numbers(load_series(changed)) == numbers | mine


def test_other_numbers_without_a_description_are_an_error(changed: Path, tmp_path: Path) -> None:
    """What, where, and what to do."""
    with pytest.raises(UsageError) as caught:
        require_numbers(_settings(tmp_path, changed))
    assert caught.value.message == (
        f"the series in {changed} has other numbers than the profile v12: "
        "KVM_CAP_INTROSPECTION is 998 there and 999 here; "
        "KVM_INTROSPECTION_HOOK is 0xd8 there and 0xc8 here"
    )
    assert "inv series.describe" in caught.value.hint
    assert str(changed / "series.toml") in caught.value.hint


def test_a_description_settles_it(changed: Path, tmp_path: Path) -> None:
    shutil.copy(REVISIONS / "numbers" / "series.toml", changed)
    settings = _settings(tmp_path, changed)
    require_numbers(settings)
    profile = interface(settings)
    assert (profile.name, profile.capability, profile.ioctl("HOOK").nr) == ("v12", 998, 0xD8)


def test_a_description_may_lie_beside_an_mbox(changed: Path, tmp_path: Path) -> None:
    mbox = tmp_path / "theirs" / "v12.mbox"
    mbox.parent.mkdir()
    mbox.write_bytes(b"".join(path.read_bytes() for path in sorted(changed.glob("*.patch"))))
    shutil.copy(REVISIONS / "numbers" / "series.toml", mbox.parent)
    settings = with_series(_settings(tmp_path, mbox))
    assert settings.description == str(mbox.parent / "series.toml")
    assert interface(settings).capability == 998


def test_a_description_that_is_wrong_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"than v12: KVM_CAP_INTROSPECTION is 999 there and 206"):
        require_numbers(_settings(tmp_path, OWN, description="v12"))


def test_another_version_may_be_demanded(tmp_path: Path) -> None:
    """To see how a kernel differs from a version that it does not speak."""
    settings = _settings(tmp_path, OWN, abi="v7")
    require_numbers(settings)
    assert interface(settings).name == "v7"
    assert interface(_settings(tmp_path, OWN)).name == "v12"


def test_tests_with_qemu_need_its_numbers(changed: Path, tmp_path: Path) -> None:
    """QEMU has been built with those of this project; of another one nothing is known."""
    shutil.copy(REVISIONS / "numbers" / "series.toml", changed)
    qemu = {"qemu_series": Settings.qemu_series}
    assert speaks_to_qemu(_settings(tmp_path, OWN, **qemu))
    assert not speaks_to_qemu(_settings(tmp_path, changed, **qemu))
    assert not speaks_to_qemu(_settings(tmp_path, OWN, **qemu, abi="v7"))
    assert speaks_to_qemu(_settings(tmp_path, changed))


def test_options_are_those_of_the_description(tmp_path: Path) -> None:
    series = tmp_path / "series"
    shutil.copytree(OWN, series)
    text = (REVISIONS / "numbers" / "series.toml").read_text()
    one = '"CONFIG_KVM_INTROSPECTION"'
    (series / "series.toml").write_text(text.replace(one, f'{one}, "CONFIG_KVM_XEN"'))
    asked = {ask.option: ask for ask in _asked(_settings(tmp_path, series), load_series(series))}
    assert asked["KVM_INTROSPECTION"].value == asked["KVM_XEN"].value == "y"
    assert asked["KVM_XEN"].where == str(series / "series.toml")
    # The first patches do not have them yet.
    first = load_series(series).first(1)
    assert "KVM_XEN" not in {ask.option for ask in _asked(_settings(tmp_path, series), first)}


def test_shipped_revisions() -> None:
    found = {one.name: one for one in load_revisions()}
    assert found.keys() == {"v6", "v7", "numbers", "v12-as-v7"}
    assert [name for name, one in found.items() if one.red] == ["v12-as-v7"]
    for one in found.values():
        assert bool(load_series(one.place).patches) is not bool(one.red)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ('[gone]\nred = ["HOOK-OK"]', "there is no directory gone"),
        ('[here]\nred = ["CLEANUP-OK"]', "here: no clause CLEANUP-OK"),
        ("[here", "cannot be read"),
    ],
)
def test_wrong_revisions(tmp_path: Path, entries: str, complaint: str) -> None:
    (tmp_path / "here").mkdir()
    shutil.copy(REVISIONS / "v7" / "series.toml", tmp_path / "here")
    (tmp_path / "revisions.toml").write_text(entries)
    with pytest.raises(UsageError, match=complaint):
        load_revisions(tmp_path)
