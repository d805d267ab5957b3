# SPDX-License-Identifier: GPL-2.0-or-later
"""Clauses: the testable promises of the interface, with stable ids.

``clauses.toml`` has those of v12. What an older version lacks, promises otherwise or promises
in addition, is in ``clauses-VERSION.toml``, the difference to v12.
"""

from __future__ import annotations

import fnmatch
import functools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from types import MappingProxyType
from typing import Literal

import msgspec

from harness.abi.load import load_profile, profile_names
from harness.abi.profile import Profile
from harness.errors import UsageError

__all__ = ["Clause", "Side", "all_clauses", "load_clauses", "requirement_documents"]

Side = Literal["kernel", "qemu", "lifecycle"]
Basis = Literal["doc", "impl", "both", "test", "qemu"]

_WHOLE = "v12"


@dataclass(frozen=True)
class Clause:
    """One promise.

    ``basis`` tells where it stands: in the interface's text (doc), only in the reference code
    (impl), in both, asserted by the reference selftest (test), or on the QEMU side (qemu).
    ``documents`` are ids of requirement documents. ``readings`` are the accepted behaviours, by a
    short word, where text and reference code disagree; empty for all others. ``needs`` are the
    commands, events and ioctls without which it does not apply, as :meth:`Profile.has` takes them.
    """

    id: str
    group: str
    basis: Basis
    text: str
    documents: tuple[str, ...]
    side: Side
    readings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    needs: tuple[str, ...] = ()

    def unclaimed(self, profile: Profile) -> str:
        """Why it is not tested on a series that claims less than its version has, or nothing."""
        lacking = [one for one in self.needs if not profile.has(one)]
        return f"not claimed: {', '.join(lacking)}" if lacking else ""


class _Clause(msgspec.Struct, forbid_unknown_fields=True):
    basis: Basis
    text: str
    documents: list[str] = []
    readings: dict[str, str] = {}
    needs: list[str] = []


class _Group(msgspec.Struct, forbid_unknown_fields=True):
    title: str
    side: Side
    clauses: dict[str, _Clause]
    needs: list[str] = []


class _File(msgspec.Struct, forbid_unknown_fields=True):
    documents: dict[str, str]
    groups: dict[str, _Group]


class _Difference(msgspec.Struct, forbid_unknown_fields=True):
    absent: list[str] = []
    changed: dict[str, str] = {}
    groups: dict[str, _Group] = {}


def _read(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()


@functools.cache
def _file() -> _File:
    return msgspec.convert(tomllib.loads(_read("clauses.toml").decode()), _File)


@functools.cache
def load_clauses(version: str = _WHOLE) -> Mapping[str, Clause]:
    """All clauses of a version by id, in the order of the interface's description; read once.

    :raises UsageError: no such version, or the data contradict themselves.
    """
    clauses = _flat(_file().groups)
    if version == _WHOLE:
        return clauses
    profile = load_profile(version)
    text = _read(f"clauses-{version}.toml").decode()
    difference = msgspec.convert(tomllib.loads(text), _Difference)
    kept = {name: one for name, one in clauses.items() if not one.unclaimed(profile)}
    for pattern in difference.absent:
        gone = fnmatch.filter(kept, pattern)
        if not gone:
            raise UsageError(f"clauses-{version}.toml: without {pattern} there is none, either")
        kept = {name: one for name, one in kept.items() if name not in gone}
    for name, text in difference.changed.items():
        if name not in kept:
            raise UsageError(f"clauses-{version}.toml: there is no {name} that changed")
        kept[name] = replace(kept[name], text=text)
    new = _flat(difference.groups)
    if twice := new.keys() & clauses.keys():
        raise UsageError(f"clauses-{version}.toml: {', '.join(sorted(twice))} mean others in v12")
    # What is new in a group comes after the rest of it.
    groups = dict.fromkeys(c.group for c in (*kept.values(), *new.values()))
    return MappingProxyType(
        {
            name: clause
            for group in groups
            for name, clause in (*kept.items(), *new.items())
            if clause.group == group
        }
    )


def _flat(groups: Mapping[str, _Group]) -> Mapping[str, Clause]:
    clauses: dict[str, Clause] = {}
    for group in groups.values():
        for name, raw in group.clauses.items():
            if name in clauses or not set(raw.documents) <= set(_file().documents):
                raise UsageError(f"clause {name} exists twice, or names an unknown document")
            clauses[name] = Clause(
                name, group.title, raw.basis, raw.text, tuple(raw.documents), group.side,
                MappingProxyType(raw.readings), (*group.needs, *raw.needs),
            )  # fmt: skip
    return MappingProxyType(clauses)


@functools.cache
def all_clauses() -> Mapping[str, Clause]:
    """The clauses of all versions by id; v12's wording, where it has them."""

    def every() -> Iterator[tuple[str, Clause]]:
        for version in profile_names():
            yield from load_clauses(version).items()
        yield from load_clauses().items()

    return MappingProxyType(dict(every()))


def requirement_documents() -> Mapping[str, str]:
    """Titles of the requirement documents by id."""
    return MappingProxyType(_file().documents)
