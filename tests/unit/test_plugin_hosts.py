# SPDX-License-Identifier: GPL-2.0-or-later
"""How the plugin lends hosts to tests: watched, replaced when broken, given up when hopeless."""

from __future__ import annotations

import pytest
from plugin_suite import Suite

pytest_plugins = ["pytester"]


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """A fresh suite."""
    return Suite(pytester)


def test_one_host_serves_many_tests(suite: Suite) -> None:
    """The shared host is reused, a fresh one is for its test alone and ends with it."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")
        seen = []
        def test_first(host): seen.append(host)
        def test_second(host): seen.append(host)
        def test_fresh(fresh_host): seen.append(fresh_host)
        def test_check(host):
            assert seen[0] is seen[1] is host
            assert seen[2] is not host
            assert seen[2].closed
            assert not host.closed
        """
    )
    assert set(suite.verdicts().values()) == {"PASS"}
    assert suite.record("test_first")["evidence"]["host_console"] == "hosts/main-1/console.log"


def test_complaint_fails_the_test(suite: Suite) -> None:
    """What the kernel complains about makes the test FAIL, and the next gets another host."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")
        def test_before(host): host.console.text += "hooked\\n"
        def test_warns(host): host.console.text += "note\\nWARNING: at kvmi.c:42\\n"
        def test_after(host): assert host.console.text == ""
        """
    )
    assert suite.verdicts() == {"test_before": "PASS", "test_warns": "FAIL", "test_after": "PASS"}
    record = suite.record("test_warns")
    assert "WARNING: at kvmi.c:42" in record["reason"]
    assert suite.evidence("test_warns", "kernel_log") == "note\nWARNING: at kvmi.c:42\n"
    assert "test_before" in suite.evidence("test_warns", "failure_teardown")


def test_crash_explains_what_it_caused(suite: Suite) -> None:
    """A lost connection is ours, unless the host's kernel crashed: then it is a FAIL."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")
        def test_crash(host):
            host.crash()
            raise errors.InfraError("connection reset")
        def test_lost(host):
            host.fate = errors.LostHostError("gone")
            raise errors.InfraError("connection reset")
        def test_after(host): host.check()
        """
    )
    assert suite.verdicts() == {"test_crash": "FAIL", "test_lost": "ERROR", "test_after": "PASS"}
    record = suite.record("test_crash")
    assert "kernel panic" in record["reason"]
    assert any("connection reset" in note for note in record["notes"])


def test_dies_between_tests(suite: Suite) -> None:
    """A host that died while nobody used it costs no test anything."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")
        seen = []
        def test_first(host): seen.append(host)
        def test_second(): seen[0].crash()
        def test_third(host): assert host is not seen[0]
        """
    )
    assert set(suite.verdicts().values()) == {"PASS"}


def test_a_bad_test_leaves_nothing_behind(suite: Suite) -> None:
    """After a FAIL or ERROR the next test gets another host, and what lived on it is closed."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")

        class Manager:
            made = []
            def __init__(self, host):
                self.host = host
                self.made.append(self)
                self.closed_before_host = None
            def close(self):
                self.closed_before_host = not self.host.closed

        @pytest.fixture
        def manager(per_host, host):
            return per_host.get("manager", Manager)

        def test_first(manager): pass
        def test_fails(manager):
            assert manager.made == [manager]
            assert False
        def test_after(manager):
            assert manager is not manager.made[0]
            assert manager.made[0].closed_before_host
        """
    )
    assert suite.verdicts() == {"test_first": "PASS", "test_fails": "FAIL", "test_after": "PASS"}


def test_hosts_may_be_kept_after_a_failure(suite: Suite) -> None:
    """With --kvmi-unfinished: after one that is the kernel's, and that left no trace."""
    suite.run(
        """
        pytestmark = pytest.mark.clause("HOOK-OK")
        hosts = []

        @pytest.fixture
        def stuck(host):
            yield
            raise errors.ConformanceError("the guest does not end")

        def test_fails(host):
            hosts.append(host)
            assert False
        def test_is_ours(host):
            assert host is hosts[0]
            raise errors.InfraError("ours")
        def test_warns(host):
            assert host is not hosts[0]
            hosts.append(host)
            host.console.text += "WARNING: at kvmi.c:42\\n"
            assert False
        def test_stuck(host, stuck):
            assert host is not hosts[1]
            hosts.append(host)
        def test_after(host): assert host is not hosts[2]
        """,
        "--kvmi-unfinished",
    )
    assert suite.verdicts() == {
        "test_fails": "FAIL",
        "test_is_ours": "ERROR",
        "test_warns": "FAIL",
        "test_stuck": "FAIL",
        "test_after": "PASS",
    }
    assert "does not end" in suite.record("test_stuck")["reason"]


def test_watch_after_a_sequence(suite: Suite) -> None:
    """A lifecycle test's host stays under watch: a late complaint is still this test's."""
    suite.run(
        """
        import threading
        pytestmark = [pytest.mark.clause("HOOK-OK"), pytest.mark.lifecycle]
        def test_late(host):
            def complain(): host.console.text += "WARNING: late\\n"
            thread = threading.Timer(0.3, complain)
            thread.name = "host-late"
            thread.start()
        """
    )
    assert suite.verdicts() == {"test_late": "FAIL"}


def test_hopeless_hosts_are_given_up(suite: Suite) -> None:
    """Two failing starts are two clear errors; all other tests are MISS, not errors."""
    tests = "\n".join(f"        def test_{n}(host): pass" for n in range(6))
    suite.run(
        f"""
        pytestmark = pytest.mark.clause("HOOK-OK")
        @pytest.fixture(scope="session", autouse=True)
        def hopeless(target):
            target.__class__.fail = errors.DeadlineError("no answer over SSH in 60 s")
{tests}
        """
    )
    verdicts = suite.verdicts()
    assert [verdicts[f"test_{n}"] for n in range(6)] == ["ERROR"] * 2 + ["MISS"] * 4
    assert "no answer over SSH" in suite.record("test_0")["reason"]
    assert "test_1" in suite.record("test_5")["reason"]
