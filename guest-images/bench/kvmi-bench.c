// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How long is a vCPU held for one introspection event and its reply? Runs in a host, is the
 * device manager of a small guest and, on the other end of a UNIX socket, its introspection tool.
 *
 *	kvmi-bench [--counters FILE] [--vcpus N] [--limit SECONDS] [--apart] [--no-guest]
 *
 * First it prints a line of JSON about the host and about the kinds of events that its kernel
 * has. Then it reads lines "KIND COUNT WARM-UP" and answers each by one line of JSON, with COUNT
 * samples taken after WARM-UP others:
 *
 *	hold	by the guest's TSC, from before the instruction that raises the event to after it
 *	out	the first part of that: until the tool has received the event
 *	answer	the second part: until the tool sends its reply; the rest is the way back
 *
 * KIND is one of the table below; "exit" is a plain exit to this program. "own:KIND" is the
 * same exchange of messages without a guest: a thread takes the part of the kernel, so that the
 * figures are the share of this program, its socket and its two wake-ups.
 *
 * vCPU, tool and the kernel's own thread take turns on one CPU, so that figures are made of work
 * and of context switches. With --apart the tool has a CPU of its own, if there is one, and
 * figures contain the waking of idle CPUs.
 *
 * It ends with its standard input, or after a line that tells a failure; and when something
 * takes longer than the limit.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <x86intrin.h>

#include "counters.h"
#include "guest.h"
#include "kvmi-abi.h"

#define PAGES_AT_ONCE	511	/* entries of one VM_SET_PAGE_ACCESS that fit a message */
#define IN_FLIGHT	16

enum policy { CONTINUE, RETRY_UNRESTRICTED, INJECT, STEP };

struct kind {
	const char *name;
	const char *code;		/* of the guest */
	int events[2];			/* of one sample in order; 0: no more */
	int control;			/* event to be enabled, 0: none */
	int command;			/* further command that it takes, 0: none */
	enum policy policy;
	unsigned char access;		/* what is left of the page */
	bool many_pages;		/* each sample has its own */
};

#define EVENT(name) KVMI_VCPU_EVENT_##name
extern const char guest_code[], guest_code_end[], guest_start[], guest_on_event[],
	guest_on_fault[], guest_clock[], guest_exit[], guest_exit_kernel[], guest_hypercall[],
	guest_breakpoint[], guest_cr3[], guest_msr[], guest_xsetbv[], guest_sgdt[], guest_lidt[],
	guest_read[], guest_write[], guest_fetch[], guest_singlestep[], guest_pause[], guest_trap[];

static const struct kind kinds[] = {
	{ .name = "clock", .code = guest_clock },
	{ .name = "exit", .code = guest_exit },
	{ .name = "exit-kernel", .code = guest_exit_kernel },
	{ .name = "hypercall", .code = guest_hypercall, .events = { EVENT(HYPERCALL) },
	  .control = EVENT(HYPERCALL) },
	{ .name = "breakpoint", .code = guest_breakpoint, .events = { EVENT(BREAKPOINT) },
	  .control = EVENT(BREAKPOINT) },
	{ .name = "cr3", .code = guest_cr3, .events = { EVENT(CR) }, .control = EVENT(CR),
	  .command = KVMI_VCPU_CONTROL_CR },
	{ .name = "msr", .code = guest_msr, .events = { EVENT(MSR) }, .control = EVENT(MSR),
	  .command = KVMI_VCPU_CONTROL_MSR },
	{ .name = "xsetbv", .code = guest_xsetbv, .events = { EVENT(XSETBV) },
	  .control = EVENT(XSETBV) },
	{ .name = "sgdt", .code = guest_sgdt, .events = { EVENT(DESCRIPTOR) },
	  .control = EVENT(DESCRIPTOR) },
	{ .name = "lidt", .code = guest_lidt, .events = { EVENT(DESCRIPTOR) },
	  .control = EVENT(DESCRIPTOR) },
	{ .name = "pf-read", .code = guest_read, .events = { EVENT(PF) }, .control = EVENT(PF),
	  .command = KVMI_VM_SET_PAGE_ACCESS, .access = 0 },
	{ .name = "pf-write", .code = guest_write, .events = { EVENT(PF) }, .control = EVENT(PF),
	  .command = KVMI_VM_SET_PAGE_ACCESS, .access = KVMI_ACCESS_R | KVMI_ACCESS_X },
	{ .name = "pf-fetch", .code = guest_fetch, .events = { EVENT(PF) }, .control = EVENT(PF),
	  .command = KVMI_VM_SET_PAGE_ACCESS, .access = KVMI_ACCESS_R | KVMI_ACCESS_W },
	{ .name = "pf-retry", .code = guest_write, .events = { EVENT(PF) }, .control = EVENT(PF),
	  .command = KVMI_VM_SET_PAGE_ACCESS, .access = KVMI_ACCESS_R | KVMI_ACCESS_X,
	  .policy = RETRY_UNRESTRICTED, .many_pages = true },
	{ .name = "singlestep", .code = guest_singlestep, .events = { EVENT(SINGLESTEP) },
	  .control = EVENT(HYPERCALL), .command = KVMI_VCPU_CONTROL_SINGLESTEP, .policy = STEP },
	{ .name = "pause", .code = guest_pause, .events = { EVENT(PAUSE) },
	  .command = KVMI_VM_PAUSE_VCPU },
	{ .name = "trap", .code = guest_trap, .events = { EVENT(HYPERCALL), EVENT(TRAP) },
	  .control = EVENT(HYPERCALL), .command = KVMI_VCPU_INJECT_EXCEPTION,
	  .policy = INJECT },
};

