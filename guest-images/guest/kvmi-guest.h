/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KVMI_GUEST_H
#define KVMI_GUEST_H

#include <stdint.h>

#define PAGE_SIZE	4096

void die(const char *what);
uint64_t physical(const void *address);
int do_nested(uint64_t asked, int intel);

#endif
