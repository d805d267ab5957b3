/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the parts of the executor know of each other; executor.c says what it is. */
#ifndef EXECUTOR_H
#define EXECUTOR_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
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
#include <time.h>
#include <unistd.h>

#include "bytes.h"

enum { LANES = 4, VMS = 4, VCPUS = 4, SLOTS = 32, IMAGES = 16, FORMS = 64 };
enum { STOP_MS = 50 };

enum { /* records that come */
	CONFIG = 1, IMAGE, FORM, CASE,
	VM = 16, VMEND, RUN, STOP, SOCK, END, IOCTL, STREAM, PARAM, DELAY, MEMSLOT, FAIL, READY,
	FORGET,
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

/* machine.c */
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
	pthread_mutex_t lock; /* for who starts, stops, makes or closes it */
	_Atomic int fd;
	const struct image *image;
	uint8_t *memory;
	struct vcpu vcpu[VCPUS];
	unsigned int vcpus, uses;
};

extern struct image images[IMAGES];
extern struct vm vms[VMS];
extern atomic_uint restarts; /* vCPUs that had gone astray */

void open_kvm(void);
int kvm_fd(void);
int start_vcpu(struct vcpu *vcpu);
int stop_vcpu(struct vcpu *vcpu);
int make_vm(struct vm *vm, const struct image *image, bool reuse);
int close_vm(struct vm *vm);
void park_vm(struct vm *vm);
void forget_idle(void);
int set_memory(struct vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
	       uint64_t offset);

/* socket.c */
struct slot {
	_Atomic int ours, peer; /* what HOOK gets, and the tool's end */
};

extern struct slot slots[SLOTS];

int make_socket(struct slot *slot, uint8_t kind, uint32_t room);
int end_socket(struct slot *slot, uint8_t end, uint8_t how);

/* tool.c */
struct form { /* how an event is answered */
	bool known;
	uint8_t actions;   /* bitmap */
	uint16_t extra;    /* bytes of its own part */
	uint32_t value_at; /* where in the event's payload they are copied from */
};

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

extern struct form forms[FORMS];
extern uint16_t event_id;          /* of messages */
extern uint32_t deadline_ms;       /* after so long without progress something is stuck */
extern _Atomic uint64_t progress;  /* when something last came back */

uint64_t now_ms(void);
int pump(struct stream *stream, int fd, struct buffer *log);

/* operation.c */
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

extern struct lane lanes[LANES];
extern char parameter[256];        /* path of the module's parameter */
extern atomic_bool parameter_off;  /* or it may be */
extern atomic_bool ready;          /* lane 0 has made what the others use */

void make_edge(void);
int set_parameter(bool on);
void wait_for(sem_t *what);
void run_lane(struct lane *lane);

/* case.c */
extern struct buffer results;
extern uint32_t unhook_request;

void start_lanes(void);
bool next_record(struct reader *from, uint16_t *kind, uint16_t *lane, struct reader *inside);
bool let_run(struct reader from);
void describe(struct buffer *to);

#endif
