# SPDX-License-Identifier: GPL-2.0-or-later
"""Many machines, one run: who they are, how they get the kernel under test, who does what.

==========  ==========================================================================
module      concern
==========  ==========================================================================
inventory   the file that names the machines
kexec       the program that starts another kernel, on a machine
switch      a machine gets the kernel under test, and is held to it
runtime     what a worker needs on a machine, packed
guard       the program that a worker runs in, on a machine
machine     one machine: prepared, watched, looked after when it is lost
schedule    which machine runs which test
session     pytest-xdist with machines that may be lost
rounds      round after round until nothing is owed; lost machines are judged
run         from inventory and builds to verdicts
nightly     build, run, compare, keep, tell: once a night
==========  ==========================================================================

A worker runs on the machine itself, started through execnet's gateway over SSH; its host is
that machine. Verdicts come back with the tests' reports, and so does all evidence: nothing has
to be fetched from a machine that may be gone. What a kernel says is followed from here, too.
"""
