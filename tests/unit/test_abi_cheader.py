# SPDX-License-Identifier: GPL-2.0-or-later
"""The compiler's check of uapi headers, against headers written here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.abi import load_profile
from harness.abi.cheader import check_headers, generate_c, generate_header
from harness.errors import ConformanceError, UsageError

PROFILE = load_profile("v12")

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")


def header(tmp_path: Path, name: str = "v12") -> Path:
    """A directory with headers that have all that the profile says, as a kernel would."""
    (tmp_path / "linux").mkdir()
    text = generate_header(load_profile(name), kvm_structs=True)
    (tmp_path / "linux/kvmi.h").write_text(text)
    (tmp_path / "linux/kvm.h").touch()
    return tmp_path


@needs_compiler
def test_good_headers(tmp_path: Path) -> None:
    """All assertions hold for headers that agree with the profile."""
    check = check_headers(PROFILE, [header(tmp_path)])
    assert check.assertions > 500
    assert set(check.structs) == set(PROFILE.structs)


@needs_compiler
@pytest.mark.parametrize("name", ["v6", "v7"])
def test_good_headers_of_older_versions(tmp_path: Path, name: str) -> None:
    """Where events have no header, other structs and other names are needed."""
    profile = load_profile(name)
    include = [header(tmp_path, name)]
    assert set(check_headers(profile, include).structs) == set(profile.structs)
    part = check_headers(profile, include, commands=["GET_VERSION"], events=["CR"])
    assert "kvmi_event" in part.structs
    assert "kvmi_event_trap" not in part.structs


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("#define KVMI_VM_GET_INFO 0x8", "#define KVMI_VM_GET_INFO 0x80", "id of KVMI_VM_GET_INFO"),
        (
            "unsigned long long gpa",
            "unsigned int gpa",
            "size of struct kvmi_page_access_entry is not 16",
        ),
        ("unsigned int max_msg_size;", "unsigned int max;", "max_msg_size"),
    ],
)
def test_headers_that_differ(tmp_path: Path, old: str, new: str, message: str) -> None:
    """The first difference is named, the compiler's words are kept."""
    kvmi = header(tmp_path) / "linux/kvmi.h"
    kvmi.write_text(kvmi.read_text().replace(old, new, 1))
    with pytest.raises(ConformanceError, match=f"headers differ .*{message}") as caught:
        check_headers(PROFILE, [tmp_path])
    assert "error:" in caught.value.details


@needs_compiler
def test_header_of_our_programs(tmp_path: Path) -> None:
    """What our programs in C are compiled with agrees with the profile beside the system's kvm.h,
    whose structs it contains."""
    (tmp_path / "kvmi-abi.h").write_text(generate_header(PROFILE))
    check = check_headers(PROFILE, [tmp_path], headers=("linux/kvm.h", "kvmi-abi.h"))
    assert set(check.structs) == set(PROFILE.structs)


def test_a_part_of_the_interface() -> None:
    """A series that is not complete is asked only for what it has, and what that contains."""
    source = generate_c(PROFILE, commands=["VCPU_GET_REGISTERS"], events=["PAUSE"])
    assert "sizeof(struct kvmi_vcpu_get_registers_reply) == 472" in source
    assert "sizeof(struct kvm_segment) == 24" in source
    assert "kvmi_vcpu_event_cr" not in source
    assert "KVMI_VM_SET_PAGE_ACCESS" not in source


def test_wrong_calls(tmp_path: Path) -> None:
    """A missing directory or compiler is named."""
    with pytest.raises(UsageError, match="nowhere is not a directory"):
        check_headers(PROFILE, [tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="no C compiler no-such-cc"):
        check_headers(PROFILE, [tmp_path], compiler="no-such-cc")
