# SPDX-License-Identifier: GPL-2.0-or-later
"""KCIDB JSON: the run as KernelCI's database takes it, schema 5.3 (package kcidb-io).

Its five verdicts are ours. The series is the checkout, the kernel the build, and each clause's
verdict of one test is a test.
"""

from __future__ import annotations

import json
import re
from typing import Any

from harness.report.model import Verdict
from harness.report.view import NO_CLAUSE, RunView

__all__ = ["ORIGIN", "kcidb_of"]

ORIGIN = "kvmi_harness"
"""What the database calls the sender."""

_EXCERPT = 16000  # its schema allows 16384 characters


def kcidb_of(view: RunView) -> dict[str, Any]:
    """The run as one document.

    A run that was made before series were recorded with their hash has no patchset hash.
    """
    run = _word(view.facts.run)
    build = f"{ORIGIN}:{run}"
    return {
        "version": {"major": 5, "minor": 3},
        "checkouts": [_checkout(view, f"{ORIGIN}:{run}")],
        "builds": [_build(view, build)],
        "tests": [
            _test(view, verdict, build=build, number=number)
            for number, verdict in enumerate(view.verdicts, start=1)
        ],
    }


def _checkout(view: RunView, checkout: str) -> dict[str, Any]:
    facts = view.facts
    record = {
        "id": checkout,
        "origin": ORIGIN,
        "valid": True,
        "comment": f"{facts.kernel.get('title', '')} {facts.series}".strip(),
        "misc": _full({"base": facts.kernel.get("base", ""), "qemu": facts.qemu}),
    }
    if "patchset_hash" in facts.kernel:
        record["patchset_hash"] = facts.kernel["patchset_hash"]
    if message := facts.kernel.get("message_id", ""):
        record["message_id"] = message.strip("<>")
    return record | _started(facts.started)


def _build(view: RunView, build: str) -> dict[str, Any]:
    facts = view.facts
    return {
        "id": build,
        "checkout_id": build,
        "origin": ORIGIN,
        "architecture": "x86_64",
        "status": "PASS",  # it booted and was tested
        "comment": facts.kernel.get("release", ""),
        "misc": _full({"harness": facts.harness, "system": facts.system, "key":
                       facts.kernel.get("key", "")}),
    } | _started(facts.started)  # fmt: skip


def _test(view: RunView, verdict: Verdict, *, build: str, number: int) -> dict[str, Any]:
    clause = view.clauses.get(verdict.clause or "")
    group = _word(clause.group if clause else NO_CLAUSE)
    machine = view.facts.machine
    record: dict[str, Any] = {
        "id": f"{build}.{number}",
        "build_id": build,
        "origin": ORIGIN,
        "path": f"kvmi.{group}.{verdict.clause or 'none'}",
        "status": verdict.verdict.value,
        "duration": verdict.duration_s,
        "comment": clause.text if clause else verdict.description,
        "environment": {
            "comment": " ".join(
                part
                for part in (
                    f"target {verdict.target}",
                    machine.virtualisation if machine and len(view.targets) < 2 else "",
                    machine.caution if machine else "",
                )
                if part
            ),
        },
        "misc": _full({"test": verdict.test, "reason": verdict.reason, "seen": verdict.seen,
                       "again": (view.rerun([verdict.test], target=verdict.target)
                                 if verdict.verdict.bad else "")}),
    }  # fmt: skip
    if verdict.clause in view.known:
        record["waived"] = True
    if verdict.verdict.bad and (path := verdict.evidence.get("failure")):
        file = view.path(path)
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            record["log_excerpt"] = text.replace("\0", "")[-_EXCERPT:]
    return record | _started(verdict.started)


def _started(when: str) -> dict[str, str]:
    return {"start_time": when} if when else {}


def _full(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}


def _word(text: str) -> str:
    """A part of an id or path: letters, digits, dashes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-").lower()


def to_json(view: RunView) -> str:
    """The document as text."""
    return json.dumps(kcidb_of(view), indent=1, ensure_ascii=False) + "\n"
