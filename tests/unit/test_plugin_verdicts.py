# SPDX-License-Identifier: GPL-2.0-or-later
"""From what happens in a test to its verdict, seen from outside: whole pytest runs on small
generated suites, with a target that boots nothing."""

from __future__ import annotations

import json

import pytest
from plugin_suite import Suite

from harness.series.description import load_description, to_toml

pytest_plugins = ["pytester"]

both_ways = pytest.mark.parametrize(
    "options", [("-pno:xdist",), ("-n2",)], ids=["alone", "workers"]
)


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """A fresh suite."""
    return Suite(pytester)


@both_ways
def test_whose_fault(suite: Suite, options: tuple[str, ...]) -> None:
    """Each way a test can end has its verdict, with workers and without."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")

        def test_holds(): pass
        def test_assertion(): assert 1 == 2, "errno differs"
        def test_promise(): raise errors.MalformedMessage("padding is 7")
        def test_crash(): raise errors.HostCrashedError("panic")
        def test_ours(): raise errors.InfraError("ssh refused")
        def test_bug(): {}["x"]
        def test_skip(): pytest.skip("needs two CPUs")

        @pytest.fixture
        def broken(): raise errors.DeadlineError("no boot")
        def test_fixture(broken): pass

        @pytest.fixture
        def refused(): raise errors.ConformanceError("hook refused")
        def test_fixture_fail(refused): pass

        @pytest.fixture
        def untidy():
            yield
            raise OSError("cannot close")
        def test_teardown(untidy): pass
        """,
        *options,
    )
    assert suite.verdicts() == {
        "test_holds": "PASS",
        "test_assertion": "FAIL",
        "test_promise": "FAIL",
        "test_crash": "FAIL",
        "test_ours": "ERROR",
        "test_bug": "ERROR",
        "test_skip": "SKIP",
        "test_fixture": "ERROR",
        "test_fixture_fail": "FAIL",
        "test_teardown": "ERROR",
    }
    assert suite.record("test_skip")["reason"] == "needs two CPUs"
    assert "padding is 7" in suite.record("test_promise")["reason"]
    assert suite.record("test_teardown")["phase"] == "teardown"
    for record in suite.records():
        assert record["verdict"] == "PASS" or record["reason"]
        for path in record.get("evidence", {}).values():
            assert (suite.run_dir / path).is_file()
    assert "errno differs" in suite.evidence("test_assertion", "failure")


def test_fixtures_tell_of_a_failure(suite: Suite) -> None:
    """What a fixture has to say is asked before anything is torn down, and only on failure."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")

        @pytest.fixture
        def guest(on_failure):
            state = ["alive"]
            on_failure("guests", lambda: "the guest is " + state[0])
            on_failure("broken", lambda: {}["rip"])
            yield state
            state[0] = "gone"

        @pytest.fixture
        def refused(guest): raise errors.ConformanceError("no")

        def test_holds(guest): pass
        def test_fails(guest): assert guest == []
        def test_set_up(refused): pass
        """
    )
    for test in ("test_fails", "test_set_up"):
        assert suite.evidence(test, "guests") == "the guest is alive"
        assert suite.evidence(test, "broken") == "cannot be told: KeyError: 'rip'"
    assert "guests" not in suite.record("test_holds").get("evidence", {})


def test_assertion_inside_the_package_is_ours(suite: Suite) -> None:
    """An invariant of this package that fails says nothing about the kernel."""
    suite.run(
        """
        from harness.report import model

        @pytest.mark.clause("HOOK-OK")
        def test_inside():
            exec(compile("assert False", model.__file__, "exec"), {})
        """
    )
    assert suite.verdicts() == {"test_inside": "ERROR"}


def test_several_clauses(suite: Suite) -> None:
    """One line for each clause; a test may skip one, and say which reading it saw."""
    suite.run(
        '''
        @pytest.mark.clause("HOOK-OK", "EV-HYPERCALL-NOTOOL")
        @pytest.mark.clause("HOOK-ENOMEM")
        def test_it(clauses):
            """What it is about,
            in two lines.

            And more."""
            clauses.skip("HOOK-ENOMEM", "no fault injection")
            clauses.seen("EV-HYPERCALL-NOTOOL", "enosys")
            clauses.note("took two tries")
        '''
    )
    found = {r["clause"]: r for r in suite.records()}
    assert {clause: r["verdict"] for clause, r in found.items()} == {
        "HOOK-OK": "PASS",
        "EV-HYPERCALL-NOTOOL": "PASS",
        "HOOK-ENOMEM": "SKIP",
    }
    assert found["HOOK-ENOMEM"]["reason"] == "no fault injection"
    assert found["EV-HYPERCALL-NOTOOL"]["seen"] == "enosys"
    assert found["HOOK-OK"]["notes"] == ["took two tries"]
    assert found["HOOK-OK"]["description"] == "What it is about, in two lines."


