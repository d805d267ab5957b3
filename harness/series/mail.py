# SPDX-License-Identifier: GPL-2.0-or-later
"""One mail of a series: what it is, its place in the series, and what it was made for.

The forms are those of ``git format-patch``, of mailing lists, and of b4: a subject such as
``[RFC PATCH v2 03/17] KVM: …``; trailers ``base-commit:`` and ``prerequisite-patch-id:``
(git-format-patch(1), "Base tree information").
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from email import message_from_bytes
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parseaddr

__all__ = ["Kind", "Mail", "read_mail"]


class Kind(enum.Enum):
    """What a mail is; the value is how messages to people call it."""

    PATCH = "a patch"
    COVER = "a cover letter"
    REPLY = "a reply"
    OTHER = "no patch"


# Mail programs' words for "reply" and "forwarded", in the languages seen on the lists.
_REPLY = re.compile(r"^\s*(?:re|aw|sv|vs|antw|odp|r|fwd?|wg)(?:\[\d+\])?\s*:", re.IGNORECASE)
_BRACKET = re.compile(r"\s*\[(?P<inside>[^]]*)\]")
_NUMBERED = re.compile(r"(?<![\d.])(?P<number>\d+)\s*/\s*(?P<total>\d+)\b")
_VERSION = re.compile(r"\bv(?P<version>\d+)\b", re.IGNORECASE)
_DIFF = re.compile(r"^(?:diff --git a/|--- (?:a/|/dev/null)[^\n]*\n\+\+\+ )", re.MULTILINE)
_BASE = re.compile(r"^base-commit:\s*(?P<id>[0-9a-f]{7,64})\s*$", re.MULTILINE)
_PREREQUISITE = re.compile(r"^prerequisite-patch-id:\s*(?P<id>[0-9a-f]{7,64})\s*$", re.MULTILINE)
_ID = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Mail:
    """One mail, or one file of a patch.

    ``number`` and ``total`` are None where the subject has no n/m. ``root`` is the message id
    of the thread's first mail, empty for a mail that answers none.
    """

    content: bytes
    name: str
    kind: Kind
    title: str
    number: int | None
    total: int | None
    version: int
    message_id: str
    root: str
    author: str
    base_commit: str
    prerequisites: tuple[str, ...]

    @property
    def label(self) -> str:
        """How messages call it: ``v2 3/17 "KVM: …"``, or its file's name."""
        place = "" if self.number is None else f"{self.number}/{self.total} "
        version = f"v{self.version} " if self.version > 1 else ""
        return f'{version}{place}"{self.title or self.name or "(no subject)"}"'


def read_mail(content: bytes, *, name: str = "") -> Mail:
    """Read a mail. A bare diff without any header is a patch, too.

    :param name: of its file, for messages.
    """
    # A file that begins with its diff has no headers for the parser to find.
    bare = re.match(rb"(?:diff --git |--- |Index: )", content) is not None
    message = message_from_bytes(b"\n" + content if bare else content)
    text = _text(message)
    subject = " ".join(_header(message, "Subject").split())
    title, inside = _without_brackets(_REPLY.sub("", subject))
    numbered = _NUMBERED.search(inside)
    version = _VERSION.search(inside)
    references = _ID.findall(f"{message.get('References', '')} {message.get('In-Reply-To', '')}")
    number = int(numbered["number"]) if numbered else None
    return Mail(
        content=content,
        name=name,
        kind=_kind(subject, text, number),
        title=title,
        number=number,
        total=int(numbered["total"]) if numbered else None,
        version=int(version["version"]) if version else 1,
        message_id=next(iter(_ID.findall(str(message.get("Message-ID", "")))), ""),
        root=references[0] if references else "",
        author=parseaddr(_header(message, "From"))[0] or _header(message, "From"),
        base_commit=next((found["id"] for found in _BASE.finditer(text)), ""),
        prerequisites=tuple(found["id"] for found in _PREREQUISITE.finditer(text)),
    )


def _kind(subject: str, text: str, number: int | None) -> Kind:
    # A reply may well hold a diff, as a suggestion: it is none of the series' patches.
    if _REPLY.match(subject):
        return Kind.REPLY
    if number == 0:
        return Kind.COVER
    return Kind.PATCH if _DIFF.search(text) else Kind.OTHER


def _without_brackets(subject: str) -> tuple[str, str]:
    """The title, and what stood in the brackets before it."""
    inside = []
    rest = subject
    while found := _BRACKET.match(rest):
        inside.append(found["inside"])
        rest = rest[found.end() :]
    return rest.strip(), " ".join(inside)


def _header(message: Message, name: str) -> str:
    value = message.get(name)
    if value is None:
        return ""
    try:
        return str(make_header(decode_header(str(value))))
    except (LookupError, ValueError):
        return str(value)


def _text(message: Message) -> str:
    """All text of the mail, as its reader sees it."""
    parts = []
    for part in message.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                parts.append(payload.decode("utf-8", errors="replace"))
    return "\n".join(parts).replace("\r\n", "\n")
