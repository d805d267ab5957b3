# SPDX-License-Identifier: GPL-2.0-or-later
"""From blocks of samples to a result, on the terminal and as a page."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from harness.abi import load_profile
from harness.bench.kinds import CLOCK, EXIT, EXIT_KERNEL, KINDS
from harness.bench.program import Block, Facts, KindFacts, VcpuSamples
from harness.bench.result import Kind, Result, make_result
from harness.bench.rounds import Options, Rounds
from harness.bench.show import print_result, render_page, what_it_is
from harness.errors import UsageError
from harness.report.model import MachineRecord


def block(kind: str, hold: list[int], *, expected: int = 3, events: int | None = None) -> Block:
    """Samples whose parts are a half, a tenth and the rest."""
    return Block(
        kind=kind,
        vcpus=[
            VcpuSamples(
                events=expected if events is None else events, expected=expected, hold=hold,
                out=[one // 2 for one in hold], answer=[one // 10 for one in hold],
            )
        ],
    )  # fmt: skip


def result(*, emulated: bool = True, events: int | None = None) -> Result:
    """Two rounds on a kernel that has HYPERCALL and PAUSE, lacks all else, and fails at PAUSE."""
    known = {
        CLOCK: KindFacts(events=[], samples=9),
        EXIT: KindFacts(events=[], samples=9),
        EXIT_KERNEL: KindFacts(events=[], samples=9),
        **{name: KindFacts(events=[7], samples=9, missing_event=7, error=-2) for name in KINDS},
        "hypercall": KindFacts(events=[3], samples=9),
        "xsetbv": KindFacts(events=[11], samples=9),
        "pause": KindFacts(events=[1], samples=9),
        "singlestep": KindFacts(events=[19], samples=9, missing_command=27, error=-95),
    }
    facts = Facts(
        pid=7, vendor="AMD", cpus=2, vcpus=1, tsc_khz=2_000_000, tsc_compares=True, apart=False,
        kernel_threads=1, version=1, singlestep=0, kinds=known,
    )  # fmt: skip
    blocks = [
        {
            CLOCK: block(CLOCK, [20, 20, 20]),
            EXIT: block(EXIT, [(1000 * slow) + 20] * 3),
            EXIT_KERNEL: block(EXIT_KERNEL, [(500 * slow) + 20] * 3),
            "hypercall": block("hypercall", [(4000 * slow) + 20] * 3, events=events),
            "own:hypercall": block("own:hypercall", [1000 * slow] * 3),
        }
        for slow in (1, 3)
    ]
    return make_result(
        Rounds(
            facts,
            {"xsetbv": "no XSETBV leaves the guest"},
            blocks,
            {"pause": "not done within 60 s"},
        ),
        profile=load_profile("v12"),
        started="2025-01-31T10:15:00.000Z",
        options=vars(Options(rounds=2, samples=3)),
        kernel={"release": "6.12", "series": "linux@12345678", "key": "k"},
        machine=MachineRecord(
            target="tcg", emulated=emulated, cpu_model="EPYC <model>", virtualisation="SVM"
        ),
        complaints=[],
    )


def of(found: Result, name: str) -> Kind:
    """One kind of a result."""
    return next(kind for kind in found.kinds if kind.name == name)


def test_figures() -> None:
    """Ticks become ns, what the clock costs is off, and the ratio is that within each round."""
    found = result()
    exit, event = of(found, EXIT), of(found, "hypercall")
    assert exit.hold is not None
    assert exit.hold.rounds_ns == [500, 1500]
    assert event.hold is not None
    assert (event.hold.samples, event.hold.rounds_ns) == (6, [2000, 6000])
    assert event.ratio is not None
    assert (event.ratio.value, event.ratio.low, event.ratio.high) == pytest.approx((4, 4, 4))
    assert event.own_share is not None
    assert event.own_share.value == pytest.approx(0.25)
    assert event.parts is not None
    whole = event.parts.out_ns + event.parts.answer_ns + event.parts.back_ns
    assert whole == pytest.approx(4010, rel=0.01)
    assert found.clock_ns == 10


def test_what_has_no_figures_says_why() -> None:
    """A kernel without an event, a CPU without the means, a measurement that failed."""
    found = result()
    assert of(found, "cr3").lacking == "VM_CHECK_EVENT CR answers KVM_ENOENT"
    assert of(found, "singlestep").lacking.endswith("features.singlestep is 0")
    assert "no XSETBV leaves the guest" in of(found, "xsetbv").lacking
    assert of(found, "pause").failed == "not done within 60 s"
    assert all(of(found, name).hold is None for name in ("cr3", "singlestep", "pause"))


def test_events_that_did_not_come() -> None:
    """Samples without an event of their own are no figures of events."""
    kind = of(result(events=2), "hypercall")
    assert kind.failed == "2 events came where there should have been 3"
    assert kind.hold is None


def test_result_is_complete_as_json() -> None:
    """What is stored is what was made."""
    found = result()
    assert msgspec.json.decode(msgspec.json.encode(found), type=Result).kinds == found.kinds


def test_a_virtual_machine_is_not_called_hardware() -> None:
    """What is below a hypervisor cannot be seen."""
    found = result(emulated=False)
    machine = msgspec.structs.replace(found.machine, hypervisor="KVM")
    text = what_it_is(msgspec.structs.replace(found, machine=machine))
    assert text.startswith("NOT SHOWN TO BE HARDWARE")


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("emulated", [True, False])
def test_emulated_is_told_from_hardware(emulated: bool, width: int) -> None:
    """Terminal and page begin with what the figures were made on; nothing is cut."""
    found = result(emulated=emulated)
    out = io.StringIO()
    print_result(found, Console(file=out, width=width))
    page = render_page(found)
    for text in (" ".join(out.getvalue().split()), page):
        assert ("EMULATED, not hardware: SVM" in text) == emulated
        assert ("Hardware: EPYC" in text) != emulated
        assert "4.00 (4.00-4.00)" in text
        assert "VM_CHECK_EVENT CR answers KVM_ENOENT" in text
        assert "not done within 60 s" in text
        assert "…" not in text
    assert "<model>" not in page
    assert ("machine emulated" in page) == emulated


@pytest.mark.parametrize(
    "wrong", [{"rounds": 1}, {"samples": 0}, {"vcpus": 3}, {"only": ("hypercalls",)}]
)
def test_wrong_options(wrong: dict[str, object]) -> None:
    """Options that make no sense are refused before anything is built."""
    with pytest.raises(UsageError):
        Options(**wrong)  # type: ignore[arg-type]