def test_several_errors_at_once(suite: Suite) -> None:
    """Of several failing tear-downs the kernel's fault decides; nothing is lost."""
    suite.run(
        """
        @pytest.fixture
        def one():
            yield
            raise OSError("cannot close")

        @pytest.fixture
        def two(one):
            yield
            raise errors.SilenceError("no unhook event")

        @pytest.mark.clause("HOOK-OK")
        def test_both(two): pass
        """
    )
    record = suite.record("test_both")
    assert record["verdict"] == "FAIL"
    assert "no unhook event" in record["reason"]
    assert "cannot close" in suite.evidence("test_both", "failure_teardown")


@both_ways
def test_unknown_clause(suite: Suite, options: tuple[str, ...]) -> None:
    """A clause that does not exist is a usage error that names test and near ids."""
    result = suite.run(
        """
        @pytest.mark.clause("HOOK-EINVAL-PADING")
        def test_typo(): pass
        """,
        *options,
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*test_typo: unknown clause 'HOOK-EINVAL-PADING'*-PADDING*"])


def test_choice_and_repetition(suite: Suite) -> None:
    """--kvmi-clause takes ids and patterns; --kvmi-repeat runs each test several times."""
    suite.run(
        """
        @pytest.mark.clause("HOOK-OK")
        def test_one(): pass
        @pytest.mark.clause("HOOK-ENOMEM")
        def test_two(): pass
        @pytest.mark.clause("UNHOOK-FREES")
        def test_three(): pass
        """,
        "--kvmi-clause=HOOK-E*",
        "--kvmi-clause=UNHOOK-FREES",
        "--kvmi-repeat=2",
    )
    assert suite.verdicts() == {
        "test_two[1of2]": "PASS",
        "test_two[2of2]": "PASS",
        "test_three[1of2]": "PASS",
        "test_three[2of2]": "PASS",
    }


def test_on_request(suite: Suite) -> None:
    """What runs on request only runs where its name, or that of its file, is given."""
    tests = """
        @pytest.mark.clause("HOOK-OK")
        def test_short(): pass
        @pytest.mark.on_request
        @pytest.mark.clause("HOOK-OK")
        def test_long(): pass
    """
    suite.run(tests, "--kvmi-clause=HOOK-OK")
    assert set(suite.verdicts()) == {"test_short"}
    suite.run(tests, "-k", "long")
    assert set(suite.verdicts()) == {"test_short", "test_long"}  # the second run adds to the first


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["alone", "workers"])
def test_shards_share_the_tests(suite: Suite, workers: tuple[str, ...]) -> None:
    """Each test is in one of the shards, and each shard's plan is what it owes."""
    source = """
        @pytest.mark.parametrize("number", range(7))
        @pytest.mark.clause("HOOK-OK")
        def test_it(number): pass
        """
    shards = []
    for shard in ("1/2", "2/2"):
        suite.run_dir = suite.pytester.path / f"run-{shard[0]}"
        result = suite.run(source, f"--kvmi-shard={shard}", *workers)
        assert result.ret == 0
        shards.append(set(suite.verdicts()))
        planned = (suite.run_dir / "plan.jsonl").read_text().splitlines()
        assert len(planned) == len(shards[-1])
    assert sorted(len(shard) for shard in shards) == [3, 4]
    assert set.union(*shards) == {f"test_it[{number}]" for number in range(7)}


def test_leaks_are_errors(suite: Suite) -> None:
    """Threads left behind, and exceptions in threads and finalisers, are our errors."""
    suite.run(
        """
        import gc, threading
        pytestmark = pytest.mark.clause("HOOK-OK")

        def test_thread():
            threading.Thread(target=threading.Event().wait, name="lost", daemon=True).start()

        def test_thread_exception():
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()

        def test_finaliser():
            class Bad:
                def __del__(self): raise ValueError("in __del__")
            Bad()
            gc.collect()

        def test_after(): pass
        """
    )
    assert suite.verdicts() == {
        "test_thread": "ERROR",
        "test_thread_exception": "ERROR",
        "test_finaliser": "ERROR",
        "test_after": "PASS",
    }
    assert "lost" in suite.record("test_thread")["reason"]


