# SPDX-License-Identifier: GPL-2.0-or-later
"""Device managers: the small one of this project, and QEMU."""
