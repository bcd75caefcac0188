"""When the disk fails on a real crash boot: the next target, and at last the console."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from capture.dumpfile.reader import KdumpFile
from capture.verify import verify
from tests.guest import disk
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE, Case
from tests.guest.crash import SAVE_TIMEOUT, TARGET_LABEL, ImageStore, only_crash, panicked, target_image
from tests.guest.qemu import BOOT_TIMEOUT, Disk

HANGS = "hangs"
TIMEOUT = 20
"""Seconds after which a disk is given up."""
AGAIN_AND_AGAIN = " --target ".join
"""What ``vmcapture load`` is given as its target."""


@pytest.fixture(scope="session")
def case(kernels: Callable[[str], Kernel]) -> Case:
    kernels(RESCUE.kernel)  # skips here, where it can say why
    return RESCUE


def test_a_missing_a_broken_and_a_hanging_disk_are_passed_over(
    case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    """The hanging one stops in the midst of the dump, for ever; what it had taken by then is all right."""
    hangs, broken = tmp_path / "hangs.img", tmp_path / "broken.img"
    disk.make(hangs, "1G", HANGS)
    disk.make(broken, "64M", "broken")
    with broken.open("r+b") as file:  # the group descriptors, behind the superblock: found, and not to be mounted
        file.seek(2048)
        file.write(b"\xff" * 6144)
    targets = ("LABEL=gone", "LABEL=broken", f"LABEL={HANGS}", f"LABEL={TARGET_LABEL}")
    with panicked(
        replace(case, level="1", arguments=("-object", f"throttle-group,id={HANGS}")),
        image_store,
        tmp_path,
        target=AGAIN_AND_AGAIN(targets),
        more_disks=(Disk(broken), Disk(hangs, throttle_group=HANGS)),
        append=f"vmcapture.wait=3 vmcapture.timeout={TIMEOUT}",
    ) as machine:
        machine.expect(r"saving memory: +[3-8]\d%", BOOT_TIMEOUT + SAVE_TIMEOUT)
        machine.qmp("qom-set", path=f"/objects/{HANGS}", property="limits", value={"bps-total": 1})
        machine.expect(r"trying the next target, LABEL=crash", BOOT_TIMEOUT)
        machine.expect(r"^vmcapture: saved in LABEL=crash", SAVE_TIMEOUT)
        machine.wait_exit(BOOT_TIMEOUT)
    said = [line for line in machine.console.splitlines() if "trying the next target" in line]
    assert [line.rpartition(" ")[2] for line in said] == list(targets[1:])
    # of the 3 s those are left that the job did not need to get here, and of a busy machine's none
    assert re.search(r"target LABEL=gone: no such file system( after [1-3] s)?;", said[0])
    assert re.search(r"LABEL=broken \(/dev/vd.\) cannot be mounted: ", said[1])
    assert f"saved in part: LABEL={HANGS}: no answer from the target for {TIMEOUT} s (vmcapture.timeout=)" in said[2]

    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    assert json.loads((saved / "manifest.json").read_text())["complete"]
    assert verify(KdumpFile(saved / "vmcore"), None, progress=False).exit_status == 0
    log = (saved / "capture-log.txt").read_text()
    assert all(target in log for target in targets[:3])

    disk.replay(hangs)
    part = only_crash(hangs, tmp_path / "part")
    assert (part / "vmcore-dmesg.txt").read_bytes() == (saved / "vmcore-dmesg.txt").read_bytes()
    report = verify(KdumpFile(part / "vmcore.incomplete"), None, progress=False)
    assert (report.exit_status, report.damaged) == (3, 0)
    assert 0 < report.unwritten < report.pages


@pytest.mark.long
def test_a_disk_that_hangs_from_the_start_costs_time_and_no_more(
    case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    """Whoever reads it waits for ever, findfs as well."""
    hangs = tmp_path / "hangs.img"
    disk.make(hangs, "1G", HANGS)
    targets = (f"LABEL={HANGS}", f"LABEL={TARGET_LABEL}")
    with panicked(
        replace(case, arguments=("-object", f"throttle-group,id={HANGS}")),
        image_store,
        tmp_path,
        target=AGAIN_AND_AGAIN(targets),
        more_disks=(Disk(hangs, throttle_group=HANGS),),
        append="vmcapture.wait=3",
    ) as machine:
        machine.qmp("qom-set", path=f"/objects/{HANGS}", property="limits", value={"bps-total": 1})
        machine.expect(r"LABEL=hangs: no such file system.*; trying the next target, LABEL=crash", 2 * BOOT_TIMEOUT)
        machine.expect(r"^vmcapture: saved in LABEL=crash", SAVE_TIMEOUT)
        machine.wait_exit(BOOT_TIMEOUT)
    saved = only_crash(target_image(tmp_path), tmp_path / "saved")
    assert json.loads((saved / "manifest.json").read_text())["complete"]


def test_where_no_disk_takes_the_log_its_end_and_the_registers_are_on_the_console(
    case: Case, image_store: ImageStore, tmp_path: Path
) -> None:
    with panicked(
        case,
        image_store,
        tmp_path,
        target_attached=False,
        append="vmcapture.wait=1 vmcapture.failure=poweroff",
    ) as machine:
        machine.expect(r"^vmcapture: no disk took the log; its last \d+ lines, and the registers:\n", BOOT_TIMEOUT)
        said = machine.expect(r"(?s)(.*)^vmcapture: not saved: target LABEL=crash: no such file", SAVE_TIMEOUT)[1]
        machine.wait_exit(BOOT_TIMEOUT)
    assert "Kernel panic - not syncing: sysrq triggered crash" in said
    assert "sysrq_handle_crash" in said
    assert re.search(r"^CPU 0, running PID \d+  <- this CPU panicked$", said, re.MULTILINE)
    assert re.search(r"\brip ffffffff[0-9a-f]{8}\b", said)
    assert "Traceback" not in machine.console
