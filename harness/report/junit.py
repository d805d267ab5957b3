# SPDX-License-Identifier: GPL-2.0-or-later
"""JUnit XML: one test case for each clause and test, ``classname`` is the clause's group.

FAIL is a ``failure`` (``skipped`` where it is a known one), SKIP is ``skipped``. ERROR and MISS
are an ``error`` (of that type), so that no reader of such files takes them for success.
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from harness.report.model import Outcome, RunFacts, Verdict
from harness.report.view import NO_CLAUSE, RunView

__all__ = ["write_junit"]

DETAIL_CHARACTERS = 20000

# XML 1.0 section 2.2: what a document may contain.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(view: RunView, path: Path) -> None:
    """Write a run as one JUnit file."""
    facts = view.facts
    suite = ElementTree.Element("testsuite", name="kvmi-conformance", timestamp=facts.started[:19])
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _facts(facts).items():
        ElementTree.SubElement(properties, "property", name=name, value=_clean(value))
    for verdict in view.verdicts:
        suite.append(_case(view, verdict))
    totals = {
        "tests": len(view.verdicts),
        "failures": len(suite.findall("testcase/failure")),
        "errors": sum(v.verdict in (Outcome.ERROR, Outcome.MISS) for v in view.verdicts),
        "skipped": len(suite.findall("testcase/skipped")),
    }
    for name, number in totals.items():
        suite.set(name, str(number))
    # A test of several clauses took its time once.
    suite.set("time", f"{sum(test.first.duration_s for test in view.tests):.3f}")
    root = ElementTree.Element("testsuites", name="kvmi-conformance")
    # Schemas of JUnit files, such as Jenkins', know no number of skipped tests here.
    for name in ("tests", "failures", "errors", "time"):
        root.set(name, suite.get(name, ""))
    root.append(suite)
    tree = ElementTree.ElementTree(root)
    ElementTree.indent(tree)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _case(view: RunView, verdict: Verdict) -> ElementTree.Element:
    clause = view.clauses.get(verdict.clause or "")
    file, _, name = verdict.test.partition("::")
    # Readers take cases of one name for one case.
    where = f" on {verdict.target}" if len(view.targets) > 1 else ""
    case = ElementTree.Element(
        "testcase",
        classname=clause.group if clause else NO_CLAUSE,
        name=_clean(f"{verdict.clause or '-'} ({name}){where}"),
        file=file,
        time=f"{verdict.duration_s:.3f}",
    )
    match verdict.verdict:
        case Outcome.FAIL if verdict.clause in view.known:
            # As pytest reports a test that is expected to fail.
            why = f"known failure, {view.known[verdict.clause].tracked}: {verdict.reason}"
            ElementTree.SubElement(case, "skipped", message=_clean(why))
        case Outcome.FAIL:
            _problem(view, verdict, case, "failure")
        case Outcome.ERROR | Outcome.MISS:
            _problem(view, verdict, case, "error")
        case Outcome.SKIP:
            ElementTree.SubElement(case, "skipped", message=_clean(verdict.reason))
        case Outcome.PASS if verdict.clause in view.passes_again:
            tracked = view.passes_again[verdict.clause].tracked
            words = f"{verdict.clause} holds again: take it off the known failures ({tracked})"
            ElementTree.SubElement(case, "system-out").text = _clean(words)
        case Outcome.PASS:
            pass
    return case


def _problem(view: RunView, verdict: Verdict, case: ElementTree.Element, kind: str) -> None:
    element = ElementTree.SubElement(
        case, kind, type=verdict.verdict.value, message=_clean(verdict.reason)
    )
    parts = [verdict.reason, f"Run it again: {view.rerun([verdict.test], target=verdict.target)}"]
    parts += [f"{name}: {path}" for name, path in verdict.evidence.items()]
    if "failure" in verdict.evidence:
        path = view.path(verdict.evidence["failure"])
        if path.is_file():
            parts.append(path.read_text(encoding="utf-8", errors="replace")[:DETAIL_CHARACTERS])
    element.text = _clean("\n".join(parts))


def _facts(facts: RunFacts) -> dict[str, str]:
    """The run's facts as flat text."""
    flat = {
        "run": facts.run,
        "target": facts.target,
        "series": facts.series,
        "abi": facts.abi,
        "system": facts.system,
    }
    flat |= {f"kernel.{name}": value for name, value in facts.kernel.items()}
    flat |= {f"qemu.{name}": value for name, value in facts.qemu.items()}
    machine = facts.machine
    if machine is not None:
        for name in machine.__struct_fields__:
            value = getattr(machine, name)
            if isinstance(value, dict):
                flat |= {f"machine.{key}": text for key, text in value.items()}
            else:
                flat[f"machine.{name}"] = (
                    str(value).lower() if isinstance(value, bool) else str(value)
                )
    return {name: value for name, value in flat.items() if value}


def _clean(text: str) -> str:
    return _NOT_XML.sub("�", text)
