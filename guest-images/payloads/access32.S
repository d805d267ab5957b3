# SPDX-License-Identifier: GPL-2.0-or-later
#
# 32-bit code that runs without paging, so it reaches 4 GB of guest-physical memory: the
# first routines of access.S. The upper halves of mailbox words stay zero.

	.include "layout.inc"
	.code32
	.globl	_start, slide
_start:
	incl	MAILBOX + TICKS
	movl	MAILBOX + WANT, %eax
	cmpl	MAILBOX + DONE, %eax
	je	idle
	movl	MAILBOX + ARG_1, %edi
	movl	MAILBOX + ARG_2, %esi
	call	*MAILBOX + ARG_NR
	movl	%eax, MAILBOX + RESULT
	incl	MAILBOX + DONE
	jmp	_start
idle:
	pause
	jmp	_start

read:
	movl	(%edi), %eax
	ret
write:
	movl	%esi, (%edi)
	ret
modify:
	incl	(%edi)
	ret

	.org	0x1000, 0x90
slide:					# answers 30
	xorl	%eax, %eax
	.rept	30
	incl	%eax
	.endr
	ret
