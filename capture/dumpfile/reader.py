"""Reads kdump-compressed dumps back: header, bitmaps, descriptors, pages in batches.

Reads what this program and makedumpfile write as version 6: zstd, zlib, raw pages; LZO and snappy where the system has
a library for them. The file may be damaged, cut short or hostile: everything that steers memory or time is checked
against the file's size first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from capture.dumpfile import foreign, kdump
from capture.dumpfile.codec import ZSTD_BATCHED
from capture.errors import SourceError
from capture.notes.elfnote import NOTE_HEADER

BATCH_PAGES, BATCH_BYTES = 1024, 4 << 20
"""What is decoded together at most."""
NOT_WRITTEN = "not written"
"""Why a page of an incomplete dump has no data."""
_RANK_BYTES = 1 << 12
"""Bytes of bitmap 2 between two numbers that say how many pages come before."""
_WINDOW_BYTES = 1 << 16
"""Bytes of bitmap 2 looked at together."""
_MAX_BLOCK = 1 << 16
_READ_BYTES = 4 << 20
"""Page data read together; the last page of a read may run over it."""
_MAX_ZSTD_WINDOW = 1 << 20


class ReadPages(NamedTuple):
    """A batch of pages: ``data`` is (pages, page size) bytes; ``bad`` says for each index why it has none.

    ``unreadable`` are those that are zeros because they could not be read when they were saved.
    """

    pfns: NDArray[np.int64]
    data: NDArray[np.uint8]
    bad: dict[int, str]
    unreadable: NDArray[np.bool_]


class KdumpFile:
    """An open dump.

    Raises:
        SourceError: it is not a kdump-compressed file that we read, or is cut short within its headers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ranks: NDArray[np.int64] | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe would be waited for
        except OSError as error:
            check = "its permissions" if error.errno == errno.EACCES else "the path"
            raise SourceError(f"{path}: cannot be opened: {error.strerror}; check {check}") from None
        try:
            self._read_headers()
        except BaseException:
            self.close()
            raise

    def _read_headers(self) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{self.path}: is not a file; name the dump itself")
        self.size = status.st_size
        self.header = np.frombuffer(self._read(0, kdump.DISK_DUMP_HEADER.itemsize, "header"), kdump.DISK_DUMP_HEADER)[0]
        self.page_size = int(self.header["block_size"])
        self._check_header()
        sub = self._read(self.page_size, kdump.KDUMP_SUB_HEADER.itemsize, "sub-header")
        self.sub_header = np.frombuffer(sub, kdump.KDUMP_SUB_HEADER)[0]
        self.bitmap_bytes = int(self.header["bitmap_blocks"]) // 2 * self.page_size
        self.bitmap1 = (1 + int(self.header["sub_hdr_size"])) * self.page_size
        self.bitmap2 = self.bitmap1 + self.bitmap_bytes
        self.descriptor_table = self.bitmap2 + self.bitmap_bytes
        if self.max_mapnr > 8 * self.bitmap_bytes or not self.bitmap_bytes:
            raise SourceError(f"{self.path}: bitmaps of {self.bitmap_bytes} bytes for {self.max_mapnr} PFNs: damaged")
        if self.descriptor_table > self.size:
            raise SourceError(
                f"{self.path}: truncated: bitmaps end at {self.descriptor_table}, the file at {self.size}"
            )

    @property
    def incomplete(self) -> bool:
        """Whether the dump is marked incomplete."""
        return bool(int(self.header["status"]) & kdump.INCOMPLETE)

    @property
    def level(self) -> int:
        """The dump level it was made with."""
        return int(self.sub_header["dump_level"])

    @property
    def gaps(self) -> bool:
        """Whether pages that it left out may read as zeros: never in this format."""
        return False

    @property
    def max_mapnr(self) -> int:
        """The highest PFN plus one."""
        return int(self.sub_header["max_mapnr_64"]) or int(self.header["max_mapnr"])

    def page_count(self) -> int:
        """Return the number of pages in bitmap 2; reads all of it."""
        return sum(len(pfns) for pfns in self._pfns())

    def pages(self) -> Iterator[ReadPages]:
        """Yield every page of bitmap 2 in PFN order, decompressed; one that cannot be had is in ``bad``."""
        done = 0
        limit = min(BATCH_PAGES, BATCH_BYTES // self.page_size)
        for pfns in self._pfns():
            for first in range(0, len(pfns), limit):
                batch = pfns[first : first + limit]
                yield self._read_batch(batch, done)
                done += len(batch)

    def bits(self, bitmap: int, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        """Return the bits of a bitmap from ``first_pfn`` (a multiple of 8) on; zeros beyond its end."""
        room = max(0, min(-(-pages // 8), self.bitmap_bytes - first_pfn // 8))
        raw = os.pread(self._fd, room, bitmap + first_pfn // 8).ljust(-(-pages // 8), b"\0")
        return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")[:pages].astype(np.bool_)

    def runs(self, *bitmaps: int) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, pages) of every run of pages that are in any of ``bitmap1`` and ``bitmap2``."""
        first, end = 0, 0
        for pfns in self._pfns(*bitmaps):
            breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
            for low, high in zip(pfns[[0, *breaks]].tolist(), pfns[[*(breaks - 1), -1]].tolist(), strict=True):
                if low != end:
                    if end > first:
                        yield first, end - first
                    first = low
                end = high + 1
        if end > first:
            yield first, end - first

    def read_run(self, first_pfn: int, pages: int) -> Iterator[bytes]:
        """Yield the bytes of pages that follow each other, a batch at a time.

        Raises:
            OSError: EIO: one is not in the dump, or damaged.
        """
        index = self._rank(first_pfn, pages)
        limit = min(BATCH_PAGES, BATCH_BYTES // self.page_size)
        for start in range(0, pages, limit):
            pfns = np.arange(first_pfn + start, first_pfn + min(pages, start + limit), dtype=np.int64)
            batch = self._read_batch(pfns, index + start)
            if batch.bad:
                number, reason = next(iter(batch.bad.items()))
                raise OSError(errno.EIO, f"PFN {int(pfns[number]):#x}: {reason}")
            yield batch.data.tobytes()

    def notes(self) -> bytes:
        """Return the ELF notes; of old dumps that have none, VMCOREINFO as a note.

        Raises:
            SourceError: they lie outside of the file.
        """
        sub = self.sub_header
        size, text_size = int(sub["size_note"]), int(sub["size_vmcoreinfo"])
        if max(size, text_size) > self.size:
            raise SourceError(f"{self.path}: notes of {max(size, text_size)} bytes in a file of {self.size}: damaged")
        if size:
            return self._read(int(sub["offset_note"]), size, "notes")
        if not text_size:
            return b""
        text = self._read(int(sub["offset_vmcoreinfo"]), text_size, "VMCOREINFO")
        name = b"VMCOREINFO\0"
        head = NOTE_HEADER.pack(len(name), len(text), 0) + name.ljust(12, b"\0")
        return head + text.ljust(-(-len(text) // 4) * 4, b"\0")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> KdumpFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, offset: int, length: int, what: str) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "offset out of range"
            raise SourceError(f"{self.path}: the {what} at {offset:#x} cannot be read: {reason}") from None
        if len(data) < length:
            raise SourceError(f"{self.path}: truncated: the {what} at {offset:#x} is cut short")
        return data

    def _check_header(self) -> None:
        if self.header["signature"] != kdump.SIGNATURE.rstrip(b"\0"):
            advice = kdump.wrapped(self._read(0, kdump.DISK_DUMP_HEADER.itemsize, "header"))
            raise SourceError(f"{self.path}: {advice or 'not a kdump-compressed dump'}")
        version = int(self.header["header_version"])
        if version < kdump.HEADER_VERSION:
            raise SourceError(f"{self.path}: header version {version}: only {kdump.HEADER_VERSION} is read")
        if int(self.header["sub_hdr_size"]) < 1:
            raise SourceError(f"{self.path}: a sub-header of {int(self.header['sub_hdr_size'])} blocks: it is damaged")
        if self.page_size not in (4096, 16384, _MAX_BLOCK):
            raise SourceError(f"{self.path}: page size {self.page_size}: the header is damaged")

    def _rank(self, first_pfn: int, pages: int) -> int:
        """Return the number of the descriptor of a page of bitmap 2, of which ``pages`` have to follow each other.

        Raises:
            OSError: EIO: they are not all in the dump.
        """
        if self._ranks is None:
            bits = [0]
            for start in range(0, -(-self.max_mapnr // 8), _RANK_BYTES):
                piece = os.pread(self._fd, _RANK_BYTES, self.bitmap2 + start)
                bits.append(int.from_bytes(piece, "little").bit_count())
            self._ranks = np.cumsum(np.array(bits, dtype=np.int64))
        start = first_pfn // (8 * _RANK_BYTES)
        length = -(-(first_pfn + pages) // 8) - start * _RANK_BYTES
        if first_pfn < 0 or first_pfn + pages > self.max_mapnr:
            raise OSError(errno.EIO, f"PFN {first_pfn:#x} is beyond the dump")
        bitmap = int.from_bytes(os.pread(self._fd, length, self.bitmap2 + start * _RANK_BYTES), "little")
        within = first_pfn - start * 8 * _RANK_BYTES
        wanted = (1 << pages) - 1
        if bitmap >> within & wanted != wanted:
            raise OSError(errno.EIO, f"PFN {first_pfn:#x} is not in the dump")
        return int(self._ranks[start]) + (bitmap & (1 << within) - 1).bit_count()

    def _pfns(self, *bitmaps: int) -> Iterator[NDArray[np.int64]]:
        """Yield the PFNs of bitmaps (bitmap 2), window by window. Bits from max_mapnr on are padding."""
        end = -(-self.max_mapnr // 8)
        for start in range(0, end, _WINDOW_BYTES):
            length = min(_WINDOW_BYTES, end - start)
            window = np.zeros(length, dtype=np.uint8)
            for bitmap in bitmaps or (self.bitmap2,):
                window |= np.frombuffer(os.pread(self._fd, length, bitmap + start).ljust(length, b"\0"), dtype=np.uint8)
            if not window.any():
                continue
            bits = np.unpackbits(window, bitorder="little")
            pfns = np.flatnonzero(bits).astype(np.int64) + start * 8
            pfns = pfns[pfns < self.max_mapnr]
            if len(pfns):
                yield pfns

    def _read_batch(self, pfns: NDArray[np.int64], first: int) -> ReadPages:
        """Decode the pages of descriptors ``first`` and following; data that several share is decoded once."""
        width = kdump.PAGE_DESCRIPTOR.itemsize
        raw_table = os.pread(self._fd, len(pfns) * width, self.descriptor_table + first * width)
        table = np.zeros(len(pfns), dtype=kdump.PAGE_DESCRIPTOR)
        there = np.frombuffer(raw_table[: len(raw_table) // width * width], dtype=kdump.PAGE_DESCRIPTOR)
        table[: len(there)] = there
        offset, size = table["offset"], table["size"].astype(np.int64)
        inside = (offset > 0) & (size > 0) & (size <= 2 * self.page_size) & (offset <= self.size - size)
        bad: dict[int, str] = {}
        for index in map(int, np.flatnonzero(~inside)):
            where = f"descriptor points outside the file ({int(offset[index]):#x}+{int(size[index])})"
            # A power cut may leave a half of it: 24 does not divide a disk's blocks.
            bad[index] = where if offset[index] and size[index] else NOT_WRITTEN
        data = np.zeros((len(pfns), self.page_size), dtype=np.uint8)
        stored, which = np.unique(table[inside], return_inverse=True)  # sorted by offset
        if len(stored):
            decoded = np.zeros((len(stored), self.page_size), dtype=np.uint8)
            failed: dict[int, str] = {}
            for start, end in _windows(stored):
                self._decode(stored[start:end], decoded[start:end], start, failed)
            data[inside] = decoded[which]
            if failed:
                bad |= {
                    int(index): failed[int(page)]
                    for index, page in zip(np.flatnonzero(inside), which, strict=True)
                    if int(page) in failed
                }
        return ReadPages(pfns, data, bad, inside & (table["page_flags"] >> np.uint64(32) == kdump.UNREADABLE))

    def _decode(self, stored: NDArray[np.void], pages: NDArray[np.uint8], number: int, failed: dict[int, str]) -> None:
        """Read and decode neighbouring stored pages into ``pages``; ``number`` is the first one's in ``failed``."""
        base = int(stored["offset"][0])
        length = int((stored["offset"] + stored["size"]).max()) - base
        window = os.pread(self._fd, length, base).ljust(length, b"\0")
        offsets, sizes, flags = stored["offset"] - base, stored["size"], stored["flags"]
        zstd = flags == kdump.COMPRESSED_ZSTD
        raw = (flags == kdump.RAW) & (sizes == self.page_size)
        _put_zstd(window, offsets, sizes, np.flatnonzero(zstd), pages, number, failed)
        for index in map(int, np.flatnonzero(raw)):
            pages[index] = np.frombuffer(window, dtype=np.uint8, count=self.page_size, offset=int(offsets[index]))
        for index in map(int, np.flatnonzero(~zstd & ~raw)):
            content = window[int(offsets[index]) : int(offsets[index]) + int(sizes[index])]
            flag = int(flags[index])
            if flag == kdump.COMPRESSED_ZLIB:
                reason = _put_zlib(content, pages[index])
            elif flag in foreign.PACKAGES:
                reason = _put_foreign(flag, content, pages[index])
            else:
                reason = f"flags {flag:#x}, {len(content)} bytes: no codec for it here"
            if reason is not None:
                failed[number + index] = reason
        checked = stored["page_flags"] >> np.uint64(32) == kdump.CHECKED
        for index in map(int, np.flatnonzero(checked)):
            content = window[int(offsets[index]) : int(offsets[index]) + int(sizes[index])]
            if number + index not in failed and kdump.checksum(content) != int(stored["page_flags"][index]):
                failed[number + index] = "checksum: its bytes are not those that were written"


def _windows(stored: NDArray[np.void]) -> list[tuple[int, int]]:
    """Cut stored pages (sorted by offset) into index ranges that one read of up to _READ_BYTES each covers."""
    windows: list[tuple[int, int]] = []
    start = 0
    offsets = stored["offset"]
    while start < len(stored):
        end = int(np.searchsorted(offsets, int(offsets[start]) + _READ_BYTES))
        windows.append((start, end))
        start = end
    return windows


def _put_zlib(content: bytes, page: NDArray[np.uint8]) -> str | None:
    """Decompress into ``page``; return why not, where that fails."""
    try:
        decompressor = zlib.decompressobj()
        found = decompressor.decompress(content, len(page) + 1)
    except zlib.error as error:
        return f"zlib: {error}"
    if len(found) != len(page) or not decompressor.eof:
        return f"zlib: {len(found)} bytes instead of {len(page)}"
    page[:] = np.frombuffer(found, dtype=np.uint8)
    return None


def _put_foreign(flag: int, content: bytes, page: NDArray[np.uint8]) -> str | None:
    """Decompress into ``page``; return why not, where that fails."""
    found = foreign.decompress(flag, content, len(page))
    if isinstance(found, str):
        return found
    page[:] = np.frombuffer(found, dtype=np.uint8)
    return None


def _put_zstd(
    window: bytes,
    offsets: NDArray[np.int64],
    sizes: NDArray[np.uint32],
    frames: NDArray[np.intp],
    pages: NDArray[np.uint8],
    number: int,
    failed: dict[int, str],
) -> None:
    """Decompress all ``frames`` of a window in one call; one by one where there is no such call, or one is damaged."""
    if not len(frames):
        return
    page_size = pages.shape[1]
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
    if ZSTD_BATCHED:
        segments = np.empty((len(frames), 2), dtype="<u8")
        segments[:, 0], segments[:, 1] = offsets[frames], sizes[frames]
        lengths = np.full(len(frames), page_size, dtype="<u8").tobytes()
        with contextlib.suppress(zstandard.ZstdError, ValueError):
            # The collection yields buffers by the sequence protocol, which its type stub does not say.
            found: Any = decompressor.multi_decompress_to_buffer(
                zstandard.BufferWithSegments(window, segments.tobytes()), decompressed_sizes=lengths
            )
            pages[frames] = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(frames), page_size)
            return
    for index in map(int, frames):
        frame = window[int(offsets[index]) : int(offsets[index]) + int(sizes[index])]
        try:
            # A size that the frame itself names is what zstandard allocates, whatever the limit.
            named = zstandard.frame_content_size(frame)
            if named not in (-1, page_size):
                failed[number + index] = f"zstd: {named} bytes instead of {page_size}"
                continue
            page = decompressor.decompress(frame, max_output_size=page_size, allow_extra_data=False)
        except (zstandard.ZstdError, ValueError) as error:
            failed[number + index] = f"zstd: {error}"
            continue
        if len(page) == page_size:
            pages[index] = np.frombuffer(page, dtype=np.uint8)
        else:
            failed[number + index] = f"zstd: {len(page)} bytes instead of {page_size}"
