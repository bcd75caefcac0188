"""The target: find the file system that the command line names, mount it, unmount it.

Searching and mounting are left to ``findfs`` and ``mount`` (busybox in the capture kernel): they know every file
system, and their one line of error is worth passing on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from capture import pulse
from capture.console import Console
from capture.errors import TargetError

MOUNT_POINT = Path("/run/vmcapture/target")
"""Where a target is mounted; at ``target-2`` and so on while something hangs there."""
_MOST_MOUNT_POINTS = 9
_POLL = 0.5


@contextmanager
def mounted_target(target: str, wait: int, console: Console, device: str | None = None) -> Iterator[Path]:
    """Mount ``target`` (``LABEL=``, ``UUID=`` or a device path), waiting up to ``wait`` seconds for it to appear.

    ``device`` is where it was found before (``devices_of``); where that is gone, it is looked for again.

    Raises:
        TargetError: it did not appear, or cannot be mounted read-write.
    """
    if device is None or not Path(device).is_block_device():
        device = find_device(target, wait, console)
    point = _mount_point()
    _run(["mount", "-o", "rw", device, str(point)], f"{target} ({device}) cannot be mounted")
    try:
        yield point
    finally:
        try:
            _run(["umount", str(point)], f"{target} cannot be unmounted")
        except TargetError as error:  # everything is on the disk: this must not hide what was saved, or why it was not
            console.say(f"{error}; what was saved is synced")


def _mount_point() -> Path:
    """Return the first place with nothing mounted on it.

    A save that was killed may have left its target mounted: it is unmounted. Where somebody works in it, or a disk
    hangs (``give_up_mount_points``), that place stays as it is.

    Raises:
        TargetError: all places are in use.
    """
    for number in range(1, _MOST_MOUNT_POINTS + 1):
        point = MOUNT_POINT.with_name(f"{MOUNT_POINT.name}-{number}") if number > 1 else MOUNT_POINT
        if _given_up(point).exists():
            continue
        point.mkdir(parents=True, exist_ok=True)
        try:
            if os.path.ismount(point):
                _run(["umount", str(point)], "in use")
        except TargetError:
            continue
        return point
    raise TargetError(f"{MOUNT_POINT} to {point.name} are all in use: unmount them")


def give_up_mount_points() -> None:
    """Touch no more what is mounted now: a disk hangs, and whoever touches it hangs too."""
    for point in MOUNT_POINT.parent.glob(f"{MOUNT_POINT.name}*"):
        _given_up(point).touch()


def _given_up(point: Path) -> Path:
    return point.with_name(f"hangs-{point.name}")


def devices_of(targets: Iterable[str]) -> dict[str, str]:
    """Return the devices of those targets that are there now.

    To look for one, all disks are read: to be done before any of them hangs.
    """
    found: dict[str, str] = {}
    for target in targets:
        with contextlib.suppress(TargetError):
            device = _look_up(target)
            if device is not None:
                found[target] = device
    return found


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
                f"target {target}: no such file system{f' after {wait} s' if wait else ''}; attach it and save again, "
                "or mount any other and name it: vmcapture save DIR"
            )
        if not announced:
            console.say(f"waiting up to {wait} s for {target}")
            announced = True
        pulse.beat()  # to wait is what was asked for
        time.sleep(_POLL)


def _look_up(target: str) -> str | None:
    if "=" not in target:
        return target if Path(target).is_block_device() else None
    import subprocess  # the process that watches over the job has no need of it

    try:
        with pulse.at_target():
            answer = subprocess.run(["findfs", target], capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(f"findfs cannot be run ({error.strerror}): name the target by its device, /dev/...") from None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _run(command: list[str], failure: str) -> None:
    import subprocess  # see _look_up

    try:
        with pulse.at_target():
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(f"{failure}: {command[0]} cannot be run: {error.strerror}") from None
    if answer.returncode:
        said = " ".join((answer.stderr or answer.stdout).split()) or f"{command[0]} ended with {answer.returncode}"
        raise TargetError(f"{failure}: {said}")
