# SPDX-License-Identifier: GPL-2.0-or-later
"""The forms in which a series is given, told apart, checked, and brought into one.

What comes out is a directory of patches. One that is given as such is checked and used as it
is; everything else becomes a directory in the cache, named by its content::

    <cache>/series/<key>/<name>/0000-cover-letter.patch, 0001-….patch, …
    <cache>/git/<key>/                  bare clones, for series in a tree on another machine
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.build import cache
from harness.build.progress import note
from harness.build.run import output_of
from harness.errors import UsageError
from harness.series import remote
from harness.series.description import FILE_NAME
from harness.series.mail import Kind, Mail, read_mail
from harness.series.thread import Given, ordered, series_in

__all__ = ["FORMS", "anchored", "fetched"]

FORMS = (
    "a directory of patches; an mbox; TREE:BASE..TIP of a git tree here; "
    "URL#BASE..TIP or URL#TIP of one elsewhere; a message id"
)
"""For messages: what a series may be given as."""

_RANGE = re.compile(r"(?P<tree>.+?):(?P<range>[^:]+?\.\.[^:.][^:]*)")
_REMOTE = re.compile(
    r"(?P<url>(?:[a-z][a-z0-9+]*://|[^/#@\s]+@[^/#:\s]+:)[^#\s]+)#(?P<ref>[^#\s]+)"
)
_MESSAGE = re.compile(r"<?(?P<id>[^\s/<>#]+@[^\s/<>#]+)>?|https?://\S+/[^\s/]+@[^\s/]+(?:/\S*)?")
_CHOSEN = re.compile(r"(?P<file>.+)#(?P<number>[1-9]\d*)")
_GIT_TIMEOUT_S = 900
_MOST_PATCHES = 1000


def anchored(text: str, *, base: Path) -> Path | str:
    """``text`` with relative paths in it made absolute from ``base``; a path if it names one.

    Looks at nothing but files here: a series elsewhere is fetched by :func:`fetched`.
    """
    path = base / Path(text).expanduser()
    if path.exists():
        return path
    if (found := _CHOSEN.fullmatch(text)) and (file := base / found["file"]).is_file():
        return f"{file}#{found['number']}"
    if _REMOTE.fullmatch(text) or _MESSAGE.fullmatch(text):
        return text
    if found := _RANGE.fullmatch(text):
        return f"{base / Path(found['tree']).expanduser()}:{found['range']}"
    return path


def fetched(given: Path | str, *, root: Path) -> Path:
    """The directory of the patches of a series, checked to be whole.

    :param given: a directory or mbox, or text of another of :data:`FORMS`. ``MBOX#N`` is the
        N-th series of an mbox that holds several.
    :param root: the cache, as in ``settings.cache``.
    :raises UsageError: no such thing; no patches in it; several series; a patch that is
        missing, double, misplaced, or in fact a reply.
    :raises BuildError: git or b4 failed; the message says what at.
    """
    text = str(given)
    path = Path(given)
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _mbox(path, 0, root)
    if (found := _CHOSEN.fullmatch(text)) and Path(found["file"]).is_file():
        return _mbox(Path(found["file"]), int(found["number"]), root)
    # Before the range: a URL has a colon, too.
    if found := _REMOTE.fullmatch(text):
        with remote.clone(found["url"], root=root) as tree:
            return _commits(tree, found["ref"], what=text, root=root)
    if found := _RANGE.fullmatch(text):
        tree = Path(found["tree"])
        if not tree.is_dir():
            raise UsageError(f"{tree}, of {text}, is no directory", hint=_hint())
        return _commits(tree, found["range"], what=text, root=root)
    if _MESSAGE.fullmatch(text):
        return _message(text.strip("<>"), root)
    raise UsageError(f"there is no series {text}: no such directory or file", hint=_hint())


def _hint() -> str:
    return f"a series is {FORMS}"


def _directory(directory: Path) -> Path:
    """Check the patches of a directory: their names give the order."""
    mails = [
        read_mail(path.read_bytes(), name=path.name) for path in sorted(directory.glob("*.patch"))
    ]
    if not mails and (directory / ".git").exists():
        raise UsageError(
            f"{directory} is a git tree", hint=f"name the commits of the series: {directory}:A..B"
        )
    # An empty directory stands for no patches at all; one of something else is a mistake.
    others = sorted(path.name for path in directory.iterdir() if path.name != FILE_NAME)
    if not mails and others:
        raise UsageError(
            f"{directory} holds no patches: nothing there is called *.patch, but {others[0]} is",
            hint=_hint(),
        )
    patches = []
    for mail in mails:
        # format-patch calls the cover letter 0000; any other text is for people, too.
        if mail.kind is Kind.COVER or mail.name.startswith("0000-"):
            continue
        if mail.kind is not Kind.PATCH:
            raise UsageError(
                f"{mail.name} in {directory} is {mail.kind.value}, not a patch: {mail.label}",
                hint="put the mail there that begins with [PATCH n/m] and holds the diff",
            )
        patches.append(mail)
    if patches:
        ordered(Given(tuple(patches)), what=str(directory), by_name=True)
    return directory


def _mbox(path: Path, number: int, root: Path) -> Path:
    found = series_in(_split(path), what=str(path))
    if not number and len(found) > 1:
        listed = "\n".join(f"  {path}#{n}  {one.label}" for n, one in enumerate(found, start=1))
        raise UsageError(
            f"{path} holds {len(found)} series: " + "; ".join(one.label for one in found),
            hint=f"choose one of them, such as {path}#1",
            details=listed,
        )
    if number > len(found):
        raise UsageError(f"{path} holds {len(found)} series, so there is no {path}#{number}")
    return _kept(found[max(0, number - 1)], what=str(path), name=path.stem, root=root)


def _split(path: Path) -> list[Mail]:
    with tempfile.TemporaryDirectory(prefix="kvmi-mbox-") as scratch:
        # git knows a mail's first line from a line of text that begins with "From ".
        output_of(["git", "mailsplit", "-b", f"-o{scratch}", "--", str(path)])
        return [read_mail(mail.read_bytes()) for mail in sorted(Path(scratch).iterdir())]


def _message(wanted: str, root: Path) -> Path:
    message_id = next(part for part in wanted.split("/") if "@" in part)
    with tempfile.TemporaryDirectory(prefix="kvmi-b4-") as scratch:
        thread = remote.thread(wanted, Path(scratch))
        found = series_in(_split(thread), what=f"the thread of {wanted}")
    here = [
        one
        for one in found
        if any(
            mail and mail.message_id == f"<{message_id}>"
            for mail in (one.cover, *one.patches, *one.replies)
        )
    ]
    if len(here) != 1 and len(found) > 1:
        raise UsageError(
            f"the thread of {wanted} holds {len(found)} series: "
            + "; ".join(one.label for one in found),
            hint="give the message id of the cover letter or of a patch of the one you mean",
        )
    chosen = (here or found)[0]
    return _kept(chosen, what=f"the thread of {wanted}", name=_slug(chosen.title), root=root)


def _commits(tree: Path, reference: str, *, what: str, root: Path) -> Path:
    """The commits of a git tree as patches. ``reference`` is BASE..TIP, or the tip alone."""

    def git(*arguments: str) -> str:
        return output_of(["git", *arguments], cwd=tree, timeout_s=_GIT_TIMEOUT_S).strip()

    remote.require_tree(tree)
    base, _, tip = reference.rpartition("..")
    remote.commit_of(tree, tip, what=what)
    base = base or remote.nearest_release(tree, tip)
    remote.commit_of(tree, base, what=what)
    start = git("merge-base", base, tip)
    count = int(git("rev-list", "--count", f"{start}..{tip}"))
    if not 0 < count <= _MOST_PATCHES:
        raise UsageError(
            f"{what} has {count} commits since {base}",
            hint="name the commit that the series begins after: BASE..TIP",
        )
    if merges := git("rev-list", "--merges", "--oneline", f"{start}..{tip}"):
        raise UsageError(
            f"{what} is no series: {merges.splitlines()[0]} is a merge",
            hint="rebase the series onto its base, so that each commit is a patch",
        )
    with tempfile.TemporaryDirectory(prefix="kvmi-range-") as scratch:
        # All that somebody's own git settings could change is said here.
        git(
            "format-patch", "-q", "-n", "--no-attach", "--no-signature", "--zero-commit",
            "--no-cover-letter", "--no-thread", "--subject-prefix=PATCH", "--src-prefix=a/",
            "--dst-prefix=b/", "--no-ext-diff", "--no-textconv", "--full-index", "--binary",
            f"--base={start}", "-o", scratch, f"{start}..{tip}",
        )  # fmt: skip
        mails = [read_mail(path.read_bytes()) for path in sorted(Path(scratch).iterdir())]
    return _kept(Given(tuple(mails)), what=what, name=_slug(tip), root=root)


def _kept(series: Given, *, what: str, name: str, root: Path) -> Path:
    """The series as a directory in the cache."""
    patches = ordered(series, what=what)
    if series.replies:
        note(f"{what}: replies among the patches, left out: {len(series.replies)}")

    def make(into: Path) -> None:
        directory = into / name
        directory.mkdir()
        if series.cover is not None:
            (directory / "0000-cover-letter.patch").write_bytes(series.cover.content)
        for number, mail in enumerate(patches, start=1):
            file = directory / f"{number:04d}-{_slug(mail.title)}.patch"
            file.write_bytes(_plain(mail))

    digest = hashlib.sha256()
    for mail in (series.cover, *patches):
        digest.update(hashlib.sha256(mail.content if mail else b"").digest())
    inputs: dict[str, cache.Input] = {"mails": digest.hexdigest(), "name": name}
    return cache.entry("series", inputs, make, root=root) / name


def _plain(mail: Mail) -> bytes:
    """The mail as ``git format-patch`` would write it: no transfer encoding, UTF-8."""
    with tempfile.TemporaryDirectory(prefix="kvmi-mail-") as scratch:
        text, patch = Path(scratch, "text"), Path(scratch, "patch")
        facts = output_of(
            ["git", "mailinfo", "--no-scissors", str(text), str(patch)],
            cwd=Path(scratch),
            data=mail.content,
        )
        known = dict(line.split(": ", 1) for line in facts.splitlines() if ": " in line)
        number = f" {mail.number}/{mail.total}" if mail.number is not None else ""
        lines: Sequence[str] = (
            "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001",
            f"From: {known.get('Author', '?')} <{known.get('Email', '')}>",
            f"Date: {known.get('Date', 'Thu, 1 Jan 1970 00:00:00 +0000')}",
            f"Subject: [PATCH{number}] {known.get('Subject', mail.title)}",
            *([f"Message-ID: {mail.message_id}"] if mail.message_id else []),
        )
        return ("\n".join(lines) + "\n\n").encode() + text.read_bytes() + patch.read_bytes()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:52] or "series"
