// SPDX-License-Identifier: GPL-2.0-or-later
/* Cases: lane 0 drives, the others help. */
#include "executor.h"

static sem_t helped;              /* a helper is through with its lane */
static struct reader frame;       /* for lane 0 */
static sem_t frame_due, frame_done;
struct buffer results;
uint32_t unhook_request;

static _Atomic uint32_t current;  /* number of the case */

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
	restarts = 0;
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
	number = restarts;
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

bool next_record(struct reader *from, uint16_t *kind, uint16_t *lane, struct reader *inside)
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
bool let_run(struct reader from)
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
void describe(struct buffer *to)
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

void start_lanes(void)
{
	sem_init(&helped, 0, 0);
	sem_init(&frame_due, 0, 0);
	sem_init(&frame_done, 0, 0);
	for (unsigned int i = 0; i < LANES; i++) {
		lanes[i].number = i;
		sem_init(&lanes[i].due, 0, 0);
		if (pthread_create(&lanes[i].thread, NULL, i ? help : drive, &lanes[i]))
			die("a thread");
	}
}
