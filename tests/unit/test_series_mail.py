# SPDX-License-Identifier: GPL-2.0-or-later
"""Mails of a series: what each is, which belong together, what is missing."""

from __future__ import annotations

import pytest

from harness.errors import UsageError
from harness.series import Given, Kind, Mail, ordered, read_mail, series_in

DIFF = "diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n"


def _mail(
    subject: str, *, body: str = DIFF, message_id: str = "", answers: str = "", name: str = ""
) -> Mail:
    headers = f"From: A Developer <a@example.org>\nSubject: {subject}\n"
    headers += f"Message-ID: <{message_id}>\n" if message_id else ""
    headers += f"In-Reply-To: <{answers}>\n" if answers else ""
    return read_mail(f"{headers}\n{body}".encode(), name=name)


@pytest.mark.parametrize(
    ("subject", "number", "total", "version", "title"),
    [
        ("[PATCH] KVM: one", None, None, 1, "KVM: one"),
        ("[PATCH 3/17] KVM: a [b] c", 3, 17, 1, "KVM: a [b] c"),
        ("[RFC PATCH v12 03/77] KVM:\n x86: folded", 3, 77, 12, "KVM: x86: folded"),
        ("[Qemu-devel] [PATCH RFC V2 1/2] kvm: add", 1, 2, 2, "kvm: add"),
        ("=?utf-8?q?=5BPATCH_2/3=5D_caf=C3=A9?=", 2, 3, 1, "café"),
        ("no brackets 1/2", None, None, 1, "no brackets 1/2"),
    ],
)
def test_a_subject_tells_place_and_version(
    subject: str, number: int | None, total: int | None, version: int, title: str
) -> None:
    mail = _mail(subject)
    assert (mail.number, mail.total, mail.version, mail.title) == (number, total, version, title)
    assert mail.kind is Kind.PATCH


@pytest.mark.parametrize(
    ("subject", "body", "kind"),
    [
        ("Re: [PATCH 3/17] KVM: x", DIFF, Kind.REPLY),
        ("AW: Re: [PATCH 3/17] KVM: x", "> " + DIFF.replace("\n", "\n> "), Kind.REPLY),
        ("[PATCH 0/17] KVM: x", "A diffstat only.", Kind.COVER),
        ("[PATCH 1/17] KVM: x", "> " + DIFF.replace("\n", "\n> "), Kind.OTHER),
        ("hello", "words", Kind.OTHER),
    ],
)
def test_what_is_no_patch_is_recognised(subject: str, body: str, kind: Kind) -> None:
    assert _mail(subject, body=body).kind is kind


def test_a_bare_diff_and_an_encoded_mail_are_patches() -> None:
    assert read_mail(DIFF.encode()).kind is Kind.PATCH
    encoded = (
        b"Subject: [PATCH] x\nContent-Transfer-Encoding: base64\n"
        b"Content-Type: text/plain; charset=utf-8\n\n"
        b"ZGlmZiAtLWdpdCBhL2YgYi9mCi0tLSBhL2YKKysrIGIvZgo=\n"
    )
    assert read_mail(encoded).kind is Kind.PATCH


def test_the_base_is_read_from_the_trailers() -> None:
    trailers = f"base-commit: {'a1' * 20}\nprerequisite-patch-id: {'b2' * 20}\n"
    trailers += f"prerequisite-patch-id: {'c3' * 20}\n"
    (given,) = series_in(
        [_mail("[PATCH 0/1] x", body="words\n\n" + trailers), _mail("[PATCH 1/1] y")], what="here"
    )
    assert given.base_commit == "a1" * 20
    assert given.prerequisites == ("b2" * 20, "c3" * 20)
    assert given.title == "x"


def test_mails_in_any_order_become_the_series_and_replies_stay_out() -> None:
    mails = [
        _mail("[PATCH 2/2] b", message_id="2", answers="0"),
        _mail("Re: [PATCH 2/2] b", body="> " + DIFF, message_id="r", answers="0"),
        _mail("[PATCH 0/2] cover", body="words", message_id="0"),
        _mail("[PATCH 1/2] a", message_id="1", answers="0"),
    ]
    (given,) = series_in(mails, what="thread.mbox")
    assert [mail.title for mail in ordered(given, what="it")] == ["a", "b"]
    assert [mail.message_id for mail in given.replies] == ["<r>"]


def test_versions_and_threads_are_different_series() -> None:
    mails = [
        _mail("[PATCH 0/1] one", body="words", message_id="0"),
        _mail("[PATCH 1/1] one", message_id="1", answers="0"),
        # As some send it: the new version as an answer to the old one.
        _mail("[PATCH v2 1/1] two", message_id="2", answers="0"),
        _mail("[PATCH 0/1] three", body="words", message_id="t0"),
        _mail("[PATCH 1/1] three", message_id="t1", answers="t0"),
    ]
    found = series_in(mails, what="it")
    assert [one.title for one in found] == ["one", "two", "three"]
    assert [len(one.patches) for one in found] == [1, 1, 1]


def test_without_patches_it_is_said_what_there_is() -> None:
    with pytest.raises(UsageError, match=r'no patch in m.mbox; it holds a reply: 3/9 "KVM: x"'):
        series_in([_mail("Re: [PATCH 3/9] KVM: x")], what="m.mbox")
    with pytest.raises(UsageError, match="holds nothing"):
        series_in([], what="m.mbox")


def test_what_is_missing_is_named_also_when_only_its_answer_is_there() -> None:
    mails = [
        _mail("[PATCH 1/3] a", message_id="1", answers="0"),
        _mail("Re: [PATCH 2/3] b", body="> " + DIFF, answers="0"),
    ]
    (given,) = series_in(mails, what="it")
    with pytest.raises(UsageError) as caught:
        ordered(given, what="it")
    assert "patch 2/3 is missing (there is only a reply to it, by A Developer)" in str(caught.value)
    assert "patch 3/3 is missing" in str(caught.value)


def test_doubles_and_a_wrong_order_of_names_are_named() -> None:
    double = Given(tuple(_mail(f"[PATCH {n}/2] t{n}", name=f"{n}.patch") for n in (1, 2, 2)))
    with pytest.raises(UsageError, match=r"2 patches are 2/2: 2\.patch and 2\.patch"):
        ordered(double, what="it")
    swapped = Given(
        (_mail("[PATCH 2/2] b", name="0001.patch"), _mail("[PATCH 1/2] a", name="0002.patch"))
    )
    with pytest.raises(UsageError, match=r'0001.patch is 2/2 "b", where 1/2 is due'):
        ordered(swapped, what="it", by_name=True)
    assert [mail.title for mail in ordered(swapped, what="it")] == ["a", "b"]


def test_patches_of_two_series_in_one_place_are_named() -> None:
    both = Given((_mail("[PATCH 1/2] a"), _mail("[PATCH v2 2/2] b")))
    with pytest.raises(UsageError, match=r'different series: 1/2 "a" and v2 2/2 "b"'):
        ordered(both, what="it")
