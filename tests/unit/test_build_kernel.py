# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels from elsewhere; and what a killed build leaves must not get into the next kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.build.kernel import build_kernel, half_written_removed
from harness.errors import UsageError
from harness.settings import load_settings


def _object(build: Path, name: str, *, written: int, recorded: int | None) -> Path:
    """An object of Kbuild's, and its record unless the build was killed before that."""
    path = build / "sub" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("object")
    os.utime(path, (written, written))
    if recorded is not None:
        record = path.with_name(f".{name}.cmd")
        record.write_text("command")
        os.utime(record, (recorded, recorded))
    return path


def test_objects_newer_than_their_record_are_made_again(tmp_path: Path) -> None:
    whole = _object(tmp_path, "whole.o", written=10, recorded=11)
    cut = _object(tmp_path, "cut.o", written=20, recorded=11)
    first = _object(tmp_path, "first.o", written=20, recorded=None)
    (tmp_path / ".unfinished").touch()
    with half_written_removed(tmp_path):
        assert whole.exists()
        assert not cut.exists()
        # make builds what has no record in any case.
        assert first.exists()
    assert not (tmp_path / ".unfinished").exists()


def test_nothing_is_removed_after_a_build_that_ended(tmp_path: Path) -> None:
    touched = _object(tmp_path, "touched.o", written=20, recorded=11)
    with half_written_removed(tmp_path):
        assert touched.exists()


def test_a_build_that_did_not_end_is_remembered(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), half_written_removed(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / ".unfinished").exists()


def test_a_kernel_from_elsewhere_is_copied_and_known_by_its_content(tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    head = bytearray(0x400)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x100).to_bytes(2, "little")
    head[0x300:0x320] = b"6.12.1-mine+ (me@here) #1 SMP".ljust(0x20, b"\0")
    image.write_bytes(head)
    settings = load_settings(cache=tmp_path / "cache", kernel=image)
    first = build_kernel(settings)
    assert first.release == "6.12.1-mine+"
    assert first.bzimage != image
    image.write_bytes(head + b"rebuilt")
    second = build_kernel(settings)
    assert first.bzimage.read_bytes() == head
    assert (second.key, second.series) != (first.key, first.series)


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(0x400), None])
def test_what_is_no_kernel_is_refused(tmp_path: Path, content: bytes | None) -> None:
    image = tmp_path / "vmlinux"
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(UsageError, match="vmlinux"):
        build_kernel(load_settings(cache=tmp_path / "cache", kernel=image))
