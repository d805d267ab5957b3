# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases of the fuzzer: the same from the same seed, of all kinds, and judged rightly."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.abi import Codec, Profile, load_profile
from harness.errors import ConformanceError, UsageError
from harness.fuzz.calls import Call, CallCases
from harness.fuzz.expect import Closes, Permissions, Rules, Sent
from harness.fuzz.holdings import Holdings, wait_until_given_back
from harness.fuzz.judge import judge
from harness.fuzz.messages import MessageCases, Session
from harness.fuzz.plan import Batch, Plan, load_plan, save_plan
from harness.fuzz.tell import tell
from harness.fuzz.wire import (
    Arg,
    Kind,
    Mode,
    Op,
    Outcome,
    Replied,
    Streamed,
    encode_cases,
    read_outcomes,
)
from harness.hosts import Host


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("v12")


@pytest.fixture(scope="module")
def rules(profile: Profile) -> Rules:
    return Rules(
        profile,
        commands=frozenset(c.id for c in profile.commands.values()),
        events=frozenset(e.id for e in profile.events.values()),
    )


def _messages(profile: Profile, rules: Rules, seed: str = "x") -> MessageCases:
    return MessageCases(profile, rules, seed=seed, size=200)


def _bytes(ops: Sequence[Op]) -> bytes:
    return encode_cases([(0, ops)])


def _sessions(ops: Sequence[Op]) -> list[Session]:
    return [op.expect for op in ops if isinstance(op.expect, Session)]


# -- cases


def test_a_case_depends_on_seed_and_number_alone(profile: Profile, rules: Rules) -> None:
    """The same case is the same bytes, whatever was drawn before it."""
    one, other = _messages(profile, rules), _messages(profile, rules)
    for number in range(5):
        other.case(number)
    assert _bytes(one.case(7)) == _bytes(other.case(7))
    assert _bytes(one.case(7)) != _bytes(one.case(8))
    assert _bytes(one.case(7)) != _bytes(_messages(profile, rules, "y").case(7))
    calls = CallCases(profile, seed="x")
    assert _bytes(calls.case(3)) == _bytes(CallCases(profile, seed="x").case(3))


def test_cases_cover_the_interface(profile: Profile, rules: Rules) -> None:
    """All commands are sent, allowed and not, and sessions end in all ways."""
    cases = _messages(profile, rules)
    sessions = [session for number in range(20) for session in _sessions(cases.case(number))]
    sent = [one for session in sessions for one in session.sent]
    assert {one.id for one in sent} >= {c.id for c in profile.commands.values()} | {0, 1}
    assert any(one.id not in profile.command_by_id for one in sent)
    assert {session.mode for session in sessions} == set(Mode)
    assert {session.closes for session in sessions} == set(Closes)
    lengths = Counter(len(one.payload) for one in sent)
    assert profile.max_message_size in lengths
    assert 0 in lengths
    assert all(len(one.payload) <= profile.max_message_size for one in sent)


def test_sequences_cover_the_ioctls(profile: Profile) -> None:
    """All ioctls are issued, with all kinds of arguments, from up to three threads."""
    cases = CallCases(profile, seed="x")
    ops = [op for number in range(200) for op in cases.case(number)]
    calls = [op.expect for op in ops if isinstance(op.expect, Call)]
    assert {call.name for call in calls} == {*profile.ioctls, ""}
    assert {call.arg for call in calls} >= set(Arg) - {Arg.VALUE}
    assert {op.lane for op in ops} == {0, 1, 2}
    assert {op.kind for op in ops} >= set(Kind) - {
        Kind.CONFIG, Kind.IMAGE, Kind.FORM, Kind.CASE, Kind.FORGET,
    }  # fmt: skip


# -- what is right


def _judged(rules: Rules, name: str, *, allowed: bool = True, **fields: Any) -> Sent:
    command = rules.profile.command(name)
    id, payload = Codec(rules.profile).encode_command(command, **fields)
    everything = rules.commands if allowed else frozenset[int]()
    permissions = Permissions(everything, rules.events)
    return rules.judge(id, 5, payload, permissions=permissions, vcpus=2)


def test_certain_answers(rules: Rules) -> None:
    """Where the interface leaves no choice, there is none."""
    assert _judged(rules, "GET_VERSION").errors == {0}
    assert _judged(rules, "GET_VERSION", allowed=False).errors == {0}
    assert _judged(rules, "VM_GET_INFO", allowed=False).errors == {-1}
    assert _judged(rules, "VCPU_GET_INFO", vcpu=2).errors == {-22}
    assert _judged(rules, "VCPU_GET_INFO", vcpu=0, hdr_padding2=1).errors == {-22}
    assert _judged(rules, "VM_READ_PHYSICAL", gpa=4095, size=2).errors == {-22}
    assert 0 not in _judged(rules, "VM_CONTROL_CLEANUP", enable=2).errors
    assert _judged(rules, "VM_READ_PHYSICAL", gpa=0, size=16).size == 24
    assert _judged(rules, "VCPU_GET_REGISTERS", msrs_idx=[1, 2]).size == 8 + 472 + 32
    assert _judged(rules, "VCPU_GET_REGISTERS", vcpu=1).lane == 1


