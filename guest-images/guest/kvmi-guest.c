// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a guest does on request, and exact accounts of it.
 *
 * Every subcommand answers on standard output, one JSON object a line:
 *
 *	hypercall N	N hypercalls that ask for the introspection tool
 *	breakpoint N	N breakpoint instructions
 *	counter [MS]	a clockwork in the background, ticking every MS milliseconds
 *	memory		a page that stays in place and can be looked at
 *	nested N	N rounds of a guest of this guest
 *	vsock PORT	one vsock connection to that port, passed on to and from here
 *
 * Linked statically: the guest has no C library.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <linux/vm_sockets.h>
#include <time.h>
#include <unistd.h>
#include <cpuid.h>

#include "kvmi-guest.h"

#define HYPERCALL	34	/* KVM_HC_XEN_HVM_OP */
#define REQUEST_EVENT	24	/* KVM_HC_XEN_HVM_OP_GUEST_REQUEST_VM_EVENT */

void die(const char *what)
{
	fprintf(stderr, "kvmi-guest: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t number(const char *text)
{
	char *end;
	uint64_t value = strtoull(text, &end, 0);

	if (!*text || *end) {
		fprintf(stderr, "kvmi-guest: '%s' is not a number\n", text);
		exit(2);
	}
	return value;
}

/* ---- hypercall ---------------------------------------------------------- */

/* Each vendor has its own instruction; the other one's may be trapped, not emulated. */
static int is_intel(void)
{
	unsigned int eax, ebx, ecx, edx;

	return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx;
}

static int64_t hypercall(int intel)
{
	int64_t result = HYPERCALL;
	uint64_t unused = 0;

	/*
	 * The 64-bit form has its arguments in rdi and rsi. A kernel that looks for them
	 * in rbx and rcx, as for other hypercalls, finds zeros there.
	 */
	if (intel)
		asm volatile("vmcall" : "+a"(result), "+b"(unused)
			     : "D"(REQUEST_EVENT), "S"(0), "c"(0), "d"(0) : "memory");
	else
		asm volatile("vmmcall" : "+a"(result), "+b"(unused)
			     : "D"(REQUEST_EVENT), "S"(0), "c"(0), "d"(0) : "memory");
	return result;
}

#define MAX_RESULTS 16

static int do_hypercall(uint64_t asked)
{
	struct {
		int64_t value;
		uint64_t count;
	} results[MAX_RESULTS] = { 0 };
	int intel = is_intel();
	unsigned int used = 0, i;
	uint64_t made, other = 0;

	for (made = 0; made < asked; made++) {
		int64_t value = hypercall(intel);

		for (i = 0; i < used && results[i].value != value; i++)
			;
		if (i == used) {
			if (used == MAX_RESULTS) {
				other++;
				continue;
			}
			results[used++].value = value;
		}
		results[i].count++;
	}

	printf("{\"asked\":%llu,\"made\":%llu,\"returned\":{", (unsigned long long)asked,
	       (unsigned long long)made);
	for (i = 0; i < used; i++)
		printf("%s\"%lld\":%llu", i ? "," : "", (long long)results[i].value,
		       (unsigned long long)results[i].count);
	printf("},\"other\":%llu}\n", (unsigned long long)other);
	return 0;
}

/* ---- breakpoint --------------------------------------------------------- */

static volatile sig_atomic_t trapped;

static void on_trap(int signal)
{
	(void)signal;
	trapped++;
}

static int do_breakpoint(uint64_t asked)
{
	struct sigaction action = { .sa_handler = on_trap };
	uint64_t made;

	if (sigaction(SIGTRAP, &action, NULL))
		die("sigaction");
	for (made = 0; made < asked; made++)
		asm volatile("int3" ::: "memory");
	printf("{\"asked\":%llu,\"made\":%llu,\"trapped\":%lld}\n", (unsigned long long)asked,
	       (unsigned long long)made, (long long)trapped);
	return 0;
}

/* ---- counter ------------------------------------------------------------ */

#define COUNTER_FILE	"/run/counter"
#define SLOTS		(16 * PAGE_SIZE / sizeof(uint64_t))

/*
 * Ask the kernel: the vDSO reads the clock that KVM keeps for vCPU 0, which is not set yet when
 * another vCPU is the first to run after the machine was stopped.
 */
static uint64_t now_us(void)
{
	struct timespec now;

	if (syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now))
		die("clock_gettime");
	return now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
}

static void publish(const char *text, int length)
{
	int fd = open(COUNTER_FILE ".new", O_WRONLY | O_CREAT | O_TRUNC, 0644);

	if (fd < 0 || write(fd, text, length) != length || close(fd) ||
	    rename(COUNTER_FILE ".new", COUNTER_FILE))
		die(COUNTER_FILE);
}

/*
 * Ticks for ever. Each tick is written into the next slot of some pages of memory, after
 * looking whether the slot still has what was written into it one round before: a page
 * that a migration lost or took back shows as "lost". The count itself is in two places
 * for the same reason.
 */
static void count(uint64_t period_ms, int started)
{
	static volatile uint64_t slots[SLOTS];
	static volatile uint64_t ticks, copy;
	struct timespec period = { period_ms / 1000, period_ms % 1000 * 1000000 };
	uint64_t began = now_us(), before = began, largest_gap = 0, went_back = 0, lost = 0;
	char text[256];

	for (;;) {
		uint64_t now = now_us(), next = ticks + 1;
		volatile uint64_t *slot = &slots[next % SLOTS];

		if (now < before || ticks != copy)
			went_back++;
		else if (now - before > largest_gap)
			largest_gap = now - before;
		before = now;
		if (*slot != (next > SLOTS ? next - SLOTS : 0))
			lost++;
		*slot = next;
		ticks = next;
		copy = next;
		publish(text, snprintf(text, sizeof(text),
			"{\"ticks\":%llu,\"went_back\":%llu,\"lost\":%llu,"
			"\"max_gap_ms\":%llu,\"elapsed_ms\":%llu,\"pid\":%d}\n",
			(unsigned long long)next, (unsigned long long)went_back,
			(unsigned long long)lost, (unsigned long long)largest_gap / 1000,
			(unsigned long long)(now - began) / 1000, getpid()));
		if (next == 1)
			close(started);
		nanosleep(&period, NULL);
	}
}

static int do_counter(uint64_t period_ms)
{
	int go[2];
	char word;
	pid_t child;

	/* We stay until the first tick is published: the pipe closes when it is. */
	if (pipe(go))
		die("pipe");
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		int null = open("/dev/null", O_RDWR), i;

		/* Away from the SSH session, which would otherwise wait for us. */
		setsid();
		for (i = 0; i < 3; i++)
			dup2(null, i);
		unlink(COUNTER_FILE);
		close(go[0]);
		if (fork() == 0)
			count(period_ms, go[1]);
		_exit(0);
	}
	close(go[1]);
	while (read(go[0], &word, 1) < 0 && errno == EINTR)
		;
	return access(COUNTER_FILE, R_OK) ? 1 : 0;
}

