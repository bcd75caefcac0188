"""The set-up side on a real kernel: armed, disarmed, and what sysfs says of a real disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE
from tests.guest.crash import TARGET_LABEL, ImageStore, demand, healthy, status_of
from tests.guest.qemu import Machine

LOAD_TO = "vmcapture load --kernel-image /run/healthy/vmlinuz --append console=ttyS0 --target"
LOAD = f"{LOAD_TO} LABEL={TARGET_LABEL}"
IMAGE = "/run/healthy/capture.img"


@pytest.fixture(scope="module")
def machine(
    kernels: Callable[[str], Kernel], image_store: ImageStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """One machine for all tests here."""
    kernels(RESCUE.kernel)  # skips here, where it can say why
    with healthy(RESCUE, image_store, tmp_path_factory.mktemp("setup")) as running:
        yield running


@pytest.fixture(autouse=True)
def disarmed_after(machine: Machine) -> Iterator[None]:
    yield
    demand(machine, "vmcapture unload")


def crash_loaded(machine: Machine) -> str:
    return demand(machine, "cat /sys/kernel/kexec_crash_loaded").strip()


def test_a_machine_with_memory_reserved_but_nothing_loaded_is_not_armed(machine: Machine) -> None:
    status, said = machine.run("vmcapture status")
    assert status == 1
    assert said.startswith(
        "not armed: no capture kernel is loaded (256 MiB reserved for the capture kernel); run vmcapture"
    )


@pytest.mark.parametrize(("option", "syscall"), [("-s", "file"), ("-c", "load"), ("", "file")])
def test_load_arms_and_unload_disarms(option: str, syscall: str, machine: Machine) -> None:
    status, said = machine.run(f"{LOAD} --image {IMAGE} {option}")
    assert status == 0, said
    assert crash_loaded(machine) == "1"
    found = status_of(machine)
    assert found["armed"]
    assert found["reservation"] == 256 << 20
    assert found["loaded"]["syscall"] == syscall
    words = found["loaded"]["command_line"].split()
    assert f"vmcapture.target=LABEL={TARGET_LABEL}" in words
    assert not [word for word in words if word.startswith("crashkernel=")]
    demand(machine, "vmcapture unload")
    assert crash_loaded(machine) == "0"
    assert machine.run("vmcapture status")[0] == 1


def test_a_disk_named_by_its_device_is_loaded_by_its_uuid(machine: Machine) -> None:
    demand(machine, f"{LOAD_TO} /dev/vdb --image {IMAGE}")
    words = status_of(machine)["loaded"]["command_line"].split()
    (uuid,) = [word.removeprefix("vmcapture.target=UUID=") for word in words if word.startswith("vmcapture.target=")]
    assert demand(machine, f"findfs UUID={uuid}").strip() == "/dev/vdb"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (f"{LOAD} --image /run/none.img", "no such image"),
        (f"{LOAD} --image {IMAGE} --kernel-image /run/none", "no such kernel"),
        (f"{LOAD} --image {IMAGE} --kernel-image /proc/version -s", "kexec"),
        (f"{LOAD} --image {IMAGE} --append $(head -c 2000 /dev/zero | tr '\\0' x)", "characters"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_and_leaves_the_machine_disarmed(
    command: str, reason: str, machine: Machine
) -> None:
    status, said = machine.run(command)
    assert status in (1, 2)
    (line,) = said.strip().splitlines()
    assert line.startswith("vmcapture: ")
    assert reason in line
    assert crash_loaded(machine) == "0"


def test_the_modules_behind_a_real_disk_are_those_that_the_kernel_loaded_for_it(machine: Machine) -> None:
    # The launcher's environment and interpreter, with a question of our own.
    demand(machine, "grep ^export /usr/bin/vmcapture > /run/environment")
    python = demand(machine, "sed -n \"s/^exec '\\([^']*\\)'.*/\\1/p\" /usr/bin/vmcapture").strip()
    asked = "from pathlib import Path; from initramfs import volumes; print(volumes.needed_by_device(Path('/dev/vdb')))"
    said = demand(machine, f'(. /run/environment; {python} -s -S -P -c "{asked}")')
    loaded = demand(machine, "lsmod")
    for module in ("virtio_pci", "virtio_blk"):
        assert f"'{module}'" in said
        assert module in loaded


def test_info_on_the_running_kernel_plans_a_dump(machine: Machine) -> None:
    found = json.loads(demand(machine, "vmcapture info --json /proc/kcore", timeout=180))
    free = int(demand(machine, "sed -n 's/^nr_free_pages //p' /proc/vmstat"))
    assert found["filter_unusable"] is None
    assert found["problems"] == []
    assert abs(found["classes"]["free"] - free) < 0.25 * free  # (its own 40 MB are in use while it looks)
    sizes = {entry["asked"]: (entry["level"], entry["bytes"]) for entry in found["predicted"]}
    assert {asked: made for asked, (made, _) in sizes.items()} == {level: level for level in (0, 1, 16, 17, 31)}
    assert sizes[31][1] < sizes[17][1] < sizes[1][1] <= sizes[0][1]
