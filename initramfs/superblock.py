"""How much room a file system has that is not mounted: what its superblock said when it was unmounted.

Sources: Documentation/filesystems/ext4/super.rst; fs/xfs/libxfs/xfs_format.h (struct xfs_dsb);
include/uapi/linux/btrfs_tree.h (struct btrfs_super_block). One that was not unmounted cleanly may say too much or too
little; who mounts it next finds out.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from capture.boot import superblocks


class Room(NamedTuple):
    """Bytes that are free for root, and bytes in all."""

    free: int
    total: int


_EXT, _EXT_64BIT = 0x400, 0x80
_BTRFS = 0x10000


def room(device: Path) -> Room | None:
    """Return the room on a device; None where its file system is of another kind.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(descriptor, superblocks.HEAD, 0)
    finally:
        os.close(descriptor)
    kind = superblocks.kind_of(data)
    try:
        return None if kind is None else _READERS[kind](data)
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
