# SPDX-License-Identifier: GPL-2.0-or-later
"""The long run of the fuzzer, as tests."""
