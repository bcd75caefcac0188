"""Volumes that have to be put together before a target on them can be found: md arrays, logical volumes of LVM.

The image names them (VOLUMES, written by initramfs.volumes), from the bottom up, and nothing else is put together here:
of what the machine had besides, nothing is touched.

An array is started without all its disks only when those have not come for a while. It is not synchronised here: the
healthy system goes on with that. A dirty array with parity that lacks a disk is not started at all, as the kernel would
have it: what it would make of the missing disk may be wrong, and nobody would be told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from capture.boot.programs import run
from capture.errors import TargetError

VOLUMES = Path("/etc/vmcapture/volumes")
"""A folder of the image: a file for each, ``md UUID NAME`` or ``lvm DM-UUID NAME``; the files' names say the order."""
MD, LVM = "md", "lvm"
SYS = Path("/sys")
PATIENCE = 10.0
"""Seconds for all disks of an array to come; half of the time that there is, where that is less."""
_LVM_UUID = (6, 4, 4, 4, 4, 4, 6)
"""How many characters of a UUID of LVM stand between two dashes."""


class Volume(NamedTuple):
    """One volume: its kind, what it is known by, its name on the healthy machine, and its place in the order."""

    kind: str
    identity: str
    name: str
    number: int


def volumes() -> list[Volume]:
    """Return the volumes that this image is for, from the bottom up."""
    found: list[Volume] = []
    if not VOLUMES.is_dir():
        return found
    for number, path in enumerate(sorted(VOLUMES.iterdir())):
        kind, identity, name = path.read_text(encoding="utf-8").split()
        found.append(Volume(kind, identity, name, number))
    return found


class Assembly:
    """Puts the volumes together, as often as it is asked to, until all are there."""

    def __init__(self, wait: float = 2 * PATIENCE, say: Callable[[str], object] = lambda _: None) -> None:
        """``wait``: for how many seconds somebody will ask. ``say`` is told of arrays that lack a disk."""
        self.lacking: dict[str, str] = {}
        """Volumes that are not there yet → why."""
        self._volumes = volumes()
        self._say = say
        self._patient_until = time.monotonic() + min(PATIENCE, wait / 2)

    def go_on(self) -> None:
        """Put together what is not together yet, and can be."""
        for volume in self._volumes:
            try:
                if volume.kind == MD:
                    _assemble(volume, self._say, degraded=time.monotonic() >= self._patient_until)
                else:
                    _activate(volume)
            except TargetError as error:
                self.lacking[volume.name] = str(error)
            else:
                self.lacking.pop(volume.name, None)

    @property
    def line(self) -> str:
        """What is lacking, and why."""
        return "; ".join(self.lacking.values())


def is_member(device: str) -> bool:
    """Tell whether a device belongs to one of the arrays, put together or not: what is on it is not to be mounted."""
    arrays = [volume.identity for volume in volumes() if volume.kind == MD]
    if not arrays:
        return False
    try:
        said = run(["mdadm", "--examine", "--export", device], device)
    except TargetError:  # it has no superblock
        return False
    return any(f"MD_UUID={uuid}" in said.splitlines() for uuid in arrays)


def tops(device: str, sys: Path | None = None) -> list[str]:
    """Return the devices at the top of all that stands on ``device``; that is itself where nothing does.

    What lies below a mirror, say, shows the label and the UUID of the file system on it.
    """
    place = (sys or SYS) / "class/block" / Path(device).resolve().name
    holders = sorted(entry.name for entry in (place / "holders").glob("*"))
    if not holders:
        return [device]
    return list(dict.fromkeys(top for name in holders for top in tops(f"/dev/{name}", sys)))


def _assemble(volume: Volume, say: Callable[[str], object], *, degraded: bool) -> None:
    name = f"md{volume.number}"
    array = SYS / "block" / name / "md"
    if (array / "array_state").exists():
        if _read(array / "array_state") not in ("clear", "inactive"):
            return
        with contextlib.suppress(TargetError):  # what came of an earlier try, with a disk less
            run(["mdadm", "--stop", f"/dev/{name}"], name)
    run(
        [
            "mdadm",
            "--assemble",
            f"/dev/{name}",
            "--config=partitions",
            f"--uuid={volume.identity}",
            "--run" if degraded else "--no-degraded",
        ],
        f"array {volume.name} cannot be assembled",
    )
    with contextlib.suppress(OSError):  # an array without redundancy has none
        (array / "sync_action").write_text("frozen")
    lacking = _read(array / "degraded")
    if lacking not in ("", "0"):
        say(f"array {volume.name} lacks {lacking} of its disks, and is used without")


def _activate(volume: Volume) -> None:
    if _is_active(volume.identity):
        return
    said = run(
        ["lvm", "lvchange", "--sysinit", "-K", "-ay", "-S", f"lv_uuid={lvm_uuid(volume.identity)}"],
        f"logical volume {volume.name} cannot be activated",
    )
    if not _is_active(volume.identity):  # nothing to be selected is no error
        raise TargetError(f"logical volume {volume.name}: {' '.join(said.split()) or 'no disk carries it'}")


def _is_active(identity: str) -> bool:
    return any(_read(path) == identity for path in (SYS / "block").glob("dm-*/dm/uuid"))


def _read(path: Path) -> str:
    """Return what a file of sysfs says; nothing where it is not, or not any more."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def lvm_uuid(identity: str) -> str:
    """Return the last UUID in that of a device-mapper device (``LVM-`` group, volume) as LVM writes it."""
    text, pieces = identity[-sum(_LVM_UUID) :], []
    for length in _LVM_UUID:
        pieces.append(text[:length])
        text = text[length:]
    return "-".join(pieces)
