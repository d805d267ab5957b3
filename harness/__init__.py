# SPDX-License-Identifier: GPL-2.0-or-later
"""kvmi-harness: from a KVM introspection patch series to a conformance report."""

__version__ = "0.1.0"
