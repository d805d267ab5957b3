# SPDX-License-Identifier: GPL-2.0-or-later
"""The pytest plugin: options, the clause marker, fixtures, verdicts.

==============  ======================================================================
module          concern
==============  ======================================================================
options         command line, markers, what a process of a run knows (:class:`Session`)
collect         the clause marker's ids, selection, order, the plan
classify        from an exception to a verdict
worker          hooks in the process that runs tests: phases, limits, leaks, evidence
evidence        where a test's evidence lies
parcel          evidence of workers on other machines
pool            hosts: started, watched, replaced, given up
fixtures        what tests ask for
timeline        steps of a sequence, for the report
controller      hooks in the process that writes verdicts
==============  ======================================================================

Loaded by every pytest of an environment that has the package installed, so it costs
nothing until a test of ours is collected: one that bears ``@pytest.mark.clause`` or asks
for a host.
"""

from __future__ import annotations

from typing import NoReturn

import pytest

from harness.plugin import options

__all__ = ["skip_clause"]


def skip_clause(reason: str) -> NoReturn:
    """End the running test: its clauses do not apply here, for this reason.

    The verdict is SKIP, never PASS. To skip some of a test's clauses and go on, use the
    ``clauses`` fixture.
    """
    pytest.skip(reason)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the group "kvmi"."""
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register markers and the parts that this process needs."""
    from harness.plugin import collect, controller, fixtures, worker

    options.add_markers(config)
    session = options.Session.of(config)
    config.pluginmanager.register(fixtures, "kvmi-fixtures")
    config.pluginmanager.register(collect.Collect(session), "kvmi-collect")
    if session.runs_tests:
        config.pluginmanager.register(worker.Worker(session), "kvmi-worker")
    if session.is_controller:
        config.pluginmanager.register(controller.Controller(session), "kvmi-controller")
        if config.pluginmanager.hasplugin("xdist"):
            config.pluginmanager.register(controller.Nodes(session), "kvmi-nodes")
        if session.in_fleet:
            from harness.fleet.session import Fleet

            config.pluginmanager.register(Fleet(session), "kvmi-fleet")
