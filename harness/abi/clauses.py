# SPDX-License-Identifier: GPL-2.0-or-later
"""Clauses: the testable promises of the interface, with stable ids."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Literal

import msgspec

from harness.errors import UsageError

__all__ = ["Clause", "Side", "load_clauses", "requirement_documents"]

Side = Literal["kernel", "qemu", "lifecycle"]
Basis = Literal["doc", "impl", "both", "test", "qemu"]


@dataclass(frozen=True)
class Clause:
    """One promise.

    ``basis`` tells where it stands: in the interface's text (doc), only in the reference code
    (impl), in both, asserted by the reference selftest (test), or on the QEMU side (qemu).
    ``documents`` are ids of requirement documents. ``readings`` are the accepted behaviours, by a
    short word, where text and reference code disagree; empty for all others.
    """

    id: str
    group: str
    basis: Basis
    text: str
    documents: tuple[str, ...]
    side: Side
    readings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)


class _Clause(msgspec.Struct, forbid_unknown_fields=True):
    basis: Basis
    text: str
    documents: list[str] = []
    readings: dict[str, str] = {}


class _Group(msgspec.Struct, forbid_unknown_fields=True):
    title: str
    side: Side
    clauses: dict[str, _Clause]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    documents: dict[str, str]
    groups: dict[str, _Group]


@functools.cache
def _file() -> _File:
    text = resources.files(__package__).joinpath("clauses.toml").read_text()
    return msgspec.convert(tomllib.loads(text), _File)


@functools.cache
def load_clauses() -> Mapping[str, Clause]:
    """All clauses by id, in the order of the interface's description; read once.

    :raises UsageError: the data contradict themselves.
    """
    clauses: dict[str, Clause] = {}
    file = _file()
    for group in file.groups.values():
        for name, raw in group.clauses.items():
            if name in clauses or not set(raw.documents) <= set(file.documents):
                raise UsageError(f"clause {name} exists twice, or names an unknown document")
            clauses[name] = Clause(
                name, group.title, raw.basis, raw.text, tuple(raw.documents), group.side,
                MappingProxyType(raw.readings),
            )  # fmt: skip
    return MappingProxyType(clauses)


def requirement_documents() -> Mapping[str, str]:
    """Titles of the requirement documents by id."""
    return MappingProxyType(_file().documents)
