"""How much memory to reserve, and how many CPUs a reservation is enough for.

Computed from what was measured of capture kernels in QEMU (tests/bench/reservation.py; Debian's 6.1 and 6.12 with the
drivers of a virtual disk): what the kernel takes, the image, which stays in memory as it is packed, and the job. None
of it grows with the memory of the dead machine but the kernel's own page structures for what is reserved.
"""

from __future__ import annotations

import functools
import lzma
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

from initramfs import cpio
from initramfs.errors import ImageError

_PACKED = (b"\x1f\x8b", b"\x1f\x9e", b"BZ", b"\x5d\0", b"\xfd7", b"\x89L", b"\x02!", b"\x28\xb5")
"""What lib/decompress.c of the kernel knows: gzip, gzip's old self, bzip2, lzma, xz, lzo, lz4, zstd."""
_PADDING = 1 << 16
_CPIO, _GZIP, _XZ, _ZSTD = cpio.MAGIC.encode(), b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
USUAL_RATIO = 3
"""By what an image is larger when it is unpacked, where it is packed as nobody here can read (LZ4, LZO)."""
MIB = 1 << 20
KERNEL = 40 * MIB
"""What is no MemTotal any more when the job begins: text, data, per-CPU areas, what the firmware keeps."""
PAGE_STRUCTURES = 64
"""Struct page of the reservation itself: one part in so many (64 bytes a page of 4 KiB)."""
DRIVERS = 14 * MIB
"""Slab, modules, stacks: what the kernel takes after that."""
JOB = 34 * MIB
"""The interpreter with all that it loads, and one thread; of mapped files what is used all the time."""
CPU = 8 * MIB
"""A CPU more: a thread's chunks, the kernel's per-CPU data."""
SPARE = 8 * MIB
"""For data on its way to the disk, and for what nobody thought of."""
STEP = 16 * MIB
MAX_CPUS = 8
"""More compress faster than a disk writes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Parts of a reservation in bytes, for a capture kernel with ``cpus``."""

    cpus: int
    kernel: int
    drivers: int
    image: int
    job: int
    target: int = 0
    spare: int = SPARE

    @property
    def needed(self) -> int:
        """The sum, with the page structures that the sum itself takes; and room to unpack the image in.

        What it is unpacked into may take half of the memory that the kernel and the packed image leave.
        """
        parts = self.kernel + self._running + self.unpacking
        return parts + parts // PAGE_STRUCTURES

    @property
    def unpacking(self) -> int:
        """What of that is needed to unpack the image only."""
        return max(0, 3 * self.image - self._running)

    @property
    def _running(self) -> int:
        return self.drivers + self.image + self.job + self.target + self.spare

    @property
    def reservation(self) -> int:
        """What to reserve: ``needed`` in steps of 16 MiB."""
        return -(-self.needed // STEP) * STEP

    @property
    def parameter(self) -> str:
        """The word for the running kernel's command line."""
        return f"crashkernel={self.reservation >> 20}M"

    def lines(self) -> list[str]:
        """Return it as lines for a person."""
        parts = (
            ("kernel", self.kernel, "text, data, page structures"),
            ("drivers", self.drivers, "what it takes once it runs"),
            ("image", self.image, "stays in memory"),
            ("job", self.job, f"interpreter and {self.cpus} compressing thread{'s' * (self.cpus > 1)}"),
            *([("target", self.target, "its programs and its file system")] if self.target else []),
            ("spare", self.spare, "data on its way to the disk"),
            *([("unpack", self.unpacking, "it may take half of the memory then")] if self.unpacking else []),
        )
        return [self.parameter, *(f"  {name:8}{size / MIB:6.1f} MiB  {why}" for name, size, why in parts)]

    def values(self) -> dict[str, int | str]:
        """Return it for JSON, in bytes."""
        return {
            **asdict(self), "needed": self.needed, "reservation": self.reservation, "parameter": self.parameter,
        }  # fmt: skip


def estimate(image: int, cpus: int = 1, target: int = 0) -> Estimate:
    """Return what a capture kernel with so many CPUs needs.

    Its image takes ``image`` bytes of memory, and to save to the target ``target`` more (initramfs.targets.memory_of).
    """
    return Estimate(cpus, KERNEL, DRIVERS, image, JOB + (cpus - 1) * CPU, target)


def cpus_for(reservation: int, image: int, online: int, target: int = 0) -> int:
    """Return how many CPUs a capture kernel may have with what is reserved: at least one, at most those there are."""
    most = max(1, min(online, MAX_CPUS))
    return next((cpus for cpus in range(most, 1, -1) if estimate(image, cpus, target).needed <= reservation), 1)


def is_image(path: Path) -> bool:
    """Return whether a file begins as the kernel wants an initramfs to: a cpio archive, packed or not.

    Zeros before it are skipped (init/initramfs.c).

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(_PADDING).lstrip(b"\0").startswith((b"07070", *_PACKED))


def memory_of(image: Path) -> int:
    """Return the bytes of memory that an image takes: a squashfs as it is packed, a plain tree unpacked."""
    return unpacked_size(image) or image.stat().st_size


def unpacked_size(image: Path) -> int | None:
    """Return the bytes that an image is unpacked into; None for one that is not packed, as ours with a squashfs.

    An image of a distribution may begin with archives that are not packed (microcode), and pads between them.
    """
    status = image.stat()
    return _unpacked_size(image, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _unpacked_size(image: Path, size: int, _changed: int) -> int | None:
    with image.open("rb") as file:
        while start := file.read(len(_CPIO)):
            plain = file.tell() - len(start)
            file.seek(plain)
            if start == _CPIO:
                try:
                    cpio.skip(file)
                except ImageError:
                    return None
            elif start[:1] == b"\0":
                while (byte := file.read(1)) == b"\0":
                    pass
                file.seek(-len(byte), os.SEEK_CUR)
            elif start.startswith(_GZIP):
                file.seek(-4, os.SEEK_END)
                return plain + int.from_bytes(file.read(4), "little")  # ISIZE, RFC 1952
            else:
                return plain + _unpacked_stream(file, start, size - plain)
    return None


def _unpacked_stream(file: BinaryIO, start: bytes, packed: int) -> int:
    """Return the bytes that the rest of a file is unpacked into; where nobody here can read it, what is usual."""
    try:
        if start.startswith(_XZ):
            with lzma.open(file) as plain:
                return _length(plain)
        if start.startswith(_ZSTD):
            with zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as plain:
                return _length(plain)
    except (EOFError, lzma.LZMAError, OSError, ValueError, zstandard.ZstdError):
        pass
    return packed * USUAL_RATIO


def _length(stream: IO[bytes]) -> int:
    return sum(len(piece) for piece in iter(lambda: stream.read(MIB), b""))
