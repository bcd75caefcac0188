"""A watchdog on a real crash boot: it does not cut a save that goes on, and it does cut one that hangs.

QEMU's i6300ESB runs on over kexec as hardware does; the machine's disk is as slow as its throttle group says, and stops
when that is told to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest import disk
from tests.guest.cache import Kernel
from tests.guest.cases import LINUX_6_1, LINUX_6_1_FULL, Case
from tests.guest.crash import (
    OURS,
    SAVE_TIMEOUT,
    TARGET_FOLDER,
    TARGET_LABEL,
    ImageStore,
    Saver,
    demand,
    healthy,
    panicked,
    status_of,
    target_image,
)
from tests.guest.qemu import BOOT_TIMEOUT, Disk, Machine

SECONDS = 30
ARMED_BEFORE = 40  # seconds, by the healthy system: a capture kernel is up in 20, on a busy host too
BYTES_A_SECOND = 2 << 20  # a step of 16 MiB is on the disk in less than SECONDS; the dump of every page is not
GROUP = "slow"
SLOW = ("-object", f"throttle-group,id={GROUP},x-bps-total={BYTES_A_SECOND}")
HARDWARE = Case(
    "watchdog", LINUX_6_1_FULL, level="1", arguments=(*SLOW, "-device", "i6300esb", "-action", "watchdog=reset")
)
SOFTWARE = Case("softdog", LINUX_6_1, level="1", arguments=SLOW)
ARM = f"busybox watchdog -T {ARMED_BEFORE} -t 5 /dev/watchdog0"
# (The image's busybox has no pkill.)
KILL_THE_FEEDER = "for each in /proc/[0-9]*; do ! grep -q watchdog $each/cmdline || kill -9 ${each##*/}; done"

Kernels = Callable[[str], Kernel]


@contextmanager
def saving(
    case: Case,
    store: ImageStore,
    folder: Path,
    *,
    options: str = "",
    target: str = f"LABEL={TARGET_LABEL}",
    append: str = "",
    before: tuple[str, ...] = (),
) -> Iterator[Machine]:
    """A machine that has panicked and saves to the slow disk."""

    def load(case: Case, final: str, target: str, append: str) -> str:
        return f"{OURS.load(case, final, target, append)} {options}"

    slow = Disk(target_image(folder), throttle_group=GROUP)
    with panicked(
        case, store, folder, target=target, target_attached=False, more_disks=(slow,), before=before, append=append,
        saver=Saver(OURS.name, load),
    ) as machine:  # fmt: skip
        machine.qmp("query-status")  # from here on QMP tells what happens
        yield machine


def test_the_healthy_system_knows_what_runs_and_says_what_would_not_be_fed(
    kernels: Kernels, image_store: ImageStore, tmp_path: Path
) -> None:
    kernels(HARDWARE.kernel)  # skips here, where it can say why
    with healthy(HARDWARE, image_store, tmp_path) as machine:
        load = OURS.load(HARDWARE, "poweroff", f"LABEL={TARGET_LABEL}", "")

        def loaded(options: str = "") -> tuple[bool, str | None]:
            """Whether the capture kernel is to use a watchdog, and what status has to say of that."""
            demand(machine, f"{load} {options}")
            status = status_of(machine)
            return "vmcapture.watchdog=180" in status["loaded"]["command_line"].split(), status["watchdog"]

        assert loaded() == (False, None)
        demand(machine, ARM)
        assert loaded() == (True, None)
        used, said = loaded("--watchdog 0")
        assert not used
        assert (said or "").startswith("watchdog0 runs now, and is not used in the capture kernel")


def test_a_watchdog_that_ran_before_the_crash_is_fed_until_all_is_saved(
    kernels: Kernels, image_store: ImageStore, tmp_path: Path
) -> None:
    kernels(HARDWARE.kernel)
    with saving(HARDWARE, image_store, tmp_path, options=f"--watchdog {SECONDS}", before=(ARM,)) as machine:
        line = rf"^vmcapture: watchdog0 \(i6300ESB timer\) resets the machine after {SECONDS} s without progress"
        machine.expect(line, BOOT_TIMEOUT)
        armed = time.monotonic()
        machine.expect(r"^vmcapture: saved in ", SAVE_TIMEOUT)
        assert time.monotonic() - armed > ARMED_BEFORE, "it was too fast to tell"
        machine.wait_exit(BOOT_TIMEOUT)
        assert "WATCHDOG" not in machine.events()
    image = target_image(tmp_path)
    disk.check(image)
    (name,) = disk.names(image, TARGET_FOLDER)
    saved = disk.extract(image, f"{TARGET_FOLDER}/{name}", tmp_path / "saved")
    assert json.loads((saved / "manifest.json").read_text())["complete"]


@pytest.mark.parametrize("case", [HARDWARE, pytest.param(SOFTWARE, marks=pytest.mark.long)], ids=str)
def test_a_save_that_hangs_is_cut(case: Case, kernels: Kernels, image_store: ImageStore, tmp_path: Path) -> None:
    """The disk takes no more bytes, and answers nothing: a person may wait for ever, and so would the job."""
    kernels(case.kernel)
    options = f"--watchdog {SECONDS}"
    with saving(case, image_store, tmp_path, options=options, append="vmcapture.timeout=0") as machine:
        machine.expect(r"saving memory: +[1-9]", BOOT_TIMEOUT + SAVE_TIMEOUT)
        machine.qmp("qom-set", path=f"/objects/{GROUP}", property="limits", value={"bps-total": 1})
        machine.wait_exit(SECONDS + BOOT_TIMEOUT)
        assert ("WATCHDOG" in machine.events()) == (case is HARDWARE)
    assert "vmcapture: poweroff" not in machine.console
    assert ("softdog: Initiating system reboot" in machine.console) == (case is SOFTWARE)


@pytest.mark.long
def test_a_person_at_the_shell_is_not_cut(kernels: Kernels, image_store: ImageStore, tmp_path: Path) -> None:
    kernels(HARDWARE.kernel)
    case = replace(HARDWARE, append="vmcapture.wait=0")
    with saving(case, image_store, tmp_path, options="--watchdog 10", target="LABEL=none") as machine:
        machine.expect(r"^vmcapture: not saved.*\n", BOOT_TIMEOUT)
        machine.shell()
        assert demand(machine, "cat /sys/class/watchdog/watchdog0/state").strip() == "inactive"
        demand(machine, "sleep 20")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
        assert "WATCHDOG" not in machine.events()


@pytest.mark.long
def test_what_cannot_be_disarmed_is_fed_behind_the_shell(
    kernels: Kernels, image_store: ImageStore, tmp_path: Path
) -> None:
    kernels(HARDWARE.kernel)
    case = replace(HARDWARE, append="i6300esb.nowayout=1 vmcapture.wait=0")
    with saving(case, image_store, tmp_path, options="--watchdog 10", target="LABEL=none") as machine:
        machine.expect(r"^vmcapture: watchdog0 cannot be disarmed \(nowayout\): it is fed", BOOT_TIMEOUT)
        machine.shell()
        demand(machine, "sleep 70", 120)
        demand(machine, KILL_THE_FEEDER)  # and nobody else feeds it
        machine.wait_exit(BOOT_TIMEOUT)
        assert "WATCHDOG" in machine.events()
