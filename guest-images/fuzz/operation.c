// SPDX-License-Identifier: GPL-2.0-or-later
/* The operations of a case, and the lanes that carry them out. */
#include "executor.h"

struct lane lanes[LANES];
char parameter[256];
atomic_bool parameter_off;
atomic_bool ready;

static uint8_t *edge; /* the end of what can be read */

void make_edge(void)
{
	edge = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (edge == MAP_FAILED || mprotect(edge + 4096, 4096, PROT_NONE))
		die("guard page");
	edge += 4096;
}

int set_parameter(bool on)
{
	int fd = open(parameter, O_WRONLY), r;

	r = fd < 0 || write(fd, on ? "Y" : "N", 1) != 1 ? errno : 0;
	close(fd);
	return r;
}

/*
 * Documentation/fault-injection: the n-th thing that can fail in this thread fails. 0 takes
 * that back, and must not fail itself: the C library dies of failures in its own calls.
 */
static int fail_nth(uint32_t number)
{
	char text[16];
	int fd, r, size = snprintf(text, sizeof(text), "%u", number), tries = 20;

	do {
		fd = open("/proc/thread-self/fail-nth", O_WRONLY);
		if (fd < 0 && errno == ENOENT)
			return ENOENT; /* a kernel without it */
		r = fd < 0 || write(fd, text, size) != size ? errno : 0;
		close(fd);
	} while (r && !number && tries--);
	return r;
}

static int do_ioctl(struct reader *from)
{
	struct vm *vm = &vms[u8(from) % VMS];
	uint8_t kind = u8(from);
	struct slot *slot = &slots[u8(from) % SLOTS];
	uint8_t spare = u8(from);
	uint32_t request = get_uint32_t(from);
	size_t size = from->end - from->at;
	uint8_t buffer[4096];
	void *argument = buffer;
	int fd = -1, r;

	(void)spare;
	if (size > sizeof(buffer))
		size = sizeof(buffer);
	memset(buffer, 0, sizeof(buffer));
	memcpy(buffer, take(from, size), size);
	switch (kind) {
	case ARG_OURS: fd = slot->ours; break;
	case ARG_PEER: fd = slot->peer; break;
	case ARG_VM_FD: fd = vm->fd; break;
	case ARG_VCPU_FD: fd = vm->vcpu[0].fd; break;
	case ARG_KVM_FD: fd = kvm_fd(); break;
	case ARG_CLOSED_FD: fd = 1000; break;
	case ARG_NULL: argument = NULL; break;
	case ARG_UNMAPPED: argument = edge; break;
	case ARG_KERNEL: argument = (void *)0xffff888000000000; break;
	case ARG_EDGE:
		/* Lanes share the edge. What they write there does not matter. */
		argument = edge - size / 2;
		memcpy(argument, buffer, size / 2);
		break;
	case ARG_VALUE:
		memcpy(&argument, buffer, sizeof(argument));
		break;
	}
	if (kind >= ARG_OURS && (kind <= ARG_KVM_FD || kind == ARG_CLOSED_FD))
		memcpy(buffer, &fd, sizeof(fd));
	r = ioctl(vm->fd, request, argument);
	return r < 0 ? errno : r;
}

static void do_stream(struct lane *lane, struct reader *from)
{
	struct stream stream = { 0 };
	size_t record = open_record(&lane->results, STREAMED, lane->number), summary;
	uint32_t counts[7];
	int fd;

	stream.slot = u8(from) % SLOTS;
	stream.mode = u8(from);
	stream.deaf = u8(from);
	stream.cont = u8(from);
	stream.other = u8(from);
	stream.wrong = u8(from);
	stream.chunk = get_uint16_t(from);
	stream.linger_ms = get_uint16_t(from);
	stream.expected = get_uint32_t(from);
	stream.random = get_uint32_t(from) | 1;
	stream.pieces = *from;
	fd = slots[stream.slot].peer;
	memset(counts, 0, sizeof(counts));
	summary = lane->results.size;
	put(&lane->results, counts, sizeof(counts));
	stream.ended = fd < 0; /* closed by an earlier operation */
	counts[0] = pump(&stream, fd, &lane->results);
	counts[1] = stream.ended;
	counts[2] = stream.replies;
	counts[3] = stream.events;
	counts[4] = stream.answered;
	counts[5] = stream.wrongly;
	counts[6] = stream.written;
	memcpy(lane->results.data + summary, counts, sizeof(counts));
	close_record(&lane->results, record);
	free(stream.in.data);
	free(stream.out.data);
	free(stream.sent.data);
}

static int do_simple(uint16_t kind, struct reader *from)
{
	struct vm *vm;
	uint32_t slot, flags;
	uint64_t gpa, size, offset;
	uint8_t number, end;
	int r;

	switch (kind) {
	case PARAM:
		parameter_off = true;
		return set_parameter(u8(from));
	case FORGET:
		forget_idle();
		return 0;
	case READY:
		ready = true;
		return 0;
	case DELAY:
		usleep(get_uint32_t(from));
		return 0;
	case FAIL:
		return fail_nth(get_uint32_t(from));
	case IOCTL:
		return do_ioctl(from);
	case SOCK:
		number = u8(from) % SLOTS;
		end = u8(from);
		return make_socket(&slots[number], end, get_uint32_t(from));
	case END:
		number = u8(from) % SLOTS;
		end = u8(from);
		return end_socket(&slots[number], end, u8(from));
	}
	/* Only one lane at a time starts, stops and ends a virtual machine. */
	vm = &vms[u8(from) % VMS];
	pthread_mutex_lock(&vm->lock);
	switch (kind) {
	case VM:
		number = u8(from) % IMAGES;
		r = make_vm(vm, &images[number], u8(from));
		break;
	case VMEND:
		r = close_vm(vm);
		break;
	case RUN:
		number = u8(from);
		r = vm->fd < 0 || number >= vm->vcpus ? EBADF : start_vcpu(&vm->vcpu[number]);
		break;
	case STOP:
		number = u8(from);
		r = vm->fd < 0 || number >= vm->vcpus ? EBADF : stop_vcpu(&vm->vcpu[number]);
		break;
	case MEMSLOT:
		slot = get_uint32_t(from);
		flags = get_uint32_t(from);
		gpa = get_uint64_t(from);
		size = get_uint64_t(from);
		offset = get_uint64_t(from);
		r = vm->fd < 0 || offset + size > vm->image->memory ?
			EBADF : set_memory(vm, slot, flags, gpa, size, offset);
		break;
	default:
		errno = EPROTO;
		die("operation %u", kind);
		r = EPROTO;
	}
	pthread_mutex_unlock(&vm->lock);
	return r;
}

void wait_for(sem_t *what)
{
	while (sem_wait(what))
		;
}

void run_lane(struct lane *lane)
{
	while (lane->number && !ready)
		usleep(50);
	for (unsigned int i = 0; i < lane->count; i++) {
		struct reader from = lane->ops[i];
		size_t record;
		uint32_t r;

		lane->at = i;
		if (lane->kinds[i] == STREAM) {
			do_stream(lane, &from);
		} else {
			r = do_simple(lane->kinds[i], &from);
			record = open_record(&lane->results, RESULT, lane->number);
			put(&lane->results, &r, sizeof(r));
			close_record(&lane->results, record);
		}
		progress = now_ms();
	}
	lane->at = lane->count;
	if (!lane->number)
		ready = true;
}
