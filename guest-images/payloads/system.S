# SPDX-License-Identifier: GPL-2.0-or-later
#
# 64-bit code, in ring 0 for most of it, that executes one privileged instruction after
# another, as ordered: ARG_NR is the address of a routine below, ARG_1 and ARG_2 go into rdi
# and rsi, rax comes back as RESULT. A routine that faults is over; every exception is
# recorded as the CPU delivered it, and the guest goes on.

	.include "layout.inc"
	.code64
	.globl	_start, vectors
_start:
	incq	TICKS(%r15)
	movq	WANT(%r15), %rax
	cmpq	DONE(%r15), %rax
	je	_start			# no PAUSE: it may leave the guest each time, see count_exits
	leaq	after(%rip), %rax
	movq	%rsp, RESUME_SP(%r15)
	movq	%rax, RESUME(%r15)
	movq	ARG_1(%r15), %rdi
	movq	ARG_2(%r15), %rsi
	xorl	%eax, %eax
	call	*ARG_NR(%r15)
after:
	movq	$0, RESUME(%r15)
	movq	%rax, RESULT(%r15)
	incq	DONE(%r15)
	jmp	_start

# --- Control registers: set to rdi, answer what they are then.

set_cr0:
	movq	%rdi, %cr0
	movq	%cr0, %rax
	ret
set_msw:				# the lower 4 bits of cr0
	lmsw	%di
	movq	%cr0, %rax
	ret
clear_ts:
	clts
	movq	%cr0, %rax
	ret
set_cr3:
	movq	%rdi, %cr3
	movq	%cr3, %rax
	ret
set_cr4:
	movq	%rdi, %cr4
	movq	%cr4, %rax
	ret

# --- MSR rdi, extended control register rdi: set to rsi, answer what it is then.

# With KIND 1 by KVM's emulator, by its own prefix.

set_msr:
	movl	%edi, %ecx
	movl	%esi, %eax
	movq	%rsi, %rdx
	shrq	$32, %rdx
	cmpq	$0, KIND(%r15)
	jne	1f
wrmsr_site:
	wrmsr
get_msr:
	movl	%edi, %ecx
	rdmsr
	jmp	both_halves
1:	ud2
	.ascii	"kvm"
emulated_wrmsr_site:
	wrmsr
	jmp	get_msr
set_xcr:
	movl	%edi, %ecx
	movl	%esi, %eax
	movq	%rsi, %rdx
	shrq	$32, %rdx
	cmpq	$0, KIND(%r15)
	jne	1f
xsetbv_site:
	xsetbv
	jmp	get_xcr
1:	ud2
	.ascii	"kvm"
emulated_xsetbv_site:
	xsetbv
get_xcr:
	xgetbv
both_halves:
	movl	%eax, %eax
	shlq	$32, %rdx
	orq	%rdx, %rax
	ret

# --- Descriptor tables: memory operands are at AREA, selectors in di.

store_gdt:
	sgdt	AREA(%r15)
	ret
store_idt:
	sidt	AREA(%r15)
	ret
store_ldt:
	sldt	AREA(%r15)
	ret
store_tr:
	str	AREA(%r15)
	ret
load_gdt:
	lgdt	AREA(%r15)
	ret
load_idt:
	lidt	AREA(%r15)
	ret
load_ldt:
	lldt	%di
	ret
load_tr:
	ltr	%di
	ret

# --- The rest.

identify:				# leaf edi, subleaf esi: four registers to AREA
	movl	%edi, %eax
	movl	%esi, %ecx
	cpuid
	movl	%eax, AREA(%r15)
	movl	%ebx, AREA + 4(%r15)
	movl	%ecx, AREA + 8(%r15)
	movl	%edx, AREA + 12(%r15)
	ret
load_xmm:				# two registers from AREA
	movups	AREA(%r15), %xmm0
	movups	AREA + 16(%r15), %xmm5
	ret
store_xmm:				# two registers to AREA
	movups	%xmm0, AREA(%r15)
	movups	%xmm5, AREA + 16(%r15)
	ret
read:					# 8 bytes at rdi
	movq	(%rdi), %rax
	ret
breakpoint:
	int3
	ret
halt:
	hlt
	ret

# --- A thousand times, for who counts exits.

many_cr3:				# rdi and rsi in turn
	movl	$500, %ecx
1:	movq	%rdi, %cr3
	movq	%rsi, %cr3
	loop	1b
	ret
many_msr:				# MSR edi
	movl	$1000, %r8d
	movl	%edi, %ecx
	xorl	%edx, %edx
1:	leal	0x1000(%r8d), %eax
	wrmsr
	decl	%r8d
	jnz	1b
	ret
many_xcr:				# XCR0, with rdi and rsi in turn
	movl	$500, %r8d
	xorl	%ecx, %ecx
	xorl	%edx, %edx
1:	movl	%edi, %eax
	xsetbv
	movl	%esi, %eax
	xsetbv
	decl	%r8d
	jnz	1b
	ret
many_gdt:
	movl	$1000, %ecx
1:	sgdt	AREA(%r15)
	loop	1b
	ret
many_breakpoints:			# each of them is recorded; RESUME must not end the routine
	movq	$0, RESUME(%r15)
	movl	$1000, %ecx
1:	int3
	loop	1b
	ret

# --- Exceptions: one entry of 16 bytes for each vector.

	.balign	16
vectors:
	.set	vector, 0
	.rept	256
	movq	$vector, VECTOR(%r15)
	jmp	record
	.balign	16
	.set	vector, vector + 1
	.endr

record:
	movq	%rsp, FAULT_SP(%r15)
	pushq	%rax
	movq	%cr2, %rax
	movq	%rax, FAULT_CR2(%r15)
	.set	offset, 0
	.rept	6
	movq	8 + offset(%rsp), %rax
	movq	%rax, STACK + offset(%r15)
	.set	offset, offset + 8
	.endr
	popq	%rax
	incq	FAULTS(%r15)
	# The CPU aligns the stack to 16 bytes and puts five words on it, and perhaps a sixth,
	# the error code, which iretq does not take off.
	testb	$8, FAULT_SP(%r15)
	jnz	1f
	addq	$8, %rsp
1:	cmpq	$0, RESUME(%r15)
	je	2f
	pushq	RESUME(%r15)
	popq	(%rsp)
	pushq	RESUME_SP(%r15)
	popq	24(%rsp)
	movq	$0, RESUME(%r15)
2:	iretq
