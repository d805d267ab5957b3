// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The part of the fuzzer that runs in the host: it carries out cases.
 *
 * A case is a list of operations that harness/fuzz made elsewhere, in bulk and from a seed.
 * They come over one TCP connection and so do the results, so that no operation waits for
 * the network. Nothing of the introspection interface is decided here but one thing: which
 * answer an event gets, since events come when they like. The numbers that this takes
 * (forms) and those of the ioctls are part of what is sent.
 *
 * Operations are spread over lanes, one thread each, which start together. When all are
 * done (or one does not come back from the kernel, which ends everything) the virtual
 * machines of the case are unhooked and closed, and the results go out.
 *
 * Frames: a u32 size and so many bytes of records; a record: u16 kind, u16 lane, u32 size
 * and so many bytes. All little endian, nothing aligned. harness/fuzz/wire.py is the other
 * end and describes the records.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { LANES = 4, VMS = 4, VCPUS = 4, SLOTS = 32, IMAGES = 16, FORMS = 64 };

enum { /* records that come */
	CONFIG = 1, IMAGE, FORM, CASE,
	VM = 16, VMEND, RUN, STOP, SOCK, END, IOCTL, STREAM, PARAM, DELAY, MEMSLOT, FAIL, READY,
};

enum { /* records that go */
	DONE = 1, RESULT, STREAMED, CLEANED, STUCK,
};

enum { /* arguments of ioctls */
	ARG_BYTES, ARG_OURS, ARG_PEER, ARG_VM_FD, ARG_VCPU_FD, ARG_KVM_FD, ARG_NULL,
	ARG_UNMAPPED, ARG_KERNEL, ARG_EDGE, ARG_VALUE, ARG_CLOSED_FD,
};

enum { /* ends of sockets */
	UNIX_STREAM, UNIX_SEQPACKET, UNIX_DGRAM, TCP_PAIR, TCP_ALONE, TCP_LISTENING, A_PIPE,
	A_FILE, AN_EVENTFD, UDP_SOCKET, UNIX_ALONE,
};

enum { MODE_NONE, MODE_REPLIES, MODE_END, MODE_SHUT };

struct buffer {
	uint8_t *data;
	size_t size, room;
};

static void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, ": %s\n", strerror(errno));
	_exit(3);
}

static void put(struct buffer *to, const void *data, size_t size)
{
	if (to->size + size > to->room) {
		to->room = (to->size + size) * 2;
		to->data = realloc(to->data, to->room);
		if (!to->data)
			die("memory");
	}
	memcpy(to->data + to->size, data, size);
	to->size += size;
}

static size_t open_record(struct buffer *to, uint16_t kind, uint16_t lane)
{
	uint32_t size = 0;

	put(to, &kind, 2);
	put(to, &lane, 2);
	put(to, &size, 4);
	return to->size;
}

static void close_record(struct buffer *to, size_t start)
{
	uint32_t size = to->size - start;

	memcpy(to->data + start - 4, &size, 4);
}

/* -- what comes: a reader over bytes ------------------------------------------------------ */

struct reader {
	const uint8_t *at, *end;
};

static const uint8_t *take(struct reader *from, size_t size)
{
	const uint8_t *at = from->at;

	if ((size_t)(from->end - at) < size) {
		errno = EPROTO;
		die("a record is too short");
	}
	from->at += size;
	return at;
}

static uint8_t u8(struct reader *from) { return *take(from, 1); }

#define GET(type)                                                                             \
	static type get_##type(struct reader *from)                                           \
	{                                                                                     \
		type value;                                                                   \
		memcpy(&value, take(from, sizeof(value)), sizeof(value));                     \
		return value;                                                                 \
	}
GET(uint16_t)
GET(uint32_t)
GET(uint64_t)

/* -- virtual machines --------------------------------------------------------------------- */

struct chunk {
	uint64_t at;
	uint32_t size;
	const uint8_t *data;
};

struct image {
	uint64_t memory;
	unsigned int vcpus, chunks, patches[VCPUS];
	bool irqchip;
	struct chunk *chunk;
	struct chunk *patch[VCPUS];
	struct kvm_regs regs[VCPUS];
};

