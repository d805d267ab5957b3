# SPDX-License-Identifier: GPL-2.0-or-later
#
# The boot loader of a host that Bochs emulates: Bochs cannot start a kernel by itself, and
# a general boot loader takes seconds there. The BIOS loads this sector from the medium
# (El Torito, no emulation) to 0x7c00 and leaves the drive's number in DL. The table at its
# end says which sectors go where; then the kernel's own real-mode code is entered as
# Documentation/arch/x86/boot.rst wants it. The medium's maker, harness/build/medium.py,
# has filled in the kernel's header.

	.set	CHUNK, 16		# sectors of 2048 bytes read at once
	.set	BUFFER, 0x20000		# where they are read to: a free place below 1 MiB
	.set	SETUP, 0x1000		# segment of the kernel's real-mode code
	.set	SETUP_STACK, 0xe000	# its heap and stack end here, its command line begins
	.set	ENTRY, 12		# bytes of an entry of the table: sector, count, address

	.code16
	.globl	_start
_start:	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x7c00, %sp
	movb	%dl, drive
	inb	$0x92, %al		# address line 20 on, by the system control port
	orb	$2, %al
	outb	%al, $0x92
	sti
	movw	$table, %si

part:	movl	4(%si), %ecx		# sectors left of this part; the last part has none
	jecxz	start_kernel
	cmpl	$CHUNK, %ecx
	jbe	1f
	movl	$CHUNK, %ecx
1:	movw	%cx, packet_count
	movl	(%si), %eax
	movl	%eax, packet_sector
	addl	%ecx, (%si)
	subl	%ecx, 4(%si)

	pushl	%ecx
	pushw	%si
	movw	$packet, %si
	movb	drive, %dl
	movb	$0x42, %ah		# extended read
	int	$0x13
	popw	%si
	popl	%ecx
	jc	failed

	# Beyond 1 MiB only segments of 4 GiB reach: they are loaded in protected mode, and
	# keep their limit after it. The BIOS may have loaded them anew, so each time.
	cli
	lgdt	gdt_register
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	jmp	1f
1:	movw	$8, %bx
	movw	%bx, %ds
	movw	%bx, %es
	andb	$0xfe, %al
	movl	%eax, %cr0
	jmp	1f
1:	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	sti
	shll	$9, %ecx		# sectors to double words
	movl	8(%si), %edi
	pushl	%esi
	movl	$BUFFER, %esi
	cld
	addr32 rep movsl
	popl	%esi
	movl	%edi, 8(%si)
	cmpl	$0, 4(%si)
	jne	part
	addw	$ENTRY, %si
	jmp	part

start_kernel:
	cli
	movw	$SETUP, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %fs
	movw	%ax, %gs
	movw	%ax, %ss
	movw	$SETUP_STACK, %sp
	ljmp	$SETUP + 0x20, $0

failed:	movw	$0x3fb, %dx		# on the serial console, where somebody looks
	movb	$3, %al			# 8 bits
	outb	%al, %dx
	movw	$message, %si
1:	movw	$0x3fd, %dx
2:	inb	%dx, %al		# until it takes a character
	testb	$0x20, %al
	jz	2b
	lodsb
	testb	%al, %al
	jz	3f
	movw	$0x3f8, %dx
	outb	%al, %dx
	jmp	1b
3:	cli
	hlt
	jmp	3b

message: .asciz	"boot loader: the medium cannot be read\r\n"
drive:	.byte	0
	.balign	8
gdt:	.quad	0
	.quad	0x00cf93000000ffff	# data, 4 GiB from 0
gdt_register:
	.word	. - gdt - 1
	.long	gdt
packet:	.byte	16, 0
packet_count:
	.word	0
	.word	0, BUFFER >> 4
packet_sector:
	.quad	0

	.org	0x1c0
table:	.org	0x200
