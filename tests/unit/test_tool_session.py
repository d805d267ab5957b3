# SPDX-License-Identifier: GPL-2.0-or-later
"""The session against a peer that does as told: replies, events, order, deadlines, the end."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from tool_peer import Peer, error_code, event_payload

from harness.abi import load_profile
from harness.errors import (
    ConformanceError,
    HarnessError,
    MalformedMessage,
    SessionClosed,
    SilenceError,
    UsageError,
)
from harness.tool import TAKEN, EventMessage, Session, State

INFO = error_code() + struct.pack("<I12x", 2)


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A session and its peer; no reader thread is left when the test ends."""
    one = Peer(name="test", first_seq=100)
    yield one
    one.close()
    assert not [t for t in threading.enumerate() if t.name == "kvmi-reader-test"]


# -- commands ------------------------------------------------------------------------------------


def test_command_and_reply(peer: Peer) -> None:
    """A reply is matched by its seq, decoded, and timed."""
    pending = peer.session.send("VM_GET_INFO")
    id, seq, payload = peer.read()
    assert (id, seq, payload) == (8, 100, b"")
    assert not pending.done
    peer.send(8, INFO, seq)
    reply = pending.reply(5).ok()
    assert reply.fields.vcpu_count == 2
    assert reply.seq == 100
    assert 0 < reply.latency_ns < 5e9
    assert pending.reply(0) is reply
    assert peer.session.unanswered == []


def test_replies_out_of_order(peer: Peer) -> None:
    """Each reply reaches its own command, whatever the order."""
    first = peer.session.send("VM_READ_PHYSICAL", gpa=0, size=1)
    second = peer.session.send("VM_READ_PHYSICAL", gpa=1, size=2)
    peer.send(12, error_code() + b"BC", second.seq)
    peer.send(12, error_code() + b"A", first.seq)
    assert (first.reply(5).data, second.reply(5).data) == (b"A", b"BC")


def test_error_replies_are_values(peer: Peer) -> None:
    """An error code is no exception until somebody says that it must not be."""
    pending = peer.session.send("VCPU_GET_INFO", vcpu=9)
    peer.send(3, error_code(-22), pending.seq)
    reply = pending.reply(5)
    assert (reply.err, reply.error) == (-22, "KVM_EINVAL")
    reply.fails("KVM_EINVAL")
    with pytest.raises(ConformanceError, match=r"VCPU_GET_INFO \(seq 100\) answered KVM_EINVAL"):
        reply.ok()


def test_raw_messages(peer: Peer) -> None:
    """Unknown ids, seqs of one's own, and headers that lie."""
    seq = peer.session.send_raw(77, b"abc", seq=5)
    assert (peer.read(), seq) == ((77, 5, b"abc"), 5)
    peer.send(77, error_code(-1000), 5)
    assert peer.session.reply_to(5, 5).error == "KVM_ENOSYS"

    peer.session.send_raw(8, b"abc", size=2)
    assert peer.sock.recv(100) == bytes.fromhex("0800 0200 64000000") + b"abc"
    peer.session.send_bytes(b"\1\2\3")
    assert peer.sock.recv(100) == b"\1\2\3"
    with pytest.raises(UsageError, match="seq 6"):
        peer.session.reply_to(6)


def test_id_0_from_the_tool_is_a_command(peer: Peer) -> None:
    """Its refusal is told from the UNHOOK event, which has the same id and size."""
    seq = peer.session.send_raw(0)
    peer.event("UNHOOK", seq=1)
    peer.send(0, error_code(-1000), seq)
    assert peer.session.reply_to(seq, 5).error == "KVM_ENOSYS"
    assert peer.session.next_event(timeout_s=5).name == "UNHOOK"


def test_same_seq_twice(peer: Peer) -> None:
    """Commands with the same seq are answered in their order."""
    first = peer.session.send("VM_READ_PHYSICAL", size=1, seq=7)
    second = peer.session.send("VM_READ_PHYSICAL", size=1, seq=7)
    peer.send(12, error_code() + b"1", 7)
    peer.send(12, error_code() + b"2", 7)
    assert (first.reply(5).data, second.reply(5).data) == (b"1", b"2")


