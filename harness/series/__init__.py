# SPDX-License-Identifier: GPL-2.0-or-later
"""A series in whatever form somebody has it, made a directory of patches that git can apply.

:mod:`~harness.series.mail` reads one mail, :mod:`~harness.series.thread` finds the series among
several, :mod:`~harness.series.forms` tells the forms apart and fetches. What a series speaks
is told by a :mod:`~harness.series.description`.
"""

from harness.series.description import (
    Description,
    description_of,
    found_beside,
    interface,
    load_description,
)
from harness.series.forms import FORMS, anchored, fetched
from harness.series.mail import Kind, Mail, read_mail
from harness.series.thread import Given, ordered, series_in

__all__ = [
    "FORMS",
    "Description",
    "Given",
    "Kind",
    "Mail",
    "anchored",
    "description_of",
    "fetched",
    "found_beside",
    "interface",
    "load_description",
    "ordered",
    "read_mail",
    "series_in",
]
