// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest of the guest: some instructions that a hypervisor or a tool may intercept, again
 * and again, each followed by a look at what it did. The guest is the hypervisor here, with
 * its own kernel's KVM.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvmi-guest.h"

/* The page with code and vectors, and the one that the rounds are counted in. */
#define CODE		0x400
#define STACK		0xff0
#define DATA		0x1000
#define MEMORY		(2 * PAGE_SIZE)
#define VECTOR_3	(3 * 4)
/* Offset of the segment and of the number of breakpoints, both in the second page. */
#define ROUNDS		0
#define BREAKPOINTS	4

#define PORT_ROUND	0x10
#define PORT_WRONG	0x11

/*
 * Real mode, where CR3 and the descriptor tables can be set to anything. The values are
 * unlike all that the guest itself ever uses: a tool that sees one has seen too much.
 */
asm(
"	.pushsection .rodata\n"
"	.code16\n"
"	.globl nested_code, nested_trap, nested_call, nested_end\n"
"nested_code:\n"
"	movl	%cr0, %eax\n"
"	xorl	$8, %eax\n"			/* TS */
"	movl	%eax, %ebx\n"
"	movl	%eax, %cr0\n"
"	movl	%cr0, %eax\n"
"	movw	$1, %di\n"
"	cmpl	%ebx, %eax\n"
"	jne	1f\n"
"	movl	$0x7e5a5000, %ebx\n"
"	movl	%ebx, %cr3\n"
"	movl	%cr3, %eax\n"
"	movw	$2, %di\n"
"	cmpl	%ebx, %eax\n"
"	jne	1f\n"
"	movl	%cr4, %eax\n"
"	xorl	$4, %eax\n"			/* TSD */
"	movl	%eax, %ebx\n"
"	movl	%eax, %cr4\n"
"	movl	%cr4, %eax\n"
"	movw	$3, %di\n"
"	cmpl	%ebx, %eax\n"
"	jne	1f\n"
"	lgdtl	%cs:0x300\n"
"	sgdtl	%cs:0x308\n"
"	movl	%cs:0x302, %eax\n"
"	movw	$4, %di\n"
"	cmpl	%cs:0x30a, %eax\n"
"	jne	1f\n"
"	movl	$0x175, %ecx\n"			/* MSR_IA32_SYSENTER_ESP */
"	movl	$0x7e57ab1e, %eax\n"
"	movl	%eax, %ebx\n"
"	xorl	%edx, %edx\n"
"	wrmsr\n"
"	xorl	%eax, %eax\n"
"	rdmsr\n"
"	movw	$5, %di\n"
"	cmpl	%ebx, %eax\n"
"	jne	1f\n"
"	int3\n"
"	movl	$34, %eax\n"			/* KVM_HC_XEN_HVM_OP */
"	movl	$24, %ebx\n"			/* ..._GUEST_REQUEST_VM_EVENT */
"	xorl	%ecx, %ecx\n"
"nested_call:\n"
"	vmmcall\n"
"	movw	$6, %di\n"
"	cmpl	$-1000, %eax\n"			/* -KVM_ENOSYS, of the guest's KVM */
"	jne	1f\n"
"	incl	0x1000\n"			/* DATA + ROUNDS */
"	movl	0x1000, %eax\n"
"	outl	%eax, $0x10\n"			/* PORT_ROUND */
"	jmp	nested_code\n"
"1:	outl	%eax, $0x11\n"			/* PORT_WRONG */
"nested_trap:\n"
"	incl	0x1004\n"			/* DATA + BREAKPOINTS */
"	iretw\n"
"nested_end:\n"
"	.code64\n"
"	.popsection\n");

extern const uint8_t nested_code[], nested_trap[], nested_call[], nested_end[];

static int needed(int fd, unsigned long request, void *argument, const char *what)
{
	int result = ioctl(fd, request, argument);

	if (result < 0)
		die(what);
	return result;
}

static void load(uint8_t *memory, int intel)
{
	static const uint8_t vmcall[] = { 0x0f, 0x01, 0xc1 };
	/* limit and base of a table that nobody uses */
	static const uint8_t table[] = { 0x37, 0x00, 0x00, 0x50, 0x5a, 0x7e };
	uint16_t handler = CODE + (nested_trap - nested_code);

	memcpy(memory + CODE, nested_code, nested_end - nested_code);
	if (intel)
		memcpy(memory + CODE + (nested_call - nested_code), vmcall, sizeof(vmcall));
	memcpy(memory + 0x300, table, sizeof(table));
	memcpy(memory + VECTOR_3, &handler, sizeof(handler));
}

static void start(int vcpu)
{
	struct kvm_regs regs = { .rip = CODE, .rsp = STACK, .rflags = 2 };
	struct kvm_sregs sregs;

	needed(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	needed(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
	needed(vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");
}

/*
 * Say where the page is that the rounds are counted in, wait for a line, make the rounds,
 * and tell what came of them. "failed" is the number of the step that went wrong.
 */
int do_nested(uint64_t asked, int intel)
{
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY };
	struct kvm_run *run;
	uint32_t rounds = 0, breakpoints = 0, strange = 0;
	unsigned int failed = 0, reason = 0;
	uint8_t *memory;
	char line[16];

	if (kvm < 0)
		die("/dev/kvm");
	vm = needed(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED || mlock(memory, MEMORY))
		die("mmap");
	load(memory, intel);
	region.userspace_addr = (uintptr_t)memory;
	needed(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
	needed(vm, KVM_SET_TSS_ADDR, (void *)0xfffbd000, "KVM_SET_TSS_ADDR");
	vcpu = needed(vm, KVM_CREATE_VCPU, NULL, "KVM_CREATE_VCPU");
	run = mmap(NULL, needed(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE"),
		   PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		die("mmap of the vCPU");
	start(vcpu);

	printf("{\"gpa\":%llu}\n", (unsigned long long)physical(memory + DATA));
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	while (rounds < asked) {
		if (ioctl(vcpu, KVM_RUN, NULL) < 0) {
			if (errno == EINTR)
				continue;
			die("KVM_RUN");
		}
		reason = run->exit_reason;
		if (reason != KVM_EXIT_IO)
			break;
		if (run->io.port == PORT_WRONG) {
			struct kvm_regs regs;

			needed(vcpu, KVM_GET_REGS, &regs, "KVM_GET_REGS");
			failed = regs.rdi & 0xffff;
			break;
		}
		rounds++;
		if (*(uint32_t *)((uint8_t *)run + run->io.data_offset) != rounds)
			strange++;
	}
	memcpy(&breakpoints, memory + DATA + BREAKPOINTS, sizeof(breakpoints));
	printf("{\"rounds\":%u,\"breakpoints\":%u,\"strange\":%u,\"failed\":%u,\"exit\":%u}\n",
	       rounds, breakpoints, strange, failed, reason);
	return 0;
}
