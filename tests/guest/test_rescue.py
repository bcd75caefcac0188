"""When something goes wrong on the crash boot: what the console says, and that a person can still save by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capture.dumpfile.reader import KdumpFile
from capture.verify import verify
from tests.guest import disk
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE, Case
from tests.guest.crash import (
    OURS,
    SAVE_TIMEOUT,
    TARGET_FOLDER,
    TARGET_LABEL,
    ImageStore,
    Saver,
    demand,
    only_crash,
    panicked,
    rescue_shell,
    target_image,
)
from tests.guest.qemu import BOOT_TIMEOUT, Disk
from tests.readers import drgn_reader

Kernels = Callable[[str], Kernel]


@pytest.fixture(scope="session")
def case(kernels: Kernels) -> Case:
    kernels(RESCUE.kernel)  # skips here, where it can say why
    return RESCUE


def test_a_save_by_hand_completes_once_the_missing_target_is_attached(
    case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    with rescue_shell(case, image_store, tmp_path, target_attached=False, append="vmcapture.wait=10") as machine:
        # The line that a person sees above the prompt: what happened, and which command to try.
        (line,) = [line for line in machine.console.splitlines() if line.startswith("vmcapture: not saved")]
        assert f"target LABEL={TARGET_LABEL}: no such file system after 10 s" in line
        assert line.endswith("to try again: vmcapture save")

        status, said = machine.run("vmcapture save", SAVE_TIMEOUT)
        assert status == 5, said
        assert "no such file system" in said

        machine.attach(Disk(target_image(tmp_path)))
        status, said = machine.run("vmcapture save", SAVE_TIMEOUT)
        assert status == 0, said
        demand(machine, f"mkdir -p /run/target && mount LABEL={TARGET_LABEL} /run/target")
        dump = f"/run/target{TARGET_FOLDER}/*/vmcore"
        assert "pages equal the source" in demand(
            machine, f"vmcapture verify {dump} --against /proc/vmcore", SAVE_TIMEOUT
        )
        demand(machine, "umount /run/target")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    assert json.loads((saved / "manifest.json").read_text())["complete"]
    assert "Kernel panic - not syncing" in (saved / "vmcore-dmesg.txt").read_text()


@pytest.mark.parametrize("percent", [
    "[6-8]", *(pytest.param(percent, marks=pytest.mark.long) for percent in ("[12]", "[34]", "5", "9"))
])  # fmt: skip
def test_a_power_cut_leaves_a_dump_whose_written_pages_are_all_right(
    percent: str, case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    every_page = replace(case, level="1")  # more than one step of 16 MiB, or of 16,384 pages
    with panicked(every_page, image_store, tmp_path) as machine:
        machine.expect(rf"saving memory: +{percent}\d%", BOOT_TIMEOUT + SAVE_TIMEOUT)  # a first step is synced by then
        machine.kill()
    image = target_image(tmp_path)
    disk.replay(image)
    saved = only_crash(image, tmp_path / "saved")
    assert "Kernel panic - not syncing" in (saved / "vmcore-dmesg.txt").read_text()
    assert json.loads((saved / "registers.json").read_text())["panicked_cpu"] is not None
    report = verify(KdumpFile(saved / "vmcore.incomplete"), None, progress=False)
    assert report.incomplete
    assert report.exit_status == 3
    assert report.damaged == 0
    assert 0 < report.unwritten < report.pages


@pytest.mark.long
def test_a_target_that_is_too_small_keeps_what_fits_and_a_shell_says_so(
    case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    small = replace(case, target_size="64M", level="1")
    with rescue_shell(small, image_store, tmp_path) as machine:
        (line,) = [line for line in machine.console.splitlines() if line.startswith("vmcapture: saved in part")]
        assert "no room left" in line
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    manifest = json.loads((saved / "manifest.json").read_text())
    assert not manifest["complete"]
    assert "no room left" in manifest["failures"][0]
    report = verify(KdumpFile(saved / "vmcore.incomplete"), None, progress=False)
    assert (report.exit_status, report.damaged) == (3, 0)
    assert report.pages - report.unwritten == manifest["dump"]["pages_written"] > 0


def test_a_save_that_ran_out_of_room_goes_on_once_there_is_some(
    case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    fill = (
        f"mkdir -p /run/target && mount -t ext4 LABEL={TARGET_LABEL} /run/target"
        " && dd if=/dev/zero of=/run/target/room bs=1M count=8"
        " && { dd if=/dev/zero of=/run/target/ballast bs=1M; rm /run/target/room && umount /run/target; }"
    )
    with panicked(replace(case, target_size="128M"), image_store, tmp_path, final="shell", before=(fill,)) as machine:
        machine.expect(r"^vmcapture: saved in part.*no room left.*\n", BOOT_TIMEOUT + SAVE_TIMEOUT)
        machine.shell()
        target = f"mkdir -p /run/target && mount LABEL={TARGET_LABEL} /run/target"
        demand(machine, f"{target} && rm /run/target/ballast && umount /run/target")

        status, said = machine.run("vmcapture save", SAVE_TIMEOUT)

        assert status == 0, said
        assert "where it was cut short before" in said
        assert re.search(r"vmcore.incomplete: [1-9]\d* of \d+ pages \(level 31\) are there already; going on", said)
        verify = f"vmcapture verify /run/target{TARGET_FOLDER}/*/vmcore --against /proc/vmcore"
        assert "pages equal the source" in demand(machine, f"{target} && {verify}", SAVE_TIMEOUT)
        demand(machine, "umount /run/target")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["complete"]
    assert 0 < manifest["dump"]["pages_found"] < manifest["dump"]["pages"] == manifest["dump"]["pages_written"]
    drgn_reader(saved / "vmcore")


KDUMP_TOOLS = """\
USE_KDUMP=1
KDUMP_COREDIR="/var/crash"
MAKEDUMP_ARGS="-c -d 17"
KDUMP_NUM_DUMPS=3
KDUMP_CMDLINE_APPEND="reset_devices nr_cpus=1 usbcore.nousb"
"""


def test_a_plain_tree_with_hooks_follows_what_kdump_tools_was_told(
    case: Case, guest_folder: Path, tmp_path: Path
) -> None:
    """All of the tree, for a kernel without squashfs, is in memory, in a tmpfs that the kernel caps at half of it."""
    (guest_folder / "hooks").mkdir()  # (what is below /tmp there would not be seen)
    hooks = []
    for name, script in (
        ("pre", "#!/bin/bash\nwords=(before the save)\necho ${words[@]}; sleep 1000\n"),
        ("post", '#!/bin/sh\necho "after it: $1 $VMCAPTURE_OUTCOME in $VMCAPTURE_TARGET"\n'),
    ):
        hooks.append(guest_folder / "hooks" / name)
        hooks[-1].write_text(script)
        hooks[-1].chmod(0o755)
    store = ImageStore(guest_folder / "plain-images", squashfs=False, hooks=((hooks[0],), (hooks[1],)))
    told = f"cat > /run/kdump-tools <<'END'\n{KDUMP_TOOLS}END"
    imported = "vmcapture config import -o /run/vmcapture.conf /run/kdump-tools; echo timeout 20 >> /run/vmcapture.conf"
    armed = Saver(OURS.name, lambda *words: f"{OURS.load(*words)} --config /run/vmcapture.conf")
    with rescue_shell(
        replace(case, crashkernel="320M"), store, tmp_path, before=(told, imported), saver=armed
    ) as machine:
        assert "vmcapture: pre: before the save" in machine.console
        assert "/pre: no end after 20 s (vmcapture.timeout=), killed; going on" in machine.console
        assert "vmcapture: saved in LABEL=crash" in machine.console
        assert "squashfs" not in demand(machine, "cat /proc/mounts")
        words = demand(machine, "cat /proc/cmdline").split()
        assert {"vmcapture.failure=reboot", "vmcapture.keep=3", "vmcapture.timeout=20", "usbcore.nousb"} <= set(words)
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    assert "vmcapture: post: after it: 0 saved in LABEL=crash" in machine.console
    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["dump"]["level"], manifest["dump"]["compression"]) == (17, "zlib:1")
    assert "pre: before the save" in (saved / "capture-log.txt").read_text()


def test_an_image_that_arrives_damaged_ends_as_it_was_told_when_no_one_is_there(
    case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    """Cut off, here; where a reservation is too small, the kernel unpacks what it can as well, and goes on."""
    cut = "/run/cut.img"

    def load(*arguments: Any) -> str:
        return OURS.load(*arguments).replace("/run/healthy/capture.img", cut)

    half = f"head -c $(($(stat -c %s /run/healthy/capture.img) / 2)) /run/healthy/capture.img > {cut}"
    with panicked(
        case, image_store, tmp_path, append="vmcapture.failure=poweroff", before=(half,), saver=Saver(OURS.name, load)
    ) as machine:
        machine.expect("vmcapture: the system in the image does not mount: ", BOOT_TIMEOUT)
        machine.wait_exit(BOOT_TIMEOUT)
    assert "vmcapture# " not in machine.console.rpartition("Kernel panic - not syncing")[2]