def test_time_limit(suite: Suite) -> None:
    """A test that exceeds its limit is our ERROR, with the place where it waited."""
    suite.run(
        """
        import threading

        @pytest.mark.clause("HOOK-OK")
        @pytest.mark.timeout(0.3)
        def test_waits(): threading.Event().wait(20)

        @pytest.mark.clause("HOOK-OK")
        def test_next(): pass
        """
    )
    assert suite.verdicts() == {"test_waits": "ERROR", "test_next": "PASS"}
    assert "limit of 0.3 s" in suite.record("test_waits")["reason"]
    assert "wait(20)" in suite.evidence("test_waits", "failure")


def test_timeline(suite: Suite) -> None:
    """Steps are written as they happen, with their outcome."""
    suite.run(
        """
        @pytest.mark.clause("HOOK-OK")
        @pytest.mark.lifecycle
        def test_steps(timeline):
            with timeline.step("hook"):
                with timeline.step("handshake"): pass
            timeline.mark("event")
            with timeline.step("migrate"):
                assert False, "no migration"
        """
    )
    lines = [json.loads(line) for line in suite.evidence("test_steps", "timeline").splitlines()]
    assert [(line["step"], line["state"], line.get("depth", 0)) for line in lines] == [
        ("hook", "begin", 0),
        ("handshake", "begin", 1),
        ("handshake", "ok", 1),
        ("hook", "ok", 0),
        ("event", "mark", 0),
        ("migrate", "begin", 0),
        ("migrate", "failed", 0),
    ]


def test_a_failing_step_is_to_blame(suite: Suite) -> None:
    """Clauses of steps that came to a good end held; those not reached are MISS."""
    suite.run(
        """
        @pytest.mark.clause("HOOK-OK", "HOOK-ABI", "UNHOOK-ABI", "UNHOOK-FREES")
        def test_steps(timeline):
            with timeline.step("hook", clauses=["HOOK-OK"]): pass
            with timeline.step("migrate", clauses=["HOOK-ABI"]):
                with timeline.step("wait"):
                    assert False, "no migration"
            with timeline.step("unhook", clauses=["UNHOOK-ABI", "UNHOOK-FREES"]): pass
        """
    )
    found = {r["clause"]: r for r in suite.records()}
    assert {clause: r["verdict"] for clause, r in found.items()} == {
        "HOOK-OK": "PASS",
        "HOOK-ABI": "FAIL",
        "UNHOOK-ABI": "MISS",
        "UNHOOK-FREES": "MISS",
    }
    assert "in: migrate: no migration" in found["UNHOOK-ABI"]["reason"]


def test_inert_for_plain_tests(pytester: pytest.Pytester) -> None:
    """A suite without clauses sees nothing of the plugin."""
    pytester.makepyfile("def test_plain(): pass")
    result = pytester.runpytest_subprocess("-n1")
    result.assert_outcomes(passed=1)
    assert "kvmi:" not in result.stdout.str()
    assert not (pytester.path / "reports").exists()


def test_by_hand(pytester: pytest.Pytester) -> None:
    """Without --kvmi-run a run's directory is made, and reports/latest points to it."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.clause("HOOK-OK")
        def test_it(): pass
        """
    )
    result = pytester.runpytest_subprocess()
    latest = pytester.path / "reports" / "latest"
    assert latest.is_symlink()
    with (latest / "verdicts.jsonl").open() as lines:
        assert [json.loads(line)["kind"] for line in lines] == ["run", "verdict", "end"]
    result.stdout.fnmatch_lines(["kvmi: 1 PASS -> *"])


def _claims(suite: Suite, revision: str, **changes: str) -> None:
    """Give the suite a series that is described."""
    text = to_toml(load_description(revision))
    for old, new in changes.items():
        assert f'"{old}",' in text
        text = text.replace(f'"{old}",', new, 1)
    (suite.pytester.path / "series.toml").write_text(text)
    (suite.pytester.path / "kvmi-harness.toml").write_text('description = "series.toml"')


