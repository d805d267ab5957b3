# SPDX-License-Identifier: GPL-2.0-or-later
"""Capability and module parameter."""

from __future__ import annotations

import pytest
from lab import Lab

from harness.abi import Profile, load_clauses
from harness.build.kernel import resolve_options
from harness.errors import UsageError
from harness.hosts import Host
from harness.manager.small import KVM_CHECK_EXTENSION, PARAMETER, SmallManager
from harness.manager.smallvm import SmallVm
from harness.paths import KERNEL_CONFIG
from harness.plugin import skip_clause
from harness.settings import Settings

CAPABILITIES = range(1100)
OPTION = "CONFIG_KVM_INTROSPECTION"


def _answers(manager: SmallManager) -> dict[int, int]:
    """What KVM_CHECK_EXTENSION says to every number in use."""
    requests = [
        {"op": "ioctl", "on": "kvm", "request": KVM_CHECK_EXTENSION, "arg": {"value": number}}
        for number in CAPABILITIES
    ]
    answers = manager.link.call("batch", requests=requests, timeout_s=30)
    return {number: answer["ret"] for number, answer in zip(CAPABILITIES, answers, strict=True)}


@pytest.mark.clause("CAP-VERSION")
def test_version(manager: SmallManager, vm: SmallVm, profile: Profile) -> None:
    """The capability answers the API version, on /dev/kvm and on a VM alike."""
    assert manager.capability(profile.capability) == profile.version
    assert manager.capability(profile.capability, on=f"vm:{vm.name}") == profile.version


@pytest.mark.clause("CAP-DISABLED-ZERO")
def test_disabled(lab: Lab, vm: SmallVm, profile: Profile) -> None:
    """The capability answers 0 while kvm.introspection is off, and the version again after."""
    with lab.introspection_off():
        assert lab.manager.capability(profile.capability) == 0
        assert lab.manager.capability(profile.capability, on=f"vm:{vm.name}") == 0
    assert lab.manager.capability(profile.capability) == profile.version


@pytest.mark.clause("CAP-NUMBER")
def test_number(lab: Lab, profile: Profile) -> None:
    """Of all capability numbers just the profile's one depends on kvm.introspection.

    Before v12 it does not, and answers the version as it is.
    """
    on = _answers(lab.manager)
    if "CAP-DISABLED-ZERO" not in load_clauses(profile.name):
        assert on[profile.capability] == profile.version
        return
    with lab.introspection_off():
        off = _answers(lab.manager)
    assert {number for number in CAPABILITIES if on[number] != off[number]} == {profile.capability}


@pytest.mark.clause("MODPARAM-RUNTIME")
def test_parameter_is_writable(lab: Lab, profile: Profile) -> None:
    """kvm.introspection is a bool of mode 0644 whose value shows what was written."""
    path = PARAMETER + profile.module_parameter
    assert profile.module_parameter in lab.manager.list_dir(PARAMETER)
    assert lab.manager.link.call("mode", path=path) == "644"
    assert lab.manager.read_file(path).strip() == "Y"
    with lab.introspection_off():
        assert lab.manager.read_file(path).strip() == "N"
        assert lab.vm().hook(-1) == "EPERM"
    assert lab.manager.read_file(path).strip() == "Y"
    assert lab.manager.capability(profile.capability) == profile.version


@pytest.mark.clause("MODPARAM-DEFAULT-OFF")
@pytest.mark.boot_without("kvm.introspection=1")
def test_parameter_is_off_by_default(
    fresh_host: Host, profile: Profile, settings: Settings
) -> None:
    """A host that boots without kvm.introspection on its command line has it off."""
    manager = SmallManager(fresh_host, profile=profile, cache=settings.cache)
    try:
        assert profile.module_parameter in manager.list_dir(PARAMETER)
        assert manager.read_file(PARAMETER + profile.module_parameter).strip() == "N"
        assert manager.create_vm().hook(-1) == "EPERM"
    finally:
        manager.close()


@pytest.mark.clause("KCONFIG-DEFAULT-N")
@pytest.mark.needs("source")
@pytest.mark.timeout(900)  # another run may be compiling in the tree
def test_option_is_off_by_default(settings: Settings) -> None:
    """The kernel option is off unless asked for; without Intel or AMD KVM it is not there."""
    # All that it may depend on besides KVM (sockets, say) is in the usual configuration.
    usual = (KERNEL_CONFIG / "base.config").read_text().splitlines()
    base = [line for line in usual if not line.startswith((OPTION, "CONFIG_KVM_"))]
    amd, intel = "CONFIG_KVM_AMD=y", "CONFIG_KVM_INTEL=y"
    try:
        config = resolve_options(settings, [*base, amd, intel])
    except UsageError as error:
        skip_clause(f"the kernel's source is not at hand: {error}")
    assert amd in config
    assert f"# {OPTION} is not set" in config
    for backend in (amd, intel):
        asked = [*base, backend, f"{OPTION}=y"]
        assert f"{OPTION}=y" in resolve_options(settings, asked)
    neither = [line.replace("=y", "=n") for line in (amd, intel)]
    config = resolve_options(settings, [*base, *neither, f"{OPTION}=y"])
    assert "CONFIG_KVM=y" in config
    assert OPTION not in config