/* Time stamps of one sample by the host's TSC: the tool received, the tool is about to answer. */
struct marks {
	uint64_t received, answering;
};

static struct vcpu {
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	sem_t start, out;		/* to its thread; done or at the end */
	struct marks *marks;
	unsigned int marked, events;
	/* An event that waits for the reply to a command. */
	struct { bool waits; uint32_t seq, command; int event; uint64_t since_ns; } held;
	bool stepping;
} vcpus[MAX_VCPUS];

/* A tool: one end of a socket, and the thread that reads it. */
struct tool {
	int fd;
	pthread_t thread;
	pthread_mutex_t lock;
	volatile uint64_t *slot;	/* of the counters; never NULL */
	uint32_t seq;
	struct { size_t size; uint64_t ns; } sent[IN_FLIGHT];
	uint32_t called;		/* command that main waits for */
	int error;
	sem_t replied;
	unsigned char reply[4200];
	unsigned char buffer[1 << 16];
	size_t filled;
};

static struct tool guest_tool, own_tool;
static const struct kind *volatile kind;
static unsigned int vcpu_count = 1, cpu_count, limit_s = 60, wanted, kernel_threads;
static bool apart;
static unsigned char *memory;
static struct kvmi_get_version_reply version;

/* -- telling ------------------------------------------------------------------------------- */

static __attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...)
{
	char text[512], line[600];
	va_list arguments;
	int size;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	size = snprintf(line, sizeof(line), "{\"kind\": \"%s\", \"failed\": \"%s\"}\n",
			kind ? kind->name : "", text);
	if (write(STDOUT_FILENO, line, size) < 0)
		_exit(4);
	_exit(3);
}

static void on_alarm(int signal)
{
	(void)signal;
	fail("not done within %u s: %u events of vCPU 0, %u samples wanted", limit_s,
	     vcpus[0].events, wanted);
}

static int must(int result, const char *what)
{
	if (result < 0)
		fail("%s: %s", what, strerror(errno));
	return result;
}

static void wait_for(sem_t *semaphore)
{
	while (sem_wait(semaphore) < 0)
		;	/* interrupted */
}

/* Pin a thread, 0: the calling one; no figure shall depend on what the scheduler likes. */
static bool stay_on(unsigned int cpu, pid_t thread)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu % cpu_count, &set);
	return sched_setaffinity(thread, sizeof(set), &set) == 0;
}

/* Kernel threads of the introspection that started with our hook go where the tool is. */
static unsigned int place_kernel_threads(void)
{
	DIR *proc = opendir("/proc");
	unsigned int placed = 0;
	struct dirent *entry;

	while (proc && (entry = readdir(proc))) {
		char path[300], name[64];
		int parent = 0, id = atoi(entry->d_name);
		FILE *stat;

		snprintf(path, sizeof(path), "/proc/%d/stat", id);
		stat = id ? fopen(path, "r") : NULL;
		if (!stat)
			continue;
		if (fscanf(stat, "%*d (%63[^)]) %*c %d", name, &parent) == 2 && parent == 2 &&
		    strstr(name, "kvmi"))
			placed += stay_on(0, id);
		fclose(stat);
	}
	if (proc)
		closedir(proc);
	return placed;
}

static void start_thread(pthread_t *thread, void *(*function)(void *), void *argument)
{
	if (pthread_create(thread, NULL, function, argument))
		fail("no further thread");
}

/* -- the tool ------------------------------------------------------------------------------ */

static void send_all(int fd, const void *data, size_t size)
{
	for (const char *at = data; size; ) {
		ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		must(sent, "the socket to the kernel");
		at += sent;
		size -= sent;
	}
}

static void send_message(struct tool *tool, int id, uint32_t seq, const void *payload, size_t size)
{
	unsigned char message[sizeof(struct kvmi_msg_hdr) + KVMI_MAX_MSG_SIZE];
	struct kvmi_msg_hdr header = { .id = id, .size = size, .seq = seq };

	memcpy(message, &header, sizeof(header));
	memcpy(message + sizeof(header), payload, size);
	send_all(tool->fd, message, sizeof(header) + size);
}

static uint32_t send_command(struct tool *tool, int id, const void *payload, size_t size,
			     bool called)
{
	uint32_t seq;

	pthread_mutex_lock(&tool->lock);
	seq = ++tool->seq;
	tool->sent[seq % IN_FLIGHT].size = sizeof(struct kvmi_msg_hdr) + size;
	tool->sent[seq % IN_FLIGHT].ns = now_ns();
	if (called)
		tool->called = seq;
	send_message(tool, id, seq, payload, size);
	pthread_mutex_unlock(&tool->lock);
	return seq;
}

