# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface as data, and the codec made from it. A leaf: imports only the errors.

profile = load_profile("v12")
codec = Codec(profile)
id, payload = codec.encode_command("VM_READ_PHYSICAL", gpa=0x1000, size=16)
"""

from harness.abi.clauses import (
    Clause,
    Side,
    all_clauses,
    load_clauses,
    requirement_documents,
)
from harness.abi.codec import HEADER, Codec, frame
from harness.abi.layout import Field, Record, Struct
from harness.abi.load import load_profile, profile_names
from harness.abi.messages import EventBody, Reply
from harness.abi.profile import Command, Event, Ioctl, Profile

__all__ = [
    "HEADER",
    "Clause",
    "Codec",
    "Command",
    "Event",
    "EventBody",
    "Field",
    "Ioctl",
    "Profile",
    "Record",
    "Reply",
    "Side",
    "Struct",
    "all_clauses",
    "frame",
    "load_clauses",
    "load_profile",
    "profile_names",
    "requirement_documents",
]
