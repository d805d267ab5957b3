// SPDX-License-Identifier: GPL-2.0-or-later
/* Sockets, and other things that HOOK may be given. */
#include "executor.h"

struct slot slots[SLOTS];

static bool tcp_pair(int fds[2])
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t size = sizeof(address);
	int listener, one = 1;

	listener = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&address, &size))
		die("a TCP socket");
	fds[0] = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(fds[0], (struct sockaddr *)&address, size)) {
		close(fds[0]);
		close(listener);
		return false;
	}
	fds[1] = accept(listener, NULL, NULL);
	close(listener);
	setsockopt(fds[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fds[1], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return true;
}

int make_socket(struct slot *slot, uint8_t kind, uint32_t room)
{
	static const int types[] = { SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM };
	int fds[2] = { -1, -1 }, tries = 0;

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
		/* One that ended just now, between the same ports, resets a new one. */
		while (!tcp_pair(fds))
			if (++tries == 10)
				die("a TCP connection");
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

int end_socket(struct slot *slot, uint8_t end, uint8_t how)
{
	_Atomic int *which = end ? &slot->peer : &slot->ours;
	int fd;

	if (how < 3)
		return shutdown(*which, how) ? errno : 0;
	fd = atomic_exchange(which, -1);
	return fd < 0 || close(fd) ? EBADF : 0;
}