struct vm;

struct vcpu {
	struct vm *vm;
	unsigned int index;
	_Atomic int fd;
	struct kvm_run *run;
	struct kvm_sregs sregs;
	pthread_t thread;
	bool started;
	atomic_bool stop, ended;
};

struct vm {
	_Atomic int fd;
	const struct image *image;
	uint8_t *memory;
	struct vcpu vcpu[VCPUS];
	unsigned int vcpus, uses;
};

static struct image images[IMAGES];
static struct vm vms[VMS];
static pthread_mutex_t vm_locks[VMS];
/* Making one takes as long as a short case: those that no case changed for good serve again. */
static struct vm idle[IMAGES];
static int kvm;
static size_t run_size;
static struct {
	struct kvm_cpuid2 head;
	struct kvm_cpuid_entry2 entries[128];
} cpuid;

static uint32_t unhook_request;
static char parameter[256];
static uint32_t deadline_ms;
static atomic_uint exits_shutdown;

static void reset_vcpu(struct vcpu *vcpu)
{
	const struct image *image = vcpu->vm->image;
	struct kvm_vcpu_events events = { 0 };

	/* Also an exception that the CPU refuses to inject. */
	ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &events);
	ioctl(vcpu->fd, KVM_SET_SREGS, &vcpu->sregs);
	ioctl(vcpu->fd, KVM_SET_REGS, &image->regs[vcpu->index]);
}

static void restore_memory(struct vm *vm)
{
	for (unsigned int i = 0; i < vm->image->chunks; i++)
		memcpy(vm->memory + vm->image->chunk[i].at, vm->image->chunk[i].data,
		       vm->image->chunk[i].size);
}

/* A guest that went astray starts again, so that vCPUs keep running whatever is done to them. */
static void *run_vcpu(void *argument)
{
	struct vcpu *vcpu = argument;

	while (!vcpu->stop) {
		int r = ioctl(vcpu->fd, KVM_RUN, 0);

		if (r < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (r >= 0 && (vcpu->run->exit_reason == KVM_EXIT_IO ||
			       vcpu->run->exit_reason == KVM_EXIT_MMIO ||
			       vcpu->run->exit_reason == KVM_EXIT_DEBUG))
			continue;
		if (r < 0 || vcpu->run->exit_reason != KVM_EXIT_HLT) {
			exits_shutdown++;
			restore_memory(vcpu->vm);
			reset_vcpu(vcpu);
		}
		usleep(3000);
	}
	vcpu->ended = true;
	return NULL;
}

static int start_vcpu(struct vcpu *vcpu)
{
	if (vcpu->fd < 0 || vcpu->started)
		return EBADF;
	vcpu->stop = false;
	vcpu->ended = false;
	vcpu->run->immediate_exit = 0;
	if (pthread_create(&vcpu->thread, NULL, run_vcpu, vcpu))
		return EAGAIN;
	vcpu->started = true;
	return 0;
}

/* The signal may come before the ioctl: ask until it is over. */
static int stop_vcpu(struct vcpu *vcpu)
{
	if (!vcpu->started)
		return EBADF;
	vcpu->stop = true;
	while (!vcpu->ended) {
		vcpu->run->immediate_exit = 1;
		pthread_kill(vcpu->thread, SIGUSR1);
		usleep(200);
	}
	pthread_join(vcpu->thread, NULL);
	vcpu->started = false;
	return 0;
}

static void release_vm(struct vm *vm)
{
	int fd = vm->fd;

	vm->fd = -1;
	for (unsigned int i = 0; i < vm->vcpus; i++) {
		munmap(vm->vcpu[i].run, run_size);
		close(vm->vcpu[i].fd);
		vm->vcpu[i].fd = -1;
	}
	close(fd);
	munmap(vm->memory, vm->image->memory);
}

static int close_vm(struct vm *vm)
{
	if (vm->fd < 0)
		return EBADF;
	for (unsigned int i = 0; i < vm->vcpus; i++)
		stop_vcpu(&vm->vcpu[i]);
	release_vm(vm);
	return 0;
}

static int set_memory(struct vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
		      uint64_t offset)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)vm->memory + offset,
	};

	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? errno : 0;
}

