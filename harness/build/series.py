# SPDX-License-Identifier: GPL-2.0-or-later
"""A patch series: an ordered set of ``git format-patch`` files in a directory."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import PatchError, UsageError
from harness.series import FORMS, read_mail

__all__ = ["Patch", "Series", "failure", "load_series", "record"]

_TOUCHED = re.compile(
    rb"^(?:diff --git a/(?P<old>\S+) b/(?P<new>\S+)"
    rb"|--- a/(?P<minus>[^\t\n]+)|\+\+\+ b/(?P<plus>[^\t\n]+)"
    rb"|(?:rename|copy) (?:from|to) (?P<moved>[^\n]+))",
    re.MULTILINE,
)
_HUNK = re.compile(r"@@ -\S+ \+(?P<start>\d+)(?:,(?P<count>\d+))? @@")
_OPTION = re.compile(rb"^\+(?:menu)?config[ \t]+(?P<option>\w+)", re.MULTILINE)
_SUBJECT = re.compile(r"^Subject: (?:\[[^]]*\] )?(?P<text>.*(?:\n[ \t].*)*)", re.MULTILINE)
_FILE_LINE = re.compile(r"^error: patch failed: (?P<file>.+):(?P<line>\d+)$", re.MULTILINE)
_FILE_ONLY = re.compile(r"^error: (?P<file>[^:\n]+): (?P<why>.+)$", re.MULTILINE)
_CORRUPT = re.compile(r"^error: (?P<why>corrupt patch at (?:.*:|line )(?P<line>\d+))", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """One file of a series."""

    path: Path
    content: bytes

    @property
    def name(self) -> str:
        """The file's name, by which messages call the patch."""
        return self.path.name

    @property
    def subject(self) -> str:
        """The patch's one-line title, without ``[PATCH …]``; the file name if it has none."""
        found = _SUBJECT.search(self.content.decode(errors="replace"))
        return " ".join(found["text"].split()) if found else self.name

    def added(self) -> dict[str, set[int]]:
        """For each file the numbers of the lines that are new, as they are after the patch."""
        found: dict[str, set[int]] = {}
        lines: set[int] = set()
        number = left = 0
        for row in self.content.decode(errors="surrogateescape").split("\n"):
            if left > 0 and row[:1] in ("+", " ", ""):
                if row.startswith("+"):
                    lines.add(number)
                number, left = number + 1, left - 1
            elif row.startswith("+++ b/"):
                lines = found.setdefault(row[6:].split("\t")[0], set())
            elif hunk := _HUNK.match(row):
                number, left = int(hunk["start"]), int(hunk["count"] or 1)
        return found

    def touched(self) -> set[str]:
        """All paths that the patch may read, change, make, move or remove.

        A line of the patch's own text that happens to look like a header gives a path
        too many; that does no harm where this is used.
        """
        return {
            value.decode(errors="surrogateescape")
            for found in _TOUCHED.finditer(self.content)
            for value in found.groupdict().values()
            if value is not None
        }


@dataclass(frozen=True)
class Series:
    """The patches of a directory, in the order of their names. There may be none."""

    directory: Path
    patches: tuple[Patch, ...]
    cover: bytes = b""
    """The cover letter, if there is one."""

    @property
    def title(self) -> str:
        """That of the cover letter, or else of the first patch; empty without patches."""
        if self.cover:
            return read_mail(self.cover).title
        return self.patches[0].subject if self.patches else ""

    @property
    def made_for(self) -> str:
        """What its authors made it on, where they say so, for people."""
        mails = [read_mail(text) for text in (self.cover, *(p.content for p in self.patches))]
        base = next((mail.base_commit for mail in mails if mail.base_commit), "")
        before = len({one for mail in mails for one in mail.prerequisites})
        if not base:
            return ""
        more = f" with {before} more patches before it" if before else ""
        return f"commit {base[:12]}{more}"

    @property
    def patchset_hash(self) -> str:
        """As KCIDB defines it: SHA-256 over the patches' SHA-256, each on a line of its own."""
        sums = [hashlib.sha256(patch.content).hexdigest() + "\n" for patch in self.patches]
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 over the patches' contents in their order; names do not count."""
        summary = hashlib.sha256()
        for patch in self.patches:
            summary.update(hashlib.sha256(patch.content).digest())
        return summary.hexdigest()

    @property
    def id(self) -> str:
        """What reports call the series: the directory's name and the start of the digest."""
        return f"{self.directory.name}@{self.digest[:12]}"

    def options(self) -> set[str]:
        """The kernel options that it adds, without ``CONFIG_``."""
        text = b"\n".join(patch.content for patch in self.patches)
        return {found["option"].decode() for found in _OPTION.finditer(text)}

    def first(self, count: int) -> Series:
        """The series up to its patch ``count``."""
        return replace(self, patches=self.patches[:count])

    def touched(self) -> set[str]:
        """All paths that some patch touches."""
        return set().union(*(patch.touched() for patch in self.patches))