def test_silence_says_what_came_instead(peer: Peer) -> None:
    """The error names what was waited for; the details list what came and what is open."""
    peer.event("PAUSE", seq=3, vcpu=1, rip=0x1234)
    pending = peer.session.send("VM_GET_INFO")
    with pytest.raises(SilenceError, match=r"within 0\.2 s: reply to VM_GET_INFO") as caught:
        pending.reply(0.2)
    assert "event PAUSE (seq 3) vcpu 1" in caught.value.details
    assert "rip=0x1234" in caught.value.details
    assert "commands not answered:\n  VM_GET_INFO (seq 100)" in caught.value.details
    peer.send(8, INFO, pending.seq)
    assert pending.reply(5).ok()


def test_no_answer_where_none_is_due(peer: Peer) -> None:
    """A command may be watched for staying unanswered."""
    pending = peer.session.send("VM_GET_INFO")
    pending.unanswered(0.05)
    peer.send(8, INFO, pending.seq)
    with pytest.raises(ConformanceError, match=r"the reply to VM_GET_INFO .* came, and must not"):
        pending.unanswered(5)


# -- events --------------------------------------------------------------------------------------


def test_event_and_answer(peer: Peer) -> None:
    """An event is typed; its answer repeats id and seq."""
    own = struct.pack("<QB7x", 0x5000, 1)
    peer.event("BREAKPOINT", seq=9, vcpu=2, rip=0x77, own=own)
    event = peer.session.next_event("BREAKPOINT", vcpu=2, timeout_s=5)
    assert (event.name, event.seq, event.vcpu, event.mode) == ("BREAKPOINT", 9, 2, 8)
    assert (event.regs.rip, event.fields.gpa, event.fields.insn_len) == (0x77, 0x5000, 1)
    assert event.dirty_padding == ()
    peer.session.answer(event, "RETRY")
    assert peer.read() == (1, 9, bytes.fromhex("0200 0000 00000000 01 05 0000 00000000"))


def test_events_wait_for_their_taker(peer: Peer) -> None:
    """Kind and vCPU choose; the others stay in the queue, in order."""
    peer.event("PAUSE", seq=1, vcpu=0)
    peer.event("HYPERCALL", seq=2, vcpu=1)
    peer.event("PAUSE", seq=3, vcpu=1)
    assert peer.session.next_event("VCPU_PAUSE", vcpu=1, timeout_s=5).seq == 3
    assert peer.session.next_event("HYPERCALL", timeout_s=5).seq == 2
    assert peer.session.next_event(timeout_s=5).seq == 1
    with pytest.raises(SilenceError, match="event PAUSE of vCPU 1"):
        peer.session.next_event("PAUSE", vcpu=1, timeout_s=0.05)


def test_wrong_answers_on_purpose(peer: Peer) -> None:
    """Everything in an answer can be wrong."""
    peer.event("PAUSE", seq=4)
    event = peer.session.next_event(timeout_s=5)
    peer.session.answer(
        event, 9, id=3, seq=8, vcpu=5, event_id=6, hdr_padding1=1, padding2=2, length=20
    )
    assert peer.read() == (
        3,
        8,
        bytes.fromhex("0500 0100 00000000 09 06 0000 02000000 00000000"),
    )


def test_guest_value_is_kept_by_default(peer: Peer) -> None:
    """The answer to a register's change lets it happen unless told otherwise."""
    own = struct.pack("<B7xQQ", 4, 0x10, 0x20)
    peer.event("CR", seq=1, own=own)
    peer.event("CR", seq=2, own=own)
    peer.session.answer(peer.session.next_event("CR", timeout_s=5))
    peer.session.answer(peer.session.next_event("CR", timeout_s=5), new_val=0x10)
    assert [peer.read()[2][16:] for _ in range(2)] == [
        b"\x20".ljust(8, b"\0"),
        b"\x10".ljust(8, b"\0"),
    ]


def test_events_while_a_command_waits_and_the_reverse(peer: Peer) -> None:
    """An event is answered by its handler while a command waits; a handler may send commands."""
    sent = []

    def handler(event: EventMessage) -> str:
        sent.append(peer.session.send("VCPU_GET_INFO", vcpu=event.vcpu or 0))
        return "CONTINUE"

    peer.session.handle("HYPERCALL", handler)
    pending = peer.session.send("VM_GET_INFO")
    assert peer.read()[0] == 8
    peer.event(seq=1)
    assert peer.read()[0] == 3
    assert peer.read()[:2] == (1, 1)
    peer.send(8, INFO, pending.seq)
    pending.reply(5).ok()
    peer.send(3, error_code() + bytes(8), sent[0].seq)
    sent[0].reply(5).ok()


