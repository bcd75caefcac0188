"""The kdump-compressed structures (version 6), as declarations.

Read by crash, drgn, libkdumpfile and makedumpfile. In the file, in blocks of the page size: the header, the sub-header
followed by the ELF notes, bitmap 1 (the page exists), bitmap 2 (the page is in the dump), one descriptor for each bit
of bitmap 2 in PFN order, then page data at any offset.
Layouts: diskdump_mod.h of makedumpfile and diskdump.h of crash, 64-bit little
endian.
"""

from __future__ import annotations

import os
import zlib
from typing import NamedTuple

import numpy as np

SIGNATURE = b"KDUMP   "
WRAPPED = {
    b"age-encryption.org/v1": "is encrypted: decrypt it where the key is (age -d -i KEY FILE | vmcapture dump - OUT)",
    b"makedumpfile\0": "is a flattened dump: put it together first (vmcapture dump FILE OUT)",
}
"""How files begin that become dumps, and what to do first."""
_START_BYTES = 32
HEADER_VERSION = 6

COMPRESSED_ZLIB = 0x1
COMPRESSED_LZO = 0x2
COMPRESSED_SNAPPY = 0x4
INCOMPLETE = 0x8
"""In the header's status only: pages are missing; their descriptors are all zeros."""
EXCLUDED_VMEMMAP = 0x10
COMPRESSED_ZSTD = 0x20
RAW = 0

DISK_DUMP_HEADER = np.dtype(
    {
        "names": [
            "signature", "header_version", "utsname", "tv_sec", "tv_usec", "status", "block_size", "sub_hdr_size",
            "bitmap_blocks", "max_mapnr", "total_ram_blocks", "device_blocks", "written_blocks", "current_cpu",
            "nr_cpus",
        ],
        "formats": [
            "S8", "<i4", "V390", "<i8", "<i8", "<u4", "<i4", "<i4", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4", "<i4",
        ],
        "offsets": [0, 8, 12, 408, 416, 424, 428, 432, 436, 440, 444, 448, 452, 456, 460],
        "itemsize": 464,
    }
)  # fmt: skip
"""struct disk_dump_header. bitmap_blocks counts both bitmaps; max_mapnr is cut to 32 bits."""

KDUMP_SUB_HEADER = np.dtype(
    [
        ("phys_base", "<u8"),
        ("dump_level", "<i4"),
        ("split", "<i4"),
        ("start_pfn", "<u8"),
        ("end_pfn", "<u8"),
        ("offset_vmcoreinfo", "<u8"),
        ("size_vmcoreinfo", "<u8"),
        ("offset_note", "<u8"),
        ("size_note", "<u8"),
        ("offset_eraseinfo", "<u8"),
        ("size_eraseinfo", "<u8"),
        ("start_pfn_64", "<u8"),
        ("end_pfn_64", "<u8"),
        ("max_mapnr_64", "<u8"),
    ]
)
"""struct kdump_sub_header. Offsets are from the start of the file."""

PAGE_DESCRIPTOR = np.dtype([("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])
"""struct page_desc."""

CHECKED = 0x5643_4B31
"""The upper half of ``page_flags`` where the lower one is the CRC-32 of a page as it is stored: in our dumps, of pages
that carry no checksum of their own. crash, drgn and makedumpfile do not look at it; makedumpfile writes 0."""

UNREADABLE = 0x5643_4B32
"""The upper half of ``page_flags`` of a page that is zeros because it could not be read."""


def checksum(stored: bytes | memoryview) -> int:
    """Return the ``page_flags`` of a page that is stored so."""
    return CHECKED << 32 | zlib.crc32(stored)


def start_of(name: str) -> bytes:
    """Return how a file begins, nothing when it cannot be read; whatever is wrong with it, somebody else says."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.pread(fd, _START_BYTES, 0)
    except OSError:
        return b""
    finally:
        os.close(fd)


def wrapped(start: bytes) -> str | None:
    """Return what to do first with a file that begins so, None when it is nothing that becomes a dump."""
    return next((advice for signature, advice in WRAPPED.items() if start.startswith(signature)), None)


class Layout(NamedTuple):
    """Where the parts of a dump lie, in bytes from the start of the file."""

    block_size: int
    notes_size: int
    max_mapnr: int
    descriptors: int

    @property
    def sub_header(self) -> int:
        """The sub-header: block 1."""
        return self.block_size

    @property
    def notes(self) -> int:
        """The ELF notes, straight after the sub-header."""
        return self.sub_header + KDUMP_SUB_HEADER.itemsize

    @property
    def sub_header_blocks(self) -> int:
        """Blocks of the sub-header with the notes."""
        return -(-(KDUMP_SUB_HEADER.itemsize + self.notes_size) // self.block_size)

    @property
    def bitmap_bytes(self) -> int:
        """Size of one bitmap, whole blocks."""
        return -(-self.max_mapnr // (8 * self.block_size)) * self.block_size

    @property
    def bitmap1(self) -> int:
        """Bitmap 1: the page exists."""
        return (1 + self.sub_header_blocks) * self.block_size

    @property
    def bitmap2(self) -> int:
        """Bitmap 2: the page is in the dump."""
        return self.bitmap1 + self.bitmap_bytes

    @property
    def descriptor_table(self) -> int:
        """The page descriptors."""
        return self.bitmap2 + self.bitmap_bytes

    @property
    def data(self) -> int:
        """The first byte of page data."""
        return self.descriptor_table + self.descriptors * PAGE_DESCRIPTOR.itemsize
