# SPDX-License-Identifier: GPL-2.0-or-later
"""The half of the small device manager that runs in the host.

These modules are sent to the host and run there (see :mod:`harness.manager.link`), so they
are complete in themselves and use the standard library alone. They own what a device
manager owns: the descriptors of /dev/kvm, the memory of its guests, one thread per running
vCPU, and the sockets that it hands to KVM.

The process connects to who started it. Requests come as JSON lines over this connection,
``{"id": 7, "op": "run", ...}``; each is answered by one line, ``{"id": 7, "ok": ...}`` or
``{"id": 7, "fault": text}``. While one is performed another thread reads on, so one that
blocks in the kernel does not stop the others; the caller waits for an answer before it
sends what depends on it.
A fault means a wrong request or a defect in here; what the kernel says (a return
value and an errno) is always part of ``ok``.

The process ends when the connection does, and with it all its virtual machines.
"""
