# SPDX-License-Identifier: GPL-2.0-or-later
"""Sequences in the life of guests, each with a real QEMU on a real host."""
