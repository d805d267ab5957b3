# SPDX-License-Identifier: GPL-2.0-or-later
"""Transcripts: complete, decoded, readable, and there after a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tool_peer import CODEC, Peer, error_code, event_payload

from harness.errors import InfraError, MalformedMessage, UsageError
from harness.tool import Transcript, render
from harness.tool import transcript as module
from harness.tool.explain import explain
from harness.tool.handshake import answer_record
from harness.tool.transcript import convert, read_raw


def talk(path: Path) -> list[dict[str, Any]]:
    """The entries of a small session: handshake, command, event, data, and a broken message."""
    transcript = Transcript(path, name="test_talk")
    channel = transcript.channel("first")
    peer = Peer(transcript=channel, first_seq=100)
    channel.raw(True, answer_record(key=b"k"))
    peer.session.send_bytes(b"\1\2\3")
    pending = peer.session.send("VM_READ_PHYSICAL", gpa=0x1234, size=4)
    peer.send(12, error_code() + b"abcd", pending.seq)
    pending.reply(5)
    own = struct.pack("<QB7x", 0x5000, 1)
    for seq in (1, 2):
        peer.event("BREAKPOINT", seq=seq, vcpu=1, rip=0xFFFF800000001000, own=own)
        peer.session.answer(peer.session.next_event(timeout_s=5), "RETRY")
    pending = peer.session.send("VM_CHECK_EVENT", id="PF", padding1=3)
    peer.send(6, error_code(-22), pending.seq)
    pending.reply(5)
    pending = peer.session.send("VM_GET_INFO")
    peer.send(8, b"broken", pending.seq)
    with pytest.raises(MalformedMessage):
        pending.reply(5)
    peer.sock.close()
    peer.session.expect_close(5)
    peer.close()
    transcript.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_message_decoded(tmp_path: Path) -> None:
    """Names, fields, times and latencies of both directions; what is broken as hex."""
    first, *entries = talk(tmp_path / "t.jsonl")
    assert (first["kind"], first["abi"], first["name"]) == ("transcript", "v12", "test_talk")
    assert [(e["kind"], e.get("name")) for e in entries if e["kind"] != "note"] == [
        ("bytes", None),
        ("bytes", None),
        ("command", "VM_READ_PHYSICAL"),
        ("reply", "VM_READ_PHYSICAL"),
        ("event", "BREAKPOINT"),
        ("event-reply", "BREAKPOINT"),
        ("event", "BREAKPOINT"),
        ("event-reply", "BREAKPOINT"),
        ("command", "VM_CHECK_EVENT"),
        ("reply", "VM_CHECK_EVENT"),
        ("command", "VM_GET_INFO"),
        ("reply", "VM_GET_INFO"),
    ]
    messages = [e for e in entries if "name" in e]
    command, reply, event, answer, again, _, check, refused, _, broken = messages
    assert (command["dir"], command["seq"]) == ("out", 100)
    assert command["fields"] == {"gpa": "0x1234", "size": 4}
    assert (reply["dir"], reply["error"], reply["data"]) == ("in", None, b"abcd".hex())
    assert reply["latency_us"] > 0
    assert (event["vcpu"], event["fields"]) == (1, {"gpa": "0x5000", "insn_len": 1})
    assert event["arch"]["regs"]["rip"] == "0xffff800000001000"
    assert event["arch"]["sregs"]["cs"]["selector"] == 0
    assert (answer["dir"], answer["fields"]) == ("out", {"vcpu": 1, "action": "RETRY"})
    assert answer["latency_us"] > 0
    assert (again["arch"]["sregs"], again["arch"]["msrs"]) == ("same", "same")
    assert check["fields"] == {"id": "PF", "padding1": 3}
    assert refused["error"] == "KVM_EINVAL"
    assert "kvmi_error_code has 6 bytes" in broken["malformed"]
    assert broken["hex"] == b"broken".hex()
    assert [e["hex"] for e in entries if e["kind"] == "bytes"][1] == "010203"
    assert all(a["t"] <= b["t"] + 0.001 for a, b in itertools.pairwise(entries))
    assert any(e["kind"] == "note" and "end of the session" in e["text"] for e in entries)
    assert not (tmp_path / "t.jsonl.raw").exists()


def test_for_people(tmp_path: Path) -> None:
    """One line per message, with names; more on request; entries do as well as a file."""
    entries = talk(tmp_path / "t.jsonl")
    text = render(tmp_path / "t.jsonl")
    assert text.startswith("# test_talk ")
    assert "1-> command VM_READ_PHYSICAL (seq 100) gpa=0x1234 size=4\n" in text
    assert "1<- reply VM_READ_PHYSICAL (seq 100): ok 4 bytes: 61626364  [" in text
    assert "event BREAKPOINT (seq 1) vcpu 1 gpa=0x5000 insn_len=1 mode=8 rip=0xffff8000" in text
    assert "event reply BREAKPOINT (seq 1) vcpu=1 action=RETRY" in text
    assert "command VM_CHECK_EVENT (seq 101) id=PF padding1=3" in text
    assert "reply VM_CHECK_EVENT (seq 101): KVM_EINVAL" in text
    assert "MALFORMED: reply to VM_GET_INFO" in text
    assert render(entries) == text
    assert "62 72 6f 6b 65 6e" in render(entries, full=True)


def test_after_a_kill(tmp_path: Path) -> None:
    """The raw file has all messages of a process that was killed; a cut last one is left out."""
    path = tmp_path / "t.jsonl"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from harness.tool import Transcript\n"
        "channel = Transcript(Path(sys.argv[1])).channel()\n"
        "for seq in range(50):\n"
        "    channel.received(0, 8, seq, bytes(24))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    raw = tmp_path / "t.jsonl.raw"
    raw.write_bytes(raw.read_bytes()[:-5])
    assert [e["seq"] for e in read_raw(raw) if e["kind"] == "reply"] == list(range(49))
    assert "reply VM_GET_INFO (seq 48)" in render(raw)
    convert(raw, path)
    assert render(path) == render(raw)
    path.write_text(path.read_text()[:-10])
    assert "(seq 47)" in render(path)


def test_several_sessions_in_one(tmp_path: Path) -> None:
    """Each connection has its channel."""
    path = tmp_path / "t.jsonl"
    with Transcript(path) as transcript:
        for name in ("first", "second"):
            peer = Peer(transcript=transcript, name=name)
            peer.event(seq=1)
            peer.session.next_event(timeout_s=5)
            peer.close()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["channel"] for e in entries if e["kind"] == "event"] == [1, 2]
    assert [e["text"] for e in entries if e.get("text", "").startswith("begin")] == [
        "begin first",
        "begin second",
    ]


def test_no_place(tmp_path: Path) -> None:
    """A directory that is not there; a disk that is full while the session runs."""
    with pytest.raises(InfraError, match=r"cannot write .*nowhere"):
        Transcript(tmp_path / "nowhere" / "t.jsonl")
    transcript = Transcript(tmp_path / "t.jsonl")
    channel = transcript.channel()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, transcript._file)
    os.close(full)
    channel.received(0, 8, 1, bytes(24))
    with pytest.raises(InfraError, match="not complete: No space left on device"):
        transcript.close()
    assert (tmp_path / "t.jsonl").exists()
    transcript.close()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows a file; says what is wrong with another."""
    path = tmp_path / "t.jsonl"
    talk(path)
    assert module.main([str(path)]) == 0
    assert "VM_READ_PHYSICAL" in capsys.readouterr().out
    assert module.main([str(tmp_path / "none")]) == UsageError.exit_code
    assert "none: No such file" in capsys.readouterr().err
    (tmp_path / "other").write_bytes(b"something else, and long")
    with pytest.raises(UsageError, match="no raw transcript"):
        list(read_raw(tmp_path / "other"))


def test_event_without_registers_costs_little() -> None:
    """A transcript entry of an event is a few kilobytes at most."""
    entry = explain(CODEC, outgoing=False, id=1, seq=1, payload=event_payload())
    assert len(json.dumps(entry)) < 5000
