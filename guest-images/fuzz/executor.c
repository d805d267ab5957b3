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
#include "executor.h"

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
	open_kvm();
	make_edge();
	for (unsigned int i = 0; i < SLOTS; i++)
		slots[i].ours = slots[i].peer = -1;
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
		die("connecting to %s:%s", argv[1], argv[2]);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	start_lanes();
	while (take_frame(fd))
		;
	_exit(0); /* a lane may be in the kernel; it takes everything down */
}