OF_ALL_KINDS = """
@pytest.mark.clause("HOOK-OK")
def test_common(): pass
@pytest.mark.clause("CLEANUP-OK")
def test_of_v12(): pass
@pytest.mark.clause("MAXGFN-OK")
def test_of_v7(): pass
@pytest.mark.clause("HOOK-OK", "CLEANUP-OK")
def test_of_both(clauses): clauses.skip("CLEANUP-OK", "not here")
@pytest.mark.clause("READPHYS-OK")
def test_reading(): assert False
@pytest.mark.clause("HOOK-ABI", "READPHYS-EINVAL-ZERO")
def test_more(): assert False
@pytest.mark.clause("EVT-RETRY")
def test_asks(profile): profile.command("VM_READ_PHYSICAL")
@pytest.mark.clause("EVT-CRASH")
def test_older(profile): profile.ioctl("UNHOOK"), profile.event("CREATE_VCPU")
@pytest.mark.clause("EVT-CONTINUE")
def test_nowhere(profile): profile.event("FLIGHT")
"""


@both_ways
def test_what_does_not_apply_is_no_failure_for_pytest(
    suite: Suite, options: tuple[str, ...]
) -> None:
    result = suite.run(
        """
        @pytest.fixture
        def absent(): raise errors.AbsentError("v7 has no fuzzer")
        @pytest.mark.clause("EVT-RETRY")
        def test_asks(): raise errors.AbsentError("v7 has no such event")
        @pytest.mark.clause("EVT-CRASH")
        def test_needs(absent): pass
        """,
        *options,
    )
    assert suite.verdicts() == {"test_asks": "SKIP", "test_needs": "SKIP"}
    assert result.ret == 0


@both_ways
def test_clauses_of_another_version(suite: Suite, options: tuple[str, ...]) -> None:
    """A run is about the clauses of one version; what only another has is none of it."""
    _claims(suite, "v7")
    suite.run(OF_ALL_KINDS, *options)
    found = {(r["test"].partition("::")[2], r["clause"]): r["verdict"] for r in suite.records()}
    assert found == {
        ("test_common", "HOOK-OK"): "PASS",
        ("test_of_v7", "MAXGFN-OK"): "PASS",
        ("test_of_both", "HOOK-OK"): "PASS",
        ("test_reading", "READPHYS-OK"): "FAIL",
        ("test_more", "HOOK-ABI"): "FAIL",
        ("test_more", "READPHYS-EINVAL-ZERO"): "FAIL",
        ("test_asks", "EVT-RETRY"): "PASS",
        ("test_older", "EVT-CRASH"): "PASS",
        ("test_nowhere", "EVT-CONTINUE"): "ERROR",
    }
    assert suite.records("run")[0]["abi"] == "v7"


@both_ways
def test_what_is_not_claimed_is_skipped(suite: Suite, options: tuple[str, ...]) -> None:
    """Clauses of commands that the series does not claim are SKIP, never FAIL."""
    _claims(suite, "linux-6.12", VM_READ_PHYSICAL="")
    suite.run(OF_ALL_KINDS, *options)
    records = {(r["test"].partition("::")[2], r["clause"]): r for r in suite.records()}
    assert {key: record["verdict"] for key, record in records.items()} == {
        ("test_common", "HOOK-OK"): "PASS",
        ("test_of_v12", "CLEANUP-OK"): "PASS",
        ("test_of_both", "HOOK-OK"): "PASS",
        ("test_of_both", "CLEANUP-OK"): "SKIP",
        ("test_reading", "READPHYS-OK"): "SKIP",
        ("test_more", "HOOK-ABI"): "FAIL",
        ("test_more", "READPHYS-EINVAL-ZERO"): "SKIP",
        ("test_asks", "EVT-RETRY"): "SKIP",
        ("test_older", "EVT-CRASH"): "SKIP",
        ("test_nowhere", "EVT-CONTINUE"): "ERROR",
    }
    for test, clause in (("test_reading", "READPHYS-OK"), ("test_more", "READPHYS-EINVAL-ZERO")):
        assert records[test, clause]["reason"] == "not claimed: VM_READ_PHYSICAL"
    assert (
        records["test_asks", "EVT-RETRY"]["reason"] == "not claimed: the command VM_READ_PHYSICAL"
    )
    assert records["test_older", "EVT-CRASH"]["reason"] == "v12 has no event CREATE_VCPU"
