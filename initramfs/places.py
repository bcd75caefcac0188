"""Where the crashes of this machine are, seen from its healthy system: below a path of each target's file system.

A target's file system may be mounted anywhere, or not at all: then it is mounted read-only for as long as it is looked
at. What was saved on another machine is there, and not looked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from capture.boot.targets import LOCAL, kind_of
from capture.errors import CaptureError
from initramfs import devices, settings, tools
from initramfs.config import Config
from initramfs.devices import Mount


class Place(NamedTuple):
    """A directory with crashes: where it is now, and what to call it, where it is mounted for a moment only."""

    path: Path
    shown: str


def mounted(device: Path, path: str) -> Path | None:
    """Return where ``path`` of the file system on a device is now; None where that part of it is not mounted."""
    real = device.resolve()
    for mount, number in devices.mounts():
        if _is_on(mount, number, real) and Path(path).is_relative_to(mount.root):
            return mount.point / Path(path).relative_to(mount.root)
    return None


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
        found = [Place(Path(path), path)]  # the file system of the running system: the default, and where others end
        for target in config.targets:
            if kind_of(target) != LOCAL:
                lines.append(f"{target}: what is there is not looked at")
                continue
            try:
                found.append(stack.enter_context(_opened(target, path)))
            except (CaptureError, OSError) as error:
                lines.append(f"{target}: {error}")
        yield _distinct(found), lines


def _distinct(found: Sequence[Place]) -> list[Place]:
    return list({place.path.resolve(): place for place in reversed(found)}.values())[::-1]


@contextmanager
def _opened(target: str, path: str) -> Iterator[Place]:
    device = devices.find_device(target)
    if device is None:
        raise CaptureError("it is not attached now")
    if (there := mounted(device, path)) is not None:
        yield Place(there, str(there))
        return
    with mounted_for_now(device, "ro,nosuid,nodev,noexec") as root:
        yield Place(root / path.lstrip("/"), f"{target}:{path}")


@contextmanager
def mounted_for_now(device: Path, options: str) -> Iterator[Path]:
    """Mount the file system on a device where nobody else looks, and unmount it.

    Raises:
        ToolError: it cannot be mounted.
    """
    with tempfile.TemporaryDirectory(prefix="vmcapture-") as point:
        tools.run([tools.require("mount", "mount"), "-o", options, device, point])
        try:
            yield Path(point)
        finally:
            tools.run([tools.require("umount", "mount"), point])
