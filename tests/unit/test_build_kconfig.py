# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuration fragments: what was asked for must be granted."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import paths
from harness.build.kconfig import check, read_fragment
from harness.errors import ConfigError, UsageError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "virt").mkdir()
    (tmp_path / "virt" / "Kconfig").write_text(
        "config KVM\n\tbool\n\nconfig KVM_INTROSPECTION\n\tbool \"x\"\n"
        "\tdepends on KVM && X86_64\n\tdepends on NET\n\thelp\n\t  depends on nobody\n"
    )  # fmt: skip
    return tmp_path


def test_a_fragment_is_options_and_comments(tmp_path: Path) -> None:
    fragment = tmp_path / "x.config"
    fragment.write_text('# words\n\nCONFIG_A=y\nCONFIG_B="text"\n# CONFIG_C is not set\n')
    asked = read_fragment(fragment)
    assert [(one.option, one.value, one.where) for one in asked] == [
        ("A", "y", "x.config:3"),
        ("B", '"text"', "x.config:4"),
        ("C", "n", "x.config:5"),
    ]


def test_a_line_that_is_neither_is_named(tmp_path: Path) -> None:
    fragment = tmp_path / "x.config"
    fragment.write_text("CONFIG_A=y\nKVM = y\n")
    with pytest.raises(UsageError, match=r"x\.config:2 is no option: 'KVM = y'"):
        read_fragment(fragment)


def test_an_unknown_flavour_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="base, "):
        read_fragment(paths.KERNEL_CONFIG / "nonsense.config")


def test_the_project_s_fragments_can_be_read() -> None:
    for path in paths.KERNEL_CONFIG.glob("*.config"):
        asked = read_fragment(path)
        names = [one.option for one in asked]
        assert len(names) == len(set(names)), f"{path.name} asks twice"


def test_what_is_granted_passes(tmp_path: Path, tree: Path) -> None:
    fragment = tmp_path / "x.config"
    fragment.write_text("CONFIG_KVM=y\nCONFIG_GONE=n\nCONFIG_KVM=n\nCONFIG_KVM=y\n")
    check(read_fragment(fragment), "CONFIG_KVM=y\n", tree=tree, base="linux")


def test_a_lost_option_is_named_with_the_reason(tmp_path: Path, tree: Path) -> None:
    fragment = tmp_path / "x.config"
    fragment.write_text("CONFIG_KVM=y\nCONFIG_KVM_INTROSPECTION=y\nCONFIG_NONE=y\n")
    with pytest.raises(ConfigError) as caught:
        check(read_fragment(fragment), "CONFIG_KVM=y\n", tree=tree, base="linux 6.12")
    message = caught.value.message
    assert "linux 6.12 lacks CONFIG_KVM_INTROSPECTION=y, asked for in x.config:2" in message
    assert "defined at virt/Kconfig:4, depends on KVM && X86_64 && NET" in message
    assert "and 1 more" in message
    assert "CONFIG_NONE=y: this kernel has no such option" in caught.value.details


def test_an_option_of_another_value_counts_as_lost(tmp_path: Path, tree: Path) -> None:
    fragment = tmp_path / "x.config"
    fragment.write_text("CONFIG_KVM=n\n")
    with pytest.raises(ConfigError, match="it became y"):
        check(read_fragment(fragment), "CONFIG_KVM=y\n", tree=tree, base="linux")
