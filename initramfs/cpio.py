"""Writes a tree as a newc cpio archive, the format that the kernel unpacks as an initramfs; same tree, same bytes.

The format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources.
"""

from __future__ import annotations

import stat
from typing import Protocol

from initramfs.errors import ImageError
from initramfs.tree import Device, Directory, Entry, File, Symlink, Tree

MAGIC = "070701"
ALIGNMENT = 4
BLOCK = 512
TRAILER = "TRAILER!!!"
MAX_FILE = 0xFFFFFFFF  # eight hexadecimal digits hold the size


class Output(Protocol):
    """Where the archive goes."""

    def write(self, data: bytes, /) -> int:
        """Write all of the bytes."""


def write(tree: Tree, output: Output) -> int:
    """Write the archive and return its size: entries in path order, owned by root, no times, inodes counted from 1."""
    written = 0
    for inode, (path, entry) in enumerate(tree, start=1):
        written += _write_entry(output, path[1:], entry, inode)
    written += output.write(_header(TRAILER, mode=0, inode=0, links=1, size=0))
    return written + output.write(bytes(-written % BLOCK))


def _write_entry(output: Output, name: str, entry: Entry, inode: int) -> int:
    match entry:
        case File():
            content = entry.read()
            if len(content) > MAX_FILE:
                raise ImageError(f"/{name}: {len(content)} bytes are too many for an initramfs")
            header = _header(name, mode=stat.S_IFREG | entry.mode, inode=inode, links=1, size=len(content))
        case Symlink():
            content = entry.target.encode()
            header = _header(name, mode=stat.S_IFLNK | 0o777, inode=inode, links=1, size=len(content))
        case Directory():
            content = b""
            header = _header(name, mode=stat.S_IFDIR | entry.mode, inode=inode, links=2, size=0)
        case Device():
            content = b""
            header = _header(
                name, mode=stat.S_IFCHR | entry.mode, inode=inode, links=1, size=0, device=(entry.major, entry.minor)
            )
    return output.write(header) + output.write(content) + output.write(bytes(-len(content) % ALIGNMENT))


def _header(name: str, *, mode: int, inode: int, links: int, size: int, device: tuple[int, int] = (0, 0)) -> bytes:
    encoded = name.encode() + b"\0"
    owner = group = time = device_major = device_minor = checksum = 0
    fields = (inode, mode, owner, group, links, time, size, device_major, device_minor, *device, len(encoded), checksum)
    header = (MAGIC + "".join(f"{field:08X}" for field in fields)).encode() + encoded
    return header + bytes(-len(header) % ALIGNMENT)