def load_series(directory: Path | str) -> Series:
    """Read ``directory/*.patch``.

    :raises UsageError: it is no directory, or a file in it cannot be read. A series in
        another form has to be fetched first: :func:`harness.settings.with_series`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UsageError(
            f"the series {directory} is no directory",
            hint=f"a series is {FORMS}",
        )
    try:
        files = [Patch(path, path.read_bytes()) for path in sorted(directory.glob("*.patch"))]
    except OSError as error:
        raise UsageError(f"the series {directory} cannot be read: {error}") from error
    # format-patch's cover letter is text for people.
    covers = [file for file in files if file.name.startswith("0000-")]
    patches = [file for file in files if file not in covers]
    return Series(directory, tuple(patches), covers[0].content if covers else b"")


def record(series: Series, *, base: str) -> dict[str, str]:
    """What reports say of a series beyond its id; nothing of one without patches.

    :param base: the source that it applies to.
    """
    facts = {
        "title": series.title,
        "patches": str(len(series.patches)),
        "patchset_hash": series.patchset_hash,
        "base": base,
        "message_id": read_mail(series.cover).message_id if series.cover else "",
    }
    return {name: value for name, value in facts.items() if value} if series.patches else {}


def failure(
    patch: Patch, complaint: str, *, base: str, kind: str, made_for: str = ""
) -> PatchError:
    """The error for a patch that ``git apply`` refused with ``complaint``.

    :param base: what it was applied to, for people.
    :param kind: ``kernel`` or ``qemu``, as the tree tasks call it.
    :param made_for: what the series says it was made for, if it does.
    """
    text = patch.content.decode(errors="replace")
    hunk = ""
    if found := _FILE_LINE.search(complaint):
        where = f"{found['file']} line {found['line']}"
        hunk = _hunk(text, found["file"], int(found["line"]))
        if hunk:
            where += f" (hunk {hunk.splitlines()[0]})"
    elif found := _CORRUPT.search(complaint):
        where = f"the patch file itself is damaged at its line {found['line']}"
    elif found := _FILE_ONLY.search(complaint):
        where = f"{found['file']}: {found['why']}"
    else:
        where = complaint.strip().splitlines()[0] if complaint.strip() else "git gave no reason"
    other = f" (the series says that it is for {made_for})" if made_for else ""
    return PatchError(
        f"patch {patch.name} does not apply to {base}{other}: {where}",
        hint=(
            f"`inv tree.edit {kind}` makes a tree in which to correct it, "
            f"`inv tree.refresh {kind}` writes the series back"
        ),
        details="\n".join(part for part in (complaint.strip(), hunk) if part),
    )


def _hunk(text: str, file: str, line: int) -> str:
    """The hunk of ``file`` that starts at ``line`` of the old file, as it stands in the patch."""
    inside = False
    taken: list[str] = []
    for row in text.splitlines():
        if row.startswith(("diff --git ", "-- ")):
            if taken:
                break
            inside = inside and not row.startswith("diff --git ")
        if row in (f"--- a/{file}", f"+++ b/{file}"):
            inside = True
        elif row.startswith("@@ -"):
            if taken:
                break
            if inside and re.match(rf"@@ -{line}[, ]", row):
                taken.append(row)
        elif taken:
            taken.append(row)
    return "\n".join(taken)
