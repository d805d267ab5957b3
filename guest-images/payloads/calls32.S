# SPDX-License-Identifier: GPL-2.0-or-later
#
# The hypercall half of calls.S for 32-bit code (protected or compatibility mode):
# arguments travel in ebx and ecx. Mailbox words are 64 bits wide; the upper halves
# stay zero.

	.include "layout.inc"
	.code32
	.globl	_start, call_site
_start:
	incl	MAILBOX + TICKS
	movl	MAILBOX + WANT, %eax
	cmpl	MAILBOX + DONE, %eax
	je	idle

	movl	MAILBOX + ARG_NR, %eax
	movl	MAILBOX + ARG_1, %ebx
	movl	MAILBOX + ARG_2, %ecx
call_site:
	hypercall
	movl	%eax, MAILBOX + RESULT
	testl	%eax, %eax
	jz	done
	incl	MAILBOX + REFUSED
done:
	incl	MAILBOX + DONE
	jmp	_start

idle:
	pause
	jmp	_start
