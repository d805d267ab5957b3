/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Bytes that go, and a reader over bytes that come. */
#ifndef BYTES_H
#define BYTES_H

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct buffer {
	uint8_t *data;
	size_t size, room;
};

static inline void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, ": %s\n", strerror(errno));
	_exit(3);
}

static inline void put(struct buffer *to, const void *data, size_t size)
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

static inline size_t open_record(struct buffer *to, uint16_t kind, uint16_t lane)
{
	uint32_t size = 0;

	put(to, &kind, 2);
	put(to, &lane, 2);
	put(to, &size, 4);
	return to->size;
}

static inline void close_record(struct buffer *to, size_t start)
{
	uint32_t size = to->size - start;

	memcpy(to->data + start - 4, &size, 4);
}

struct reader {
	const uint8_t *at, *end;
};

static inline const uint8_t *take(struct reader *from, size_t size)
{
	const uint8_t *at = from->at;

	if ((size_t)(from->end - at) < size) {
		errno = EPROTO;
		die("a record is too short");
	}
	from->at += size;
	return at;
}

static inline uint8_t u8(struct reader *from) { return *take(from, 1); }

#define GET(type)                                                                             \
	static inline type get_##type(struct reader *from)                                           \
	{                                                                                     \
		type value;                                                                   \
		memcpy(&value, take(from, sizeof(value)), sizeof(value));                     \
		return value;                                                                 \
	}
GET(uint16_t)
GET(uint32_t)
GET(uint64_t)

#endif
