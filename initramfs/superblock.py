"""What the superblock of a file system says: how much room it has, and what other devices it takes to mount it.

Sources: Documentation/filesystems/ext4/super.rst; fs/xfs/libxfs/xfs_format.h (struct xfs_dsb);
include/uapi/linux/btrfs_tree.h (struct btrfs_super_block). One that was not unmounted cleanly may say too much or too
little room; who mounts it next finds out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from capture.boot import superblocks


class Room(NamedTuple):
    """Bytes that are free for root, and bytes in all."""

    free: int
    total: int


_Said = TypeVar("_Said")
_EXT, _EXT_64BIT, _EXT_HAS_JOURNAL = 0x400, 0x80, 0x4
_BTRFS = 0x10000


def room(device: Path) -> Room | None:
    """Return the room on a device; None where its file system is of another kind.

    Raises:
        OSError: it cannot be read.
    """
    return _said(device, _READERS)


def elsewhere(device: Path) -> str | None:
    """Return what of the file system on a device is on other devices; None where nothing is, or nobody knows.

    The kernel does not find those by itself: ``mount`` has to name them (xfs: logdev=, rtdev=), something has to scan
    for them first (btrfs), or they are taken by the number that they had when the file system was made (ext4).

    Raises:
        OSError: it cannot be read.
    """
    return _said(device, _ELSEWHERE)


def _said(device: Path, readers: Mapping[str, Callable[[bytes], _Said]]) -> _Said | None:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, superblocks.HEAD, 0)
    finally:
        os.close(descriptor)
    kind = superblocks.kind_of(data)
    try:
        return None if kind is None else readers[kind](data)
    except struct.error:  # shorter than a superblock
        return None


def _ext(data: bytes) -> Room:
    blocks, _, free, _, _, shift = struct.unpack_from("<6I", data, _EXT + 4)
    if struct.unpack_from("<I", data, _EXT + 0x60)[0] & _EXT_64BIT:
        blocks |= struct.unpack_from("<I", data, _EXT + 0x150)[0] << 32
        free |= struct.unpack_from("<I", data, _EXT + 0x158)[0] << 32
    size = 1024 << min(shift, 6)
    return Room(free * size, blocks * size)


def _xfs(data: bytes) -> Room:
    size, blocks = struct.unpack_from(">IQ", data, 4)
    return Room(struct.unpack_from(">Q", data, 144)[0] * size, blocks * size)


def _btrfs(data: bytes) -> Room:
    total, used = struct.unpack_from("<QQ", data, _BTRFS + 0x70)
    return Room(total - used, total)


_READERS = {superblocks.EXT: _ext, superblocks.XFS: _xfs, superblocks.BTRFS: _btrfs}


def _ext_elsewhere(data: bytes) -> str | None:
    (features,) = struct.unpack_from("<I", data, _EXT + 0x5C)
    (inode,) = struct.unpack_from("<I", data, _EXT + 0xE0)
    return "its journal" if features & _EXT_HAS_JOURNAL and not inode else None


def _xfs_elsewhere(data: bytes) -> str | None:
    realtime, log = struct.unpack_from(">Q", data, 16)[0], struct.unpack_from(">Q", data, 48)[0]
    (inside,) = struct.unpack_from(">Q", data, 280)  # where a realtime part of the same device begins
    return "its log" if not log else "its realtime part" if realtime and not inside else None


def _btrfs_elsewhere(data: bytes) -> str | None:
    (number,) = struct.unpack_from("<Q", data, _BTRFS + 0x88)
    return f"a part of it, one of {number}," if number > 1 else None


_ELSEWHERE = {
    superblocks.EXT: _ext_elsewhere, superblocks.XFS: _xfs_elsewhere, superblocks.BTRFS: _btrfs_elsewhere,
}  # fmt: skip
