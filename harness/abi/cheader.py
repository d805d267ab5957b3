# SPDX-License-Identifier: GPL-2.0-or-later
"""A profile in C: as a header of its own, and as a check of a kernel's uapi headers.

For the check, a C file full of ``_Static_assert`` is made from the profile (sizes and alignments
of structs, offsets and sizes of their fields, ids, ioctl requests, capability) and compiled
against the headers by the system's compiler. Nothing is linked or run.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.abi.layout import Struct
from harness.abi.profile import Profile
from harness.errors import ConformanceError, InfraError, UsageError

__all__ = ["HeaderCheck", "check_headers", "generate_c", "generate_header"]

#: Includes of the uapi headers that ``make headers_install`` strips, as empty files for those
#: who compile against a source tree.
_KERNEL_ONLY = ("linux/compiler.h", "linux/compiler_types.h")
_COMPILE_TIMEOUT_S = 60


_C_SIGNS = {"u": "unsigned ", "s": "signed "}
_C_WIDTHS = {"8": "char", "16": "short", "32": "int", "64": "long long"}


@dataclass(frozen=True)
class HeaderCheck:
    """What was checked: the number of assertions, all of which held, and the compiler's command."""

    assertions: int
    structs: tuple[str, ...]
    command: tuple[str, ...]


def generate_header(profile: Profile, *, kvm_structs: bool = False) -> str:
    """A C header with all of the profile, for programs that run on any host.

    Ids and ioctls have the names of the kernel's header; the values of the tables of names are
    ``KVMI_ACTION_RETRY``, ``KVMI_ACCESS_W`` and so on.

    :param kvm_structs: also define what the system's ``linux/kvm.h`` has (``struct kvm_regs``),
        which is to be included before otherwise.
    """
    numbers = {c.c_name: c.id for c in profile.commands.values()}
    numbers |= {e.c_name: e.id for e in profile.events.values()}
    numbers |= {i.c_name: i.request for i in profile.ioctls.values()}
    numbers |= {name: value for name, value in profile.constants.items() if "_HC_" in name}
    numbers |= {**profile.errno} | {
        "KVM_CAP_INTROSPECTION": profile.capability,
        "KVMI_VERSION": profile.version,
        "KVMI_MAX_MSG_SIZE": profile.max_message_size,
        **_event_messages(profile),
    }
    for table, values in profile.names.items():
        numbers |= {f"KVMI_{table.upper()}_{name}": value for name, value in values.items()}
    lines = ["/* Made from the ABI profile " + profile.name + ". */", "#pragma once"]
    lines += [f"#define {name} {value:#x}" for name, value in numbers.items()]
    for layout in profile.structs.values():
        if kvm_structs or layout.name.startswith(("kvmi_", "kvm_introspection")):
            lines += [f"struct {layout.name} {{", *_c_fields(layout), "};"]
    return "\n".join(lines) + "\n"


def _event_messages(profile: Profile) -> dict[str, int]:
    """The ids of the messages that carry events and their replies, by their names in C."""
    if profile.event_header is None:
        return {"KVMI_EVENT": profile.vcpu_event, "KVMI_EVENT_REPLY": profile.event_reply}
    return {"KVMI_VM_EVENT": profile.vm_event, "KVMI_VCPU_EVENT": profile.vcpu_event}


def _c_fields(layout: Struct) -> Iterator[str]:
    for one in layout.fields:
        kind = f"struct {one.type}"
        if one.struct is None:
            kind = _C_SIGNS[one.type[0]] + _C_WIDTHS[one.type[1:]]
        count = "" if one.count is None else "[]" if one.flexible else f"[{one.count}]"
        yield f"\t{kind} {one.name}{count};"


def generate_c(
    profile: Profile,
    *,
    commands: Iterable[str] | None = None,
    events: Iterable[str] | None = None,
    headers: Sequence[str] = ("linux/kvm.h", "linux/kvmi.h"),
) -> str:
    """The C file for these commands and events, None for all of the profile.

    :raises UsageError: unknown command or event.
    """
    structs = _needed_structs(profile, commands, events)
    lines = ["/* Made from the ABI profile " + profile.name + "; compile, do not run. */"]
    lines += ["#include <stddef.h>", *(f"#include <{h}>" for h in headers)]
    lines += [
        f'_Static_assert({condition}, "{text}");'
        for condition, text in _assertions(profile, structs, commands, events)
    ]
    return "\n".join(lines) + "\n"


