"""A directory of the virtual machine's host (``virtiofs:TAG``) as a target: tried, and what the image needs for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from capture.boot.targets import VIRTIOFS, place_of
from capture.errors import UsageError
from initramfs import devices, mounting
from initramfs.devices import SYS, Mount, Needed
from initramfs.errors import ImageError, ToolError
from initramfs.wishes import Wishes


def needed(target: str, wishes: Wishes | None = None) -> Needed:
    """Return everything that a save on the target needs.

    Raises:
        ImageError: it cannot be mounted now.
    """
    if wishes is None or wishes.check:
        _try(target)
    return devices.needed(driver_modules()) + devices.modules_for_filesystem(VIRTIOFS)


def named(target: str, say: Callable[[str], object]) -> str:
    """Return the target as the capture kernel finds it; one that cannot be mounted now is said, and may come back."""
    try:
        _try(target)
    except ImageError as error:
        say(str(error))
    return target


def of_mount(mount: Mount) -> str:
    """Return the target behind a mount."""
    return f"{VIRTIOFS}:{mount.device}"


def driver_modules(sys: Path = SYS) -> tuple[str, ...]:
    """Return the modules of all virtiofs devices: which of them has the tag, older kernels do not say."""
    found = (
        devices.driver_modules(link.resolve(), sys)
        for link in sorted(sys.glob("bus/virtio/drivers/virtiofs/virtio[0-9]*"))
    )
    return tuple(dict.fromkeys(name for names in found for name in names))


def _try(target: str) -> None:
    """Mount the target, and unmount it.

    Raises:
        UsageError: it has no tag.
        ImageError: it cannot be mounted, or written to.
    """
    tag = place_of(target)
    if not tag:
        raise UsageError(f"{target}: a tag is missing, the name that the host gave the directory: {VIRTIOFS}:TAG")
    try:
        with mounting.mounted_for_now(tag, kind=VIRTIOFS) as point, tempfile.TemporaryFile(dir=point):
            pass
    except ToolError as error:
        raise ImageError(f"{target} cannot be mounted here: {error}; does its host offer {tag}?") from None
    except OSError as error:
        raise ImageError(f"{target} cannot be written to: {error.strerror}; is it read-only on the host?") from None
