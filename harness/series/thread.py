# SPDX-License-Identifier: GPL-2.0-or-later
"""The series among mails: which belong together, in which order, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.errors import UsageError
from harness.series.mail import Kind, Mail

__all__ = ["Given", "ordered", "series_in"]


@dataclass(frozen=True)
class Given:
    """A series as somebody gave it: mails in no particular order."""

    patches: tuple[Mail, ...]
    cover: Mail | None = None
    replies: tuple[Mail, ...] = ()

    @property
    def title(self) -> str:
        """That of the cover letter, or of the first patch."""
        return (self.cover or self.patches[0]).title

    @property
    def label(self) -> str:
        """How messages call it: ``v2 of "KVM: …", 17 patches``."""
        first = self.patches[0]
        version = f"v{first.version} of " if first.version > 1 else ""
        return f'{version}"{self.title}", {len(self.patches)} of {first.total or 1} patches'

    @property
    def base_commit(self) -> str:
        """The commit that its author made it on; empty when no mail says so."""
        mails = (self.cover, *self.patches)
        return next((mail.base_commit for mail in mails if mail and mail.base_commit), "")

    @property
    def prerequisites(self) -> tuple[str, ...]:
        """Patch ids of what has to be applied before it."""
        mails = (self.cover, *self.patches)
        return tuple(dict.fromkeys(one for mail in mails if mail for one in mail.prerequisites))


def series_in(mails: Iterable[Mail], *, what: str) -> list[Given]:
    """The series among the mails, in the order in which they begin.

    Mails belong together that share the version and the total of their ``[PATCH v2 n/m]``
    and, where they are threaded, the thread. Replies go with the series that they answer.

    :param what: where the mails are from, for messages.
    :raises UsageError: there is no patch among them; the message says what there is.
    """
    known = list(mails)
    groups: dict[tuple[int, int | None, str], list[Mail]] = {}
    roots = {mail.root for mail in known if mail.root}
    for mail in known:
        if mail.kind in (Kind.PATCH, Kind.COVER):
            # The thread's first mail answers nobody; a mail outside any thread has no root.
            own = mail.message_id if mail.message_id in roots else ""
            groups.setdefault((mail.version, mail.total, mail.root or own), []).append(mail)
    found = []
    replies = [mail for mail in known if mail.kind is Kind.REPLY]
    for (_version, _total, root), members in groups.items():
        patches = tuple(mail for mail in members if mail.kind is Kind.PATCH)
        if patches:
            covers = [mail for mail in members if mail.kind is Kind.COVER]
            answers = tuple(mail for mail in replies if root and mail.root == root)
            found.append(Given(patches, covers[0] if covers else None, answers))
    if not found:
        said = [f"{mail.kind.value}: {mail.label}" for mail in known[:3]]
        raise UsageError(
            f"there is no patch in {what}; it holds {', '.join(said) or 'nothing'}",
            hint="give the mails that begin with [PATCH n/m] and hold a diff, not the answers",
        )
    return found


def ordered(series: Given, *, what: str, by_name: bool = False) -> tuple[Mail, ...]:
    """The series' patches in their order, complete.

    Patches without a number keep their place after those that have one.

    :param by_name: they were given in an order that counts, that of their files' names.
    :raises UsageError: a patch is missing, double, or out of order; all of them are named.
    """
    numbered = [mail for mail in series.patches if mail.number is not None]
    loose = [mail for mail in series.patches if mail.number is None]
    if not numbered:
        return tuple(loose)
    faults = [*_mixed(numbered), *_double(numbered), *_missing(series, numbered)]
    right = sorted(numbered, key=lambda mail: mail.number or 0)
    if by_name and not faults:
        faults += [
            f"{given.name} is {given.label}, where {due.number}/{due.total} is due"
            for given, due in zip(numbered, right, strict=True)
            if given is not due
        ]
    if faults:
        raise UsageError(
            f"the series in {what} is not whole: {'; '.join(faults)}",
            hint="patches that are numbered n/m have to be there once each, in their order",
        )
    return (*right, *loose)


def _mixed(numbered: Sequence[Mail]) -> list[str]:
    totals = {(mail.version, mail.total): mail for mail in numbered}
    if len(totals) == 1:
        return []
    return ["patches of different series: " + " and ".join(m.label for m in totals.values())]


def _double(numbered: Sequence[Mail]) -> list[str]:
    by_number: dict[tuple[int, int | None], list[Mail]] = {}
    for mail in numbered:
        by_number.setdefault((mail.version, mail.number), []).append(mail)
    return [
        f"{len(mails)} patches are {mails[0].number}/{mails[0].total}: "
        + " and ".join(mail.name or f'"{mail.title}"' for mail in mails)
        for mails in by_number.values()
        if len(mails) > 1
    ]


def _missing(series: Given, numbered: Sequence[Mail]) -> list[str]:
    there = {mail.number for mail in numbered}
    total = max(mail.total or 0 for mail in numbered)
    faults = []
    for number in sorted(set(range(1, total + 1)) - there):
        answer = next((mail for mail in series.replies if mail.number == number), None)
        only = f" (there is only a reply to it, by {answer.author})" if answer else ""
        faults.append(f"patch {number}/{total} is missing{only}")
    faults += [f"{mail.label} is beyond the end" for mail in numbered if (mail.number or 0) > total]
    return faults
