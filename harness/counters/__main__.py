# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m harness.counters``: see :func:`harness.counters.view.main`."""

import sys

from harness.counters.view import main

sys.exit(main())
