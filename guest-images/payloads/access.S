# SPDX-License-Identifier: GPL-2.0-or-later
#
# 64-bit code in ring 0 that accesses memory in one way or another, as ordered: ARG_NR is
# the address of a routine below, ARG_1 and ARG_2 go into rdi and rsi, rax comes back as
# RESULT. Routines keep r15 and rsp, and touch no memory but what their comment says.

	.include "layout.inc"
	.code64
	.globl	_start, on_breakpoint, on_debug, on_fault
	.globl	slide, slide_end, crossing, own_read, own_write
	.globl	to_user_mode, user_mode, called
_start:
	movq	%cr4, %rax
	orq	$0x600, %rax		# OSFXSR, OSXMMEXCPT: SSE works
	movq	%rax, %cr4
	fninit
round:
	incq	TICKS(%r15)
	movq	WANT(%r15), %rax
	cmpq	DONE(%r15), %rax
	je	idle
	movq	ARG_1(%r15), %rdi
	movq	ARG_2(%r15), %rsi
	movl	$16, %ecx
	xorl	%eax, %eax
	call	*ARG_NR(%r15)
	movq	%rax, RESULT(%r15)
	incq	DONE(%r15)
	jmp	round
idle:
	pause
	jmp	round

# --- What KVM's emulator can do.

read:					# (rdi)
	movq	(%rdi), %rax
	ret
write:					# rsi to (rdi)
	movq	%rsi, (%rdi)
	ret
modify:					# (rdi) plus one
	incq	(%rdi)
	ret
locked:					# (rdi) plus rsi, locked; answers what was there
	lock xaddq %rsi, (%rdi)
	movq	%rsi, %rax
	ret
move:					# 8 bytes from (rsi) to (rdi)
	movsq
	ret
move_byte:				# one byte from (rsi) to (rdi)
	movsb
	ret
move_many:				# 16 bytes from (rsi) to (rdi), one after another
	rep movsb
	ret
push:					# rsi to (rdi), by way of the stack pointer
	movq	%rsp, %rbp
	leaq	8(%rdi), %rsp
	pushq	%rsi
	movq	%rbp, %rsp
	ret
pop:					# (rdi), by way of the stack pointer
	movq	%rsp, %rbp
	movq	%rdi, %rsp
	popq	%rax
	movq	%rbp, %rsp
	ret
push_flags:				# the flags to (rdi)
	movq	%rsp, %rbp
	leaq	8(%rdi), %rsp
	pushfq
	movq	%rbp, %rsp
	ret
pop_flags:				# flags from (rdi); answers what they are then
	movq	%rsp, %rbp
	movq	%rdi, %rsp
	popfq
	movq	%rbp, %rsp
	pushfq
	popq	%rax
	pushq	$0x202
	popfq
	ret
port_out:				# one byte from (rsi) to port 0x99
	movl	$0x99, %edx
	outsb
	ret
port_in:				# one byte from port 0x99 to (rdi)
	movl	$0x99, %edx
	insb
	ret

# --- What it cannot do.

sse_read:				# 16 bytes at (rdi), answers the lower half
	pxor	%xmm0, %xmm0
	paddq	(%rdi), %xmm0
	movq	%xmm0, %rax
	ret
sse_write:				# rsi to (rdi)
	movq	%rsi, %xmm0
	movlps	%xmm0, (%rdi)
	ret
x87_write:				# 7 to (rdi)
	fld1
	fld1
	fadd	%st(0), %st
	fadd	%st(0), %st
	fadd	%st(1), %st
	fld1
	faddp
	fld1
	faddp
	fistpll	(%rdi)
	fstp	%st(0)
	ret
exchange16:				# 16 bytes at (rdi) from 0 to rsi and 0; answers what was there
	xorl	%edx, %edx
	xorl	%ecx, %ecx
	movq	%rsi, %rbx
	lock cmpxchg16b (%rdi)
	ret

# --- Exceptions.