def test_handlers_by_kind(peer: Peer) -> None:
    """Handlers answer, pass on, take, and go away again; the count has them all."""
    session = peer.session
    session.handle("HYPERCALL", lambda event: "CONTINUE")
    session.handle("BREAKPOINT", lambda event: ("RETRY", {"padding1": 7}))
    session.handle("PAUSE", lambda event: None)
    session.handle("TRAP", lambda event: TAKEN)
    for seq, name in enumerate(("HYPERCALL", "BREAKPOINT", "PAUSE", "TRAP", "HYPERCALL")):
        peer.event(name, seq=seq)
    assert [peer.read()[1] for _ in range(3)] == [0, 1, 4]
    assert session.next_event(timeout_s=5).name == "PAUSE"
    assert session.wait_count("HYPERCALL", 2, timeout_s=5) == 2
    assert (session.count("TRAP"), session.count()) == (1, 5)
    session.no_event("TRAP", within_s=0.01)
    session.handle("HYPERCALL", None)
    peer.event(seq=6)
    assert session.next_event("HYPERCALL", timeout_s=5).seq == 6
    with pytest.raises(SilenceError, match="4 events HYPERCALL in all, of which 3 came"):
        session.wait_count("HYPERCALL", 4, timeout_s=0.05)


def test_one_handler_for_all() -> None:
    """``on_event`` answers what can be answered, so UNHOOK is left to the test."""
    peer = Peer(on_event=lambda event: "CONTINUE")
    peer.event("PAUSE", seq=1)
    peer.event("UNHOOK", seq=2)
    assert peer.read()[1] == 1
    event = peer.session.next_event("UNHOOK", timeout_s=5)
    assert peer.session.state is State.UNHOOK_ANNOUNCED
    with pytest.raises(UsageError, match="UNHOOK has no answer"):
        peer.session.answer(event)
    peer.session.close()
    peer.close()


def test_thousands_of_events(peer: Peer) -> None:
    """None is lost, and none answered twice, while the test sends commands."""
    count = 3000
    peer.session.handle("HYPERCALL", lambda event: "CONTINUE")
    answers: list[int] = []

    def kernel() -> None:
        message = event_payload()
        for seq in range(1, count + 1):
            peer.send(1, message, seq)
            id, answered, _ = peer.read()
            while id != 1:
                peer.send(8, INFO, answered)
                id, answered, _ = peer.read()
            answers.append(answered)

    thread = threading.Thread(target=kernel)
    thread.start()
    commands = 0
    while thread.is_alive() and commands < 100:
        pending = peer.session.send("VM_GET_INFO")
        if thread.is_alive():
            commands += 1
            try:
                pending.reply(2)
            except SilenceError:
                break  # the last event was answered before
    thread.join(30)
    assert answers == list(range(1, count + 1))
    assert peer.session.count("HYPERCALL") == count


def test_a_handler_that_fails(peer: Peer) -> None:
    """Its event stays, and its error reaches the next wait, with its cause."""

    def handler(event: EventMessage) -> str:
        raise KeyError("oops")

    peer.session.handle("PAUSE", handler)
    peer.event("PAUSE")
    with pytest.raises(
        HarnessError, match=r"handler of PAUSE failed: KeyError\('oops'\)"
    ) as caught:
        peer.session.next_event("HYPERCALL", timeout_s=5)
    assert isinstance(caught.value.__cause__, KeyError)
    assert peer.session.next_event("PAUSE", timeout_s=5)


def test_a_handler_must_not_wait(peer: Peer) -> None:
    """Waiting in the thread that receives would wait for ever; it is refused at once."""
    peer.session.handle("PAUSE", lambda event: peer.session.command("VM_GET_INFO").error)
    peer.event("PAUSE")
    with pytest.raises(UsageError, match="a handler must not wait"):
        peer.session.next_event("HYPERCALL", timeout_s=5)


def test_nothing_where_nothing_is_due(peer: Peer) -> None:
    """Quiet is quiet; an event that comes, or waits already, is named."""
    peer.session.quiet(0.02)
    peer.session.no_event(within_s=0.02)
    peer.event("PAUSE", seq=1, vcpu=1)
    with pytest.raises(
        ConformanceError, match=r"event PAUSE \(seq 1\) vcpu 1 .*came, and must not"
    ):
        peer.session.no_event("PAUSE", within_s=5)
    peer.session.no_event("PAUSE", vcpu=0, within_s=0.02)
    peer.session.no_event("HYPERCALL", within_s=0.02)
    peer.session.handle("HYPERCALL", lambda event: "CONTINUE")
    threading.Timer(0.05, peer.event).start()
    with pytest.raises(ConformanceError, match="event HYPERCALL"):
        peer.session.no_event("HYPERCALL", within_s=5)
    threading.Timer(0.05, lambda: peer.event("PAUSE", seq=2)).start()
    with pytest.raises(ConformanceError, match="event PAUSE"):
        peer.session.quiet(5)