def test_what_ends_a_session(rules: Rules) -> None:
    """Replies to no event end it; what text and code see differently may."""
    permissions = Permissions(rules.commands, rules.events)
    for payload in (b"", bytes(15), bytes(16), bytes(40)):
        sent = rules.judge(1, 5, payload, permissions=permissions, vcpus=1)
        assert sent.closes is Closes.ALWAYS
    refused = rules.judge(1, 5, b"\x09" + bytes(15), permissions=permissions, vcpus=1)
    assert refused.closes is Closes.MAYBE
    assert _judged(rules, "VM_WRITE_PHYSICAL", size=9, data=b"x").closes is Closes.MAYBE


# -- judging


def _session_outcome(session: Session, **changed: object) -> Outcome:
    """An outcome in which all went well, but for what is changed."""
    replies = [
        Replied(one.id, 8 if max(one.errors) else one.size, one.seq,
                max(one.errors).to_bytes(4, "little", signed=True) + bytes(12))
        for one in session.sent if one.errors
    ]  # fmt: skip
    well = Streamed(False, session.closes is Closes.ALWAYS, 0, 0, 0, 100, replies)
    return Outcome(0, lanes={0: [replace(well, **changed)]})  # type: ignore[arg-type]


def _one_session(profile: Profile, rules: Rules) -> tuple[Op, Session]:
    cases = _messages(profile, rules)
    for number in range(100):
        for op in cases.case(number):
            session = op.expect
            if (
                isinstance(session, Session)
                and session.closes is Closes.NEVER
                and session.running
                and len(session.sent) > 5
            ):
                return op, session
    raise AssertionError("no session in order among a hundred cases")


def test_a_good_session_has_no_fault(profile: Profile, rules: Rules) -> None:
    """Right replies in the right order are right."""
    op, session = _one_session(profile, rules)
    assert judge(profile, [op], _session_outcome(session)) == []


def test_faults_of_sessions(profile: Profile, rules: Rules) -> None:
    """A lost, doubled, wrong or late reply is noticed, and so is a session that ended."""
    op, session = _one_session(profile, rules)
    well = _session_outcome(session).lanes[0][0]
    assert isinstance(well, Streamed)

    def faults(**changed: object) -> str:
        return "\n".join(judge(profile, [op], _session_outcome(session, **changed)))

    replies = well.replies
    assert "have no reply" in faults(replies=replies[:-1])
    assert "nothing waits for" in faults(replies=[*replies, replies[0]])
    wrong = replace(replies[-1], head=(5).to_bytes(4, "little") + bytes(12))
    assert "has error 5" in faults(replies=[*replies[:-1], wrong])
    longer = replace(replies[-1], size=replies[-1].size + 8)
    assert "bytes" in faults(replies=[*replies[:-1], longer])
    assert "did not come in time" in faults(stuck=True)
    assert "ended the session" in faults(ended=True)
    assert "does not come back" in judge(profile, [op], Outcome(0, stuck="there"))[0]


def test_replies_that_tcp_loses(profile: Profile, rules: Rules) -> None:
    """The last replies may be lost where the kernel ends a session by TCP, and nowhere else."""
    op, session = _one_session(profile, rules)

    def faults(session: Session) -> list[str]:
        well = _session_outcome(session).lanes[0][0]
        assert isinstance(well, Streamed)
        cut = _session_outcome(session, replies=well.replies[:-1])
        return judge(profile, [replace(op, expect=session)], cut)

    assert faults(replace(session, lossy=True))
    assert faults(replace(session, closes=Closes.ALWAYS))
    assert not faults(replace(session, closes=Closes.ALWAYS, lossy=True))


def test_ioctls_are_followed(profile: Profile) -> None:
    """What an ioctl may answer follows from what the ones before it answered."""

    def call(name: str, arg: Arg = Arg.BYTES, **more: Any) -> Op:
        return Op.ioctl(0, 0, expect=Call(name, 0, arg, **more))

    ops = [
        Op.vm(0, 0, expect={0}), call("PREUNHOOK"), call("HOOK", Arg.OURS), call("HOOK", Arg.OURS),
        call("COMMAND", allow=0, id=2), call("UNHOOK"), Op(Kind.PARAM, b"\0"), call("UNHOOK"),
    ]  # fmt: skip
    right: list[int | Streamed] = [
        0, errno.EFAULT, 0, errno.EEXIST, errno.EPERM, 0, 0, errno.EPERM,
    ]  # fmt: skip
    assert judge(profile, ops, Outcome(0, lanes={0: right})) == []
    for index, wrong in ((1, 0), (3, 0), (4, 0), (7, 0)):
        found = [*right[:index], wrong, *right[index + 1 :]]
        assert len(judge(profile, ops, Outcome(0, lanes={0: found}))) >= 1


