# SPDX-License-Identifier: GPL-2.0-or-later
#
# 64-bit code for ring 0 that does, one after another and for ever, all that can raise an
# event; vCPUs begin at different places. What the CPU or the tool does not let it do is
# skipped: every exception goes on with the next step. After some steps it halts, which
# lets others have the processor.

	.include "layout.inc"
	.code64
	.globl	_start, call_site, on_breakpoint, on_fault

	.set	TOUCHED, 0x40000	# pages of its own, harness/fuzz/images.py
	.set	LSTAR, 0xc0000082

_start:
	movq	%rsp, %r13
	movq	%r15, %r12		# where to begin: the mailbox tells vCPUs apart
	shrq	$9, %r12
	shll	$2, %r12d
next:
	incq	TICKS(%r15)
	incl	%r12d
	leaq	step_end(%rip), %r14	# where exceptions go on
	movl	%r12d, %eax
	xorl	%edx, %edx
	movl	$12, %ecx
	divl	%ecx
	leaq	steps(%rip), %rax
	movslq	(%rax,%rdx,4), %rdx
	addq	%rdx, %rax
	jmp	*%rax

steps:
	.long	step_hypercall - steps, step_breakpoint - steps, step_cr4 - steps
	.long	step_msr - steps, step_cr0 - steps, step_cr3 - steps, step_read - steps
	.long	step_descriptor - steps, step_write - steps, step_execute - steps
	.long	step_cpuid - steps, step_xsetbv - steps

step_hypercall:
	movl	$34, %eax
	movl	$24, %edi
	xorl	%esi, %esi
call_site:
	hypercall
	jmp	step_end

step_breakpoint:
	int3
	jmp	step_end

step_cr4:				# time stamps for ring 0 alone, and back
	movq	%cr4, %rax
	xorq	$4, %rax
	movq	%rax, %cr4
	jmp	step_end

step_msr:
	movl	$LSTAR, %ecx
	movl	TICKS(%r15), %eax
	xorl	%edx, %edx
	wrmsr
	jmp	step_end

step_cr0:				# alignment mask, and back
	movq	%cr0, %rax
	xorq	$0x40000, %rax
	movq	%rax, %cr0
	jmp	step_end

step_cr3:				# caching of the top table, and back
	movq	%cr3, %rax
	xorq	$8, %rax
	movq	%rax, %cr3
	jmp	step_end

step_descriptor:
	sgdt	DESCRIPTORS(%r15)
	lgdt	DESCRIPTORS(%r15)
	sidt	DESCRIPTORS(%r15)
	lidt	DESCRIPTORS(%r15)
	sldt	%ax
	str	%ax
	jmp	step_end

step_read:
	call	page
	movq	(%rax), %rcx
	jmp	step_end

step_write:				# also as one instruction that reads two pages and writes
	call	page
	movq	%r12, 16(%rax)
	leaq	0xffc(%rax), %rdi
	leaq	0x7fc(%rax), %rsi
	movsq
	jmp	step_end

step_execute:
	call	page
	movb	$0xc3, (%rax)
	call	*%rax
	jmp	step_end

step_cpuid:
	xorl	%eax, %eax
	cpuid
	jmp	step_end

step_xsetbv:				# SSE only, and x87 with it
	movq	%cr4, %rax
	orq	$0x40000, %rax
	movq	%rax, %cr4
	xorl	%ecx, %ecx
	xgetbv
	xorl	$2, %eax
	xsetbv

step_end:
	movq	%r13, %rsp
	testl	$15, %r12d		# at times it halts, or spins instead
	jnz	next
	testl	$16, %r12d
	jz	spin
	hlt
	jmp	next
spin:
	movl	$20000, %ecx		# without PAUSE, which may leave the guest each time
1:	loop	1b
	jmp	next

page:
	movl	%r12d, %eax
	andl	$7, %eax
	shll	$12, %eax
	addl	$TOUCHED, %eax
	ret

	.set	DESCRIPTORS, 0x70	# in the mailbox

on_breakpoint:
	incq	TRAPS(%r15)
	iretq

on_fault:
	incq	FAULTS(%r15)
	movq	%r13, %rsp
	jmp	*%r14
