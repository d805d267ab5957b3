# SPDX-License-Identifier: GPL-2.0-or-later
#
# 64-bit code that stores all its registers again and again, in the order of struct
# kvm_regs, and changes none of them: only moves and setcc, which leave the flags alone.
# There are two copies that store to different places, so that a changed rip shows.

	.include "layout.inc"
	.code64
	.globl	_start, other

	.macro	dump	to
	movq	%rax, \to + 0x00
	movq	%rbx, \to + 0x08
	movq	%rcx, \to + 0x10
	movq	%rdx, \to + 0x18
	movq	%rsi, \to + 0x20
	movq	%rdi, \to + 0x28
	movq	%rsp, \to + 0x30
	movq	%rbp, \to + 0x38
	movq	%r8,  \to + 0x40
	movq	%r9,  \to + 0x48
	movq	%r10, \to + 0x50
	movq	%r11, \to + 0x58
	movq	%r12, \to + 0x60
	movq	%r13, \to + 0x68
	movq	%r14, \to + 0x70
	movq	%r15, \to + 0x78
	setc	\to + 0x80
	setz	\to + 0x81
	sets	\to + 0x82
	seto	\to + 0x83
	setp	\to + 0x84
	movq	$1,   \to + 0x88	# the worker clears this word and waits for it
	.endm

_start:
	dump	DUMP_A
	jmp	_start
other:
	dump	DUMP_B
	jmp	other
