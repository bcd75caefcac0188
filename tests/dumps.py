"""Kdump-compressed dumps by hand: the numbers of makedumpfile's diskdump_mod.h, and a dump from a few lines."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from tests.builders import PAGE

ZLIB, INCOMPLETE, ZSTD = 0x1, 0x8, 0x20
"""DUMP_DH_COMPRESSED_ZLIB, DUMP_DH_COMPRESSED_INCOMPLETE, DUMP_DH_COMPRESSED_ZSTD."""
STATUS, BLOCK_SIZE, SUB_HDR_SIZE, BITMAP_BLOCKS, MAX_MAPNR = 424, 428, 432, 436, 440
"""Offsets in struct disk_dump_header."""
DESCRIPTOR = "<qIIQ"
"""struct page_desc: offset, size, flags, page_flags."""


def stored_checksum(stored: bytes) -> int:
    """``page_flags`` of a page that is stored so, and has no checksum of its own: docs/format.md."""
    return 0x5643_4B31 << 32 | zlib.crc32(stored)


DESCRIPTOR_BYTES = 24


def dump_of(
    stored: Mapping[int, tuple[int, bytes]],
    *,
    block: int = PAGE,
    status: int = ZSTD,
    max_mapnr: int = 300,
    gap: bytes = b"",
) -> bytes:
    """Return a dump of ``stored``: flags and bytes of each page by PFN, with ``gap`` before each page's data."""
    header = b"KDUMP   " + struct.pack("<i", 6).ljust(416, b"\0")
    header += struct.pack("<IiiIIIIIIi", status, block, 1, 2, max_mapnr, 0, 0, 0, 0, 1)
    sub = struct.pack("<QiiQQQQQQQQQQQ", 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, max_mapnr, max_mapnr)
    bitmap = bytearray(block)
    for pfn in stored:
        bitmap[pfn // 8] |= 1 << pfn % 8
    table, data = b"", b""
    start = 4 * block + DESCRIPTOR_BYTES * len(stored)
    for pfn in sorted(stored):
        flags, content = stored[pfn]
        data += gap
        table += struct.pack(DESCRIPTOR, start + len(data), len(content), flags, 0)
        data += content
    return header.ljust(block, b"\0") + sub.ljust(block, b"\0") + bytes(bitmap) * 2 + table + data
