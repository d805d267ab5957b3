# SPDX-License-Identifier: GPL-2.0-or-later
#
# 64-bit code, at any privilege level. Goes round for ever and counts its rounds; while
# DONE is not WANT it makes one hypercall, breakpoint or other software interrupt a round and
# counts exactly what came of it. The worker writes WANT to start calls, so none happens by itself.

	.include "layout.inc"
	.code64
	.globl	_start, call_site, breakpoint_site, prefixed_site, on_breakpoint, on_fault
	.globl	on_software_interrupt
_start:
	incq	TICKS(%r15)
	movq	WANT(%r15), %rax
	cmpq	DONE(%r15), %rax
	je	idle
	cmpq	$1, KIND(%r15)
	je	breakpoint_site
	ja	others

	movq	ARG_NR(%r15), %rax
	movq	ARG_1(%r15), %rdi
	movq	ARG_2(%r15), %rsi
call_site:
	hypercall
	movq	%rax, RESULT(%r15)
	testq	%rax, %rax
	jz	done
	incq	REFUSED(%r15)
done:
	incq	DONE(%r15)
	jmp	_start

breakpoint_site:
	int3
	jmp	done

others:
	cmpq	$3, KIND(%r15)
	je	low_interrupt
	ja	high_interrupt
prefixed_site:
	.byte	0x3e, 0xcc		# a segment prefix makes it an instruction of two bytes
	jmp	done

low_interrupt:
	int	$0x21
	jmp	done

high_interrupt:				# as a signed byte it would be negative
	int	$0x80
	jmp	done

idle:
	pause
	jmp	_start

on_software_interrupt:
on_breakpoint:
	incq	TRAPS(%r15)
	pushq	(%rsp)
	popq	TRAP_IP(%r15)
	iretq

on_fault:
	incq	FAULTS(%r15)
	popq	FAULT_TOP(%r15)
	popq	FAULT_TOP + 8(%r15)
stay:
	pause
	jmp	stay
