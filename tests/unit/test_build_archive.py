# SPDX-License-Identifier: GPL-2.0-or-later
"""Where Debian's packages come from: as the machine's own apt configuration has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.build.archive import Archive, machine_archives, machine_codename, primary
from harness.build.sources import Source
from harness.errors import UsageError

_ONE_LINE = """
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] http://mirror.example/debian bookworm main contrib  # words
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian bookworm-updates main
deb http://security.example/debian-security bookworm-security main
deb http://vendor.example/linux bookworm stable
deb http://vendor.example/other nodistro main
deb cdrom:[Debian 12]/ bookworm main
"""  # noqa: E501

_DEB822 = """
Types: deb deb-src
# words
URIs: http://mirror.example/debian
Suites: trixie trixie-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: http://off.example/debian
Suites: trixie
Components: main
Enabled: no
"""


def _etc(tmp_path: Path, name: str, text: str) -> Path:
    place = tmp_path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return tmp_path


def test_the_one_line_format(tmp_path: Path) -> None:
    archives = machine_archives("bookworm", _etc(tmp_path, "sources.list", _ONE_LINE))
    assert [one.suite for one in archives] == [
        "bookworm",
        "bookworm-updates",
        "bookworm-security",
    ]
    assert archives[0].options == (("Signed-By", "/usr/share/keyrings/x.gpg"),)
    assert archives[0].components == ("main",)


def test_the_deb822_format(tmp_path: Path) -> None:
    etc = _etc(tmp_path, "sources.list.d/debian.sources", _DEB822)
    archives = machine_archives("trixie", etc)
    assert [one.suite for one in archives] == ["trixie", "trixie-updates"]
    stanza = archives[0].stanza("deb-src")
    assert "Types: deb-src\nURIs: http://mirror.example/debian\nSuites: trixie\n" in stanza
    assert "Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n" in stanza


def test_debian_is_told_from_a_vendor_with_the_same_suite_name() -> None:
    vendor = Archive("http://vendor.example/x", "bookworm", ("main",))
    debian = Archive("http://mirror.example/pub/d", "bookworm", ("main",))
    updates = Archive("http://mirror.example/pub/d", "bookworm-updates", ("main",))
    assert primary([vendor, debian, updates], "bookworm") == debian


def test_a_machine_without_debian_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no entry for Debian"):
        primary([], "bookworm")


def test_the_code_name_of_the_machine(tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('NAME="Debian GNU/Linux"\nVERSION_CODENAME=trixie\n')
    assert machine_codename(release) == "trixie"


@pytest.mark.parametrize(
    ("version", "upstream"),
    [
        ("6.12.57-1~deb12u1", "6.12.57"),
        ("1:10.0.2+ds-2+deb13u1", "10.0.2"),
        ("6.12.8-1", "6.12.8"),
    ],
)
def test_the_authors_version(version: str, upstream: str) -> None:
    assert Source("x", version, "", Path("x")).upstream == upstream
