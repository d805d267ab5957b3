# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptions of series: read strictly, and made from headers by the compiler."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from harness import paths
from harness.abi import load_profile
from harness.abi.cheader import generate_header
from harness.build.series import load_series
from harness.errors import UsageError
from harness.series.describe import derive
from harness.series.description import (
    Description,
    found_beside,
    interface,
    load_description,
    shipped,
    to_toml,
)
from harness.settings import load_settings, with_series

OWN = paths.KERNEL_CONFIG / "linux"


def test_shipped_descriptions_fit_their_profiles() -> None:
    assert set(shipped()) == {"linux-6.12", "v12", "v7", "v6"}
    for name in shipped():
        one = load_description(name)
        whole = load_profile(one.revision)
        assert set(one.commands) == set(whole.commands)
        assert one.ioctls == {key: i.request for key, i in whole.ioctls.items()}
        assert one.profile.unclaimed == ()
    assert load_description("v12").capability == 206
    assert load_description("v6").revision == "v6"


def test_a_description_is_written_and_read_back(tmp_path: Path) -> None:
    one = load_description("v7")
    file = tmp_path / "series.toml"
    file.write_text(to_toml(one))
    assert load_description(str(file)) == one
    assert found_beside(tmp_path) == str(file)
    assert found_beside(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('revision = "v12"', 'revision = "v11"', "revision is 'v11', not one of v12, v6, v7"),
        ("capability = 999", 'capability = "999"', r"Expected `int`, got `str` - at `\$.cap"),
        ("capability = 999", "capability = -1", "capability is -1"),
        ("capability = 999", "", "missing required field `capability`"),
        ("capability = 999", "capability = 999\nspeed = 1", "unknown field `speed`"),
        ('"VM_GET_INFO",', '"VM_GET_INF",', r"commands: VM_GET_INF is unknown \(VM_GET_INFO\?\)"),
        ('"VM_GET_INFO",', '"VM_GET_INFO", "VM_GET_INFO",', "VM_GET_INFO is there 2 times"),
        ('"CONFIG_KVM_INTROSPECTION"', '"KVM"', "'KVM' is no CONFIG_"),
        ("HOOK = 0x4018aec8", "HOOKS = 0x4018aec8", r"ioctls: HOOKS is unknown \(HOOK\?\)"),
        ("[ioctls]", "[ioctls", "is wrong: "),
    ],
)
def test_what_is_wrong_is_named_with_its_file(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    text = to_toml(load_description("linux-6.12"))
    assert old in text
    file = tmp_path / "series.toml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=complaint) as caught:
        load_description(str(file))
    assert str(file) in caught.value.message


def test_names_and_files_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="v11 cannot be read") as caught:
        load_description("v11")
    assert "v12, v6, v7" in caught.value.hint
    with pytest.raises(UsageError, match="cannot be read"):
        load_description("/nonexistent/series.toml")


def test_a_description_beside_the_patches_chooses_the_interface(tmp_path: Path) -> None:
    (tmp_path / "series.toml").write_text(to_toml(load_description("v7")))
    settings = load_settings(kernel_series=tmp_path, qemu_series=tmp_path, cache=tmp_path)
    assert with_series(settings).abi == "v7"
    assert interface(with_series(settings)).capability == 180


def _headers(place: Path) -> Path:
    """The headers for user space that the own series makes, without a kernel's source."""
    place.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    added = []
    new = ("include/uapi/linux/kvmi.h", "arch/x86/include/uapi/asm/kvmi.h")
    for patch in sorted(OWN.glob("*.patch")):
        text = patch.read_text()
        options = [f"--include={path}" for path in new]
        subprocess.run(["git", "apply", *options, str(patch)], cwd=place, check=True)
        for file in re.split(r"^diff --git ", text, flags=re.MULTILINE):
            if "+++ b/include/uapi/linux/kvm.h\n" in file:
                added += re.findall(r"^\+(?!\+\+ )(.*)$", file, re.MULTILINE)
    # What it adds to KVM's own header, after what that has already.
    (place / "include/uapi/linux/kvm.h").write_text(
        "#pragma once\n#include_next <linux/kvm.h>\n" + "\n".join(added) + "\n"
    )
    (place / "include/uapi/linux/kvm_para.h").write_text("#include_next <linux/kvm_para.h>\n")
    return place


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _headers(tmp_path_factory.mktemp("headers") / "src")


def _derived(source: Path) -> tuple[Description, tuple[str, ...]]:
    include = [source / "include/uapi", source / "arch/x86/include/uapi"]
    found = derive(load_series(OWN), include)
    return found.description, found.differences


def test_the_own_series_is_described_by_its_headers(source: Path) -> None:
    description, differences = _derived(source)
    assert description == load_description("linux-6.12")
    assert differences == ()