/* Stopped, unhooked and as if it had just been made, as far as cases can tell. */
static void park_vm(struct vm *vm)
{
	struct kvm_mp_state runnable = { KVM_MP_STATE_RUNNABLE };
	struct vm *place = &idle[vm->image - images];

	for (unsigned int i = 0; i < vm->vcpus; i++)
		stop_vcpu(&vm->vcpu[i]);
	if (place->fd >= 0 || ++vm->uses > 50 || vm->image->irqchip) {
		release_vm(vm);
		return;
	}
	set_memory(vm, 0, 0, 0, vm->image->memory, 0);
	set_memory(vm, 1, 0, 0, 0, 0);
	restore_memory(vm);
	for (unsigned int i = 0; i < vm->vcpus; i++) {
		ioctl(vm->vcpu[i].fd, KVM_SET_MP_STATE, &runnable);
		reset_vcpu(&vm->vcpu[i]);
	}
	memcpy(place, vm, sizeof(*vm));
	vm->fd = -1;
}

static bool take_idle(struct vm *vm, const struct image *image)
{
	struct vm *place = &idle[image - images];

	if (place->fd < 0)
		return false;
	memcpy(vm, place, sizeof(*vm));
	place->fd = -1;
	for (unsigned int i = 0; i < vm->vcpus; i++)
		vm->vcpu[i].vm = vm;
	return true;
}

static int make_vm(struct vm *vm, const struct image *image, bool reuse)
{
	uint64_t identity = 0xfffbc000;
	int fd;

	if (vm->fd >= 0)
		return EEXIST;
	if (reuse && take_idle(vm, image))
		return 0;
	vm->image = image;
	vm->vcpus = vm->uses = 0;
	vm->memory = mmap(NULL, image->memory, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (vm->memory == MAP_FAILED)
		die("memory of a guest");
	restore_memory(vm);
	fd = ioctl(kvm, KVM_CREATE_VM, 0);
	if (fd < 0)
		return errno;
	vm->fd = fd;
	if (ioctl(fd, KVM_SET_IDENTITY_MAP_ADDR, &identity) || ioctl(fd, KVM_SET_TSS_ADDR, 0xfffbd000) ||
	    (image->irqchip && ioctl(fd, KVM_CREATE_IRQCHIP, 0)) ||
	    set_memory(vm, 0, 0, 0, image->memory, 0))
		die("a virtual machine");
	for (unsigned int i = 0; i < image->vcpus; i++) {
		struct vcpu *vcpu = &vm->vcpu[i];

		vcpu->vm = vm;
		vcpu->index = i;
		vcpu->started = false;
		vcpu->fd = ioctl(fd, KVM_CREATE_VCPU, i);
		if (vcpu->fd < 0)
			die("a vCPU");
		vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
		if (vcpu->run == MAP_FAILED || ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid) ||
		    ioctl(vcpu->fd, KVM_GET_SREGS, &vcpu->sregs))
			die("a vCPU");
		for (unsigned int j = 0; j < image->patches[i]; j++)
			memcpy((char *)&vcpu->sregs + image->patch[i][j].at,
			       image->patch[i][j].data, image->patch[i][j].size);
		reset_vcpu(vcpu);
		vm->vcpus++;
	}
	return 0;
}

/* -- sockets, and other things for HOOK ---------------------------------------------------- */

struct slot {
	_Atomic int ours, peer; /* what HOOK gets, and the tool's end */
};

static struct slot slots[SLOTS];

