# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user writes for fleets and nights, and what is said when it is wrong."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.fleet.inventory import load_inventory
from harness.fleet.machine import words_of
from harness.fleet.nightly import Night, load_night
from harness.hosts.seen import Kvm, Seen
from harness.paths import ROOT

EXAMPLES = ROOT / "examples"


def _inventory(place: Path, text: str) -> Path:
    path = place / "inventory.toml"
    path.write_text(text)
    return path


def test_a_machine_is_what_its_owner_says(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    path = _inventory(
        tmp_path,
        '[[machine]]\nname = "one"\naddress = "root@192.0.2.1:2022"\nidentity = "key"\n'
        '[[machine]]\nname = "two"\naddress = "two"\nswitch = "kexec"\nreturn_s = 90\n',
    )
    one, two = load_inventory(path)
    assert one.switch == "boots-itself"
    assert (one.where().name, one.where().port) == ("192.0.2.1", 2022)
    assert one.where().keys == (str(tmp_path / "key"),)
    assert (two.switch, two.return_s) == ("kexec", 90)


MACHINE = '[[machine]]\nname = "one"\naddress = "one"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[machine]\n", "not valid TOML"),
        ("", "names no machine"),
        ('[[machine]]\nname = "one"\n', "missing required field `address`"),
        (MACHINE + "speed = 3\n", "unknown field `speed`"),
        (MACHINE + 'switch = "ipmi"\n', "invalid enum value 'ipmi'"),
        (MACHINE + "return_s = 0\n", "return_s"),
        (MACHINE + MACHINE, "two machines one"),
        (MACHINE.replace('"one"\na', '"a b"\na'), "name"),
        (MACHINE.replace('address = "one"', 'address = "one two"'), "machine one: "),
        (MACHINE + 'identity = "none"\n', "identity: there is no file"),
        (MACHINE + 'initrd = "none"\n', 'for switch = "kexec"'),
        (MACHINE + 'switch = "kexec"\ncommand = "x"\n', 'for switch = "boots-itself"'),
        (MACHINE + 'has = ["qemu"]\nlacks = ["qemu"]\n', "cannot have and lack qemu"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_inventory(_inventory(tmp_path, text))
    assert said in caught.value.message
    assert str(tmp_path) in caught.value.message


def test_what_a_machine_has(tmp_path: Path) -> None:
    """It tells itself; its owner has the last word."""
    path = _inventory(tmp_path, MACHINE + 'has = ["lab"]\nlacks = ["smap", "qemu"]\n')
    seen = Seen(
        flags=frozenset({"vmx", "smap", "smep"}),
        modules={"kvm_intel.ept": "Y"},
        kvm=Kvm(device=True),
        acpi_oem="DELL",
        cpus=2,
    )
    words = words_of(load_inventory(path)[0], seen)
    assert {"vmx", "ept", "smep", "hardware", "cpus-1", "cpus-2", "lab"} <= words
    assert words.isdisjoint({"smap", "qemu", "svm", "npt", "cpus-3", "emulated", ""})


def test_the_examples_are_right(tmp_path: Path) -> None:
    place = shutil.copytree(EXAMPLES, tmp_path / "examples")
    night, machines = load_night(place / "nightly.toml")
    assert night.reports == str(place / "nights")
    assert [one.switch for one in machines] == ["kexec", "boots-itself", "boots-itself"]
    # What is in the comments is right, too.
    text = (place / "inventory.toml").read_text()
    text = text.replace('# initrd = "', 'initrd = "').replace("# cmdline", "cmdline")
    (place / "epyc-initrd.img").touch()
    machine = load_inventory(_inventory(place, text))[0]
    assert machine.initrd == str(place / "epyc-initrd.img")
    assert machine.cmdline is not None
    (place / "nightly.toml").write_text(
        (place / "nightly.toml").read_text().replace("# select", "select")
    )
    assert load_night(place / "nightly.toml")[0].select == "HOOK-* UNHOOK-*"


def test_all_of_a_night_is_in_the_example() -> None:
    text = (EXAMPLES / "nightly.toml").read_text()
    assert all(f"{name} = " in text for name in Night.__struct_fields__)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    units = [EXAMPLES / f"kvmi-nightly.{kind}" for kind in ("service", "timer")]
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