@pytest.mark.parametrize(
    ("file", "change", "difference"),
    [
        (
            "include/uapi/linux/kvm.h",
            ("KVM_CAP_INTROSPECTION 999", "KVM_CAP_INTROSPECTION 206"),
            "KVM_CAP_INTROSPECTION is 206, v12 has 999",
        ),
        (
            "include/uapi/linux/kvm.h",
            ("_IO(KVMIO, 0xcc)", "_IO(KVMIO, 0xcd)"),
            "ioctl KVM_INTROSPECTION_PREUNHOOK is 0xaecd, expected 0xaecc",
        ),
        (
            "include/uapi/linux/kvmi.h",
            ("= 8,", "= 80,"),
            "command KVMI_VM_GET_INFO is 0x50, expected 0x8",
        ),
        (
            "include/uapi/linux/kvmi.h",
            (
                "\t__u32 vcpu_count;\n\t__u32 padding[3];",
                "\t__u64 vcpu_count;\n\t__u32 padding[2];",
            ),
            "struct kvmi_vm_get_info_reply: vcpu_count is at 0 (8 bytes), expected 0 (4 bytes)",
        ),
        (
            "include/uapi/linux/kvmi.h",
            ("\t__u32 vcpu_count;\n", "\t__u32 vcpus;\n"),
            "struct kvmi_vm_get_info_reply has no member vcpu_count",
        ),
    ],
)
def test_headers_that_differ_are_told(
    source: Path, tmp_path: Path, file: str, change: tuple[str, str], difference: str
) -> None:
    changed = tmp_path / "src"
    subprocess.run(["cp", "-r", str(source), str(changed)], check=True)
    text = (changed / file).read_text()
    assert change[0] in text
    (changed / file).write_text(text.replace(*change, 1))
    assert difference in _derived(changed)[1]


def test_what_is_new_is_told(source: Path, tmp_path: Path) -> None:
    """A command that the data do not have, in a series that adds one to the own ones."""
    patch = tmp_path / "9999.patch"
    patch.write_text(
        "diff --git a/include/uapi/linux/kvmi.h b/include/uapi/linux/kvmi.h\n"
        "--- a/include/uapi/linux/kvmi.h\n+++ b/include/uapi/linux/kvmi.h\n"
        "@@ -1,0 +1,0 @@\n+\tKVMI_VM_FLY = 22,\n+struct kvmi_vm_fly {\n"
    )
    series = tmp_path / "series"
    subprocess.run(["cp", "-r", str(OWN), str(series)], check=True)
    patch.rename(series / patch.name)
    changed = tmp_path / "src"
    subprocess.run(["cp", "-r", str(source), str(changed)], check=True)
    header = changed / "include/uapi/linux/kvmi.h"
    text = header.read_text().replace("= 20,", "= 20,\n\tKVMI_VM_FLY = 22,", 1)
    header.write_text(text.replace("#endif", "struct kvmi_vm_fly { __u64 height; };\n#endif"))
    include = [changed / "include/uapi", changed / "arch/x86/include/uapi"]
    found = derive(load_series(series), include)
    assert found.differences == (
        "command KVMI_VM_FLY (0x16) is not in the ABI data",
        "struct kvmi_vm_fly (8 bytes) is not in the ABI data",
    )
    assert found.description.revision == load_profile("v12").name


@pytest.mark.parametrize("name", ["v6", "v7", "v12"])
def test_each_revision_is_recognised_by_its_headers(tmp_path: Path, name: str) -> None:
    """From headers that define all by macros, as the older ones do."""
    profile = load_profile(name)
    text = "#include <linux/kvm.h>\n" + generate_header(profile)
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/kvmi.h").write_text(text)
    series = tmp_path / "series"
    series.mkdir()
    lines = text.splitlines()
    (series / "0001-x.patch").write_text(
        "Subject: [PATCH] x\n\ndiff --git a/include/uapi/linux/kvmi.h b/include/uapi/linux/kvmi.h\n"
        f"--- /dev/null\n+++ b/include/uapi/linux/kvmi.h\n@@ -0,0 +1,{len(lines)} @@\n"
        + "".join(f"+{line}\n" for line in lines)
    )
    found = derive(load_series(series), [tmp_path])
    assert found.differences == ()
    assert found.description.revision == name
    assert found.description.ioctls == load_description(name).ioctls


def test_a_series_without_headers_is_no_introspection(tmp_path: Path) -> None:
    (tmp_path / "0001-x.patch").write_text("Subject: [PATCH] x\n\n--- a/f\n+++ b/f\n")
    with pytest.raises(UsageError, match="adds no introspection interface"):
        derive(load_series(tmp_path), [tmp_path])


def test_headers_that_do_not_compile_are_told(source: Path, tmp_path: Path) -> None:
    changed = tmp_path / "src"
    subprocess.run(["cp", "-r", str(source), str(changed)], check=True)
    header = changed / "include/uapi/linux/kvmi.h"
    header.write_text(header.read_text() + "\nstruct broken { nonsense x; };\n")
    with pytest.raises(UsageError, match=r"cannot be compiled: .*nonsense"):
        _derived(changed)