static int make_socket(struct slot *slot, uint8_t kind, uint32_t room)
{
	static const int types[] = { SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM };
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t size = sizeof(address);
	int fds[2] = { -1, -1 }, listener, one = 1;

	if (slot->ours >= 0 || slot->peer >= 0)
		return EEXIST;
	switch (kind) {
	case UNIX_STREAM:
	case UNIX_SEQPACKET:
	case UNIX_DGRAM:
		if (socketpair(AF_UNIX, types[kind], 0, fds))
			return errno;
		break;
	case TCP_PAIR:
		listener = socket(AF_INET, SOCK_STREAM, 0);
		if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1) ||
		    getsockname(listener, (struct sockaddr *)&address, &size))
			die("a TCP socket");
		fds[0] = socket(AF_INET, SOCK_STREAM, 0);
		if (connect(fds[0], (struct sockaddr *)&address, size))
			die("a TCP connection");
		fds[1] = accept(listener, NULL, NULL);
		close(listener);
		setsockopt(fds[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		setsockopt(fds[1], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		break;
	case TCP_ALONE:
		fds[0] = socket(AF_INET, SOCK_STREAM, 0);
		break;
	case TCP_LISTENING:
		fds[0] = socket(AF_INET, SOCK_STREAM, 0);
		listen(fds[0], 1);
		break;
	case A_PIPE:
		if (pipe(fds))
			return errno;
		break;
	case A_FILE:
		fds[0] = open("/dev/null", O_RDWR);
		break;
	case AN_EVENTFD:
		fds[0] = eventfd(0, 0);
		break;
	case UDP_SOCKET:
		fds[0] = socket(AF_INET, SOCK_DGRAM, 0);
		break;
	case UNIX_ALONE:
		fds[0] = socket(AF_UNIX, SOCK_STREAM, 0);
		break;
	}
	if (room && fds[1] >= 0) {
		setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
		setsockopt(fds[1], SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
	}
	slot->ours = fds[0];
	slot->peer = fds[1];
	return 0;
}

static int end_socket(struct slot *slot, uint8_t end, uint8_t how)
{
	_Atomic int *which = end ? &slot->peer : &slot->ours;
	int fd;

	if (how < 3)
		return shutdown(*which, how) ? errno : 0;
	fd = atomic_exchange(which, -1);
	return fd < 0 || close(fd) ? EBADF : 0;
}

/* -- the tool's side of a session ---------------------------------------------------------- */

struct form { /* how an event is answered */
	bool known;
	uint8_t actions;   /* bitmap */
	uint16_t extra;    /* bytes of its own part */
	uint32_t value_at; /* where in the event's payload they are copied from */
};

static struct form forms[FORMS];
static uint16_t event_id; /* of messages */

struct stream {
	uint8_t slot, mode, deaf, cont, other, wrong; /* the last three in percent */
	uint32_t chunk, linger_ms, expected, random;
	struct reader pieces;    /* each a u32 size and so many bytes */
	struct buffer in, out;   /* what came; answers that are due */
	struct buffer sent;      /* answers that are being sent */
	const uint8_t *at;       /* what is being sent */
	size_t left;
	uint32_t replies, events, answered, wrongly, written;
	bool ended;
};

static uint32_t dice(struct stream *stream)
{
	stream->random ^= stream->random << 13;
	stream->random ^= stream->random >> 17;
	stream->random ^= stream->random << 5;
	return stream->random;
}

/* Header, event header, common part: see struct kvmi_vcpu_event. */
static void answer(struct stream *stream, const uint8_t *message, uint16_t size, uint32_t seq)
{
	const uint8_t *payload = message + 8;
	uint16_t event, vcpu;
	uint8_t action = 0, wish = dice(stream) % 100;
	const struct form *form;
	uint8_t reply[8 + 16 + 64] = { 0 };
	uint16_t own, length;
	uint32_t id = event_id;

	if (size < 12)
		return;
	memcpy(&event, payload, 2);
	memcpy(&vcpu, payload + 10, 2);
	if (event >= FORMS || !forms[event].known)
		return;
	form = &forms[event];
	own = form->extra;
	if (wish >= stream->cont + stream->other + stream->wrong)
		return; /* never, or by whoever ends the session */
	if (wish >= stream->cont && wish < stream->cont + stream->other)
		while (!(form->actions >> action & 1) || !(dice(stream) & 1))
			action = (action + 1) % 8;
	if (own && form->value_at + own <= size)
		memcpy(reply + 24, payload + form->value_at, own);
	reply[8] = vcpu;
	reply[9] = vcpu >> 8;
	reply[16] = action;
	reply[17] = event;
	if (wish >= stream->cont + stream->other) {
		stream->wrongly++;
		switch (dice(stream) % 8) {
		case 0: seq += 1 + dice(stream) % 3; break;
		case 1: reply[16] = 3 + dice(stream) % 253; break;
		case 2: reply[17] ^= 1 + dice(stream) % 255; break;
		case 3: reply[18 + dice(stream) % 6] = 1 + dice(stream) % 255; break;
		case 4: own += 1 + dice(stream) % 32; break;
		case 5: own = -(int)(1 + dice(stream) % 16); break;
		case 6: reply[8] = dice(stream); break;
		case 7: reply[10 + dice(stream) % 6] = 1 + dice(stream) % 255; break;
		}
	}
	length = 16 + own;
	memcpy(reply, &id, 2);
	memcpy(reply + 2, &length, 2);
	memcpy(reply + 4, &seq, 4);
	put(&stream->out, reply, 8 + length);
	if (wish >= stream->cont + stream->other && !(dice(stream) % 4))
		put(&stream->out, reply, 8 + length); /* twice */
	stream->answered++;
}

/* Take whole messages out of what came: note replies, answer events. */
static void digest(struct stream *stream, struct buffer *log)
{
	size_t at = 0;

	while (stream->in.size - at >= 8) {
		const uint8_t *message = stream->in.data + at;
		uint8_t head[24] = { 0 };
		uint16_t id, size;
		uint32_t seq;

		memcpy(&id, message, 2);
		memcpy(&size, message + 2, 2);
		memcpy(&seq, message + 4, 4);
		if (stream->in.size - at < 8u + size)
			break;
		at += 8 + size;
		/* What the tool numbers itself has the top bit set. */
		if (id <= 1 && !(seq >> 31)) {
			stream->events++;
			answer(stream, message, size, seq);
			continue;
		}
		stream->replies++;
		memcpy(head, message, 8 + (size < 16 ? size : 16));
		put(log, head, sizeof(head));
	}
	memmove(stream->in.data, stream->in.data + at, stream->in.size - at);
	stream->in.size -= at;
}

static uint64_t now_ms(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000ull + time.tv_nsec / 1000000;
}

static _Atomic uint64_t progress; /* when something last came back */

/* What is sent next: answers between two pieces of the stream, never within one. */
static void refill(struct stream *stream)
{
	uint32_t size;

	if (stream->out.size) {
		stream->sent.size = 0;
		put(&stream->sent, stream->out.data, stream->out.size);
		stream->out.size = 0;
		stream->at = stream->sent.data;
		stream->left = stream->sent.size;
		return;
	}
	size = get_uint32_t(&stream->pieces);
	stream->at = take(&stream->pieces, size);
	stream->left = size;
}

static bool has_more(struct stream *stream)
{
	if (stream->left || stream->pieces.at < stream->pieces.end)
		return true;
	/* The last piece may be a part of a message: an answer must not complete it. */
	if (stream->mode == MODE_END || stream->mode == MODE_SHUT)
		stream->out.size = 0;
	return stream->out.size;
}

/* Returns 0, or ETIMEDOUT when nothing moves although something is waited for. */
static int pump(struct stream *stream, int fd, struct buffer *log)
{
	static _Thread_local uint8_t part[65536];
	uint64_t last = now_ms(), linger = last + stream->linger_ms;
	bool broken = false;

	while (!stream->ended) {
		bool more = !broken && has_more(stream);
		/* For a while nothing is read: the kernel finds no room for its replies. */
		bool deaf = stream->deaf && more && now_ms() - last < 20;
		struct pollfd poll_fd = {
			.fd = fd, .events = (more ? POLLOUT : 0) | (deaf ? 0 : POLLIN),
		};
		ssize_t n;

		if (!more && (stream->mode == MODE_NONE || stream->mode == MODE_REPLIES) &&
		    (stream->mode == MODE_NONE || stream->replies >= stream->expected) &&
		    now_ms() >= linger)
			return 0;
		/* Nobody has to read this: the other end may be no session at all. */
		if (stream->mode == MODE_NONE && now_ms() - last > 5)
			return 0;
		if (!more && stream->mode == MODE_SHUT && now_ms() >= linger) {
			shutdown(fd, SHUT_WR);
			stream->mode = MODE_END;
			continue;
		}
		if (now_ms() - last > deadline_ms)
			return ETIMEDOUT;
		if (poll(&poll_fd, 1, 2) <= 0)
			continue;
		if (!deaf && poll_fd.revents & (POLLIN | POLLHUP | POLLERR)) {
			n = recv(fd, part, sizeof(part), MSG_DONTWAIT);
			if (n > 0) {
				put(&stream->in, part, n);
				digest(stream, log);
				last = progress = now_ms();
			} else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
				stream->ended = true;
			}
		}
		if (more && poll_fd.revents & (POLLOUT | POLLHUP | POLLERR)) {
			size_t size;

			if (!stream->left)
				refill(stream);
			size = stream->left;
			if (stream->chunk && size > stream->chunk)
				size = stream->chunk;
			n = send(fd, stream->at, size, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (n > 0) {
				stream->at += n;
				stream->left -= n;
				stream->written += n;
				last = progress = now_ms();
			} else if (errno != EAGAIN && errno != EINTR) {
				broken = true; /* what the kernel still said can be read */
			}
		}
	}
	return 0;
}

/* -- operations ----------------------------------------------------------------------------- */

struct lane {
	pthread_t thread;
	unsigned int number;
	struct reader *ops; /* each one record's payload */
	uint16_t *kinds;
	unsigned int count, room;
	_Atomic unsigned int at;
	struct buffer results;
	sem_t due;
};

static struct lane lanes[LANES];
static atomic_bool ready; /* lane 0 has made what the others use */
static atomic_bool parameter_off;
static _Atomic uint32_t current; /* number of the case */
static uint8_t *edge; /* the end of what can be read */

static int set_parameter(bool on)
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
	case ARG_KVM_FD: fd = kvm; break;
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
	pthread_mutex_lock(&vm_locks[vm - vms]);
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
	pthread_mutex_unlock(&vm_locks[vm - vms]);
	return r;
}

static void wait_for(sem_t *what)
{
	while (sem_wait(what))
		;
}

static void run_lane(struct lane *lane)
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

/* -- cases: lane 0 drives, the others help ---------------------------------------------------- */

static sem_t helped;              /* a helper is through with its lane */
static struct reader frame;       /* for lane 0 */
static sem_t frame_due, frame_done;
static struct buffer results;

static void *help(void *argument)
{
	struct lane *lane = argument;

	for (;;) {
		wait_for(&lane->due);
		run_lane(lane);
		sem_post(&helped);
	}
	return NULL;
}

/* Also what a case left waiting in the kernel for its tool comes out. */
static void clean_up(struct buffer *to)
{
	size_t record = open_record(to, CLEANED, 0);
	uint32_t r;

	for (struct vm *vm = vms; vm < vms + VMS; vm++) {
		if (vm->fd < 0)
			continue;
		r = ioctl(vm->fd, unhook_request, 0) < 0 ? errno : 0;
		put(to, &r, sizeof(r));
		progress = now_ms();
		park_vm(vm);
		progress = now_ms();
	}
	for (struct slot *slot = slots; slot < slots + SLOTS; slot++) {
		if (slot->ours >= 0)
			end_socket(slot, 0, 3);
		if (slot->peer >= 0)
			end_socket(slot, 1, 3);
	}
	close_record(to, record);
}

static void run_case(uint32_t number)
{
	unsigned int helping = 0;
	size_t record;

	ready = false;
	exits_shutdown = 0;
	for (struct lane *lane = lanes; lane < lanes + LANES; lane++) {
		lane->results.size = 0;
		lane->at = 0;
		if (lane->number && lane->count) {
			helping++;
			sem_post(&lane->due);
		}
	}
	run_lane(&lanes[0]);
	while (helping--)
		wait_for(&helped);
	if (parameter_off) {
		set_parameter(true);
		parameter_off = false;
	}

	record = open_record(&results, DONE, 0);
	put(&results, &number, sizeof(number));
	number = exits_shutdown;
	put(&results, &number, sizeof(number));
	close_record(&results, record);
	for (struct lane *lane = lanes; lane < lanes + LANES; lane++) {
		if (lane->results.size)
			put(&results, lane->results.data, lane->results.size);
		lane->count = 0;
	}
	clean_up(&results);
}

static void add_operation(uint16_t kind, uint16_t number, struct reader op)
{
	struct lane *lane = &lanes[number % LANES];

	if (lane->count == lane->room) {
		lane->room = lane->room * 2 + 64;
		lane->ops = realloc(lane->ops, lane->room * sizeof(*lane->ops));
		lane->kinds = realloc(lane->kinds, lane->room * sizeof(*lane->kinds));
		if (!lane->ops || !lane->kinds)
			die("memory");
	}
	lane->ops[lane->count] = op;
	lane->kinds[lane->count++] = kind;
}

static bool next_record(struct reader *from, uint16_t *kind, uint16_t *lane, struct reader *inside)
{
	uint32_t size;

	if (from->at == from->end)
		return false;
	*kind = get_uint16_t(from);
	*lane = get_uint16_t(from);
	size = get_uint32_t(from);
	inside->at = take(from, size);
	inside->end = from->at;
	return true;
}

static void run_frame(struct reader from)
{
	struct reader inside;
	uint16_t kind, lane;
	uint32_t number = 0;
	bool begun = false;

	while (next_record(&from, &kind, &lane, &inside)) {
		if (kind != CASE) {
			add_operation(kind, lane, inside);
			continue;
		}
		if (begun)
			run_case(number);
		number = current = get_uint32_t(&inside);
		begun = true;
	}
	if (begun)
		run_case(number);
}

static void *drive(void *unused)
{
	(void)unused;
	for (;;) {
		wait_for(&frame_due);
		run_frame(frame);
		sem_post(&frame_done);
	}
	return NULL;
}

/* Returns false when it does not come back from the kernel. */
static bool let_run(struct reader from)
{
	struct timespec until;

	frame = from;
	progress = now_ms();
	sem_post(&frame_due);
	do {
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec++;
		if (!sem_timedwait(&frame_done, &until))
			return true;
	} while (now_ms() - progress < deadline_ms + 2000);
	return false;
}

/* Where everything of ours and of introspection is in the kernel. */
static void describe(struct buffer *to)
{
	static const char *const list =
		"for t in /proc/[0-9]*/task/*; do read -r n <$t/comm; case $n in kvmi*) "
		"echo \"== ${t##*/} $n\"; cat $t/stack; esac; done 2>/dev/null";
	char text[4096];
	size_t record = open_record(to, STUCK, 0), size;
	uint32_t number = current;
	FILE *all;

	put(to, &number, sizeof(number));
	for (struct lane *lane = lanes; lane < lanes + LANES; lane++) {
		snprintf(text, sizeof(text), "lane %u: operation %u of %u\n", lane->number, lane->at,
			 lane->count);
		put(to, text, strlen(text));
	}
	all = popen(list, "r");
	while (all && (size = fread(text, 1, sizeof(text), all)) > 0)
		put(to, text, size);
	if (all)
		pclose(all);
	close_record(to, record);
}

/* -- the way to the harness ------------------------------------------------------------------ */

static void send_all(int fd, const void *data, size_t size)
{
	const uint8_t *at = data;

	while (size) {
		ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);

		if (sent < 0)
			die("sending results");
		at += sent;
		size -= sent;
	}
}