# -- the order of messages -----------------------------------------------------------------------


def test_log_has_all_in_order(peer: Peer) -> None:
    """Both directions, with times that never go back."""
    pending = peer.session.send("VM_GET_INFO")
    peer.event("PAUSE", seq=1)
    peer.send(8, INFO, pending.seq)
    pending.reply(5)
    peer.session.answer(peer.session.next_event(timeout_s=5))
    assert [(m.kind, m.name, m.seq) for m in peer.session.log] == [
        ("command", "VM_GET_INFO", 100),
        ("event", "PAUSE", 1),
        ("reply", "VM_GET_INFO", 100),
        ("event-reply", "PAUSE", 1),
    ]
    assert [m.name for m in peer.session.received] == ["PAUSE", "VM_GET_INFO"]
    times = [m.ns for m in peer.session.log]
    assert times == sorted(times)
    assert 0 <= time.monotonic_ns() - times[-1] < 60e9


def test_log_is_bounded() -> None:
    """It keeps the newest."""
    peer = Peer(log_limit=3)
    for seq in range(10):
        peer.event(seq=seq)
    peer.session.wait_count("HYPERCALL", 10, timeout_s=5)
    assert [m.seq for m in peer.session.log] == [7, 8, 9]
    peer.close()


# -- messages that break the interface -----------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "payload", "message"),
    [
        (8, INFO[:-1], r"VM_GET_INFO \(seq 100\): kvmi_msg_hdr\.size is 23, expected 24"),
        (8, error_code(-1, 1), r"kvmi_error_code\.padding is 0x1, expected zero"),
        (8, INFO[:-1] + b"\1", r"kvmi_vm_get_info_reply\.padding is .* 01, expected zero"),
        (10, INFO, r"VM_GET_INFO \(seq 100\): kvmi_msg_hdr\.id is 10, expected 8"),
        (8, bytes(8192), r"kvmi_msg_hdr\.size is 8192, expected at most 8184"),
    ],
)
def test_malformed_reply(peer: Peer, id: int, payload: bytes, message: str) -> None:
    """It reaches the one who waits for it, names the field, and the session goes on."""
    pending = peer.session.send("VM_GET_INFO")
    peer.send(id, payload, 100)
    with pytest.raises(MalformedMessage, match=message) as caught:
        pending.reply(5)
    assert caught.value.details.startswith("0000  ")
    again = peer.session.send("VM_GET_INFO")
    peer.send(8, INFO, again.seq)
    again.reply(5).ok()
    peer.session.close()


def test_reply_nobody_waits_for(peer: Peer) -> None:
    """One reply too many, or with a wrong seq, is an error."""
    pending = peer.session.send("VM_GET_INFO")
    peer.send(8, INFO, 55)
    with pytest.raises(MalformedMessage, match=r"kvmi_msg_hdr\.seq is 55, and no command"):
        pending.reply(5)
    peer.send(8, INFO, pending.seq)
    pending.reply(5).ok()
    peer.send(8, INFO, pending.seq)
    with pytest.raises(MalformedMessage, match=r"VM_GET_INFO: kvmi_msg_hdr\.seq is 100"):
        peer.session.next_event(timeout_s=5)


def test_malformed_event_reaches_whoever_waits(peer: Peer) -> None:
    """Also the one who waits for something else."""
    broken = bytearray(event_payload())
    broken[9] = 0
    peer.send(1, bytes(broken), 6)
    pending = peer.session.send("VM_GET_INFO")
    with pytest.raises(
        MalformedMessage, match=r"HYPERCALL \(seq 6\): kvmi_vcpu_event\.size is 32, expected 544"
    ):
        pending.reply(5)