/* Send a command and wait for its reply; what follows the error code is in tool->reply. */
static int call(struct tool *tool, int id, const void *payload, size_t size)
{
	send_command(tool, id, payload, size, true);
	wait_for(&tool->replied);
	return tool->error;
}

static int call_vcpu(unsigned int vcpu, int id, const void *payload, size_t size)
{
	struct { struct kvmi_vcpu_hdr header; unsigned char rest[64]; } request = {
		.header.vcpu = vcpu,
	};

	memcpy(request.rest, payload, size);
	return call(&guest_tool, id, &request, sizeof(request.header) + size);
}

static void answer(struct tool *tool, unsigned int vcpu, int event, uint32_t seq, int action,
		   uint64_t new_value, uint64_t since_ns)
{
	struct {
		struct kvmi_vcpu_hdr header;
		struct kvmi_vcpu_event_reply common;
		uint64_t new_value;
	} reply = {
		.header.vcpu = vcpu, .common.action = action, .common.event = event,
		.new_value = new_value,
	};
	bool valued = event == EVENT(CR) || event == EVENT(MSR);
	size_t size = valued ? sizeof(reply) : offsetof(typeof(reply), new_value);
	struct vcpu *v = &vcpus[vcpu];
	const struct kind *now = kind;
	int last = !now->events[1] ? now->events[0] : now->events[1];

	if (event == last && v->marks && v->marked < wanted)
		v->marks[v->marked++].answering = __rdtsc();
	pthread_mutex_lock(&tool->lock);
	send_message(tool, KVMI_VCPU_EVENT, seq, &reply, size);
	pthread_mutex_unlock(&tool->lock);
	counters_event_reply(tool->slot, sizeof(struct kvmi_msg_hdr) + size, now_ns() - since_ns);
}

static uint32_t lift(struct tool *tool, uint64_t gpa)
{
	struct {
		struct kvmi_vm_set_page_access head;
		struct kvmi_page_access_entry entry;
	} request = {
		.head.count = 1,
		.entry.gpa = gpa & ~0xfffull,
		.entry.access = KVMI_ACCESS_R | KVMI_ACCESS_W | KVMI_ACCESS_X,
	};

	return send_command(tool, KVMI_VM_SET_PAGE_ACCESS, &request, sizeof(request), false);
}

static uint32_t inject(struct tool *tool, unsigned int vcpu)
{
	struct {
		struct kvmi_vcpu_hdr header;
		struct kvmi_vcpu_inject_exception what;
	} request = { .header.vcpu = vcpu, .what.nr = 6 };	/* #UD, without error code */

	return send_command(tool, KVMI_VCPU_INJECT_EXCEPTION, &request, sizeof(request), false);
}

static uint32_t step(struct tool *tool, unsigned int vcpu, bool enable)
{
	struct {
		struct kvmi_vcpu_hdr header;
		struct kvmi_vcpu_control_singlestep what;
	} request = { .header.vcpu = vcpu, .what.enable = enable };

	return send_command(tool, KVMI_VCPU_CONTROL_SINGLESTEP, &request, sizeof(request), false);
}

union payload {
	struct kvmi_vcpu_event_cr cr;
	struct kvmi_vcpu_event_msr msr;
	struct kvmi_vcpu_event_pf pf;
};

struct event_message {
	struct kvmi_event_hdr header;
	struct kvmi_vcpu_event common;
	union payload payload;
};

static void on_event(struct tool *tool, const struct kvmi_msg_hdr *header,
		     const struct event_message *message, uint64_t received)
{
	unsigned int index = message->common.vcpu;
	struct vcpu *v = &vcpus[index < MAX_VCPUS ? index : 0];
	int event = message->header.event;
	uint64_t since_ns = now_ns(), new_value = 0;
	const struct kind *now = kind;
	uint32_t command = 0;

	counters_event(tool->slot, event, sizeof(*header) + header->size, since_ns);
	if (event == now->events[0] || event == now->events[1])
		v->events++;
	if (event == now->events[0] && v->marks && v->marked < wanted)
		v->marks[v->marked].received = received;
	if (event == EVENT(CR))
		new_value = message->payload.cr.new_value;
	else if (event == EVENT(MSR))
		new_value = message->payload.msr.new_value;
	else if (event == EVENT(PF) && now->policy == RETRY_UNRESTRICTED)
		command = lift(tool, message->payload.pf.gpa);
	else if (event == EVENT(HYPERCALL) && now->policy == INJECT)
		command = inject(tool, index);
	else if (event == EVENT(HYPERCALL) && now->policy == STEP)
		command = step(tool, index, v->stepping = !v->stepping);
	else if (event == EVENT(PAUSE) && memory)
		++*(volatile uint64_t *)(memory + CONTROL(index) + C_PAUSED);
	if (command) {
		v->held.waits = true;
		v->held.command = command;
		v->held.seq = header->seq;
		v->held.event = event;
		v->held.since_ns = since_ns;
		return;
	}
	answer(tool, index, event, header->seq, KVMI_ACTION_CONTINUE, new_value, since_ns);
}

