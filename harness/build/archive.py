# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian archive that this machine is set up for, through apt with a state of our own.

Addresses, key rings and the way to the network are those of the machine's own apt
configuration. The system's package lists are neither needed nor touched, so the same
works for root, for an ordinary user, and on a machine whose lists were never fetched.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from harness.build.progress import Step
from harness.build.run import output_of, run_logged
from harness.errors import BuildError, UsageError

__all__ = ["Apt", "Archive", "machine_archives", "machine_codename", "primary"]

_TIMEOUT_S = 1800
_SUITE_ENDINGS = ("", "-updates", "-security", "-backports")
# Options of the one-line format and their names in the other one (sources.list(5)).
_OPTIONS = {
    "signed-by": "Signed-By",
    "trusted": "Trusted",
    "allow-insecure": "Allow-Insecure",
    "allow-weak": "Allow-Weak",
    "check-valid-until": "Check-Valid-Until",
    "check-date": "Check-Date",
    "by-hash": "By-Hash",
}


@dataclass(frozen=True)
class Archive:
    """One suite at one address, as an entry of apt's sources."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = field(default=())
    """Further fields in deb822 spelling, such as ``Signed-By``; values as they stand."""

    def stanza(self, types: str = "deb") -> str:
        """The entry in the deb822 format, for packages (``deb``) or sources (``deb-src``)."""
        lines = [
            f"Types: {types}",
            f"URIs: {self.uri}",
            f"Suites: {self.suite}",
            f"Components: {' '.join(self.components)}",
            *(f"{name}: {value}" for name, value in self.options),
        ]
        return "\n".join(lines) + "\n"


def machine_codename(os_release: Path = Path("/etc/os-release")) -> str:
    """The code name of the machine's Debian, such as ``bookworm``; empty if it tells none."""
    found = re.search(r'^VERSION_CODENAME="?(\w+)', os_release.read_text(), re.MULTILINE)
    return found[1] if found else ""


def machine_archives(codename: str, etc: Path = Path("/etc/apt")) -> list[Archive]:
    """Debian's own suites (``main``) among the machine's package sources.

    Other vendors' sources are left out: nothing of ours comes from there, and one that
    does not answer should not stop us.
    """
    wanted = {codename + ending for ending in _SUITE_ENDINGS}
    found: dict[tuple[str, str], Archive] = {}
    for archive in _all_archives(etc):
        if archive.suite in wanted and "main" in archive.components:
            one = Archive(archive.uri, archive.suite, ("main",), archive.options)
            found.setdefault((one.uri.rstrip("/"), one.suite), one)
    return list(found.values())


def primary(archives: Iterable[Archive], codename: str) -> Archive:
    """The one of ``archives`` that has Debian itself, and so also its other releases.

    :raises UsageError: there is none.
    """
    archives = list(archives)
    updated = {one.uri for one in archives if one.suite == f"{codename}-updates"}
    candidates = [one for one in archives if one.suite == codename]
    # A vendor may use the same suite name; Debian has updates beside it, or a telling path.
    candidates.sort(key=lambda one: (one.uri not in updated, "debian" not in one.uri))
    if not candidates:
        raise UsageError(
            f"apt's sources on this machine have no entry for Debian {codename or '?'} (main)",
            hint="add the line of your Debian mirror to /etc/apt/sources.list",
        )
    return candidates[0]


def _all_archives(etc: Path) -> Iterator[Archive]:
    parts = etc / "sources.list.d"
    for path in [etc / "sources.list", *sorted(parts.glob("*.list"))]:
        if path.is_file():
            yield from _one_line_style(path.read_text(errors="replace"))
    for path in sorted(parts.glob("*.sources")):
        yield from _deb822_style(path.read_text(errors="replace"))


def _one_line_style(text: str) -> Iterator[Archive]:
    for line in text.splitlines():
        found = re.match(
            r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<rest>[^#]*)",
            line,
        )
        if found is None or found["uri"].startswith("cdrom:"):
            continue
        options = []
        for option in (found["options"] or "").split():
            name, _, value = option.partition("=")
            if name.lower() in _OPTIONS:
                options.append((_OPTIONS[name.lower()], value.replace(",", " ")))
        yield Archive(found["uri"], found["suite"], tuple(found["rest"].split()), tuple(options))


def _deb822_style(text: str) -> Iterator[Archive]:
    kept = {name.lower(): name for name in _OPTIONS.values()}
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1].isspace() and name:  # a folded field, such as a key written out
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
            continue
        options = tuple((kept[key], value) for key, value in fields.items() if key in kept)
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Archive(uri, suite, tuple(fields.get("components", "").split()), options)