def check_headers(
    profile: Profile,
    include: Sequence[Path],
    *,
    commands: Iterable[str] | None = None,
    events: Iterable[str] | None = None,
    headers: Sequence[str] = ("linux/kvm.h", "linux/kvmi.h"),
    compiler: str = "cc",
) -> HeaderCheck:
    """Compile the assertions against the headers in ``include``.

    :param include: directories searched before the system's, in this order: that of
        ``make headers_install``, or ``include/uapi`` and ``arch/x86/include/uapi`` of a source.
    :param commands: check only what these commands need (a series that is not complete yet).
    :raises ConformanceError: an assertion fails, or a name is missing; ``details`` has the
        compiler's words.
    :raises UsageError: no such compiler, directory, command or event.
    """
    for path in include:
        if not path.is_dir():
            raise UsageError(f"{path} is not a directory", hint="give the kernel's uapi headers")
    only = None if commands is None else list(commands)
    only_events = None if events is None else list(events)
    source = generate_c(profile, commands=only, events=only_events, headers=headers)
    with tempfile.TemporaryDirectory(prefix="kvmi-header-") as scratch:
        stubs = Path(scratch) / "stubs"
        for name in _KERNEL_ONLY:
            (stubs / name).parent.mkdir(parents=True, exist_ok=True)
            (stubs / name).touch()
        file = Path(scratch) / "abi.c"
        file.write_text(source)
        search = [f"-I{path}" for path in (*include, stubs)]
        command = (
            compiler,
            "-std=gnu11",
            "-fsyntax-only",
            "-D__user=",
            "-D__EXPORTED_HEADERS__",
            *search,
            str(file),
        )
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
            )
        except FileNotFoundError:
            raise UsageError(
                f"there is no C compiler {compiler}", hint="apt install gcc libc6-dev"
            ) from None
        except subprocess.TimeoutExpired:
            raise InfraError(f"{compiler} did not end within {_COMPILE_TIMEOUT_S} s") from None
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if "error:" in line]
        raise ConformanceError(
            f"the kernel's headers differ from ABI profile {profile.name} in "
            f"{len(faults)} places, first: {faults[0].partition('error: ')[2] if faults else '?'}",
            details=done.stderr,
        )
    names = tuple(s.name for s in _needed_structs(profile, only, only_events))
    return HeaderCheck(source.count("_Static_assert("), names, command)


def _needed_structs(
    profile: Profile, commands: Iterable[str] | None, events: Iterable[str] | None
) -> list[Struct]:
    if commands is None and events is None:
        return list(profile.structs.values())
    wanted: list[Struct | None] = [i.argument for i in profile.ioctls.values()]
    wanted += [profile.structs[n] for n in ("kvmi_msg_hdr", "kvmi_error_code", "kvmi_vcpu_hdr")]
    wanted.append(profile.event_header)
    for name in profile.commands if commands is None else commands:
        command = profile.command(name)
        wanted += [command.request, command.reply]
    for name in profile.events if events is None else events:
        event = profile.event(name)
        wanted += [event.payload, event.reply]
        if event.is_vcpu:
            wanted += [profile.event_common, profile.event_reply_common]
    found: dict[str, Struct] = {}
    while wanted:
        one = wanted.pop()
        if one is not None and one.name not in found:
            found[one.name] = one
            wanted += [f.struct for f in one.fields]
    return [s for s in profile.structs.values() if s.name in found]


def _assertions(
    profile: Profile,
    structs: Sequence[Struct],
    commands: Iterable[str] | None,
    events: Iterable[str] | None,
) -> Iterator[tuple[str, str]]:
    """(condition, text) of each assertion; the text names what is wrong when it fails."""
    for layout in structs:
        c_type = f"struct {layout.name}"
        yield f"sizeof({c_type}) == {layout.size}", f"size of {c_type} is not {layout.size}"
        yield (
            f"_Alignof({c_type}) == {layout.align}",
            f"alignment of {c_type} is not {layout.align}",
        )
        for one in layout.fields:
            label = f"{layout.name}.{one.name}"
            yield (
                f"offsetof({c_type}, {one.name}) == {one.offset}",
                f"offset of {label} is not {one.offset}",
            )
            size, value = one.size, f"(({c_type} *)0)->{one.name}"
            if one.flexible:
                size, value = one.element_size, f"{value}[0]"
            yield f"sizeof({value}) == {size}", f"size of {label} is not {size}"
    for name in profile.commands if commands is None else commands:
        command = profile.command(name)
        yield f"{command.c_name} == {command.id}", f"id of {command.c_name} is not {command.id}"
    for name in profile.events if events is None else events:
        event = profile.event(name)
        yield f"{event.c_name} == {event.id}", f"id of {event.c_name} is not {event.id}"
    for ioctl in profile.ioctls.values():
        yield (
            f"{ioctl.c_name} == {ioctl.request:#x}",
            f"request of {ioctl.c_name} is not {ioctl.request:#x}",
        )
    yield (
        f"KVM_CAP_INTROSPECTION == {profile.capability}",
        f"KVM_CAP_INTROSPECTION is not {profile.capability}",
    )
    yield f"KVMI_VERSION == {profile.version}", f"KVMI_VERSION is not {profile.version}"
    for name, id in _event_messages(profile).items():
        yield f"{name} == {id}", f"{name} is not {id}"
