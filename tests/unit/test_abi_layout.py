# SPDX-License-Identifier: GPL-2.0-or-later
"""The layouts that the profile's data gives, against figures taken from elsewhere."""

from __future__ import annotations

import pytest

from harness.abi import load_profile
from harness.abi.layout import build_structs
from harness.errors import MalformedMessage, UsageError

# (size, alignment, offsets of the fields in order), written down independently of the profile's
# data file, which has no offsets at all.
FIGURES = {
    "kvm_regs": (
        144,
        8,
        [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 136],
    ),
    "kvm_segment": (24, 8, [0, 8, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]),
    "kvm_dtable": (16, 8, [0, 8, 10]),
    "kvm_sregs": (
        312,
        8,
        [0, 24, 48, 72, 96, 120, 144, 168, 192, 208, 224, 232, 240, 248, 256, 264, 272, 280],
    ),
    "kvm_msr_entry": (16, 8, [0, 4, 8]),
    "kvm_msrs": (8, 8, [0, 4, 8]),
    "kvm_xsave": (4096, 4, [0]),
    "kvmi_event_msrs": (72, 8, [0, 8, 16, 24, 32, 40, 48, 56, 64]),
    "kvmi_msg_hdr": (8, 4, [0, 2, 4]),
    "kvmi_error_code": (8, 4, [0, 4]),
    "kvmi_vcpu_hdr": (8, 4, [0, 2, 4]),
    "kvm_introspection_hook": (24, 4, [0, 4, 8]),
    "kvm_introspection_feature": (8, 4, [0, 4]),
    "kvmi_features": (8, 1, [0, 1]),
    "kvmi_event_hdr": (8, 2, [0, 2]),
    "kvmi_vcpu_event_arch": (536, 8, [0, 1, 8, 152, 464]),
    "kvmi_vcpu_event": (544, 8, [0, 2, 4, 8]),
    "kvmi_vcpu_event_reply": (8, 4, [0, 1, 2, 4]),
    "kvmi_page_access_entry": (16, 8, [0, 8, 9]),
    "kvmi_get_version_reply": (16, 4, [0, 4, 8]),
    "kvmi_vm_check_command": (8, 4, [0, 2, 4]),
    "kvmi_vm_check_event": (8, 4, [0, 2, 4]),
    "kvmi_vm_get_info_reply": (16, 4, [0, 4]),
    "kvmi_vm_control_events": (8, 4, [0, 2, 3, 4]),
    "kvmi_vm_read_physical": (16, 8, [0, 8, 10, 12]),
    "kvmi_vm_write_physical": (16, 8, [0, 8, 10, 12, 16]),
    "kvmi_vm_pause_vcpu": (8, 4, [0, 2, 3, 4]),
    "kvmi_vm_control_cleanup": (8, 1, [0, 1]),
    "kvmi_vm_set_page_access": (8, 8, [0, 2, 4, 8]),
    "kvmi_vcpu_get_info_reply": (8, 8, [0]),
    "kvmi_vcpu_control_events": (8, 4, [0, 2, 3, 4]),
    "kvmi_vcpu_get_registers": (8, 4, [0, 2, 4, 8]),
    "kvmi_vcpu_get_registers_reply": (472, 8, [0, 4, 8, 152, 464]),
    "kvmi_vcpu_get_cpuid": (8, 4, [0, 4]),
    "kvmi_vcpu_get_cpuid_reply": (16, 4, [0, 4, 8, 12]),
    "kvmi_vcpu_control_cr": (8, 4, [0, 1, 2, 4]),
    "kvmi_vcpu_inject_exception": (16, 8, [0, 1, 2, 4, 8]),
    "kvmi_vcpu_get_xcr": (8, 1, [0, 1]),
    "kvmi_vcpu_get_xcr_reply": (8, 8, [0]),
    "kvmi_vcpu_get_xsave_reply": (4096, 4, [0]),
    "kvmi_vcpu_set_xsave": (4096, 4, [0]),
    "kvmi_vcpu_get_mtrr_type": (8, 8, [0]),
    "kvmi_vcpu_get_mtrr_type_reply": (8, 1, [0, 1]),
    "kvmi_vcpu_control_msr": (8, 4, [0, 1, 2, 4]),
    "kvmi_vcpu_control_singlestep": (8, 1, [0, 1]),
    "kvmi_vcpu_translate_gva": (8, 8, [0]),
    "kvmi_vcpu_translate_gva_reply": (8, 8, [0]),
    "kvmi_vcpu_event_breakpoint": (16, 8, [0, 8, 9]),
    "kvmi_vcpu_event_cr": (24, 8, [0, 1, 8, 16]),
    "kvmi_vcpu_event_cr_reply": (8, 8, [0]),
    "kvmi_vcpu_event_trap": (16, 8, [0, 1, 2, 4, 8]),
    "kvmi_vcpu_event_xsetbv": (24, 8, [0, 1, 8, 16]),
    "kvmi_vcpu_event_descriptor": (8, 1, [0, 1, 2]),
    "kvmi_vcpu_event_msr": (24, 8, [0, 4, 8, 16]),
    "kvmi_vcpu_event_msr_reply": (8, 8, [0]),
    "kvmi_vcpu_event_pf": (24, 8, [0, 8, 16, 17, 18, 20]),
    "kvmi_vcpu_event_singlestep": (8, 1, [0, 1]),
}

