// SPDX-License-Identifier: GPL-2.0-or-later
/* The tool's side of a session. */
#include "executor.h"

struct form forms[FORMS];
uint16_t event_id;
uint32_t deadline_ms;
_Atomic uint64_t progress;

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

uint64_t now_ms(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000ull + time.tv_nsec / 1000000;
}

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
int pump(struct stream *stream, int fd, struct buffer *log)
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
