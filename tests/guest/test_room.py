"""Room on the target of a real crash boot: older crashes go after the save, those that are to stay are left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
    panicked,
    target_image,
)
from tests.guest.qemu import BOOT_TIMEOUT

OLDER = tuple(f"localhost-2001-01-0{day}-10:00:00" for day in (1, 2, 3))
OTHERS = ("localhost-2001-01-01-09:00:00", "web1-2001-01-01-10:00:00")
"""Not a crash, and not of this host."""
# Each of the older ones has 48 MiB, as a dump may have that was cut short.
FILL = (
    f"mkdir -p /run/target && mount -t ext4 LABEL={TARGET_LABEL} /run/target",
    f"mkdir -p /run/target{TARGET_FOLDER} && cd /run/target{TARGET_FOLDER} && mkdir {' '.join((*OLDER, *OTHERS))}",
    "for older in localhost-*-10*; do dd if=/dev/zero of=$older/vmcore.incomplete bs=1M count=48; done",
    f"echo mine > {OTHERS[0]}/notes.txt && echo dump > {OTHERS[1]}/vmcore.incomplete && cd / && umount /run/target",
)


def load(case: Case, final: str, target: str, append: str) -> str:
    return f"{OURS.load(case, final, target, append)} --keep 3 --free 50%"


def test_after_a_crash_as_many_are_left_as_were_asked_for_and_the_room_is_there(
    kernels: Callable[[str], Kernel], image_store: ImageStore, tmp_path: Path
) -> None:
    """By number the oldest goes; the next one because less than half of the disk is free."""
    kernels(RESCUE.kernel)  # skips here, where it can say why
    case = replace(RESCUE, target_size="256M")
    with panicked(case, image_store, tmp_path, before=FILL, saver=Saver(OURS.name, load)) as machine:
        machine.expect(r"^vmcapture: saved in ", BOOT_TIMEOUT + SAVE_TIMEOUT)
        machine.wait_exit(BOOT_TIMEOUT)
    image = target_image(tmp_path)
    disk.check(image)
    *older, new = sorted(set(disk.names(image, TARGET_FOLDER)) - set(OTHERS))
    assert older == [OLDER[2]], "the newest of the older ones"
    assert disk.names(image, f"{TARGET_FOLDER}/{older[0]}") == ["vmcore.incomplete"]
    assert disk.names(image, f"{TARGET_FOLDER}/{OTHERS[0]}") == ["notes.txt"]
    assert disk.names(image, f"{TARGET_FOLDER}/{OTHERS[1]}") == ["vmcore.incomplete"]
    saved = disk.extract(image, f"{TARGET_FOLDER}/{new}", tmp_path / "saved")
    assert json.loads((saved / "manifest.json").read_text())["complete"]
    assert verify(KdumpFile(saved / "vmcore"), None, progress=False).exit_status == 0
    first, second = [line for line in machine.console.splitlines() if line.startswith("vmcapture: removed ")]
    assert first.startswith(f"vmcapture: removed {OLDER[0]} (48.")
    assert first.rstrip().endswith("vmcapture.keep=3")
    assert second.startswith(f"vmcapture: removed {OLDER[1]} (48.")
    assert "vmcapture.free= wants " in second
