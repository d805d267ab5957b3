/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One writer of the shared-memory counters (harness/counters) in C. The file is made, with its
 * header, by the Python side; layout.h is made from harness/counters/layout.py.
 *
 * A slot's sequence counter is odd while something changes. One thread writes to a slot.
 */
#ifndef COUNTERS_H
#define COUNTERS_H

#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "counters-layout.h"

static inline uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* Stores are seen in this order by other processes: x86 keeps it, the compiler has to as well. */
#define counters_barrier() __asm__ volatile("" ::: "memory")

static inline void counters_begin(volatile uint64_t *slot)
{
	slot[COUNTERS_WORD_SEQUENCE]++;
	counters_barrier();
}

static inline void counters_end(volatile uint64_t *slot)
{
	counters_barrier();
	slot[COUNTERS_WORD_SEQUENCE]++;
}

static inline void counters_latency(volatile uint64_t *histogram, uint64_t ns)
{
	unsigned int bucket = ns ? 63 - __builtin_clzll(ns) : 0;

	histogram[bucket < COUNTERS_LATENCY_BUCKETS ? bucket : COUNTERS_LATENCY_BUCKETS - 1]++;
}

/* Map the file and take a slot; NULL if there is none, or no file of this layout. */
static inline volatile uint64_t *counters_take(const char *path, unsigned int index)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	volatile uint64_t *slot;
	struct stat facts;
	struct {
		uint64_t magic;
		uint32_t version, header_size, slot_size, slots;
	} *header;

	if (fd < 0 || fstat(fd, &facts) < 0 || facts.st_size < COUNTERS_HEADER_SIZE)
		return NULL;
	header = mmap(NULL, facts.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (header == MAP_FAILED || header->magic != COUNTERS_MAGIC ||
	    header->version != COUNTERS_VERSION || header->header_size != COUNTERS_HEADER_SIZE ||
	    header->slot_size != COUNTERS_SLOT_SIZE || index >= header->slots ||
	    facts.st_size < COUNTERS_HEADER_SIZE + (off_t)header->slots * COUNTERS_SLOT_SIZE)
		return NULL;
	slot = (void *)((char *)header + COUNTERS_HEADER_SIZE + index * COUNTERS_SLOT_SIZE);
	/* Its last writer may have died in mid-update. */
	slot[COUNTERS_WORD_SEQUENCE] += slot[COUNTERS_WORD_SEQUENCE] & 1;
	counters_begin(slot);
	slot[COUNTERS_WORD_PID] = getpid();
	slot[COUNTERS_WORD_GENERATION]++;
	slot[COUNTERS_WORD_STARTED_NS] = slot[COUNTERS_WORD_HEARTBEAT_NS] = now_ns();
	counters_end(slot);
	return slot;
}

/* What is measured now; also a sign of life. The slot's thread must not be at work. */
static inline void counters_test(volatile uint64_t *slot, const char *name)
{
	char *text = (char *)slot + COUNTERS_OFFSET_TEST;

	counters_begin(slot);
	slot[COUNTERS_WORD_HEARTBEAT_NS] = now_ns();
	memset(text, 0, COUNTERS_SIZE_TEST);
	strncpy(text, name, COUNTERS_SIZE_TEST - 1);
	counters_end(slot);
}

static inline void counters_event(volatile uint64_t *slot, unsigned int id, size_t size,
				  uint64_t ns)
{
	counters_begin(slot);
	slot[COUNTERS_WORD_EVENTS +
	     (id < COUNTERS_EVENT_IDS ? id : COUNTERS_EVENT_IDS - 1)]++;
	slot[COUNTERS_WORD_BYTES_IN] += size;
	slot[COUNTERS_WORD_HEARTBEAT_NS] = ns;
	counters_end(slot);
}

static inline void counters_event_reply(volatile uint64_t *slot, size_t size, uint64_t latency_ns)
{
	counters_begin(slot);
	slot[COUNTERS_WORD_EVENT_REPLIES]++;
	slot[COUNTERS_WORD_BYTES_OUT] += size;
	counters_latency(slot + COUNTERS_WORD_EVENT_LATENCY, latency_ns);
	counters_end(slot);
}

/* A command and its reply, when both are known. */
static inline void counters_command(volatile uint64_t *slot, size_t out, size_t in, int error,
				    uint64_t latency_ns)
{
	counters_begin(slot);
	slot[COUNTERS_WORD_COMMANDS]++;
	slot[COUNTERS_WORD_REPLIES]++;
	slot[COUNTERS_WORD_FAILED_REPLIES] += error != 0;
	slot[COUNTERS_WORD_BYTES_OUT] += out;
	slot[COUNTERS_WORD_BYTES_IN] += in;
	counters_latency(slot + COUNTERS_WORD_COMMAND_LATENCY, latency_ns);
	counters_end(slot);
}

static inline void counters_release(volatile uint64_t *slot)
{
	counters_begin(slot);
	slot[COUNTERS_WORD_PID] = 0;
	counters_end(slot);
}

#endif
