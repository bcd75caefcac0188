"""Reads kdump-compressed dumps back: header, bitmaps, descriptors, pages in batches.

Reads what this program and makedumpfile write as version 6 (zstd, zlib, raw pages; not LZO or snappy). The file may be
damaged, cut short or hostile: everything that steers memory or time is checked against the file's size first.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from capture.dumpfile import kdump
from capture.errors import SourceError

BATCH_PAGES = 1024
NOT_WRITTEN = "not written"
"""Why a page of an incomplete dump has no data."""
_WINDOW_BYTES = 1 << 16
"""Bytes of bitmap 2 looked at together."""
_MAX_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class ReadPages:
    """Up to BATCH_PAGES pages: ``data`` is (pages, page size) bytes; ``bad`` says for each index why it has none."""

    pfns: NDArray[np.int64]
    data: NDArray[np.uint8]
    bad: dict[int, str]


class KdumpFile:
    """An open dump.

    Raises:
        SourceError: it is not a kdump-compressed file that we read, or is cut short within its headers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._fd).st_size
        except OSError as error:
            raise SourceError(f"{path}: cannot be opened: {error.strerror}; check the path") from None
        self.header = np.frombuffer(self._read(0, kdump.DISK_DUMP_HEADER.itemsize, "header"), kdump.DISK_DUMP_HEADER)[0]
        self.page_size = int(self.header["block_size"])
        self._check_header()
        sub = self._read(self.page_size, kdump.KDUMP_SUB_HEADER.itemsize, "sub-header")
        self.sub_header = np.frombuffer(sub, kdump.KDUMP_SUB_HEADER)[0]
        self.bitmap_bytes = int(self.header["bitmap_blocks"]) // 2 * self.page_size
        self.bitmap2 = (1 + int(self.header["sub_hdr_size"])) * self.page_size + self.bitmap_bytes
        self.descriptor_table = self.bitmap2 + self.bitmap_bytes
        if self.descriptor_table > self.size:
            raise SourceError(f"{path}: truncated: bitmaps end at {self.descriptor_table}, the file at {self.size}")

    @property
    def incomplete(self) -> bool:
        """Whether the dump is marked incomplete."""
        return bool(int(self.header["status"]) & kdump.INCOMPLETE)

    @property
    def level(self) -> int:
        """The dump level it was made with."""
        return int(self.sub_header["dump_level"])

    @property
    def max_mapnr(self) -> int:
        """The highest PFN plus one."""
        return int(self.sub_header["max_mapnr_64"]) or int(self.header["max_mapnr"])

    def pages(self) -> Iterator[ReadPages]:
        """Yield every page of bitmap 2 in PFN order, decompressed; one that cannot be had is in ``bad``."""
        done = 0
        for pfns in self._pfns():
            for first in range(0, len(pfns), BATCH_PAGES):
                batch = pfns[first : first + BATCH_PAGES]
                yield self._read_batch(batch, done)
                done += len(batch)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _read(self, offset: int, length: int, what: str) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) < length:
            raise SourceError(f"{self.path}: truncated: the {what} at {offset:#x} is cut short")
        return data

    def _check_header(self) -> None:
        if self.header["signature"] != kdump.SIGNATURE.rstrip(b"\0"):
            raise SourceError(f"{self.path}: not a kdump-compressed dump")
        version = int(self.header["header_version"])
        if version < kdump.HEADER_VERSION:
            raise SourceError(f"{self.path}: header version {version}: only {kdump.HEADER_VERSION} is read")
        if self.page_size not in (4096, 16384, _MAX_BLOCK):
            raise SourceError(f"{self.path}: page size {self.page_size}: the header is damaged")

    def _pfns(self) -> Iterator[NDArray[np.int64]]:
        """Yield the PFNs of bitmap 2, window by window."""
        for start in range(0, self.bitmap_bytes, _WINDOW_BYTES):
            window = os.pread(self._fd, min(_WINDOW_BYTES, self.bitmap_bytes - start), self.bitmap2 + start)
            if not any(window):
                continue
            bits = np.unpackbits(np.frombuffer(window, dtype=np.uint8), bitorder="little")
            yield np.flatnonzero(bits).astype(np.int64) + start * 8

    def _read_batch(self, pfns: NDArray[np.int64], first: int) -> ReadPages:
        size = self.page_size
        width = kdump.PAGE_DESCRIPTOR.itemsize
        raw_table = os.pread(self._fd, len(pfns) * width, self.descriptor_table + first * width)
        table = np.zeros(len(pfns), dtype=kdump.PAGE_DESCRIPTOR)
        there = np.frombuffer(raw_table[: len(raw_table) // width * width], dtype=kdump.PAGE_DESCRIPTOR)
        table[: len(there)] = there
        data = np.zeros((len(pfns), size), dtype=np.uint8)
        bad: dict[int, str] = {}
        zstd: list[tuple[int, bytes]] = []
        contents = self._contents(table)
        for index, (descriptor, content) in enumerate(zip(table, contents, strict=True)):
            flags, length = int(descriptor["flags"]), int(descriptor["size"])
            if not int(descriptor["offset"]):
                bad[index] = NOT_WRITTEN
            elif content is None:
                bad[index] = f"descriptor points outside the file ({int(descriptor['offset']):#x}+{length})"
            elif flags == kdump.COMPRESSED_ZSTD:
                zstd.append((index, content))
            elif flags == kdump.RAW and length == size:
                data[index] = np.frombuffer(content, dtype=np.uint8)
            elif flags == kdump.COMPRESSED_ZLIB:
                _put_zlib(data, index, content, bad)
            else:
                bad[index] = f"flags {flags:#x}, {length} bytes: no codec for it here"
        _put_zstd(data, zstd, bad)
        return ReadPages(pfns, data, bad)

    def _contents(self, table: NDArray[np.void]) -> list[bytes | None]:
        """Read what descriptors point at, in as few reads as the file's order allows; None where it is outside."""
        contents: list[bytes | None] = []
        cache_start, cache = 0, b""
        for descriptor in table:
            offset, length = int(descriptor["offset"]), int(descriptor["size"])
            if not (offset > 0 and 0 < length <= 2 * self.page_size and offset + length <= self.size):
                contents.append(None)
                continue
            if not cache_start <= offset <= offset + length <= cache_start + len(cache):
                cache_start, cache = offset, os.pread(self._fd, BATCH_PAGES * self.page_size // 2, offset)
            start = offset - cache_start
            piece = cache[start : start + length]
            contents.append(piece if len(piece) == length else None)
        return contents


def _put_zlib(data: NDArray[np.uint8], index: int, content: bytes, bad: dict[int, str]) -> None:
    size = data.shape[1]
    try:
        decompressor = zlib.decompressobj()
        page = decompressor.decompress(content, size + 1)
    except zlib.error as error:
        bad[index] = f"zlib: {error}"
        return
    if len(page) != size or not decompressor.eof:
        bad[index] = f"zlib: {len(page)} bytes instead of {size}"
    else:
        data[index] = np.frombuffer(page, dtype=np.uint8)


def _put_zstd(data: NDArray[np.uint8], frames: list[tuple[int, bytes]], bad: dict[int, str]) -> None:
    """Decompress a batch in one call; when a frame of it is damaged, one by one, to name the page."""
    if not frames:
        return
    size = data.shape[1]
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 20)
    sizes = np.full(len(frames), size, dtype="<u8").tobytes()
    try:
        pages: Any = decompressor.multi_decompress_to_buffer([frame for _, frame in frames], decompressed_sizes=sizes)
        for (index, _), page in zip(frames, pages, strict=True):
            data[index] = np.frombuffer(page, dtype=np.uint8)
    except (zstandard.ZstdError, ValueError):
        for index, frame in frames:
            try:
                page = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
            except (zstandard.ZstdError, ValueError) as error:
                bad[index] = f"zstd: {error}"
                continue
            if len(page) != size:
                bad[index] = f"zstd: {len(page)} bytes instead of {size}"
            else:
                data[index] = np.frombuffer(page, dtype=np.uint8)
