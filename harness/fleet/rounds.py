# SPDX-License-Identifier: GPL-2.0-or-later
"""The rounds of a run on many machines, and what becomes of those that are lost.

In a round, pytest-xdist spreads what has no verdict yet over the machines
that are there, each with a worker of its own behind execnet's gateway over SSH. What a round
leaves (because a machine was lost so late that the others had ended) is done by the next, and
machines that came back to us between two rounds take part again.

What a lost machine ran in that moment is judged here. If its kernel died of it, the promise is
broken. Otherwise another machine gets the test; one that was lost with two machines is MISS.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness import paths
from harness.build.progress import note
from harness.conform import INTERRUPTED, account, death_of, run_pytest
from harness.errors import HarnessError
from harness.fleet.machine import Fate, FleetMachine
from harness.fleet.schedule import HERE
from harness.fleet.session import FLEET, Loss, read_losses, settled_tests
from harness.report.model import Outcome, Planned, Verdict, clauses_or_none
from harness.report.store import VerdictFile, load_run, write_atomically

if TYPE_CHECKING:
    from harness.fleet.runtime import Runtime

__all__ = ["Rounds"]

_ROUNDS = 6
_STARTS = 3
"""How often one machine is prepared in a run."""
_HERE_HAS = frozenset({"source"})


class Rounds:
    """The rounds of one run; see the module's text."""

    def __init__(self, run_dir: Path, machines: Sequence[FleetMachine], runtime: Runtime) -> None:
        self._run_dir = run_dir
        self._machines = {machine.name: machine for machine in machines}
        self._runtime = runtime
        self._judged = 0
        self._suspects: dict[str, list[str]] = {}
        self._starts = dict.fromkeys(self._machines, 1)

    def run(self, arguments: Sequence[str]) -> int:
        """Run until nothing is owed or nobody can do it; every test has a verdict then.

        :param arguments: for pytest, that choose tests.
        :returns: the exit status of the last pytest.
        """
        code = 0
        try:
            code, reason = self._all_rounds(arguments)
        except KeyboardInterrupt:
            reason = INTERRUPTED
        self._account_for_needs()
        lost = {one.name: one.lost for one in self._machines.values() if one.lost}
        account(self._run_dir, reason or death_of(code), machines=lost)
        return code

    def _all_rounds(self, arguments: Sequence[str]) -> tuple[int, str]:
        code = 0
        for _ in range(_ROUNDS):
            there = [machine for machine in self._machines.values() if not machine.lost]
            if not there:
                break
            code, reason = run_pytest(
                self._run_dir,
                list(arguments),
                paths.ROOT,
                ours=["--kvmi-fleet", *self._workers(there)],
            )
            if reason:
                return code, reason
            losses = self._new_losses()
            self._look_after(losses)
            lost = bool(losses) or self._look_for_lost(code)
            left = self._left()
            if not lost:
                # What one kind of machine skipped last, another may run.
                owed = {one.test for one in self._owed()}
                left = [test for test in left if test not in owed]
            # A machine that is lost while workers start ends pytest before it has collected.
            begun = bool(load_run(self._run_dir).plan)
            if not left and (begun or not lost):
                break
            note(f"Another round, for {f'{len(left)} tests' if begun else 'all tests'}")
        return code, ""

    def _workers(self, machines: Sequence[FleetMachine]) -> list[str]:
        """Options that name the workers, after their files are written."""
        config = self._run_dir / "ssh_config"
        write_atomically(config, "\n".join(machine.ssh_config() for machine in machines))
        words = {machine.name: sorted(machine.words) for machine in machines}
        write_atomically(
            self._run_dir / FLEET, msgspec.json.encode(words | {HERE: sorted(_HERE_HAS)})
        )
        specs = [f"popen//chdir={paths.ROOT}//id={HERE}"]
        specs += [machine.spec(config) for machine in machines]
        return [word for spec in specs for word in ("--tx", spec)]

    def _left(self) -> list[str]:
        """The tests to which a machine that is there has something to add."""
        words = {one.name: one.words for one in self._machines.values() if not one.lost}
        settled = settled_tests(self._run_dir, words)
        return [
            one.test
            for one in load_run(self._run_dir).plan
            if one.test not in settled
            and any(set(one.needs) <= has for has in (*words.values(), _HERE_HAS))
        ]

    def _owed(self) -> list[Planned]:
        """What was collected and has no verdict."""
        run = load_run(self._run_dir)
        done = {verdict.test for verdict in run.verdicts}
        return [planned for planned in run.plan if planned.test not in done]

    def _new_losses(self) -> list[Loss]:
        losses = read_losses(self._run_dir)
        new, self._judged = losses[self._judged :], len(losses)
        return new

    def _look_for_lost(self, code: int) -> bool:
        """After a pytest that failed by itself: is a machine missing that it did not tell of?"""
        if code in (0, 1):
            return False
        gone = [one for one in self._machines.values() if not one.lost and not one.there()]
        for machine in gone:
            self._look_at(Loss(machine=machine.name, error="it was gone when the round began"))
        return bool(gone)

    # -- machines that were lost ----------------------------------------------------------

    def _look_after(self, losses: Sequence[Loss]) -> None:
        """Find out what became of machines, make those ready that are there, and judge the
        tests that they ran."""
        of_machines = [loss for loss in losses if loss.machine in self._machines]
        with ThreadPoolExecutor(max(1, len(of_machines)), "fleet") as pool:
            found = list(pool.map(self._look_at, of_machines))
        for loss, (fate, crash, log) in zip(of_machines, found, strict=True):
            self._judge(loss, fate, crash, log)
        for loss in losses:
            if loss not in of_machines:
                reason = f"the worker here died: {loss.error}"
                self._give_verdict(loss.test, Outcome.MISS, reason)

    def _look_at(self, loss: Loss) -> tuple[Fate, str, Path | None]:
        """What became of a machine, what its kernel said of its death, and where it is kept."""
        machine = self._machines[loss.machine]
        fate = machine.fate()
        found = fate, machine.crash(), machine.kernel_log_path
        note(f"Machine {machine.name} {fate}{f'; it ran {loss.test}' if loss.test else ''}")
        if fate is Fate.GONE:
            machine.give_up(f"{machine.lost}{f'; it ran {loss.test}' if loss.test else ''}")
        else:
            self._bring_back(machine, loss.error)
        return found

    def _judge(self, loss: Loss, fate: Fate, crash: str, log: Path | None) -> None:
        """Give a verdict on the test that a lost machine ran, if one is due."""
        if not loss.test or loss.left:
            return  # it had not begun: the machine was found to be of no use
        if crash or fate is Fate.RESTARTED:
            # Nobody else restarts it while it is ours.
            how = f": its kernel died: {crash}" if crash else " restarted during this test"
            reason = f"machine {loss.machine}{how}"
            self._give_verdict(loss.test, Outcome.FAIL, reason, worker=loss.machine, log=log)
            return
        suspects = self._suspects.setdefault(loss.test, [])
        suspects.append(loss.machine)
        if len(suspects) > 1:
            names = " and ".join(dict.fromkeys(suspects))
            reason = f"lost during this test, each time: {names}"
            self._give_verdict(loss.test, Outcome.MISS, reason)

    def _bring_back(self, machine: FleetMachine, why: str) -> None:
        if machine.lost:
            return
        self._starts[machine.name] += 1
        if self._starts[machine.name] > _STARTS:
            machine.give_up(f"its worker ended {_STARTS} times, the last time with: {why}")
            return
        try:
            machine.prepare(self._runtime)
        except HarnessError as error:
            machine.give_up(error)

    def _give_verdict(
        self, test: str, outcome: Outcome, reason: str, *, worker: str = "", log: Path | None = None
    ) -> None:
        """Write what is known of a test whose worker did not live to tell."""
        run = load_run(self._run_dir)
        planned = next((one for one in run.plan if one.test == test), None)
        if planned is None or any(one.test == test for one in run.verdicts):
            return
        evidence = {}
        if log is not None:
            evidence["kernel_log"] = log.relative_to(self._run_dir).as_posix()
        with VerdictFile(self._run_dir) as file:
            for clause in clauses_or_none(planned.clauses):
                file.write(
                    Verdict(
                        clause=clause,
                        verdict=outcome,
                        test=test,
                        target=run.facts.target,
                        series=run.facts.series,
                        duration_s=0.0,
                        reason=reason,
                        description=planned.description,
                        worker=worker,
                        evidence=evidence,
                    )
                )

    def _account_for_needs(self) -> None:
        """Say of what nobody ran why: no such machine, or it was lost."""
        for planned in self._owed():
            needs = set(planned.needs)
            able = [one for one in self._machines.values() if needs <= one.words]
            unknown = [one for one in self._machines.values() if not one.words]
            if not needs or needs <= _HERE_HAS or any(not one.lost for one in able):
                continue  # it should have run
            if able or unknown:
                names = ", ".join(one.name for one in able or unknown)
                reason = f"it needs {' '.join(sorted(needs))}, and {names} was lost"
                self._give_verdict(planned.test, Outcome.MISS, reason)
            else:
                reason = f"no machine of the fleet has {' '.join(sorted(needs))}"
                self._give_verdict(planned.test, Outcome.SKIP, reason)