def test_no_problem_is_lost(peer: Peer) -> None:
    """What nobody met is raised by close, the first with the others as notes; once."""
    peer.send(8, INFO, 1)
    peer.send(8, INFO, 2)
    peer.event("PAUSE")
    peer.sock.shutdown(socket.SHUT_WR)
    while not peer.session.closed:
        time.sleep(0.001)
    with pytest.raises(MalformedMessage, match=r"kvmi_msg_hdr\.seq is 1,") as caught:
        peer.session.close()
    assert any("seq is 2" in note for note in caught.value.__notes__)
    assert len(peer.session.problems) == 2
    peer.session.close()


def test_problems_do_not_hide_an_error_of_the_test(peer: Peer) -> None:
    """A failing test keeps its own error; the session's are notes to it."""

    def failing() -> None:
        with peer.session:
            peer.send(8, INFO, 1)
            peer.sock.shutdown(socket.SHUT_WR)
            while not peer.session.closed:
                time.sleep(0.001)
            raise AssertionError("the test's own")

    with pytest.raises(AssertionError, match="the test's own") as caught:
        failing()
    assert any("seq is 1" in note for note in caught.value.__notes__)


def test_refused_event_reply(peer: Peer) -> None:
    """The error code that some kernels answer to a wrong event reply can be waited for."""
    peer.event("PAUSE", seq=3)
    event = peer.session.next_event(timeout_s=5)
    peer.session.answer(event, hdr_padding1=1)
    peer.send(1, error_code(-22), 3)
    assert peer.session.refusal(3, 5).error == "KVM_EINVAL"
    peer.send(1, error_code(-22), 4)
    with pytest.raises(ConformanceError, match="refused the event reply with seq 4: KVM_EINVAL"):
        peer.session.next_event(timeout_s=5)


# -- the end -------------------------------------------------------------------------------------


def test_peer_closes(peer: Peer) -> None:
    """Who expects it gets the time; who waits for anything else gets an error with the reason."""
    peer.event("PAUSE", seq=1)
    pending = peer.session.send("VM_GET_INFO")
    peer.read()
    peer.sock.close()
    with pytest.raises(SessionClosed, match=r"ended \(end of stream\) .* reply to VM_GET_INFO"):
        pending.reply(5)
    assert peer.session.expect_close(5) <= time.monotonic_ns()
    assert (peer.session.closed, peer.session.close_reason) == (True, "end of stream")
    assert peer.session.state is State.ENDED
    assert peer.session.next_event(timeout_s=0).name == "PAUSE"
    with pytest.raises(SessionClosed, match="cannot send"):
        peer.session.send("VM_GET_INFO")
    with pytest.raises(SessionClosed, match="during a quiet time"):
        peer.session.quiet(1)


def test_peer_does_not_close(peer: Peer) -> None:
    """The error says so."""
    with pytest.raises(SilenceError, match=r"within 0\.05 s: the end of the stream"):
        peer.session.expect_close(0.05)


def test_end_inside_a_message(peer: Peer) -> None:
    """A message that never ends is reported with its bytes."""
    peer.sock.sendall(struct.pack("<HHI", 8, 24, 100) + b"abc")
    peer.sock.close()
    peer.session.expect_close(5)
    with pytest.raises(MalformedMessage, match="inside a message, after 11 bytes") as caught:
        peer.session.close()
    assert "61 62 63" in caught.value.details


def test_messages_in_pieces(peer: Peer) -> None:
    """A stream has no borders: bytes come one by one, or several messages at once."""
    for byte in struct.pack("<HHI", 1, 552, 1) + event_payload():
        peer.sock.sendall(bytes([byte]))
    assert peer.session.next_event(timeout_s=5).seq == 1
    both = b"".join(struct.pack("<HHI", 1, 552, seq) + event_payload() for seq in (2, 3))
    peer.sock.sendall(both + both[:100])
    assert [peer.session.next_event(timeout_s=5).seq for _ in range(2)] == [2, 3]
    peer.sock.sendall(both[100:])
    assert [peer.session.next_event(timeout_s=5).seq for _ in range(2)] == [2, 3]


def test_half_close(peer: Peer) -> None:
    """After the tool's end of stream, what the kernel still sends is received."""
    pending = peer.session.send("VM_GET_INFO")
    peer.read()
    peer.session.shutdown("write")
    assert peer.sock.recv(1) == b""
    peer.send(8, INFO, pending.seq)
    pending.reply(5).ok()


