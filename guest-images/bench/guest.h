/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Where things are in the guest's memory: known to kvmi-bench.c, which fills it, and to guest.S,
 * which runs in it. All memory is mapped one to one.
 */
#ifndef GUEST_H
#define GUEST_H

#define MEMORY_SIZE	0x1000000

#define GDT		0x1000
#define TSS		0x1200
#define TSS_SIZE	0x68
#define IDT		0x2000
#define PML4_A		0x3000		/* two of the same content, */
#define PML4_B		0x4000		/* to write CR3 with a change */
#define PDPT		0x5000
#define PAGE_DIRECTORY	0x6000
#define CODE		0x10000

/* Per vCPU: the control block, in a page whose end is the stack. */
#define CONTROL(vcpu)	(0x8000 + (vcpu) * 0x1000)
#define SAMPLES(vcpu)	(0x100000 + (vcpu) * 0x100000)
#define PAGES(vcpu)	(0x800000 + (vcpu) * 0x400000)
#define MAX_VCPUS	2
#define MAX_SAMPLES	(0x100000 / 16)

/* The control block; %r15 points to it. */
#define C_GO		0x00	/* the program: 1 measure, 0 get out */
#define C_ENTRY		0x08	/* what to measure: an address in CODE */
#define C_SAMPLES	0x10	/* where pairs of time stamps go */
#define C_COUNT		0x18	/* how many pairs */
#define C_PAGE		0x20	/* page that is touched, */
#define C_STEP		0x28	/* and the distance to the next one */
#define C_PAUSED	0x30	/* how often the vCPU was paused, told by the tool */
#define C_SEEN		0x38	/* how often the guest noticed it */
#define C_SCRATCH	0x40
#define C_IDTR		0x50

/* Ports whose access is an exit to user space. */
#define PORT_PLAIN	0x10	/* the exit that is measured */
#define PORT_DONE	0x11	/* all is measured */
#define PORT_END	0x12	/* out; goes on when run again */
#define PORT_FAULT	0x13	/* an exception that nobody expects */

#define SINGLESTEP_INSTRUCTIONS	5	/* in the loop that is stepped through */

#endif
