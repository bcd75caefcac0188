"""A target that is a local file system: what the image needs for it, and how the capture kernel finds it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from initramfs import devices, superblock, volumes
from initramfs.devices import Mount, Needed
from initramfs.errors import ImageError, KexecError
from initramfs.wishes import Say, Wishes


def needed(target: str, _wishes: Wishes | None = None) -> Needed:
    """Return everything that a save on the target needs.

    Raises:
        ImageError: it is not there, has no file system, or stands on what the capture kernel cannot assemble.
    """
    node = devices.find_device(target)
    if node is None:
        raise ImageError(f"{devices.absent(target)}; is it attached?")
    device = volumes.needed_by_device(node)
    kind = devices.filesystem_of(str(node))
    if kind is None:
        raise ImageError(
            f"{target}: blkid finds no file system on it; make one, mkfs.ext4 {node}, or name another disk"
        )
    _refuse_what_is_no_file_system(target, node)
    _refuse_parts(target, node)
    return device + devices.modules_for_filesystem(kind)


def needed_by_mount(mount: Mount) -> Needed:
    """Return everything that a save on a mounted file system needs; raises as ``needed`` does."""
    if not mount.device.startswith("/dev/"):
        raise ImageError(
            f"{mount.point} is a {mount.kind} without a block device; name the disk for the dump with "
            "--target, or its modules with --module"
        )
    _refuse_served(mount)
    _refuse_parts(str(mount.point), Path(mount.device))
    return volumes.needed_by_device(Path(mount.device)) + devices.modules_for_filesystem(mount.kind)


def named(target: str, say: Say) -> str:
    """Return the target as the capture kernel finds it; a disk that is not there may be attached when it is needed.

    Raises:
        ImageError: it stands on what the capture kernel cannot assemble, or what is on it cannot be mounted.
    """
    device = devices.find_device(target)
    if device is None:
        say(devices.absent(target))
    else:
        volumes.needed_by_device(device)  # refuses what cannot work
        _refuse_what_is_no_file_system(target, device)
        _refuse_parts(target, device)
        if target.startswith("/dev/"):  # links of udev are not there in the capture kernel, and disks may change names
            uuid = devices.uuid_of(str(device))
            target = f"UUID={uuid}" if uuid else volumes.stable_name(device) or str(device.resolve())
    return target


def named_mount(mount: Mount) -> str:
    """Return the file system that is mounted there as the capture kernel finds it.

    Raises:
        KexecError: it has no UUID.
        ImageError: it stands on what the capture kernel cannot assemble.
    """
    uuid = devices.uuid_of(mount.device)
    if uuid is None:
        raise KexecError(f"{mount.point} is on {mount.device}, which has no UUID: name the disk with --target")
    volumes.needed_by_device(Path(mount.device))  # refuses what cannot work
    _refuse_served(mount)
    _refuse_parts(str(mount.point), Path(mount.device))
    return f"UUID={uuid}"


def _refuse_served(mount: Mount) -> None:
    if mount.kind.partition(".")[0] in ("fuse", "fuseblk"):
        raise ImageError(
            f"{mount.point} is on {mount.device}, which a program serves (FUSE): the capture kernel has "
            f"no such program; {volumes.REMEDY}"
        )


def _refuse_what_is_no_file_system(target: str, node: Path) -> None:
    """Refuse what has a type and cannot be mounted: swap, a part of an array or of a volume group, LUKS."""
    kind = devices.other_use_of(str(node))
    if kind is None:
        return
    if kind == "crypto_LUKS":
        raise ImageError(
            f"{target}: {node} is encrypted (LUKS): nobody gives the capture kernel its key; {volumes.REMEDY}, and "
            "have the dump itself encrypted: --recipients"
        )
    raise ImageError(f"{target}: there is {kind} on {node}, which is no file system; name the one to save on")


def _refuse_parts(what: str, node: Path) -> None:
    """Refuse a file system of which more than one device is needed: the image knows of one only."""
    with contextlib.suppress(OSError):  # who may not read it may build an image all the same
        part = superblock.elsewhere(node)
        if part is not None:
            raise ImageError(
                f"{what}: of the file system on {node}, {part} is on another device: the capture kernel cannot put "
                f"that together; {volumes.REMEDY}"
            )
