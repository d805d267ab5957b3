# SPDX-License-Identifier: GPL-2.0-or-later
#
# 16-bit code: goes round for ever and counts.

	.include "layout.inc"
	.code16
	.globl	_start
_start:
	incl	MAILBOX + TICKS
	jmp	_start
