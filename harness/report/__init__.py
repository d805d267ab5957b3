# SPDX-License-Identifier: GPL-2.0-or-later
"""Verdicts in, documents out.

Every document is made from a stored run alone, so it can be made again at any time:
``python -m harness.report RUN``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import InfraError, UsageError

if TYPE_CHECKING:
    from harness.report.view import RunView

__all__ = ["FORMATS", "render"]

FORMATS = ("html", "junit", "ktap", "kcidb", "mail", "summary")


def render(
    run_dir: Path,
    formats: Sequence[str] = FORMATS,
    *,
    against: Path | None = None,
    known: Path | None = None,
) -> RunView:
    """Make documents of a run: ``report.html``, ``junit.xml``, ``ktap.txt``, ``kcidb.json``,
    ``mail.txt``, and the terminal summary.

    :param run_dir: the run's directory, or ``latest`` in the directory of reports.
    :param formats: some of :data:`FORMATS`; the summary is printed.
    :param against: an earlier run, for the mail to say what became of its verdicts.
    :param known: a list of known failures, instead of the one that the run was started with.
    :returns: what was shown, for callers that want its exit code.
    :raises UsageError: no such run or format, or a list that is wrong.
    :raises InfraError: a document cannot be written.
    """
    from harness.report.compare import compare
    from harness.report.html import write_html
    from harness.report.junit import write_junit
    from harness.report.kcidb import to_json
    from harness.report.known import load_known
    from harness.report.ktap import ktap_of
    from harness.report.mail import mail_of, who_tests
    from harness.report.store import load_run, write_atomically
    from harness.report.summary import print_summary
    from harness.report.view import view_of

    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise UsageError(
            f"unknown format {', '.join(sorted(unknown))}", hint=f"known: {', '.join(FORMATS)}"
        )
    view = view_of(load_run(run_dir), load_known(known) if known else None)
    try:
        if "junit" in formats:
            write_junit(view, view.run.path / "junit.xml")
        if "html" in formats:
            write_html(view, view.run.path / "report.html")
        if "ktap" in formats:
            write_atomically(view.run.path / "ktap.txt", ktap_of(view))
        if "kcidb" in formats:
            write_atomically(view.run.path / "kcidb.json", to_json(view))
        if "mail" in formats:
            found = compare(view_of(load_run(against)), view) if against else None
            text = mail_of(view, against=found, tester=who_tests())
            write_atomically(view.run.path / "mail.txt", text)
    except OSError as error:
        raise InfraError(
            f"the report cannot be written to {view.run.path}: {error.strerror}",
            hint="make room there, then: python -m harness.report " + str(view.run.path),
        ) from error
    if "summary" in formats:
        print_summary(view)
    return view
