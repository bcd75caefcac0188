"""Where the crashes of this machine are, seen from its healthy system: below a path of each target's file system.

A target's file system may be mounted anywhere, or not at all: then it is mounted read-only for as long as it is looked
at. What was saved on another machine is there, and not looked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from capture.boot.mounting import inside
from capture.boot.superblocks import options_for_all_of
from capture.boot.targets import LOCAL, kind_of
from capture.errors import CaptureError
from initramfs import devices, mounting, settings
from initramfs.config import Config
from initramfs.devices import Mount
from initramfs.errors import ToolError


class Place(NamedTuple):
    """A directory with crashes: where it is now, and what to call it, where it is mounted for a moment only."""

    path: Path
    shown: str


def mounted(device: Path, path: str) -> Path | None:
    """Return where ``path`` of the file system on a device is now; None where that part of it is not mounted."""
    real = device.resolve()
    there = list(devices.mounts())
    for mount, number in there:
        if _is_on(mount, number, real) and Path(path).is_relative_to(mount.root):
            found = mount.point / Path(path).relative_to(mount.root)
            if _seen(found, [other for other, _ in there]) is mount:
                return found
    return None


def _seen(path: Path, mounts: Sequence[Mount]) -> Mount:
    """Return of which of those that are mounted a path is: of the nearest above it, and of several there the last."""
    above = [mount for mount in mounts if path.is_relative_to(mount.point)]
    return max(enumerate(above), key=lambda entry: (len(entry[1].point.parts), entry[0]))[1]


def _is_on(mount: Mount, number: str, device: Path) -> bool:
    if mount.device.startswith("/dev/") and Path(mount.device).resolve() == device:
        return True
    sys = devices.SYS / "class/block" / device.name / "dev"
    return sys.exists() and sys.read_text(encoding="utf-8").strip() == number


@contextmanager
def places(config: Config) -> Iterator[tuple[list[Place], list[str]]]:
    """Give the directories of all local targets, and a line for each target where crashes cannot be looked for."""
    path = config.path or str(settings.CRASH_DIRECTORY)
    lines: list[str] = []
    with ExitStack() as stack:
        # On the running system: the default target, and where what was on raw partitions is brought to.
        found = [Place(Path(path), path), Place(settings.CRASH_DIRECTORY, str(settings.CRASH_DIRECTORY))]
        for target in config.targets:
            if kind_of(target) != LOCAL:
                lines.append(f"{target}: what is there is not looked at")
                continue
            try:
                found.append(stack.enter_context(opened(target, path, "ro,nosuid,nodev,noexec")))
            except (CaptureError, OSError) as error:
                lines.append(f"{target}: {reason(error, target)}")
        yield _distinct(found), lines


def _distinct(found: Sequence[Place]) -> list[Place]:
    return list({os.path.realpath(place.path): place for place in reversed(found)}.values())[::-1]


@contextmanager
def opened(target: str, path: str, options: str) -> Iterator[Place]:
    """Give ``path`` on a local target: where that is mounted, else mounted with ``options`` for as long as it is used.

    Raises:
        CaptureError: it is not attached, cannot be mounted, or ``path`` is a link that leads away from it.
    """
    device = devices.find_device(target)
    if device is None:
        raise ToolError(f"{target}: it is not attached now")
    if (there := mounted(device, path)) is not None:
        yield Place(there, str(there))
        return
    with mounting.mounted_for_now(device, options_for_all_of(str(device), options)) as root:
        yield Place(inside(root, path, target), f"{target}:{path}")


def reason(error: Exception, target: str) -> str:
    """Return what an error says, without the name of the target, which stands before it anyway."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said.removeprefix(f"{target}: ")
