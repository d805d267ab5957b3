# SPDX-License-Identifier: GPL-2.0-or-later
"""A short form of the fuzzer, always the same; ``inv fuzz`` is the long one."""

from __future__ import annotations

import pytest

from harness.abi import Codec, Profile
from harness.fuzz import Fuzzer
from harness.fuzz.judge import judge
from harness.fuzz.plan import Batch
from harness.fuzz.values import MEMORY
from harness.fuzz.wire import Arg, Kind, Mode, Op, Sock, Streamed
from harness.hosts import Host
from harness.plugin.pool import PerHost
from harness.settings import Settings

SEED = "short"


@pytest.fixture
def fuzzer(host: Host, per_host: PerHost, profile: Profile, settings: Settings) -> Fuzzer:
    """The fuzzer on this worker's host."""
    made: Fuzzer = per_host.get(
        "fuzzer",
        lambda host: Fuzzer(host, profile=profile, cache=settings.cache),
        usable=lambda thing: thing.alive,
    )
    return made


@pytest.mark.clause("MSG-REPLY-ALWAYS", "MSG-REPLY-ID-SEQ", "MSG-REPLY-ERR-NODATA")
def test_messages(fuzzer: Fuzzer) -> None:
    """Of some thousand messages, most of them wrong, each has its one reply or ends the session."""
    fuzzer.run(Batch("messages", 0, 12), seed=SEED)


def test_ioctls(fuzzer: Fuzzer) -> None:
    """Random sequences of ioctls, from several threads and with failures, do no harm."""
    fuzzer.run(Batch("calls", 0, 60), seed=SEED)


# -- what the fuzzer found, and was mended

FIRST_SEQ = 0x8000_0000
"""The tool's own numbers have the top bit set, see ``executor.c``."""


def _hooked(codec: Codec) -> list[Op]:
    """A guest that runs, hooked, with everything allowed."""
    hook, argument = codec.encode_ioctl("HOOK", fd=0)
    return [
        Op.vm(0, 0, expect={0}),
        Op(Kind.RUN, bytes([0, 0]), expect={0}),
        Op.sock(0, Sock.UNIX_STREAM, expect={0}),
        Op.ioctl(0, hook, argument, arg=Arg.OURS, expect={0}),
        Op.ioctl(0, *codec.encode_ioctl("COMMAND", allow=1, id=-1), expect={0}),
        Op.ioctl(0, *codec.encode_ioctl("EVENT", allow=1, id=-1), expect={0}),
    ]


def test_unhook_while_the_receiver_writes(fuzzer: Fuzzer) -> None:
    """UNHOOK may come while VM_WRITE_PHYSICAL writes to a page whose changes are logged."""
    codec = Codec(fuzzer.profile)
    id, payload = codec.encode_command("VM_WRITE_PHYSICAL", gpa=0x80000, size=1, data=b"x")
    writes = b"".join(codec.frame(id, payload, FIRST_SEQ + seq) for seq in range(200))
    log_changes = Op.memslot(0, 0, flags=1, gpa=0, size=MEMORY, offset=0, expect={0})
    cases = []
    for number in range(40):
        pause = Op(Kind.DELAY, (number * 150).to_bytes(4, "little"), 1)
        unhook = Op.ioctl(0, codec.encode_ioctl("UNHOOK")[0], lane=1, expect={0})
        stream = Op.stream(0, [writes], Mode.NONE, linger_ms=8)
        ops = [*_hooked(codec), log_changes, Op(Kind.READY, b""), stream, pause, unhook]
        cases.append((number, ops))
    for (_number, done), outcome in fuzzer.executor.run(cases, together=10):
        assert judge(fuzzer.profile, done, outcome) == []


def test_commands_after_an_exception_that_no_cpu_delivers(fuzzer: Fuzzer) -> None:
    """Whatever is injected, the vCPU goes on executing commands."""
    codec = Codec(fuzzer.profile)
    asked = [("VCPU_INJECT_EXCEPTION", {"nr": nr}) for nr in range(32)]
    frames = []
    for seq, (name, fields) in enumerate([*asked, ("VCPU_GET_INFO", {})]):
        id, payload = codec.encode_command(name, **fields)
        frames.append(codec.frame(id, payload, FIRST_SEQ + seq))
    stream = Op.stream(0, frames, Mode.REPLIES, expected=len(frames), linger_ms=20)
    for _case, outcome in fuzzer.executor.run([(0, [*_hooked(codec), stream])]):
        result = outcome.lanes[0][-1]
        assert isinstance(result, Streamed)
        assert not result.stuck
        assert len(result.replies) == len(frames)