# Sizes of whole payloads: (request at least, successful reply), from the first byte after the
# message header; replies with arrays or data without these.
COMMAND_SIZES = {
    "GET_VERSION": (2, 0, 24),
    "VM_CHECK_COMMAND": (4, 8, 8),
    "VM_CHECK_EVENT": (6, 8, 8),
    "VM_GET_INFO": (8, 0, 24),
    "VM_CONTROL_EVENTS": (10, 8, 8),
    "VM_READ_PHYSICAL": (12, 16, 8),
    "VM_WRITE_PHYSICAL": (14, 16, 8),
    "VM_PAUSE_VCPU": (16, 8, 8),
    "VM_CONTROL_CLEANUP": (18, 8, 8),
    "VM_SET_PAGE_ACCESS": (20, 8, 8),
    "VCPU_GET_INFO": (3, 8, 16),
    "VCPU_CONTROL_EVENTS": (5, 16, 8),
    "VCPU_GET_REGISTERS": (7, 16, 480),
    "VCPU_SET_REGISTERS": (9, 152, 8),
    "VCPU_GET_CPUID": (11, 16, 24),
    "VCPU_CONTROL_CR": (13, 16, 8),
    "VCPU_INJECT_EXCEPTION": (15, 24, 8),
    "VCPU_GET_XCR": (17, 16, 16),
    "VCPU_GET_XSAVE": (19, 8, 4104),
    "VCPU_SET_XSAVE": (21, 4104, 8),
    "VCPU_GET_MTRR_TYPE": (23, 16, 16),
    "VCPU_CONTROL_MSR": (25, 16, 8),
    "VCPU_CONTROL_SINGLESTEP": (27, 16, 8),
    "VCPU_TRANSLATE_GVA": (29, 16, 16),
}

# (id, payload, reply at most)
EVENT_SIZES = {
    "UNHOOK": (0, 8, 0),
    "PAUSE": (1, 552, 16),
    "HYPERCALL": (3, 552, 16),
    "BREAKPOINT": (5, 568, 16),
    "CR": (7, 576, 24),
    "TRAP": (9, 568, 16),
    "XSETBV": (11, 576, 16),
    "DESCRIPTOR": (13, 560, 16),
    "MSR": (15, 576, 24),
    "PF": (17, 576, 16),
    "SINGLESTEP": (19, 560, 16),
}

IOCTL_REQUESTS = {
    "HOOK": 0x4018AEC8,
    "UNHOOK": 0xAEC9,
    "COMMAND": 0x4008AECA,
    "EVENT": 0x4008AECB,
    "PREUNHOOK": 0xAECC,
}

PROFILE = load_profile("v12")


@pytest.mark.parametrize("name", FIGURES)
def test_struct_layout(name: str) -> None:
    """Size, alignment and every offset follow from natural alignment."""
    size, align, offsets = FIGURES[name]
    layout = PROFILE.structs[name]
    assert (layout.size, layout.align) == (size, align)
    assert [f.offset for f in layout.fields] == offsets


def test_profile_is_complete() -> None:
    """24 commands, 11 events, 5 ioctls, and no struct beyond those with figures."""
    assert set(PROFILE.structs) == set(FIGURES)
    assert set(PROFILE.commands) == set(COMMAND_SIZES)
    assert set(PROFILE.events) == set(EVENT_SIZES)
    assert set(PROFILE.ioctls) == set(IOCTL_REQUESTS)
    assert (len(PROFILE.commands), len(PROFILE.events), len(PROFILE.ioctls)) == (24, 11, 5)


