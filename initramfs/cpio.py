"""Writes a tree as a newc cpio archive, the format that the kernel unpacks as an initramfs; same tree, same bytes.

And reads one file out of such an archive.

The format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from initramfs.errors import ImageError
from initramfs.tree import Device, Directory, Entry, File, Symlink, Tree

MAGIC = "070701"
ALIGNMENT = 4
BLOCK = 512
TRAILER = "TRAILER!!!"
MAX_FILE = 0xFFFFFFFF  # eight hexadecimal digits hold the size


HEADER = 110  # the magic, then 13 fields of eight digits
MAX_NAME = 4096  # PATH_MAX


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


def content(archive: BinaryIO, path: str) -> bytes | None:
    """Return what a regular file holds, by its path from the root on; None when the archive has no such file.

    Raises:
        ImageError: it is no newc archive, or ends too early.
    """
    for name, mode, begin, size in _entries(archive):
        if name == path.lstrip("/") and stat.S_ISREG(mode):
            archive.seek(begin)
            data = archive.read(size)
            if len(data) < size:
                raise ImageError(f"the archive ends within /{name}")
            return data
    return None


def skip(archive: BinaryIO) -> None:
    """Go to the end of the archive that begins here.

    Raises:
        ImageError: it is no newc archive, or ends too early.
    """
    for _ in _entries(archive):
        pass


def _entries(archive: BinaryIO) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, mode, place and size of each file; at the end the position is behind the archive."""
    position = archive.tell()
    while True:
        header = archive.read(HEADER)
        try:
            fields = [int(header[start : start + 8], 16) for start in range(len(MAGIC), HEADER, 8)]
        except ValueError:
            fields = []
        if len(header) < HEADER or header[: len(MAGIC)] != MAGIC.encode() or not fields or fields[11] > MAX_NAME:
            raise ImageError(f"no cpio archive of the kind newc (byte {position})")
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive.read(name_size).rstrip(b"\0").decode(errors="replace")
        begin = position + HEADER + name_size
        begin += -begin % ALIGNMENT
        if name == TRAILER:
            archive.seek(begin)
            return
        yield name, mode, begin, size
        position = begin + size
        position += -position % ALIGNMENT
        archive.seek(position)
