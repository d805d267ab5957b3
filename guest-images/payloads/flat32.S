# SPDX-License-Identifier: GPL-2.0-or-later
#
# Firmware that goes to 32-bit protected mode, and halts there for ever.

	.set	FIRMWARE, 0xff00	/* where QemuGuest puts code, in segment 0xf000 */
	.set	LINEAR, 0xffff0000 + FIRMWARE
	.code16
	.globl	_start, halted
_start:
	cli
	lgdtl	%cs:FIRMWARE + table_pointer - _start
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$8, $(LINEAR + flat - _start)
	.code32
flat:
	hlt
halted:
	jmp	flat

	.balign	8
table:
	.quad	0
	.quad	0x00cf9b000000ffff	/* code, all of the address space, already accessed */
table_pointer:
	.word	15
	.long	LINEAR + table - _start