static bool receive_all(int fd, void *data, size_t size)
{
	uint8_t *at = data;

	while (size) {
		ssize_t got = recv(fd, at, size, 0);

		if (got <= 0)
			return false;
		at += got;
		size -= got;
	}
	return true;
}

static void send_frame(int fd, const struct buffer *out)
{
	uint32_t size = out->size;

	send_all(fd, &size, sizeof(size));
	send_all(fd, out->data, out->size);
}

static void read_image(struct reader *from)
{
	struct image *image = &images[get_uint32_t(from) % IMAGES];

	image->memory = get_uint64_t(from);
	image->irqchip = get_uint32_t(from);
	image->vcpus = get_uint32_t(from) % (VCPUS + 1);
	image->chunks = get_uint32_t(from);
	image->chunk = calloc(image->chunks, sizeof(struct chunk));
	for (unsigned int i = 0; i < image->chunks; i++) {
		image->chunk[i].at = get_uint64_t(from);
		image->chunk[i].size = get_uint32_t(from);
		image->chunk[i].data = take(from, image->chunk[i].size);
	}
	for (unsigned int i = 0; i < image->vcpus; i++) {
		memcpy(&image->regs[i], take(from, sizeof(struct kvm_regs)), sizeof(struct kvm_regs));
		image->patches[i] = get_uint32_t(from);
		image->patch[i] = calloc(image->patches[i], sizeof(struct chunk));
		for (unsigned int j = 0; j < image->patches[i]; j++) {
			image->patch[i][j].at = get_uint32_t(from);
			image->patch[i][j].size = get_uint32_t(from);
			image->patch[i][j].data = take(from, image->patch[i][j].size);
		}
	}
}