static void on_reply(struct tool *tool, const struct kvmi_msg_hdr *header,
		     const unsigned char *payload)
{
	const struct kvmi_error_code *code = (const void *)payload;
	size_t rest = header->size - sizeof(*code);

	counters_command(tool->slot, tool->sent[header->seq % IN_FLIGHT].size,
			 sizeof(*header) + header->size, code->err,
			 now_ns() - tool->sent[header->seq % IN_FLIGHT].ns);
	for (unsigned int i = 0; i < vcpu_count; i++) {
		struct vcpu *v = &vcpus[i];

		if (!v->held.waits || v->held.command != header->seq)
			continue;
		if (code->err)
			fail("a command during event %d was refused with %d", v->held.event,
			     code->err);
		v->held.waits = false;
		answer(tool, i, v->held.event, v->held.seq,
		       v->held.event == EVENT(PF) ? KVMI_ACTION_RETRY : KVMI_ACTION_CONTINUE, 0,
		       v->held.since_ns);
		return;
	}
	if (header->seq == tool->called) {
		memcpy(tool->reply, payload + sizeof(*code),
		       rest < sizeof(tool->reply) ? rest : sizeof(tool->reply));
		tool->error = code->err;
		sem_post(&tool->replied);
	}
}

static void *tool_thread(void *argument)
{
	struct tool *tool = argument;

	stay_on(apart ? cpu_count - 1 : 0, 0);
	for (;;) {
		ssize_t size = read(tool->fd, tool->buffer + tool->filled,
				    sizeof(tool->buffer) - tool->filled);
		uint64_t received = __rdtsc();
		const unsigned char *at = tool->buffer;
		struct kvmi_msg_hdr header;

		if (size < 0 && errno == EINTR)
			continue;
		if (size <= 0)
			fail("the kernel closed the socket");
		tool->filled += size;
		while (tool->filled >= sizeof(header)) {
			memcpy(&header, at, sizeof(header));
			if (tool->filled < sizeof(header) + header.size)
				break;
			if (header.id == KVMI_VCPU_EVENT)
				on_event(tool, &header, (const void *)(at + sizeof(header)),
					 received);
			else
				on_reply(tool, &header, at + sizeof(header));
			at += sizeof(header) + header.size;
			tool->filled -= sizeof(header) + header.size;
		}
		memmove(tool->buffer, at, tool->filled);
	}
}

/* Start a tool; answers the other end of its socket. */
static int start_tool(struct tool *tool, const char *counters, unsigned int slot)
{
	static uint64_t nowhere[2][COUNTERS_SLOT_SIZE / sizeof(uint64_t)];
	int ends[2];

	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
	tool->fd = ends[0];
	tool->slot = counters ? counters_take(counters, slot) : nowhere[slot];
	if (!tool->slot)
		fail("%s: no counters of this program's layout", counters);
	pthread_mutex_init(&tool->lock, NULL);
	sem_init(&tool->replied, 0, 0);
	start_thread(&tool->thread, tool_thread, tool);
	return ends[1];
}

/* -- without a guest ----------------------------------------------------------------------- */

static int kernel_end;
static uint64_t *own_pairs;

static size_t payload_size(int event)
{
	switch (event) {
	case EVENT(BREAKPOINT):
		return sizeof(struct kvmi_vcpu_event_breakpoint);
	case EVENT(CR):
		return sizeof(struct kvmi_vcpu_event_cr);
	case EVENT(MSR):
		return sizeof(struct kvmi_vcpu_event_msr);
	case EVENT(XSETBV):
		return sizeof(struct kvmi_vcpu_event_xsetbv);
	case EVENT(DESCRIPTOR):
		return sizeof(struct kvmi_vcpu_event_descriptor);
	case EVENT(PF):
		return sizeof(struct kvmi_vcpu_event_pf);
	case EVENT(SINGLESTEP):
		return sizeof(struct kvmi_vcpu_event_singlestep);
	case EVENT(TRAP):
		return sizeof(struct kvmi_vcpu_event_trap);
	default:
		return 0;
	}
}

/* Receive one whole message of the tool; it sends nothing more before it has an answer. */
static void receive(unsigned char *message, size_t room, struct kvmi_msg_hdr *header)
{
	size_t filled = 0;

	do {
		filled += must(read(kernel_end, message + filled, room - filled), "socket pair");
		memcpy(header, message, sizeof(*header));
	} while (filled < sizeof(*header) || filled < sizeof(*header) + header->size);
}

/* One event of the exchange, with what the tool asks for before it answers. */
static void own_event(int event, uint32_t seq)
{
	struct {
		struct kvmi_msg_hdr header;
		struct event_message body;
	} message = {
		.header.id = KVMI_VCPU_EVENT, .header.seq = seq,
		.header.size = offsetof(struct event_message, payload) + payload_size(event),
		.body.header.event = event, .body.common.size = sizeof(struct kvmi_vcpu_event),
	};
	struct { struct kvmi_msg_hdr header; struct kvmi_error_code code; } reply = {
		.header.size = sizeof(struct kvmi_error_code),
	};
	unsigned char received[256];
	struct kvmi_msg_hdr header;

	send_all(kernel_end, &message, sizeof(message.header) + message.header.size);
	for (;;) {
		receive(received, sizeof(received), &header);
		if (header.id == KVMI_VCPU_EVENT)
			return;
		reply.header.id = header.id;
		reply.header.seq = header.seq;
		send_all(kernel_end, &reply, sizeof(reply));
	}
}

