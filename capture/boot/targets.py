"""The target: find the file system that the command line names, mount it, unmount it.

Searching and mounting are left to ``findfs`` and ``mount`` (busybox in the capture kernel): they know every file
system, and their one line of error is worth passing on.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capture.console import Console
from capture.errors import TargetError

MOUNT_POINT = Path("/run/vmcapture/target")
_POLL = 0.5


@contextmanager
def mounted_target(target: str, wait: int, console: Console) -> Iterator[Path]:
    """Mount ``target`` (``LABEL=``, ``UUID=`` or a device path), waiting up to ``wait`` seconds for it to appear.

    Raises:
        TargetError: it did not appear, or cannot be mounted read-write.
    """
    device = find_device(target, wait, console)
    MOUNT_POINT.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(MOUNT_POINT):  # a save that was killed left it behind; one that runs keeps it busy
        _run(["umount", str(MOUNT_POINT)], f"{MOUNT_POINT} is in use: is another save running?")
    _run(["mount", "-o", "rw", device, str(MOUNT_POINT)], f"{target} ({device}) cannot be mounted")
    try:
        yield MOUNT_POINT
    finally:
        os.sync()
        try:
            _run(["umount", str(MOUNT_POINT)], f"{target} cannot be unmounted")
        except TargetError as error:  # everything is on the disk: this must not hide what was saved, or why it was not
            console.say(f"{error}; what was saved is synced")


def find_device(target: str, wait: int, console: Console) -> str:
    """Return the block device of ``target``.

    Raises:
        TargetError: there is none after ``wait`` seconds.
    """
    deadline = time.monotonic() + wait
    announced = False
    while True:
        device = _look_up(target)
        if device is not None:
            return device
        if time.monotonic() >= deadline:
            raise TargetError(
                f"target {target}: no such file system after {wait} s; attach it and save again, "
                "or mount any other and name it: vmcapture save DIR"
            )
        if not announced:
            console.say(f"waiting up to {wait} s for {target}")
            announced = True
        time.sleep(_POLL)


def _look_up(target: str) -> str | None:
    if "=" not in target:
        return target if Path(target).is_block_device() else None
    try:
        answer = subprocess.run(["findfs", target], capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(f"findfs cannot be run ({error.strerror}): name the target by its device, /dev/...") from None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _run(command: list[str], failure: str) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(f"{failure}: {command[0]} cannot be run: {error.strerror}") from None
    if answer.returncode:
        said = " ".join((answer.stderr or answer.stdout).split()) or f"{command[0]} ended with {answer.returncode}"
        raise TargetError(f"{failure}: {said}")
