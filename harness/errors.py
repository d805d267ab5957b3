# SPDX-License-Identifier: GPL-2.0-or-later
"""The one tree of errors.

::

    HarnessError                 our own side, or the machine we run on     exit 4
    ├── UsageError               a wrong call, setting or missing package   exit 2
    │   └── AbsentError          the interface under test has no such thing
    ├── BuildError               kernel, QEMU or image could not be made    exit 3
    │   ├── PatchError           a patch of a series does not apply
    │   └── ConfigError          a kernel configuration lacks an option
    ├── InfraError               a machine, process or connection of ours   exit 4
    │   ├── DeadlineError        something did not happen in time
    │   └── LostHostError        the host went away without a kernel panic
    └── ConformanceError         the software under test broke a promise    exit 1
        ├── HostCrashedError     the kernel under test panicked or oopsed
        ├── MalformedMessage     the kernel or QEMU sent what nobody can read
        ├── SessionClosed        the introspection socket ended unexpectedly
        └── SilenceError         an answer or event that was due never came

Every error says what went wrong and where in its message, and what to do next in
``hint``. ``details`` carries a longer text (a log's end, a compiler's output).
"""

from __future__ import annotations

__all__ = [
    "AbsentError",
    "BuildError",
    "ConfigError",
    "ConformanceError",
    "DeadlineError",
    "HarnessError",
    "HostCrashedError",
    "InfraError",
    "LostHostError",
    "MalformedMessage",
    "PatchError",
    "SessionClosed",
    "SilenceError",
    "UsageError",
]


class HarnessError(Exception):
    """Base of all errors of this package.

    :param message: one line: what failed, and where.
    :param hint: one line: what to do next; empty when there is nothing to add.
    :param details: longer evidence, shown below the message.
    """

    exit_code = 4

    def __init__(self, message: str, *, hint: str = "", details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(HarnessError):
    """The call, a setting or an installed package is not what is needed."""

    exit_code = 2


class AbsentError(UsageError):
    """Other versions of the interface have this; that under test, or what is claimed of it, not.

    A test that comes upon it is skipped: what it checks does not apply.
    """


class BuildError(HarnessError):
    """Something could not be built; the end of the build's log is in ``details``."""

    exit_code = 3


class PatchError(BuildError):
    """A patch of a series does not apply; the message names patch, file and line."""


class CompileError(BuildError):
    """What is built refuses to be: the program that builds it said so, and was not ended."""


class ConfigError(BuildError):
    """A kernel configuration lost an option that was asked for."""


class InfraError(HarnessError):
    """A machine, process or connection of ours failed."""


class DeadlineError(InfraError):
    """Something of ours did not happen in time."""


class LostHostError(InfraError):
    """The host went away, and its console shows no crash of its kernel."""


class ConformanceError(HarnessError):
    """The kernel or the QEMU under test broke a promise."""

    exit_code = 1


class HostCrashedError(ConformanceError):
    """The kernel under test panicked or oopsed; its last words are in ``details``."""


class MalformedMessage(ConformanceError):
    """A message that does not follow the interface; the message names the field."""


class SessionClosed(ConformanceError):
    """The introspection socket ended although the session should have gone on."""


class SilenceError(ConformanceError):
    """An answer or event that the software under test owed did not come in time."""