class Apt:
    """apt with its state in ``place`` and the package sources that it is given.

    A context manager: leaving it deletes the state.

    :param place: a directory of ours, made as needed. Nothing in it is worth keeping.
    :param stanzas: entries in the deb822 format.
    :param log: where apt's output goes.
    """

    def __init__(self, place: Path, stanzas: Iterable[str], *, log: Path) -> None:
        self._place = place
        self._log = log
        self._conf = place / "apt.conf"
        for part in ("lists/partial", "archives/partial"):
            (place / part).mkdir(parents=True, exist_ok=True)
        (place / "status").touch()
        (place / "debian.sources").write_text("\n".join(stanzas))
        self._conf.write_text(self._configuration())

    def _configuration(self) -> str:
        """Only what leads to the network comes from the machine: no hooks, no pins."""
        own = {
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Etc::sourcelist": str(self._place / "debian.sources"),
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": str(self._place),
            "Dir::State::status": str(self._place / "status"),
            "Dir::Cache": str(self._place),
            "Acquire::Languages": "none",
            "Acquire::GzipIndexes": "true",
            "Acquire::Retries": "3",
            # apt's own user may not enter our home directory.
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
        }
        lines = [f'{name} "{value}";' for name, value in own.items()]
        for line in output_of(["apt-config", "dump"]).splitlines():
            name = line.partition(" ")[0]
            if (
                name.startswith("Acquire::")
                and not name.startswith("Acquire::IndexTargets")
                and name not in own
            ):
                lines.append(line)
        return "\n".join(lines) + "\n"

    def _run(self, *arguments: str, cwd: Path, step: Step) -> None:
        def show(line: str) -> None:
            if line.startswith("dlstatus:"):
                _, _, percent, text = line.split(":", 3)
                step.update(done=int(float(percent)), total=100, doing=text)

        run_logged(
            [*arguments[:1], "-q", "-o", "APT::Status-Fd=1", *arguments[1:]],
            cwd=cwd,
            log=self._log,
            timeout_s=_TIMEOUT_S,
            env=self._environment(),
            what=" ".join(arguments[:2]),
            on_line=show,
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self._conf), "LC_ALL": "C.UTF-8"}

    def update(self, step: Step) -> None:
        """Fetch the lists.

        :raises BuildError: the archive cannot be reached or its signature is not trusted.
        """
        try:
            self._run("apt-get", "update", "--error-on=any", cwd=self._place, step=step)
        except BuildError as error:
            if "NO_PUBKEY" in error.details:
                error.hint = (
                    "this machine's key ring is older than the release we need: "
                    "apt-get install --only-upgrade debian-archive-keyring"
                )
            else:
                error.hint = f"is the network there, and apt's proxy right? {error.hint}"
            raise

    def versions(self, package: str) -> list[tuple[str, str]]:
        """The versions of ``package`` and the suites they are in, newest first."""
        rows = output_of(["apt-cache", "madison", package], env=self._environment())
        found = []
        for row in rows.splitlines():
            _, version, where = (cell.strip() for cell in row.split("|"))
            words = where.split()
            if words[-1] != "Sources":
                found.append((version, words[1].partition("/")[0]))
        return found

    def download(self, package: str, version: str, into: Path, step: Step) -> Path:
        """Fetch one binary package; returns its file."""
        self._run("apt-get", "download", f"{package}={version}", cwd=into, step=step)
        return next(into.glob(f"{package}_*.deb"))

    def source(self, package: str, into: Path, step: Step) -> Path:
        """Fetch the newest source package of this name; returns its .dsc file."""
        self._run(
            "apt-get", "source", "--download-only", "--only-source", package, cwd=into, step=step
        )
        return next(into.glob(f"{package}_*.dsc"))

    def tarball(self, package: str, into: Path, step: Step) -> Path:
        """Fetch its authors' part of the newest source package, without Debian's; its file."""
        self._run("apt-get", "source", "--tar-only", "--only-source", package, cwd=into, step=step)
        return next(into.glob(f"{package}_*.orig.tar.*"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Large, and the next time newer lists are wanted.
        shutil.rmtree(self._place, ignore_errors=True)