/* ---- memory ------------------------------------------------------------- */

uint64_t physical(const void *address)
{
	uint64_t entry, index = (uintptr_t)address / PAGE_SIZE;
	int fd = open("/proc/self/pagemap", O_RDONLY);

	if (fd < 0 || pread(fd, &entry, sizeof(entry), index * sizeof(entry)) != sizeof(entry))
		die("/proc/self/pagemap");
	close(fd);
	/* Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bits 0 to 54 the frame. */
	if (!(entry >> 63) || !(entry & ((1ULL << 55) - 1))) {
		errno = EFAULT;
		die("the page has no frame");
	}
	return (entry & ((1ULL << 55) - 1)) * PAGE_SIZE;
}

static void show(const volatile unsigned char *page)
{
	int i;

	printf("{\"hex\":\"");
	for (i = 0; i < PAGE_SIZE; i++)
		printf("%02x", page[i]);
	printf("\"}\n");
}

static int do_memory(void)
{
	volatile unsigned char *page;
	char line[64];
	int i;

	page = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
	if (page == MAP_FAILED || mlock((void *)page, PAGE_SIZE))
		die("mmap");
	for (i = 0; i < PAGE_SIZE; i++)
		page[i] = i * 7 + i / 256;
	printf("{\"gpa\":%llu,\"size\":%d}\n", (unsigned long long)physical((void *)page),
	       PAGE_SIZE);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "show\n")) {
			show(page);
		} else if (!strncmp(line, "fill ", 5)) {
			memset((void *)page, atoi(line + 5), PAGE_SIZE);
			printf("{\"filled\":%d}\n", page[0]);
		} else {
			printf("{\"unknown\":true}\n");
		}
	}
	return 0;
}

/* ---- vsock --------------------------------------------------------------- */

static void pass_on(int from, int to)
{
	char buffer[16384];
	ssize_t size, sent, done;

	size = read(from, buffer, sizeof(buffer));
	if (size <= 0)
		exit(0);
	for (sent = 0; sent < size; sent += done) {
		done = write(to, buffer + sent, size - sent);
		if (done <= 0)
			exit(0);
	}
}

/* The end of a connection for somebody who reaches this guest by SSH only. */
static _Noreturn void do_vsock(uint64_t port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port
	};
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	struct pollfd both[2];
	int peer;

	if (listener < 0 || bind(listener, (void *)&address, sizeof(address)) ||
	    listen(listener, 1))
		die("vsock");
	both[0] = (struct pollfd){ .fd = 0, .events = POLLIN };
	both[1] = (struct pollfd){ .fd = listener, .events = POLLIN };
	if (poll(both, 2, -1) < 0)
		die("poll");
	/* Nothing is sent to nobody, so this is the end of our input. */
	if (both[0].revents)
		exit(0);
	peer = accept(listener, NULL, NULL);
	if (peer < 0)
		die("accept");
	close(listener);
	both[1].fd = peer;
	for (;;) {
		if (poll(both, 2, -1) < 0)
			die("poll");
		if (both[0].revents)
			pass_on(0, peer);
		if (both[1].revents)
			pass_on(peer, 1);
	}
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(what, "hypercall") && argc == 3)
		return do_hypercall(number(argv[2]));
	if (!strcmp(what, "breakpoint") && argc == 3)
		return do_breakpoint(number(argv[2]));
	if (!strcmp(what, "counter") && argc <= 3)
		return do_counter(argc == 3 ? number(argv[2]) : 20);
	if (!strcmp(what, "memory") && argc == 2)
		return do_memory();
	if (!strcmp(what, "nested") && argc == 3)
		return do_nested(number(argv[2]), is_intel());
	if (!strcmp(what, "vsock") && argc == 3)
		do_vsock(number(argv[2]));
	fprintf(stderr, "usage: kvmi-guest hypercall N | breakpoint N | counter [MS] | memory |"
		" nested N | vsock PORT\n");
	return 2;
}
