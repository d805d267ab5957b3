# SPDX-License-Identifier: GPL-2.0-or-later
"""From sources and patch series to a kernel, a QEMU and images, all kept in the cache."""
