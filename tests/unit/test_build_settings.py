# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings and the place of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import paths, resources
from harness.errors import UsageError
from harness.settings import load_settings


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_defaults_need_no_file(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.target == "auto"
    assert settings.reports == tmp_path / "reports"
    assert settings.kernel_series == paths.ROOT / "kernel-config" / "linux"


def test_workers_fit_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are given; the memory of the hosts counts."""
    monkeypatch.setattr(resources, "free_cores", lambda: 16)
    monkeypatch.setattr(resources, "free_memory_mb", lambda: 14000)
    assert load_settings().workers == 10
    assert load_settings(host_memory_mb=4000).workers == 2
    assert load_settings(host_memory_mb=16000).workers == 1
    assert load_settings(workers=7).workers == 7
    monkeypatch.setattr(resources, "free_cores", lambda: 2)
    monkeypatch.setattr(resources, "free_memory_mb", lambda: 24 << 10)
    assert load_settings().workers == 2


def test_a_container_has_its_own_limits(tmp_path: Path) -> None:
    """Those of the group and of all around it count."""
    cores, memory_mb = resources.free_cores(tmp_path), resources.free_memory_mb(tmp_path)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.free_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{512 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{500 << 20}\n")
    assert resources.free_cores(tmp_path) == 1
    assert resources.free_memory_mb(tmp_path) == 12 < memory_mb


def test_an_option_wins_over_the_file_and_none_does_not(tmp_path: Path) -> None:
    Path("kvmi-harness.toml").write_text("workers = 3\nquiet_s = 1\n")
    assert load_settings(workers=None).workers == 3
    assert load_settings(workers=5).workers == 5
    assert load_settings(workers="6").workers == 6
    assert load_settings().quiet_s == 1.0


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    named = tmp_path / "sub" / "mine.toml"
    named.write_text('kernel_series = "series"\n')
    assert load_settings(named).kernel_series == tmp_path / "sub" / "series"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wrokers = 3", ["kvmi-harness.toml", "'wrokers'", "workers"]),
        ('workers = "two"', ["kvmi-harness.toml", "workers", "int"]),
        ("workers = 0", ["workers", ">= 1"]),
        ("cache = 7", ["cache", "not a path"]),
        ("workers =\n\n", ["kvmi-harness.toml", "TOML", "line 1"]),
        ('target = "No Such!"', ["target"]),
    ],
)
def test_a_malformed_file_is_named_with_its_key(text: str, words: list[str]) -> None:
    Path("kvmi-harness.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_settings()
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(UsageError, match="options: workers = 'many'"):
        load_settings(workers="many")


def test_a_file_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_settings(tmp_path / "none.toml")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVMI_CACHE", str(tmp_path / "one"))
    assert paths.cache_dir() == tmp_path / "one"
    monkeypatch.delenv("KVMI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert paths.cache_dir() == tmp_path / "two" / "kvmi-harness"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert paths.cache_dir() == Path.home() / ".cache" / "kvmi-harness"