@pytest.mark.parametrize("name", COMMAND_SIZES)
def test_command_sizes(name: str) -> None:
    """Ids, and sizes of request and reply with their headers."""
    id, request, reply = COMMAND_SIZES[name]
    command = PROFILE.commands[name]
    header = 8 if command.is_vcpu else 0
    assert command.id == id
    assert header + (command.request.size if command.request else 0) == request
    assert 8 + (command.reply.size if command.reply else 0) == reply


@pytest.mark.parametrize("name", EVENT_SIZES)
def test_event_sizes(name: str) -> None:
    """Ids, and sizes of event and reply with their common parts."""
    id, payload, reply = EVENT_SIZES[name]
    event = PROFILE.events[name]
    assert event.id == id
    assert (552 if event.is_vcpu else 8) + (event.payload.size if event.payload else 0) == payload
    assert (16 if event.is_vcpu else 0) + (event.reply.size if event.reply else 0) == reply


def test_ioctl_requests() -> None:
    """Numbers that a device manager would get from the kernel's header."""
    assert {n: i.request for n, i in PROFILE.ioctls.items()} == IOCTL_REQUESTS


def test_numbers_of_the_profile() -> None:
    """Version, capability of the 6.12 series, message limit, and an error that is no host errno."""
    assert (PROFILE.version, PROFILE.capability, PROFILE.max_message_size) == (1, 999, 8184)
    assert PROFILE.errno["KVM_ENOSYS"] == 1000
    assert PROFILE.error_name(-22) == "KVM_EINVAL"
    assert PROFILE.error_name(0) is None
    assert PROFILE.error_name(-38) == "errno 38"


def test_names_in_any_form() -> None:
    """Commands and events are found under their short, long and C names, and by number."""
    assert PROFILE.command("KVMI_VM_GET_INFO") is PROFILE.command(8)
    for name in ("HYPERCALL", "VCPU_HYPERCALL", "KVMI_VCPU_EVENT_HYPERCALL", 3):
        assert PROFILE.event(name).id == 3
    with pytest.raises(UsageError, match="no command VM_FLY"):
        PROFILE.command("VM_FLY")
    with pytest.raises(UsageError, match="no event 77"):
        PROFILE.event(77)


def test_unknown_profile() -> None:
    """The message lists the profiles that exist."""
    with pytest.raises(UsageError, match=r"no ABI profile 'v99' \(there are: .*v12"):
        load_profile("v99")


def test_size_is_asserted() -> None:
    """A struct whose stated size is not that of natural alignment is refused."""
    with pytest.raises(UsageError, match="struct s has 16 bytes by natural alignment, not 9"):
        build_structs({"s": (9, False, ["a:u8", "b:u64"])})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["a"], "cannot read field 'a'"),
        (["a:u24"], "unknown type"),
        (["n:u8", "a:u8[n]", "b:u8"], "nothing may follow"),
        (["items:u8"], "must not be called items"),
    ],
)
def test_bad_descriptions(fields: list[str], message: str) -> None:
    """What cannot be a struct is refused by name."""
    with pytest.raises(UsageError, match=message):
        build_structs({"s": (1, False, fields)})


def test_records_are_mappings_with_attributes() -> None:
    """A record reads by name and by attribute, nested ones too, and lists what a wrong name met."""
    layout = PROFILE.structs["kvmi_vcpu_event_arch"]
    record = layout.unpack(bytes([8]) + bytes(7) + (5).to_bytes(8, "little") + bytes(layout.size))
    assert record.mode == record["mode"] == 8
    assert record.regs.rax == 5
    assert record.padding == bytes(7)
    assert record.sregs.interrupt_bitmap == (0, 0, 0, 0)
    assert record.plain()["regs"]["rax"] == 5
    with pytest.raises(AttributeError, match="kvmi_vcpu_event_arch has no field 'eax'"):
        record.eax  # noqa: B018


def test_bytes_that_end_too_early() -> None:
    """The error names the struct and both sizes, or the array and its counter."""
    with pytest.raises(MalformedMessage, match="kvmi_vcpu_hdr has 5 bytes, expected 8"):
        PROFILE.structs["kvmi_vcpu_hdr"].unpack(bytes(5))
    msrs = PROFILE.structs["kvm_msrs"]
    with pytest.raises(MalformedMessage, match=r"kvm_msrs\.entries has 16 bytes, but nmsrs = 2"):
        msrs.unpack((2).to_bytes(8, "little") + bytes(16))
