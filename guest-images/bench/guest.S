/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the guest of kvmi-bench runs, in 64-bit mode at ring 0: one loop per kind of event. Each
 * round takes the TSC, does one thing that makes the vCPU leave the guest, and takes the TSC
 * again. Position-independent: the program copies it into the guest.
 */
#include "guest.h"

/* TSC to %r8. */
#define BEGIN \
	lfence; \
	rdtsc; \
	shl	$32, %rdx; \
	or	%rdx, %rax; \
	mov	%rax, %r8

/* Store %r8 and the TSC, which stays in %rax, as one pair. */
#define FINISH \
	lfence; \
	rdtsc; \
	shl	$32, %rdx; \
	or	%rdx, %rax; \
	mov	%r8, (%r14); \
	mov	%rax, 8(%r14); \
	add	$16, %r14

#define AGAIN \
	dec	%r13; \
	jnz	1b; \
	jmp	done

/* The introspection hypercall. The program puts in VMCALL where the CPU is Intel's. */
#define HYPERCALL \
	mov	$34, %eax; \
	mov	$24, %edi; \
	xor	%esi, %esi; \
	vmmcall

	.section .rodata
	.code64
	.globl	guest_code, guest_code_end, guest_start, guest_on_event, guest_on_fault
	.globl	guest_clock, guest_exit, guest_exit_kernel, guest_hypercall, guest_breakpoint
	.globl	guest_cr3, guest_msr, guest_xsetbv, guest_sgdt, guest_lidt, guest_read
	.globl	guest_write, guest_fetch, guest_singlestep, guest_pause, guest_trap
	.balign	16
guest_code:
guest_start:
	pause
	cmpq	$0, C_GO(%r15)
	je	guest_start
	mov	C_SAMPLES(%r15), %r14
	mov	C_COUNT(%r15), %r13
	mov	C_PAGE(%r15), %r12
	mov	C_STEP(%r15), %r11
	jmp	*C_ENTRY(%r15)
done:
	out	%al, $PORT_DONE
2:
	pause
	cmpq	$0, C_GO(%r15)
	jne	2b
	out	%al, $PORT_END
	jmp	guest_start

guest_clock:				/* nothing: what taking the time costs */
1:
	BEGIN
	FINISH
	AGAIN

guest_exit:
1:
	BEGIN
	out	%al, $PORT_PLAIN
	FINISH
	AGAIN

guest_exit_kernel:			/* an exit that KVM handles by itself */
1:
	BEGIN
	xor	%eax, %eax
	cpuid
	FINISH
	AGAIN

guest_hypercall:
1:
	BEGIN
	HYPERCALL
	FINISH
	AGAIN

guest_trap:				/* an exception on the way back, whose handler finishes */
1:
	BEGIN
	HYPERCALL
	AGAIN

guest_breakpoint:			/* its handler finishes */
1:
	BEGIN
	int3
	AGAIN

guest_cr3:
	mov	%cr3, %r12
1:
	xor	$PML4_A ^ PML4_B, %r12
	BEGIN
	mov	%r12, %cr3
	FINISH
	AGAIN

guest_msr:				/* LSTAR: which tools watch */
	mov	$0xc0000082, %ecx
	rdmsr
	mov	%eax, %r12d
1:
	xor	$0x1000, %r12d
	BEGIN
	mov	%r12d, %eax
	xor	%edx, %edx
	wrmsr
	FINISH
	AGAIN

guest_xsetbv:				/* SSE on and off */
	xor	%ecx, %ecx
	xgetbv
	mov	%eax, %r12d
1:
	xor	$2, %r12d
	BEGIN
	mov	%r12d, %eax
	xor	%edx, %edx
	xsetbv
	FINISH
	AGAIN

guest_sgdt:
1:
	BEGIN
	sgdt	C_SCRATCH(%r15)
	FINISH
	AGAIN

guest_lidt:
1:
	BEGIN
	lidt	C_IDTR(%r15)
	FINISH
	AGAIN

guest_read:
1:
	BEGIN
	mov	8(%r12), %al
	FINISH
	add	%r11, %r12
	AGAIN

guest_write:
1:
	BEGIN
	mov	%al, 8(%r12)
	FINISH
	add	%r11, %r12
	AGAIN

guest_fetch:				/* the page begins with RET */
1:
	BEGIN
	call	*%r12
	FINISH
	add	%r11, %r12
	AGAIN

guest_singlestep:			/* the tool steps from one hypercall to the next */
	HYPERCALL
1:
	rdtsc				/* SINGLESTEP_INSTRUCTIONS from here */
	mov	%eax, (%r14)
	add	$16, %r14
	dec	%r13
	jnz	1b
	HYPERCALL
	jmp	done

guest_pause:				/* the count changes only while this vCPU is held */
	xor	%r10d, %r10d
	BEGIN
1:
	pause
	lfence
	rdtsc
	shl	$32, %rdx
	or	%rdx, %rax
	mov	%rax, %r9
	mov	C_PAUSED(%r15), %rdx
	cmp	%rdx, %r10
	jne	2f
	mov	%r9, %r8
	jmp	1b
2:
	mov	%rdx, %r10
	FINISH
	mov	%rax, %r8
	mov	%r10, C_SEEN(%r15)
	AGAIN

guest_on_event:
	FINISH
	iretq

guest_on_fault:
	out	%al, $PORT_FAULT
	jmp	guest_on_fault
guest_code_end:

	.section .note.GNU-stack, "", @progbits
