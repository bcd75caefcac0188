"""From armed to reported in one machine: ``arm``, ``status``, ``test``, a crash on purpose, the next boot's report.

Its root is the read-only tree of an image, and has neither kernel modules nor Python's sources: nothing can be built
there, and what ``arm`` finds is loaded. That it builds is seen on a Debian system.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from initramfs import rehearsal, stamp
from initramfs.devices import Needed
from initramfs.image import ImageReport, ImageRequest
from initramfs.kexec import CrashKernel, Loaded
from initramfs.status import Check, Status, Wanted
from tests.guest import disk, host
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE
from tests.guest.conftest import unavailable
from tests.guest.crash import SAVE_TIMEOUT, TARGET_LABEL, ImageStore, demand, healthy, target_image
from tests.guest.qemu import BOOT_TIMEOUT, Machine

WRITABLE = ("/boot", "/var/lib/vmcapture")
STATE_MADE = "mkdir -p /run/target/crash /run/target/state"
PREPARED = (
    f"mkdir -p /run/target && mount -t ext4 LABEL={TARGET_LABEL} /run/target",
    STATE_MADE,
    "mount --bind /run/target/crash /var/crash && mount --bind /run/target/state /var/lib/vmcapture",
    "mount -t tmpfs boot /boot && ln -s /run/healthy/vmlinuz /boot/vmlinuz-$(uname -r)",
    "ln -sf /run/healthy/capture.img /var/lib/vmcapture/initramfs-$(uname -r).img",
)
"""What a machine has after each boot. What it remembers is on the disk that it saves to."""


@pytest.fixture(scope="module")
def store(guest_folder: Path) -> ImageStore:
    """Images whose healthy system has the places where a machine keeps what it is armed with."""
    if (line := host.missing()) is not None:
        unavailable(line)
    files = tuple((f"{place}/.place", b"") for place in WRITABLE)
    return ImageStore(guest_folder / "arming-images", healthy_needed=Needed(files=files))


@pytest.fixture(scope="module")
def workdir(kernels: Callable[[str], Kernel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    kernels(RESCUE.kernel)  # skips here, where it can say why
    folder = tmp_path_factory.mktemp("arming")
    yield folder
    shutil.rmtree(folder)


def prepare(machine: Machine) -> None:
    for command in PREPARED:
        demand(machine, command)


def test_a_machine_is_armed_crashed_on_purpose_and_told_of_it(store: ImageStore, workdir: Path) -> None:
    with healthy(RESCUE, store, workdir) as machine:
        prepare(machine)
        status, said = machine.run("vmcapture status")
        assert status == 1
        assert said.startswith("not armed: no capture kernel is loaded")
        assert machine.run("vmcapture list")[1].strip() == "vmcapture: no crash was saved in /var/crash"

        status, said = machine.run("vmcapture arm")
        assert status == 3, said
        assert "the image that is there, /var/lib/vmcapture/initramfs-" in said
        assert "\nvmcapture: armed: /boot/vmlinuz-" in said
        status, said = machine.run("vmcapture arm")
        assert status == 3, said
        assert "vmcapture: armed already, with the same kernel, image and command line" in said

        status, said = machine.run("vmcapture status")
        print(said)
        assert status == 3, said
        assert said.startswith("armed, but doubtful: ")
        checks = dict(re.findall(r"^(\S[\w ]*?) +(good|doubt|bad) ", said, re.MULTILINE))
        assert [name for name, state in checks.items() if state != "good"] == ["image"]
        assert {"reservation", "kernel", "target", "room", "encryption", "watchdog", "tested"} <= checks.keys()

        status, said = machine.run("vmcapture test --no-guest")
        assert re.search(r"^target +good +UUID=\S+: a file was written to /crash, read back and removed$", said, re.M)
        assert demand(machine, "ls -A /run/target/crash").strip() == ""

        assert machine.run("vmcapture test --crash < /dev/null")[0] == 2
        machine.send("vmcapture test --crash --yes-crash-this-machine")
        test_id = machine.expect(r"^vmcapture: crash test ([0-9a-f]{16}): after the reboot", BOOT_TIMEOUT)[1]
        machine.expect("Kernel panic - not syncing: sysrq triggered crash", BOOT_TIMEOUT)
        machine.expect(r"^vmcapture: saved in ", BOOT_TIMEOUT + SAVE_TIMEOUT)
        machine.wait_exit(BOOT_TIMEOUT)
    disk.check(target_image(workdir))

    with healthy(RESCUE, store, workdir, target_kept=True) as machine:
        prepare(machine)
        status, said = machine.run("vmcapture report", BOOT_TIMEOUT)
        assert status == 0, said
        print(said)
        first, second = said.strip().splitlines()
        assert first.startswith("vmcapture: localhost crashed at ")
        assert ": Kernel panic - not syncing: sysrq triggered crash; /var/crash/localhost-" in first
        assert "whole, every page read back" in first
        assert second.startswith(f"vmcapture: crash test {test_id} of ")
        assert ": saved: whole, every page read back: /var/crash/localhost-" in second
        assert machine.run("vmcapture report")[1].strip() == "vmcapture: no crash that was not reported before"

        heading, row = demand(machine, "vmcapture list").strip().splitlines()
        print(heading, row, sep="\n")
        assert heading.split() == ["/var/crash:", "STATE", "SIZE", "KERNEL", "PANIC"]
        assert row.split()[1] == "whole"
        assert row.endswith("Kernel panic - not syncing: sysrq triggered crash")

        shown = demand(machine, "vmcapture show")
        print(shown)
        name = row.split()[0]
        release = demand(machine, "uname -r").strip()
        assert f"directory  /var/crash/{name}" in shown
        assert f"vmcapture: crash test {test_id}" in shown
        assert re.search(r"^registers of CPU 0, which panicked", shown, re.MULTILINE)
        assert f"crash /usr/lib/debug/boot/vmlinux-{release} '/var/crash/{name}/vmcore'".replace("'", "") in shown
        found = json.loads(demand(machine, f"vmcapture show --json {name}"))
        assert found["state"] == "whole"
        assert found["level"] == 31

        assert machine.run("vmcapture arm")[0] == 3
        found = json.loads(machine.run("vmcapture status --json")[1])
        (tested,) = [check for check in found["checks"] if check["name"] == "tested"]
        assert tested["state"] == "good"
        assert "whole, every page read back" in tested["what"]
        exported = demand(machine, "vmcapture status --prometheus -")
        assert 'vmcapture_crashes{state="whole",encrypted="false"} 1\n' in exported


@pytest.mark.long
def test_a_rehearsal_crashes_a_guest_with_what_a_machine_is_armed_with(
    store: ImageStore, kernels: Callable[[str], Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is this one, were it armed with a kernel and an image of the tests'."""
    kernel = kernels(RESCUE.kernel)
    image = store.images(kernel).capture
    request = ImageRequest(image, kernel.release, kernel.modules_dir, ())
    stamp.write(request, ImageReport(image, 1, True, kernel.release, (), (), 1))
    monkeypatch.setattr(rehearsal, "MODULES", kernel.modules_dir.parent)
    line = "console=ttyS0 vmcapture.target=LABEL=mine vmcapture.level=17 vmcapture.compress=zlib"
    loaded = Loaded(str(kernel.vmlinuz), str(image), line, "file")
    wanted = Wanted(lambda _: request, lambda: CrashKernel(kernel.vmlinuz, image, line))
    said: list[str] = []

    def rehearsed(reservation: int) -> Check:
        state = Status(True, reservation, loaded, ())
        result = rehearsal.rehearse(rehearsal.Request(state, wanted), said.append)
        return {check.name: check for check in result.checks}["guest"]

    check = rehearsed(160 << 20)
    assert check.state == "good", check.what
    assert f"a guest with {kernel.release} and 160 MiB reserved crashed in QEMU" in check.what
    for mebibytes, why in ((72, "no complete save: "), (40, "kernel and image do not fit into the reserved memory: ")):
        check = rehearsed(mebibytes << 20)
        assert check.state == "bad", check.what
        assert check.what.startswith(f"not all of a guest's crash was saved: {why}")
