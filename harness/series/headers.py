# SPDX-License-Identifier: GPL-2.0-or-later
"""The facts of C headers: constants and layouts, as the compiler sees them.

The headers are compiled with debugging information, and that is read: it has each enumerator's
value and each struct's layout, so nobody has to parse C. Macros, which are not in it, become
enumerators first. Nothing is linked or run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.build.run import output_of
from harness.errors import BuildError, UsageError

__all__ = ["CField", "CStruct", "Headers", "read_headers"]

_COMPILER = "gcc"
_TIMEOUT_S = 120
# Included by headers of the kernel's tree, and stripped by `make headers_install`.
_KERNEL_ONLY = ("linux/compiler.h", "linux/compiler_types.h")
_MACRO = "kvmi_harness_value_"
_DEFINED = re.compile(r"^#define (?P<name>[A-Za-z_]\w*) +\S", re.MULTILINE)


@dataclass(frozen=True)
class CField:
    """One member of a struct; ``offset`` and ``size`` in bytes, 0 for a flexible array."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class CStruct:
    """A struct as it lies in memory."""

    name: str
    size: int
    fields: tuple[CField, ...]


@dataclass(frozen=True)
class Headers:
    """What some headers define.

    ``constants`` holds enumerators and macros that are numbers, ``enums`` the enumerators
    that were defined together.
    """

    constants: dict[str, int]
    enums: tuple[tuple[str, ...], ...]
    structs: dict[str, CStruct]


def read_headers(
    include: Sequence[Path], headers: Sequence[str], *, macros: Container[str]
) -> Headers:
    """The facts of ``headers``, such as ``linux/kvmi.h``.

    :param include: directories that are searched before the system's.
    :param macros: names of macros; no others are looked at.
    :raises UsageError: the compiler, or a header, is missing, or a header cannot be compiled.
    """
    with tempfile.TemporaryDirectory(prefix="kvmi-headers-") as scratch:
        stubs = Path(scratch, "stubs")
        for name in _KERNEL_ONLY:
            (stubs / name).parent.mkdir(parents=True, exist_ok=True)
            (stubs / name).touch()
        options = [
            "-std=gnu11",
            "-D__user=",
            "-D__EXPORTED_HEADERS__",
            *(f"-I{path}" for path in (*include, stubs)),
        ]
        text = "#include <stddef.h>\n" + "".join(f"#include <{name}>\n" for name in headers)
        names = _macros(text, options, wanted=macros)
        while True:
            source = Path(scratch, "facts.c")
            values = "".join(f"enum {{ {_MACRO}{name} = ({name}) }};\n" for name in names)
            source.write_text(text + values)
            refused = _compile(source, options)
            if not refused:
                return _facts(source.with_suffix(".o"))
            names = [name for name in names if name not in refused]


def _macros(text: str, options: Sequence[str], *, wanted: Container[str]) -> list[str]:
    """Names of the macros without arguments that have a value."""
    argv = [_COMPILER, *options, "-E", "-dM", "-x", "c", "-"]
    try:
        defined = output_of(argv, data=text.encode(), timeout_s=_TIMEOUT_S)
    except BuildError as error:
        raise _unusable(error.details or error.message) from error
    names = (found["name"] for found in _DEFINED.finditer(defined))
    return sorted(name for name in names if name in wanted)


def _compile(source: Path, options: Sequence[str]) -> set[str]:
    """Compile; the macros that turned out not to be numbers, empty when all went well.

    :raises UsageError: something else is wrong.
    """
    done = subprocess.run(
        [
            _COMPILER, *options, "-g", "-gdwarf-4", "-fno-eliminate-unused-debug-types",
            "-c", str(source), "-o", str(source.with_suffix(".o")),
        ],
        capture_output=True,
        timeout=_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return set()
    said = done.stderr.decode(errors="replace")
    lines = source.read_text().splitlines()
    refused = set()
    # An error within a macro is told at its definition, with a note at its use.
    told = rf"^{re.escape(str(source))}:(\d+):\d+: (?:error|note):"
    for found in re.finditer(told, said, re.MULTILINE):
        if named := re.search(rf"{_MACRO}(\w+)", lines[int(found[1]) - 1]):
            refused.add(named[1])
    if not refused:
        raise _unusable(said)
    return refused


def _unusable(said: str) -> UsageError:
    faults = [line for line in said.splitlines() if "error:" in line]
    return UsageError(
        f"the headers cannot be compiled: {faults[0].strip() if faults else said.strip()[:200]}",
        hint="headers for user space have to compile by themselves",
        details=said,
    )


def _facts(program: Path) -> Headers:
    from elftools.elf.elffile import ELFFile

    constants: dict[str, int] = {}
    enums: list[tuple[str, ...]] = []
    structs: dict[str, CStruct] = {}
    with program.open("rb") as file:
        for unit in ELFFile(file).get_dwarf_info().iter_CUs():
            for entry in unit.iter_DIEs():
                if entry.tag == "DW_TAG_enumeration_type":
                    members = dict(_enumerators(entry))
                    plain = {name.removeprefix(_MACRO): value for name, value in members.items()}
                    constants |= plain
                    if plain.keys() == members.keys():
                        enums.append(tuple(members))
                elif (
                    entry.tag == "DW_TAG_structure_type"
                    and "DW_AT_byte_size" in entry.attributes
                    and (name := _name(entry))
                ):
                    structs[name] = CStruct(name, _size(entry), tuple(_fields(entry)))
    return Headers(constants, tuple(enums), structs)


def _name(entry: Any) -> str:
    value = entry.attributes.get("DW_AT_name")
    return value.value.decode() if value else ""


def _enumerators(entry: Any) -> Iterator[tuple[str, int]]:
    for child in entry.iter_children():
        if child.tag == "DW_TAG_enumerator":
            yield _name(child), int(child.attributes["DW_AT_const_value"].value)


def _fields(entry: Any, start: int = 0) -> Iterator[CField]:
    for child in entry.iter_children():
        if child.tag != "DW_TAG_member":
            continue
        location = child.attributes.get("DW_AT_data_member_location")
        offset = start + (int(location.value) if location else 0)
        kind = child.get_DIE_from_attribute("DW_AT_type")
        if name := _name(child):
            yield CField(name, offset, _size(kind))
        else:  # members of a struct or union without a name are those of its owner
            yield from _fields(kind, offset)


def _size(entry: Any) -> int:
    """Bytes of a type; those of a type that it stands for, and of all elements of an array."""
    if "DW_AT_byte_size" in entry.attributes:
        return int(entry.attributes["DW_AT_byte_size"].value)
    element = _size(entry.get_DIE_from_attribute("DW_AT_type"))
    if entry.tag != "DW_TAG_array_type":
        return element
    total = element
    for child in entry.iter_children():
        if child.tag == "DW_TAG_subrange_type":
            total *= _elements(child.attributes)
    return total


def _elements(attributes: Any) -> int:
    if "DW_AT_count" in attributes:
        return int(attributes["DW_AT_count"].value)
    # A flexible array has no bound, and one of zero elements the bound -1 in some compilers.
    bound = attributes.get("DW_AT_upper_bound")
    return int(bound.value) + 1 if bound is not None and bound.value < 1 << 63 else 0
