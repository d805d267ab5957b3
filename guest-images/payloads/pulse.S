# SPDX-License-Identifier: GPL-2.0-or-later
#
# 16-bit firmware: with each tick of the timer, 18 a second, one hypercall that asks for
# the introspection tool, and then one count more at PULSES.
#
# Interrupt controllers and timer are set up by hand: there is no BIOS.

	.set	FIRMWARE, 0xff00	/* where QemuGuest puts code, in segment 0xf000 */
	.set	PULSES, 0x500
	.code16
	.globl	_start, call_site, pulse_done, tick
_start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x4000, %sp
	# Interrupt 8, the timer's.
	movw	$(FIRMWARE + tick - _start), 0x20
	movw	$0xf000, 0x22
	movb	$0x11, %al
	outb	%al, $0x20
	movb	$8, %al
	outb	%al, $0x21
	movb	$4, %al
	outb	%al, $0x21
	movb	$1, %al
	outb	%al, $0x21
	movb	$0xfe, %al
	outb	%al, $0x21
	# The local APIC passes on what the interrupt controller says (LINT0 as ExtINT). Its
	# registers are out of reach for real mode, unless it is an x2APIC.
	xorl	%edx, %edx
	movl	$0x1b, %ecx
	movl	$0xfee00d00, %eax
	wrmsr
	movl	$0x80f, %ecx
	movl	$0x1ff, %eax
	wrmsr
	movl	$0x835, %ecx
	movl	$0x700, %eax
	wrmsr
	movb	$0x34, %al
	outb	%al, $0x43
	xorb	%al, %al
	outb	%al, $0x40
	outb	%al, $0x40
again:
	sti
	hlt
	# No tick may come between the hypercall and its being counted: whoever looks then
	# knows by the instruction pointer that the count is one behind.
	cli
	movl	$34, %eax
	movl	$24, %ebx
	xorl	%ecx, %ecx
	xorl	%edx, %edx
call_site:
	.if AMD
	vmmcall
	.else
	vmcall
	.endif
pulse_done:
	incl	PULSES
	jmp	again

tick:
	pushw	%ax
	movb	$0x20, %al
	outb	%al, $0x20
	popw	%ax
	iretw
