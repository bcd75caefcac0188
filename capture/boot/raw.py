"""A partition without a file system: the capture kernel makes one there, saves into it, and ``vmcapture collect`` takes
everything off again at the next boot.

Nothing is ever overwritten: whatever has a signature that is known (a file system, swap, a part of an array) and is not
ours is refused, here and when the image is built. What is ours was not collected yet, and gets one crash more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capture import pulse
from capture.boot import mounting
from capture.boot.local import find_device
from capture.boot.programs import run
from capture.boot.targets import place_of
from capture.console import Console
from capture.errors import TargetError

LABEL = "vmcapture-raw"
"""What the file system is called that the capture kernel makes."""
FILE_SYSTEM = "ext4"
_READABLE = 1 << 20
"""Bytes at the start that are to be readable: blkid says of a disk that fails what it says of an empty one."""
# A journal of 4 MiB; no inode tables written in advance, and few inodes: a dump is a few large files.
_MAKE = ("mke2fs", "-q", "-F", "-t", FILE_SYSTEM, "-L", LABEL, "-m", "0", "-i", "4194304", "-J", "size=4")
_EXTENDED = ("-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard")


@contextmanager
def mounted(target: str, wait: int, console: Console, device: str | None = None) -> Iterator[Path]:
    """Mount ``target``, with a new file system where there is none, waiting up to ``wait`` seconds for it to appear.

    ``device`` is where it was found before; where that is gone, it is looked for again.

    Raises:
        TargetError: it did not appear, has something else on it, or cannot be mounted.
    """
    if device is None or not Path(device).is_block_device():
        device = find_device(place_of(target), wait, console)
    found = signature(device)
    if found is None:
        run([*_MAKE, *_EXTENDED, device], f"{target} ({device}): no file system can be made")
    elif not is_ours(found):
        raise TargetError(
            f"{target} ({device}) has {describe(found)} on it: nothing is overwritten; mount any disk and name it: "
            "vmcapture save DIR"
        )
    # Nobody is to fill inode tables while a dump is written.
    command = ["mount", "-t", FILE_SYSTEM, "-o", "rw,noinit_itable", device]
    with mounting.mounted(command, target, f"{target} ({device})", console) as point:
        yield point


def signature(device: str) -> dict[str, str] | None:
    """Return what blkid (that of util-linux) says of what is on a device; None when it knows nothing of it.

    Raises:
        TargetError: the device cannot be read, or blkid does not know which of several things is on it.
    """
    try:
        with pulse.at_target():
            handle = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.pread(handle, _READABLE, 0)
            finally:
                os.close(handle)
    except OSError as error:
        raise TargetError(f"{device} cannot be read: {error.strerror}") from None
    said = run(["blkid", "-p", "-o", "export", device], f"{device}: what is on it is not clear", good=(0, 2))
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    return found if "TYPE" in found or "PTTYPE" in found else None


def is_ours(found: dict[str, str]) -> bool:
    """Tell a file system that a capture kernel made."""
    return found.get("TYPE") == FILE_SYSTEM and found.get("LABEL") == LABEL


def describe(found: dict[str, str]) -> str:
    """Name what is on a device."""
    label = f" ({found['LABEL']})" if "LABEL" in found else ""
    return found.get("TYPE", f"a partition table ({found.get('PTTYPE')})") + label