divide:					# by (rdi)
	xorl	%edx, %edx
	movl	$1, %eax
	divq	(%rdi)
	ret
breakpoint:				# with the stack at rdi
	movq	%rsp, %rbp
	movq	%rdi, %rsp
	int3
	movq	%rbp, %rsp
	ret
trace:					# (rdi) under the guest's own single-stepping
	pushfq
	orq	$0x100, (%rsp)
	popfq
	movq	(%rdi), %rax
	nop
	pushfq
	andq	$~0x100, (%rsp)
	popfq
	ret
trace_out:				# port_out under the guest's own single-stepping
	movl	$0x99, %edx
	pushfq
	orq	$0x100, (%rsp)
	popfq
	outsb
	nop
	pushfq
	andq	$~0x100, (%rsp)
	popfq
	ret
walk:					# (rdi), after the translations were flushed
	movq	%cr3, %rax
	movq	%rax, %cr3
	movq	(%rdi), %rax
	ret

# --- To user mode and back, by instructions that move the flags to r11 and from there.

system_calls:				# answers what SYSCALL left in r11
	movl	$0xc0000080, %ecx	# EFER: SCE
	rdmsr
	orl	$1, %eax
	wrmsr
	incl	%ecx			# STAR: our code segment, and one for user mode
	xorl	%eax, %eax
	movl	%cs, %edx
	orl	$0x00330000, %edx
	wrmsr
	incl	%ecx			# LSTAR
	leaq	called(%rip), %rax
	xorl	%edx, %edx
	wrmsr
	movl	$0xc0000084, %ecx	# SFMASK: TF
	movl	$0x100, %eax
	wrmsr
	movl	%ss, %ebp
	leaq	user_mode(%rip), %rcx
	movl	$0x202, %r11d
	jmp	to_user_mode
returned:
	movl	%ebp, %ss
	ret

# --- Without end, until KIND is set.

hammer:					# counts up at (rdi)
	incq	(%rdi)
	incq	TICKS(%r15)
	cmpq	$0, KIND(%r15)
	je	hammer
	ret
hammer_sse:				# the same with an instruction that only writes
	xorl	%eax, %eax
1:	incq	%rax
	movq	%rax, %xmm0
	movlps	%xmm0, (%rdi)
	incq	TICKS(%r15)
	cmpq	$0, KIND(%r15)
	je	1b
	ret
hammer_read:				# reads (rdi), answers how often
	xorl	%eax, %eax
1:	movq	(%rdi), %rdx
	incq	%rax
	incq	TICKS(%r15)
	cmpq	$0, KIND(%r15)
	je	1b
	ret

emulated_locked:			# adds rsi to (rdi) by KVM's emulator, answers what was there
	ud2
	.ascii	"kvm"
emulated_site:
	lock xaddq %rsi, (%rdi)
	movq	%rsi, %rax
	ret

on_breakpoint:
on_debug:
	incq	TRAPS(%r15)
	iretq

on_fault:
	incq	FAULTS(%r15)
	popq	FAULT_TOP(%r15)
	popq	FAULT_TOP + 8(%r15)
	popq	FLAGS(%r15)
stay:
	pause
	jmp	stay

# --- On a page of its own: to be fetched from, read and written.

	.org	0x1000, 0x90
slide:					# answers 30
	xorl	%eax, %eax
	.rept	30
	incq	%rax
	.endr
slide_end:
	ret
own_read:				# (rdi), which may be on this page
	movq	(%rdi), %rax
	ret
own_write:				# rsi to (rdi), which may be on this page
	movq	%rsi, (%rdi)
	ret
debug_status:				# sets DR6 to rsi, answers what it finds there
	movq	%rsi, %dr6
	nop
	movq	%dr6, %rax
	ret
to_user_mode:
	sysretq
user_mode:
	syscall
called:
	movq	%r11, %rax
	jmp	returned

	.org	0x1ffc, 0x90
crossing:				# one instruction on two pages
	movabsq	$0x1122334455667788, %rax
	ret
	.org	0x2ff0, 0x90
