"""Where file systems are mounted: what all kinds of target share.

``mount`` is left to busybox, or to the program that a kind brings: its one line of error is worth passing on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from capture import pulse
from capture.boot.programs import run
from capture.console import Console
from capture.errors import TargetError

MOUNT_POINT = Path("/run/vmcapture/target")
"""Where a target is mounted; at ``target-2`` and so on while something hangs there."""
_MOST_MOUNT_POINTS = 9


@contextmanager
def mounted(command: Sequence[str], name: str, what: str, console: Console) -> Iterator[Path]:
    """Run ``command`` with a mount point behind it, yield that, and unmount it.

    ``name`` is the target as people gave it, ``what`` how a line of error names it.

    Raises:
        TargetError: it cannot be mounted.
    """
    with mounted_by(lambda point: run([*command, str(point)], f"{what} cannot be mounted"), name, console) as point:
        yield point


@contextmanager
def mounted_by(mount: Callable[[Path], object], name: str, console: Console) -> Iterator[Path]:
    """Have ``mount`` mount something on a mount point, yield that, and unmount it; ``name`` is the target.

    Raises:
        TargetError: of ``mount``, or no mount point is free.
    """
    point = _mount_point()
    mount(point)
    try:
        yield point
    finally:
        try:
            for _ in range(max(1, _mounts_on(point))):
                run(["umount", str(point)], f"{name} cannot be unmounted")
        except TargetError as error:  # everything is on the disk: this must not hide what was saved, or why it was not
            console.say(f"{error}; what was saved is synced")


def hold(point: Path) -> None:
    """Mount what is mounted on ``point`` there once more, upon itself.

    A program that serves a mount (FUSE) takes it away when it ends by itself, and the place would be a directory in our
    memory: a save that has just begun would go there. So it takes away what lies above, and what is below says that
    nobody is behind it.

    Raises:
        TargetError: it cannot be.
    """
    run(["mount", "-o", "bind", str(point), str(point)], f"{point} cannot be held")


def inside(root: Path, path: str, target: str) -> Path:
    """Return the directory on the mounted target; a symbolic link must not lead out of it, into our own memory."""
    place = root / path.lstrip("/")
    with pulse.at_target():
        real = Path(os.path.realpath(place))  # Path.resolve() does not survive a link to itself
    if not real.is_relative_to(os.path.realpath(root)):
        raise TargetError(
            f"{target}: {path} on it is a symbolic link to {real}: name the directory itself with vmcapture.path="
        )
    return place


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
        try:
            for _ in range(_mounts_on(point)):
                run(["umount", str(point)], "in use")
        except TargetError:
            continue
        point.mkdir(parents=True, exist_ok=True)
        return point
    raise TargetError(f"{MOUNT_POINT} to {point.name} are all in use: unmount them")


def _mounts_on(point: Path) -> int:
    """Return how many mounts lie on ``point``, one above the other, without touching them: who serves one may be gone.

    See proc_pid_mountinfo(5).
    """
    name = str(Path(os.path.realpath(point.parent)) / point.name)
    for character in "\\ \t\n":
        name = name.replace(character, f"\\{ord(character):03o}")
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [line.split(" ")[4] for line in lines].count(name)


def give_up_mount_points() -> None:
    """Touch no more what is mounted now: a disk hangs, and whoever touches it hangs too."""
    for point in MOUNT_POINT.parent.glob(f"{MOUNT_POINT.name}*"):
        _given_up(point).touch()


def _given_up(point: Path) -> Path:
    return point.with_name(f"hangs-{point.name}")