static void *own_thread(void *argument)
{
	const struct kind *now = argument;

	stay_on(0, 0);
	for (unsigned int i = 0; i < wanted; i++) {
		own_pairs[2 * i] = __rdtsc();
		own_event(now->events[0], 2 * i);
		if (now->events[1])
			own_event(now->events[1], 2 * i + 1);
		own_pairs[2 * i + 1] = __rdtsc();
	}
	return NULL;
}

/* -- the guest ----------------------------------------------------------------------------- */

static uint64_t *control(unsigned int vcpu, unsigned int offset)
{
	return (uint64_t *)(memory + CONTROL(vcpu) + offset);
}

static void set(unsigned int vcpu, unsigned int offset, uint64_t value)
{
	__atomic_store_n(control(vcpu, offset), value, __ATOMIC_SEQ_CST);
}

static uint64_t address_of(const char *label)
{
	return CODE + (label - guest_code);
}

static void *vcpu_thread(void *argument)
{
	struct vcpu *v = argument;
	unsigned int port;

	stay_on(v - vcpus, 0);
	wait_for(&v->start);
	for (;;) {
		int result = ioctl(v->fd, KVM_RUN, 0);
		uint64_t left = __rdtsc();

		if (result < 0 && errno == EINTR)
			continue;
		must(result, "KVM_RUN");
		if (v->run->exit_reason != KVM_EXIT_IO)
			fail("the vCPU left the guest with exit reason %u, internal error %u",
			     v->run->exit_reason,
			     v->run->exit_reason == KVM_EXIT_INTERNAL_ERROR ?
			     v->run->internal.suberror : 0);
		port = v->run->io.port;
		if (port == PORT_PLAIN && v->marked < wanted) {
			v->marks[v->marked].received = left;
			v->marks[v->marked++].answering = __rdtsc();
		} else if (port == PORT_DONE) {
			sem_post(&v->out);
		} else if (port == PORT_END) {
			sem_post(&v->out);
			wait_for(&v->start);
		} else if (port == PORT_FAULT) {
			fail("the guest had an exception that nobody expects");
		}
	}
}

static void put64(unsigned int address, uint64_t value)
{
	memcpy(memory + address, &value, sizeof(value));
}

static void fill_memory(bool amd)
{
	static const unsigned char vmcall[] = { 0x0f, 0x01, 0xc1 };
	static const unsigned char vmmcall[] = { 0x0f, 0x01, 0xd9 };
	unsigned char *code = memory + CODE, *end = code + (guest_code_end - guest_code);

	memcpy(code, guest_code, guest_code_end - guest_code);
	for (; !amd && code + sizeof(vmcall) <= end; code++)
		if (!memcmp(code, vmmcall, sizeof(vmmcall)))
			memcpy(code, vmcall, sizeof(vmcall));
	put64(GDT + 0x08, 0x00af9b000000ffff);	/* code, 64 bits */
	put64(GDT + 0x10, 0x00cf93000000ffff);	/* data */
	for (unsigned int vector = 0; vector < 32; vector++) {
		bool expected = vector == 3 || vector == 6;
		uint64_t to = address_of(expected ? guest_on_event : guest_on_fault);

		put64(IDT + vector * 16, (to & 0xffff) | 0x08 << 16 | 0x8eull << 40 |
					 (to >> 16 & 0xffff) << 48);
	}
	put64(PML4_A, PDPT | 3);
	put64(PML4_B, PDPT | 3);
	put64(PDPT, PAGE_DIRECTORY | 3);
	for (uint64_t at = 0; at < MEMORY_SIZE; at += 2 << 20)
		put64(PAGE_DIRECTORY + (at >> 21) * 8, at | 0x83);
	for (unsigned int i = 0; i < vcpu_count; i++)
		for (unsigned int page = 0; page <= PAGES_AT_ONCE; page++)
			memory[PAGES(i) + page * 4096] = 0xc3;	/* RET */
}

static struct kvm_segment segment(unsigned int selector, unsigned int type)
{
	return (struct kvm_segment){
		.selector = selector, .type = type, .limit = 0xffffffff, .present = 1,
		.s = 1, .g = 1, .l = type & 8 ? 1 : 0, .db = type & 8 ? 0 : 1,
	};
}

