"""A machine that crashes again and again, on one disk: the newest crashes stay, each whole or marked, and the room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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
    panicked,
    target_image,
)
from tests.guest.qemu import BOOT_TIMEOUT

KEEP, FREE_PERCENT = 3, 50
TARGET_SIZE = "192M"  # a dump takes some 20 MiB: as many as stay leave more than half of it free
# With this on the disk, they do not.
BALLAST = "dd if=/dev/zero of=/run/target/ballast bs=1M count=60"
NO_BALLAST = "rm /run/target/ballast"
SLACK = 10 << 20
"""ext4 keeps some of what is free for itself, whoever asks; and a directory's blocks are no file's."""


class Round(NamedTuple):
    """One crash: whether QEMU is killed in the midst of the save, and what is done to the disk before."""

    cut: bool = False
    before: str = ""


WHOLE, CUT = Round(), Round(cut=True)
ROUNDS = (WHOLE, WHOLE, CUT, WHOLE, WHOLE, WHOLE, Round(before=BALLAST), CUT, WHOLE, Round(before=NO_BALLAST))


def load(case: Case, final: str, target: str, append: str) -> str:
    return f"{OURS.load(case, final, target, append)} --keep {KEEP} --free {FREE_PERCENT}%"


def on_the_target(command: str) -> str:
    mounted = f"mkdir -p /run/target && mount -t ext4 LABEL={TARGET_LABEL} /run/target"
    return f"{mounted} && {command} && umount /run/target"


@pytest.mark.long
def test_of_crashes_in_a_row_the_newest_stay_and_none_is_half_written(
    kernels: Callable[[str], Kernel], image_store: ImageStore, tmp_path: Path
) -> None:
    """One that was cut stays as it is, marked: the next crash is another one. It counts, and goes in its turn."""
    kernels(RESCUE.kernel)  # skips here, where it can say why
    case = replace(RESCUE, target_size=TARGET_SIZE)
    image = target_image(tmp_path)
    before: list[str] = []
    cut: set[str] = set()
    sizes: dict[str, int] = {}
    for number, made in enumerate(ROUNDS):
        with panicked(
            case,
            image_store,
            tmp_path,
            before=(on_the_target(made.before),) if made.before else (),
            saver=Saver(OURS.name, load),
            target_kept=number > 0,
        ) as machine:
            if made.cut:
                machine.expect(r"saving memory: +[3-8]\d%", BOOT_TIMEOUT + SAVE_TIMEOUT)
                machine.kill()
            else:
                machine.expect(r"^vmcapture: saved in ", BOOT_TIMEOUT + SAVE_TIMEOUT)
                machine.wait_exit(BOOT_TIMEOUT)
        found = tmp_path / f"after-{number}"
        there = Path(shutil.copy(image, tmp_path / "looked-at.ext4"))
        if made.cut:
            disk.replay(there)  # of the copy: the next boot finds the disk as the power cut left it
        disk.check(there)
        names = disk.names(there, TARGET_FOLDER)
        *older, newest = names
        assert newest not in before
        assert older == before[len(before) - len(older) :], "the newest of them"
        if made.cut:
            assert older == before, "nothing goes for what is not whole"
            cut.add(newest)
        crashes = disk.extract(there, TARGET_FOLDER, found)
        for name in names:
            (is_marked if name in cut else is_whole)(crashes / name)
        sizes[newest] = sum(path.stat().st_size for path in (crashes / newest).iterdir())
        if not made.cut:
            free, total = disk.room(there)
            floor = total * FREE_PERCENT // 100
            assert free >= floor
            assert len(names) <= KEEP
            gone = before[: len(before) - len(older)]
            needed = len(names) == KEEP or not gone or free - sizes[gone[-1]] < floor + SLACK
            assert needed, f"{gone} went for nothing: {len(names)} are left, {free} bytes of {total} free"
            assert made.before != BALLAST or len(names) < KEEP, "the floor was what took them"
        before = names
        shutil.rmtree(found)
    assert len(sizes) == len(ROUNDS)


def is_whole(folder: Path) -> None:
    assert json.loads((folder / "manifest.json").read_text())["complete"]
    with KdumpFile(folder / "vmcore") as dump:
        report = verify(dump, None, progress=False)
    assert report.hashed
    assert report.good, report.text()
    assert not list(folder.glob("*.incomplete"))


def is_marked(folder: Path) -> None:
    """What a power cut leaves: the small files that were finished, and a dump that says what it lacks."""
    assert "Kernel panic - not syncing" in (folder / "vmcore-dmesg.txt").read_text()
    assert json.loads((folder / "registers.json").read_text())["panicked_cpu"] is not None
    assert not (folder / "manifest.json").exists()
    assert not (folder / "vmcore").exists()
    with KdumpFile(folder / "vmcore.incomplete") as dump:
        report = verify(dump, None, progress=False)
    assert (report.exit_status, report.damaged) == (3, 0), report.text()
