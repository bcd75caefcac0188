"""A partition without a file system as a target (``raw:``): what the image needs, and how the capture kernel finds it.

The capture kernel will format it, so that it has to be the right one whatever the disks are called then: a partition is
known by its PARTUUID, a logical volume by its name, and nothing else is taken.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from capture.boot.raw import FILE_SYSTEM, describe, is_ours, signature
from capture.boot.targets import RAW, place_of
from capture.errors import TargetError, UsageError
from initramfs import devices, tools, volumes
from initramfs.devices import Needed
from initramfs.errors import ImageError

TAG = "PARTUUID="
PROGRAMS = {"mke2fs": "e2fsprogs", "blkid": "util-linux", "findfs": "util-linux"}
"""What goes into the image → its package. Of blkid and findfs busybox has its own, which know too little."""


def needed(target: str) -> Needed:
    """Return everything that a save on the target needs.

    Raises:
        ImageError: it is not there, is in use, or has something on it.
        ToolError: a program is not installed.
    """
    node = _node(target)
    if node is None:
        raise ImageError(f"{devices.absent(target)}; is it attached?")
    _refuse_what_is_in_use(target, node)
    stable_name(target, node)
    programs = tuple(tools.require(name, package) for name, package in PROGRAMS.items())
    return volumes.needed_by_device(node) + Needed((FILE_SYSTEM,), binaries=programs)


def named(target: str, say: Callable[[str], object]) -> str:
    """Return the target as the capture kernel finds it; a disk that is not there may be attached when it is needed.

    Raises:
        ImageError: it is in use, has something on it, or could be mistaken for another one.
    """
    node = _node(target)
    if node is None:
        say(devices.absent(target))
        return target
    _refuse_what_is_in_use(target, node)
    return f"{RAW}:{stable_name(target, node)}"


def stable_name(target: str, node: Path) -> str:
    """Return what names the device in any kernel.

    Raises:
        ImageError: nothing does.
    """
    said = tools.run([tools.require("blkid", "util-linux"), "-p", "-o", "export", node], good=(0, 2))
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    name = f"{TAG}{found['PART_ENTRY_UUID']}" if "PART_ENTRY_UUID" in found else volumes.stable_name(node)
    if name is None:
        raise ImageError(
            f"{target}: the capture kernel would format it, and {node} may be another disk there: name a partition (it "
            "has a PARTUUID) or a logical volume"
        )
    return name


def _node(target: str) -> Path | None:
    """Return the device, None when it is not there now.

    Raises:
        UsageError: it is named in a way that says too little.
    """
    place = place_of(target)
    if not place.startswith(("/dev/", TAG)):
        raise UsageError(f"{target}: a raw target is {RAW}:{TAG}… or {RAW}:/dev/…, a partition or a logical volume")
    return devices.find_device(place, tags=(TAG.rstrip("="),))


def _refuse_what_is_in_use(target: str, node: Path) -> None:
    try:
        found = signature(str(node))
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except TargetError as error:
        raise ImageError(f"{target}: {error}") from None
    except OSError as error:
        why = "in use: unmount it" if error.errno == errno.EBUSY else error.strerror
        raise ImageError(f"{target}: {node} is {why}") from None
    if found is not None and not is_ours(found):
        raise ImageError(
            f"{target}: {node} has {describe(found)} on it, and the capture kernel would format it; when nobody needs "
            f"that: wipefs -a {node}"
        )
