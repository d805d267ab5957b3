# SPDX-License-Identifier: GPL-2.0-or-later
"""The introspection tool: listener, handshake, session, transcript.

with Listener() as listener:
    sock = listener.accept(10)
    hello = receive_hello(sock)
    send_answer(sock, key=b"secret")
    with Session(sock, transcript=transcript) as session:
        session.command("GET_VERSION").ok()
"""

from harness.tool.handshake import Hello, key_hash, receive_hello, send_answer
from harness.tool.inbox import TAKEN, Handler
from harness.tool.listener import Listener
from harness.tool.messages import EventMessage, Message
from harness.tool.pending import Pending
from harness.tool.session import Session, State
from harness.tool.transcript import Channel, Transcript, render

__all__ = [
    "TAKEN",
    "Channel",
    "EventMessage",
    "Handler",
    "Hello",
    "Listener",
    "Message",
    "Pending",
    "Session",
    "State",
    "Transcript",
    "key_hash",
    "receive_hello",
    "render",
    "send_answer",
]
