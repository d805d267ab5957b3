# SPDX-License-Identifier: GPL-2.0-or-later
#
# 64-bit code that is stepped through. It goes round in the first lines; the worker moves
# rip to "sequence" or to one of the places after it. Each label there is an instruction,
# in the order of execution.

	.include "layout.inc"
	.code64
	.globl	_start, on_breakpoint, on_fault
_start:
	incq	TICKS(%r15)
	pause
	jmp	_start

	.globl	sequence, step_1, step_2, step_3, step_4, step_5, step_6, step_7, step_8
	.globl	step_9, step_10, step_11, step_12, step_13, step_14, step_15
sequence:
	nop
step_1:
	xorl	%eax, %eax
step_2:
	cpuid				# KVM carries this one out
step_3:
	movl	$0xc0000080, %ecx
step_4:
	rdmsr				# and this, or the processor
step_5:
	movq	%cr4, %rax
step_6:
	movq	%rax, %cr4
step_7:
	call	step_10
step_8:
	jmp	step_12
step_9:
	ud2				# never
step_10:
	incq	DONE(%r15)
step_11:
	ret				# to step_8
step_12:
	pushfq
step_13:
	popfq
step_14:
	leaq	(%rsp), %rbp
step_15:
	jmp	_start

	.globl	string, string_end
string:
	movl	$3, %ecx
	leaq	-0x100(%rsp), %rdi
	movq	%rdi, %rsi
string_move:
	rep movsb
string_end:
	jmp	_start

	.globl	port, port_end
port:
	outb	%al, $0x99
port_end:
	jmp	_start

	.globl	halt, halt_end
halt:
	hlt
halt_end:
	jmp	_start

	.globl	store, store_end
store:					# to where the worker set rdi
	movq	%rax, (%rdi)
store_end:
	jmp	_start

on_breakpoint:
on_fault:
	incq	FAULTS(%r15)
	iretq