def test_a_case_can_be_told(profile: Profile, rules: Rules) -> None:
    """Any case can be shown to people, with and without results."""
    text = tell(profile, _messages(profile, rules).case(1))
    assert "session: closes" in text
    assert "HOOK" in "".join(tell(profile, CallCases(profile, seed="x").case(n)) for n in range(5))
    op, session = _one_session(profile, rules)
    told = tell(profile, [op], _session_outcome(session))
    assert "-> 0" in told


# -- bytes and plans


def test_outcomes_are_read() -> None:
    """Records are put together again, case by case."""

    def record(kind: int, lane: int, data: bytes) -> bytes:
        size = len(data).to_bytes(4, "little")
        return bytes([kind, 0, lane, 0]) + size + data

    streamed = b"".join(n.to_bytes(4, "little") for n in (0, 1, 1, 2, 3, 4, 5))
    streamed += bytes([7, 0, 8, 0]) + (9).to_bytes(4, "little") + bytes(16)
    data = record(1, 0, (4).to_bytes(4, "little") + (1).to_bytes(4, "little"))
    data += record(2, 0, (22).to_bytes(4, "little")) + record(3, 1, streamed)
    data += record(4, 0, bytes(4)) + record(1, 0, (5).to_bytes(4, "little") + bytes(4))
    first, second = read_outcomes(data)
    assert (first.number, first.restarts, first.cleaned) == (4, 1, [0])
    assert first.lanes[0] == [22]
    assert first.lanes[1] == [Streamed(False, True, 2, 3, 4, 5, [Replied(7, 8, 9, bytes(16))])]
    assert second.number == 5
    (stuck,) = read_outcomes(record(5, 0, (6).to_bytes(4, "little") + b"where"))
    assert (stuck.number, stuck.stuck) == (6, "where")


def test_plans(tmp_path: Path) -> None:
    """A plan's batches make up what was asked for; a case can be chosen by name."""
    plan = Plan(seed="s", messages=4001, sequences=501)
    batches = plan.batches()
    assert sum(b.count for b in batches if b.kind == "calls") == 501
    assert sum(b.count for b in batches if b.kind == "messages") * 200 >= 4001
    save_plan(tmp_path, plan)
    assert load_plan(tmp_path) == plan
    assert Plan(seed="s", cases="messages-17").batches() == [Batch("messages", 17, 1)]
    name = "tests/fuzz/test_fuzz.py::test_batch[calls-25+5]"
    assert Plan(seed="s", cases=name).batches() == [Batch("calls", 25, 5)]
    two = Plan(seed="s", cases="calls-1 messages-20+10").batches()
    assert two == [Batch("calls", 1, 1), Batch("messages", 20, 10)]
    with pytest.raises(UsageError):
        Plan(seed="s", cases="all").batches()


def test_what_is_not_given_back_is_noticed() -> None:
    """One virtual machine too many counts at once, other objects when they are many."""
    base = Holdings({"machines": 0, "kvm_vcpu": 2, "kmalloc-64": 1000})
    few = Holdings({"machines": 0, "kvm_vcpu": 2, "kmalloc-64": 1050})
    many = Holdings({"machines": 1, "kvm_vcpu": 2, "kmalloc-64": 2000})
    assert few.above(base.limits(sessions=50)) == []
    assert many.above(base.limits(sessions=900)) == ["machines", "kmalloc-64"]


class _Holder:
    """A host whose kernel holds one more number after each look of the list it is given."""

    name = "one"
    patience = 0.0

    def __init__(self, name: str, *counts: int) -> None:
        self._lines = [f"{name} {count}\n" for count in counts]

    def run(self, command: str, **_options: object) -> SimpleNamespace:
        if "kmemleak" in command:
            return SimpleNamespace(returncode=1, text="")
        return SimpleNamespace(returncode=0, text=self._lines.pop(0))

    def check(self) -> None: ...


def _given_back(name: str, *counts: int) -> Holdings:
    host = cast(Host, _Holder(name, *counts))
    base = Holdings({name: 336})
    return wait_until_given_back(host, base, pid=1, sessions=60, again=lambda: 60)


def test_what_the_kernel_keeps_once_is_no_loss() -> None:
    """What a cache of everybody has grown by has to come again with the same sessions."""
    assert _given_back("kmalloc-96", 400).counts == {"kmalloc-96": 336}
    assert _given_back("kmalloc-96", 464, 470).counts == {"kmalloc-96": 470}
    assert _given_back("kmalloc-96", 464, 592, 600).counts == {"kmalloc-96": 600}


def test_what_is_lost_again_and_again_is_a_loss() -> None:
    """Such growth is reported with its course, and one machine too many at once."""
    with pytest.raises(ConformanceError, match="kmalloc-96: 336 -> 464 -> 592 -> 700"):
        _given_back("kmalloc-96", 464, 592, 700)
    with pytest.raises(ConformanceError, match=r"kvm_vcpu: 336 -> 337$"):
        _given_back("kvm_vcpu", 337)