def test_close_is_final_and_idempotent(peer: Peer) -> None:
    """The peer sees the end, later calls say what is wrong, and nothing hangs."""
    peer.session.close()
    peer.session.close()
    peer.session.abort()
    assert peer.sock.recv(1) == b""
    assert (peer.session.state, peer.session.close_reason) == (State.CLOSED, "closed here")
    with pytest.raises(UsageError, match="closed here"):
        peer.session.send("VM_GET_INFO")
    with pytest.raises(UsageError, match="closed here"):
        peer.session.expect_close(1)


def test_close_wakes_who_waits(peer: Peer) -> None:
    """A wait in another thread ends with an error when the session is closed."""
    threading.Timer(0.05, peer.session.close).start()
    with pytest.raises(SessionClosed, match="closed here"):
        peer.session.next_event(timeout_s=10)


def test_close_in_a_handler(peer: Peer) -> None:
    """The usual answer to UNHOOK: close."""

    def handler(event: EventMessage) -> str:
        peer.session.close()
        return TAKEN

    peer.session.handle("UNHOOK", handler)
    peer.event("UNHOOK")
    assert peer.sock.recv(1) == b""
    peer.session.close()
    assert peer.session.problems == []


def test_peer_goes_away_while_its_event_is_handled(peer: Peer) -> None:
    """No problem of the session: the end of the stream tells."""
    came, go = threading.Event(), threading.Event()

    def handler(event: EventMessage) -> str:
        came.set()
        go.wait(5)
        return "CONTINUE"

    peer.session.handle("PAUSE", handler)
    peer.event("PAUSE")
    assert came.wait(5)
    peer.sock.close()
    go.set()
    peer.session.expect_close(5)
    peer.session.close()


def test_tcp_abort_resets() -> None:
    """The kernel sees a reset, as when the tool's machine dies."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        session = Session(client)
        session.abort()
        other.settimeout(5)
        with pytest.raises(ConnectionResetError):
            other.recv(1)
        other.close()


def test_tcp_reset_is_the_end(peer: Peer) -> None:
    """A reset by the peer ends the session with its reason."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with Session(client) as session:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            other.close()
            session.expect_close(5)
            assert session.close_reason == "Connection reset by peer"


# -- a peer that does not read -------------------------------------------------------------------


def test_send_has_a_deadline(peer: Peer) -> None:
    """A send that is not taken fails in time, and so does all that follows."""
    started = time.monotonic()
    with pytest.raises(
        SilenceError, match=r"does not read: \d+ bytes were not taken within 0\.2 s"
    ):
        peer.session.send_bytes(bytes(8 << 20), timeout_s=0.2)
    assert time.monotonic() - started < 5
    with pytest.raises(SilenceError, match="does not read"):
        peer.session.send("VM_GET_INFO")
    peer.session.close()


def test_large_sends_arrive_whole(peer: Peer) -> None:
    """More than the socket takes at once goes out as the peer reads."""
    data = bytes(range(256)) * 16384
    got = bytearray()

    def kernel() -> None:
        while len(got) < len(data):
            got.extend(peer.sock.recv(1 << 16))

    thread = threading.Thread(target=kernel)
    thread.start()
    peer.session.send_bytes(data, timeout_s=20)
    thread.join(20)
    assert bytes(got) == data


def test_both_sides_full_do_not_lock_up(peer: Peer) -> None:
    """A peer that reads only after it has sent everything gets all answers in the end."""
    count = 5000
    peer.session.handle("HYPERCALL", lambda event: "CONTINUE")
    for seq in range(count):
        peer.event(seq=seq)
    assert peer.session.wait_count("HYPERCALL", count, timeout_s=20) == count
    assert [peer.read()[1] for _ in range(count)] == list(range(count))


def test_answers_that_nobody_takes() -> None:
    """The reader thread gives up after the deadline too, and says so."""
    peer = Peer(send_timeout_s=0.3)
    peer.session.handle("HYPERCALL", lambda event: "CONTINUE")
    peer.sock.setblocking(True)
    message = struct.pack("<HHI", 1, 552, 0) + event_payload()

    def kernel() -> None:
        for _ in range(20_000):
            peer.sock.sendall(message)

    thread = threading.Thread(target=kernel)
    thread.start()
    with pytest.raises(SilenceError, match="the peer does not read"):
        peer.session.wait_count("HYPERCALL", 10**9, timeout_s=30)
    thread.join(30)
    peer.close()


def test_profile_can_be_chosen() -> None:
    """The session uses the profile that it is given."""
    peer = Peer(profile=load_profile("v12"))
    assert peer.session.profile.name == "v12"
    peer.close()