static void read_form(struct reader *from)
{
	struct form *form = &forms[get_uint16_t(from) % FORMS];

	form->known = true;
	form->actions = u8(from);
	form->extra = u8(from);
	form->value_at = get_uint32_t(from);
}

static void read_config(struct reader *from)
{
	size_t size;

	deadline_ms = get_uint32_t(from);
	unhook_request = get_uint32_t(from);
	event_id = get_uint16_t(from);
	size = from->end - from->at;
	if (size >= sizeof(parameter))
		size = sizeof(parameter) - 1;
	memcpy(parameter, take(from, size), size);
}

/* Returns false when nothing more can be done. */
static bool take_frame(int fd)
{
	struct reader from, rest, inside;
	uint16_t kind, lane;
	uint8_t *data;
	uint32_t size;
	bool back;

	if (!receive_all(fd, &size, sizeof(size)))
		return false;
	data = malloc(size);
	if (!data || !receive_all(fd, data, size))
		return false;
	from = rest = (struct reader){ data, data + size };
	if (!next_record(&rest, &kind, &lane, &inside))
		return true;
	switch (kind) {
	case CONFIG: read_config(&inside); return true;
	case IMAGE: read_image(&inside); return true; /* which stays in memory */
	case FORM: read_form(&inside); return true;
	}
	results.size = 0;
	back = let_run(from);
	if (!back) {
		/* What lane 0 writes to must not be touched: it may come back after all. */
		struct buffer stuck = { 0 };

		describe(&stuck);
		send_frame(fd, &stuck);
		return false;
	}
	send_frame(fd, &results);
	free(data);
	return true;
}