static void set_registers(unsigned int index)
{
	struct vcpu *v = &vcpus[index];
	struct { uint16_t limit; uint64_t base; } __attribute__((packed)) idtr = { 0xfff, IDT };
	struct kvm_regs regs = {
		.rip = address_of(guest_start), .rflags = 0x202, .r15 = CONTROL(index),
		.rsp = CONTROL(index) + 0x1000,
	};
	struct kvm_sregs sregs;

	memcpy(memory + CONTROL(index) + C_IDTR, &idtr, sizeof(idtr));
	must(ioctl(v->fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = segment(0x08, 11);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(0x10, 3);
	sregs.tr = (struct kvm_segment){
		.base = TSS, .limit = TSS_SIZE - 1, .selector = 0x18, .type = 11, .present = 1,
	};
	sregs.gdt = (struct kvm_dtable){ .base = GDT, .limit = 0x17 };
	sregs.idt = (struct kvm_dtable){ .base = IDT, .limit = 0xfff };
	sregs.cr0 = 0x80010031;			/* PG, WP, NE, ET, PE */
	sregs.cr3 = PML4_A;
	sregs.cr4 = 0x40620;			/* OSXSAVE, OSXMMEXCPT, OSFXSR, PAE */
	sregs.efer = 0x500;			/* LMA, LME */
	must(ioctl(v->fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	must(ioctl(v->fd, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

/* Let the guest's TSC be the host's, so that stamps of both can be compared. */
static bool same_tsc(int vcpu)
{
	uint64_t zero = 0;
	struct kvm_device_attr offset = {
		.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&zero,
	};

	return ioctl(vcpu, KVM_SET_DEVICE_ATTR, &offset) == 0;
}

static void make_guest(bool amd, bool *tsc_compares, int *tsc_khz, int *vm)
{
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY_SIZE };
	struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid = {
		.head.nent = 256,
	};
	int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm"), run_size;

	*vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	must(ioctl(*vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		fail("no memory for the guest");
	region.userspace_addr = (uintptr_t)memory;
	must(ioctl(*vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	fill_memory(amd);
	must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	run_size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	*tsc_compares = true;
	for (unsigned int i = 0; i < vcpu_count; i++) {
		struct vcpu *v = &vcpus[i];

		v->fd = must(ioctl(*vm, KVM_CREATE_VCPU, i), "KVM_CREATE_VCPU");
		v->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
		if (v->run == MAP_FAILED)
			fail("no page of kvm_run");
		must(ioctl(v->fd, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
		set_registers(i);
		*tsc_compares &= same_tsc(v->fd);
		v->marks = calloc(MAX_SAMPLES, sizeof(*v->marks));
		sem_init(&v->start, 0, 0);
		sem_init(&v->out, 0, 0);
		start_thread(&v->thread, vcpu_thread, v);
	}
	*tsc_khz = ioctl(vcpus[0].fd, KVM_GET_TSC_KHZ, 0);
}

static void hook(int vm, int fd)
{
	struct kvm_introspection_hook hook = { .fd = fd, .uuid = "kvmi-bench" };
	struct kvm_introspection_feature all = { .allow = 1, .id = -1 };

	must(ioctl(vm, KVM_INTROSPECTION_HOOK, &hook), "KVM_INTROSPECTION_HOOK");
	must(ioctl(vm, KVM_INTROSPECTION_COMMAND, &all), "KVM_INTROSPECTION_COMMAND");
	must(ioctl(vm, KVM_INTROSPECTION_EVENT, &all), "KVM_INTROSPECTION_EVENT");
	close(fd);
	if (!apart)
		kernel_threads = place_kernel_threads();
	if (call(&guest_tool, KVMI_GET_VERSION, NULL, 0))
		fail("GET_VERSION was refused");
	memcpy(&version, guest_tool.reply, sizeof(version));
}

/* -- switching events on and off ----------------------------------------------------------- */

static void accepted(int error, const char *what)
{
	if (error)
		fail("%s was refused with %d", what, error);
}

static void restrict_pages(unsigned int vcpu, unsigned int access)
{
	struct {
		struct kvmi_vm_set_page_access head;
		struct kvmi_page_access_entry entries[PAGES_AT_ONCE];
	} request = { .head.count = kind->many_pages ? wanted : 1 };

	for (unsigned int i = 0; i < request.head.count; i++) {
		request.entries[i].gpa = PAGES(vcpu) + i * 4096;
		request.entries[i].access = access;
	}
	accepted(call(&guest_tool, KVMI_VM_SET_PAGE_ACCESS, &request, sizeof(request.head) +
		      request.head.count * sizeof(request.entries[0])), "VM_SET_PAGE_ACCESS");
}

static void switch_further(unsigned int vcpu, bool on)
{
	struct kvmi_vcpu_control_cr cr = { .cr = 3, .enable = on };
	struct kvmi_vcpu_control_msr msr = { .msr = 0xc0000082, .enable = on };

	switch (kind->command) {
	case KVMI_VCPU_CONTROL_CR:
		accepted(call_vcpu(vcpu, kind->command, &cr, sizeof(cr)), "VCPU_CONTROL_CR");
		break;
	case KVMI_VCPU_CONTROL_MSR:
		accepted(call_vcpu(vcpu, kind->command, &msr, sizeof(msr)), "VCPU_CONTROL_MSR");
		break;
	case KVMI_VM_SET_PAGE_ACCESS:
		restrict_pages(vcpu, on ? kind->access : KVMI_ACCESS_R | KVMI_ACCESS_W |
							 KVMI_ACCESS_X);
		break;
	}
}

static void switch_events(unsigned int vcpu, bool on)
{
	struct kvmi_vcpu_control_events events = { .event_id = kind->control, .enable = on };

	if (!on)
		switch_further(vcpu, on);
	if (kind->control)
		accepted(call_vcpu(vcpu, KVMI_VCPU_CONTROL_EVENTS, &events, sizeof(events)),
			 "VCPU_CONTROL_EVENTS");
	if (on)
		switch_further(vcpu, on);
}

/* Pause a vCPU in the guest, again and again; each time the guest has to see that it was. */
static void pause_vcpus(void)
{
	for (unsigned int done = 1; done <= wanted; done++)
		for (unsigned int i = 0; i < vcpu_count; i++) {
			struct kvmi_vm_pause_vcpu request = { .vcpu = i };

			accepted(call(&guest_tool, KVMI_VM_PAUSE_VCPU, &request, sizeof(request)),
				 "VM_PAUSE_VCPU");
			/* A pause of the poll; the alarm ends it. */
			while (__atomic_load_n(control(i, C_SEEN), __ATOMIC_SEQ_CST) < done)
				usleep(50);
		}
}

/* -- measuring ----------------------------------------------------------------------------- */

static void print_list(const char *name, const uint64_t *pairs, const struct marks *marks,
		       unsigned int from, unsigned int which)
{
	printf(", \"%s\": [", name);
	for (unsigned int i = from; i < wanted; i++) {
		uint64_t begin = pairs[2 * i], end = pairs[2 * i + 1];

		if (which == 1)
			end = marks[i].received;
		if (which == 2) {
			begin = marks[i].received;
			end = marks[i].answering;
		}
		printf("%s%lld", i == from ? "" : ",", (long long)(end - begin));
	}
	printf("]");
}

static void print_samples(const uint64_t *pairs, const struct vcpu *v, unsigned int from)
{
	print_list("hold", pairs, NULL, from, 0);
	if (v->marked == wanted) {
		print_list("out", pairs, v->marks, from, 1);
		print_list("answer", pairs, v->marks, from, 2);
	}
}

/* Each of those samples is the time of several instructions, and has no end of its own. */
static void print_steps(const uint64_t *pairs, unsigned int from)
{
	printf(", \"hold\": [");
	for (unsigned int i = from; i + 1 < wanted; i++)
		printf("%s%u", i == from ? "" : ",",
		       (uint32_t)(pairs[2 * i + 2] - pairs[2 * i]) / SINGLESTEP_INSTRUCTIONS);
	printf("]");
}

/* How many events; those of single-stepping are more, as more is stepped through. */
static void print_events(const struct vcpu *v)
{
	unsigned int each = !!kind->events[0] + !!kind->events[1];

	printf("\"events\": %u, \"expected\": %u", v->events, wanted *
	       (kind->policy == STEP ? SINGLESTEP_INSTRUCTIONS : each));
}

static void measure_own(unsigned int warm)
{
	pthread_t thread;

	counters_test(own_tool.slot, kind->name);
	start_thread(&thread, own_thread, (void *)kind);
	pthread_join(thread, NULL);
	printf("{\"kind\": \"own:%s\", \"vcpus\": [{", kind->name);
	print_events(&vcpus[0]);
	print_samples(own_pairs, &vcpus[0], warm);
	printf("}]}\n");
}

/* Let whoever wakes up go before a vCPU that only waits in the guest, if they share a CPU. */
static void give_way(bool on)
{
	struct sched_param none = { 0 };

	for (unsigned int i = 0; i < vcpu_count; i++)
		pthread_setschedparam(vcpus[i].thread, on ? SCHED_IDLE : SCHED_OTHER, &none);
}

static void measure(unsigned int warm)
{
	bool pause = kind->command == KVMI_VM_PAUSE_VCPU;

	give_way(true);
	counters_test(guest_tool.slot, kind->name);
	for (unsigned int i = 0; i < vcpu_count; i++) {
		set(i, C_ENTRY, address_of(kind->code));
		set(i, C_SAMPLES, SAMPLES(i));
		set(i, C_COUNT, wanted);
		set(i, C_PAGE, PAGES(i));
		set(i, C_STEP, kind->many_pages ? 4096 : 0);
		set(i, C_PAUSED, 0);
		set(i, C_SEEN, 0);
		sem_post(&vcpus[i].start);
	}
	for (unsigned int i = 0; i < vcpu_count; i++)
		switch_events(i, true);
	give_way(pause);
	for (unsigned int i = 0; i < vcpu_count; i++)
		set(i, C_GO, 1);
	if (pause)
		pause_vcpus();
	for (unsigned int i = 0; i < vcpu_count; i++)
		wait_for(&vcpus[i].out);
	give_way(true);
	for (unsigned int i = 0; i < vcpu_count; i++)
		switch_events(i, false);
	for (unsigned int i = 0; i < vcpu_count; i++)
		set(i, C_GO, 0);
	for (unsigned int i = 0; i < vcpu_count; i++)
		wait_for(&vcpus[i].out);
	printf("{\"kind\": \"%s\", \"vcpus\": [", kind->name);
	for (unsigned int i = 0; i < vcpu_count; i++) {
		const uint64_t *pairs = (const uint64_t *)(memory + SAMPLES(i));

		printf("%s{", i ? ", " : "");
		print_events(&vcpus[i]);
		if (kind->policy == STEP)
			print_steps(pairs, warm);
		else
			print_samples(pairs, &vcpus[i], warm);
		printf("}");
	}
	printf("]}\n");
}

/* -- the conversation ---------------------------------------------------------------------- */

/* Tell why the kernel cannot do a kind: which message it refuses, and how. */
static void print_kind(const struct kind *one, bool guest)
{
	struct kvmi_vm_check_event event = { 0 };
	struct kvmi_vm_check_command command = { .id = one->command };
	int error = 0;

	printf("%s\"%s\": {\"events\": [", one == kinds ? "" : ", ", one->name);
	for (unsigned int i = 0; i < 2 && one->events[i]; i++)
		printf("%s%d", i ? ", " : "", one->events[i]);
	printf("], \"samples\": %u", one->many_pages ? PAGES_AT_ONCE : MAX_SAMPLES);
	for (unsigned int i = 0; guest && i < 2 && one->events[i] && !error; i++) {
		event.id = one->events[i];
		error = call(&guest_tool, KVMI_VM_CHECK_EVENT, &event, sizeof(event));
		if (error)
			printf(", \"missing_event\": %d, \"error\": %d", event.id, error);
	}
	if (guest && !error && one->command) {
		error = call(&guest_tool, KVMI_VM_CHECK_COMMAND, &command, sizeof(command));
		if (error)
			printf(", \"missing_command\": %d, \"error\": %d", command.id, error);
	}
	if (guest && !error && one->policy == STEP && !version.features.singlestep)
		printf(", \"missing_command\": %d, \"error\": %d", command.id, -KVM_EOPNOTSUPP);
	printf("}");
}

static void serve(bool guest)
{
	char line[128], name[64];
	unsigned int count, warm;

	while (fgets(line, sizeof(line), stdin)) {
		bool own = !strncmp(line, "own:", 4);

		kind = NULL;
		if (sscanf(line + (own ? 4 : 0), "%63s %u %u", name, &count, &warm) == 3)
			for (unsigned int i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
				if (!strcmp(kinds[i].name, name))
					kind = &kinds[i];
		if (!kind || !count || count > MAX_SAMPLES || warm > MAX_SAMPLES ||
		    count + warm > (kind->many_pages ? PAGES_AT_ONCE : MAX_SAMPLES))
			fail("no such kind, or no such number of samples");
		if (own ? !kind->events[0] : !guest)
			fail("cannot be measured %s a guest", own ? "without" : "with");
		wanted = count + warm;
		for (unsigned int i = 0; i < MAX_VCPUS; i++)
			vcpus[i].marked = vcpus[i].events = 0;
		alarm(limit_s);
		if (own)
			measure_own(warm);
		else
			measure(warm);
		alarm(0);
		fflush(stdout);
	}
}

static bool is_amd(void)
{
	unsigned int a = 0, b, c, d;

	__asm__("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
	return b == 0x68747541;		/* "Auth" */
}

int main(int argc, char **argv)
{
	bool guest = true, amd = is_amd(), tsc_compares = true;
	const char *counters = NULL;
	int tsc_khz = 0, vm;

	signal(SIGPIPE, SIG_IGN);
	signal(SIGALRM, on_alarm);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--no-guest"))
			guest = false;
		else if (!strcmp(argv[i], "--apart"))
			apart = true;
		else if (i + 1 < argc && !strcmp(argv[i], "--counters"))
			counters = argv[++i];
		else if (i + 1 < argc && !strcmp(argv[i], "--vcpus"))
			vcpu_count = atoi(argv[++i]);
		else if (i + 1 < argc && !strcmp(argv[i], "--limit"))
			limit_s = atoi(argv[++i]);
		else
			fail("unknown option");
	}
	if (vcpu_count < 1 || vcpu_count > MAX_VCPUS || limit_s < 1)
		fail("a number is out of range");
	cpu_count = sysconf(_SC_NPROCESSORS_ONLN);
	own_pairs = calloc(MAX_SAMPLES, 2 * sizeof(*own_pairs));
	alarm(limit_s);
	kernel_end = start_tool(&own_tool, counters, 1);
	if (guest) {
		make_guest(amd, &tsc_compares, &tsc_khz, &vm);
		hook(vm, start_tool(&guest_tool, counters, 0));
	} else {
		vcpus[0].marks = calloc(MAX_SAMPLES, sizeof(*vcpus[0].marks));
	}
	printf("{\"pid\": %d, \"vendor\": \"%s\", \"cpus\": %u, \"vcpus\": %u, \"tsc_khz\": %d, "
	       "\"tsc_compares\": %s, \"apart\": %s, \"kernel_threads\": %u, "
	       "\"version\": %u, \"singlestep\": %u, \"kinds\": {",
	       getpid(), amd ? "AMD" : "Intel", cpu_count, vcpu_count, tsc_khz,
	       tsc_compares ? "true" : "false", apart ? "true" : "false", kernel_threads,
	       version.version, version.features.singlestep);
	for (unsigned int i = 0; i < sizeof(kinds) / sizeof(*kinds); i++)
		print_kind(&kinds[i], guest);
	printf("}}\n");
	fflush(stdout);
	alarm(0);
	serve(guest);
	counters_release(own_tool.slot);
	if (guest)
		counters_release(guest_tool.slot);
	_exit(0);	/* threads are in the kernel, which takes everything down */
}
