# SPDX-License-Identifier: GPL-2.0-or-later
#
# 64-bit code that halts for ever and counts how often it got past the halt. Whether
# interrupts are on is the worker's choice (rflags).

	.include "layout.inc"
	.code64
	.globl	_start, halt_site, on_breakpoint, on_fault
_start:
	incq	TICKS(%r15)
halt_site:
	hlt
	jmp	_start

on_breakpoint:
on_fault:
	incq	FAULTS(%r15)
	popq	FAULT_TOP(%r15)
	popq	FAULT_TOP + 8(%r15)
stay:
	hlt
	jmp	stay