static void nothing(int number)
{
	(void)number;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = nothing }; /* no SA_RESTART: it ends KVM_RUN */
	struct sockaddr_in address = { .sin_family = AF_INET };
	int fd, one = 1;

	if (argc != 3 || !inet_aton(argv[1], &address.sin_addr)) {
		fprintf(stderr, "usage: %s ADDRESS PORT\n", argv[0]);
		return 2;
	}
	address.sin_port = htons(atoi(argv[2]));
	sigaction(SIGUSR1, &action, NULL);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		die("/dev/kvm");
	run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	cpuid.head.nent = 128;
	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid))
		die("CPUID");
	edge = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (edge == MAP_FAILED || mprotect(edge + 4096, 4096, PROT_NONE))
		die("guard page");
	edge += 4096;
	for (unsigned int i = 0; i < VMS; i++) {
		pthread_mutex_init(&vm_locks[i], NULL);
		vms[i].fd = -1;
		for (unsigned int j = 0; j < VCPUS; j++)
			vms[i].vcpu[j].fd = -1;
	}
	for (unsigned int i = 0; i < IMAGES; i++)
		idle[i].fd = -1;
	for (unsigned int i = 0; i < SLOTS; i++)
		slots[i].ours = slots[i].peer = -1;
	sem_init(&helped, 0, 0);
	sem_init(&frame_due, 0, 0);
	sem_init(&frame_done, 0, 0);
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
		die("connecting to %s:%s", argv[1], argv[2]);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (unsigned int i = 0; i < LANES; i++) {
		lanes[i].number = i;
		sem_init(&lanes[i].due, 0, 0);
		if (pthread_create(&lanes[i].thread, NULL, i ? help : drive, &lanes[i]))
			die("a thread");
	}
	while (take_frame(fd))
		;
	_exit(0); /* a lane may be in the kernel; it takes everything down */
}
