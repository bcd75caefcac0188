"""The fast chunked copier: bounded memory, ordered output, all CPUs.

A chunk is read (mapped), its zero pages are set aside, the rest goes to the codec in one call, on as many threads as
there are CPUs; results are written in their order while later chunks are being worked on. With zstd no Python code runs
for each page, but for those that it does not shrink: they get a checksum of our own, as all pages do of a codec that
brings none. zlib, and a zstandard without ``multi_compress_to_buffer``, are called page by page.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile import kdump
from capture.dumpfile.codec import Codec
from capture.dumpfile.writer import KdumpWriter, PackedPages
from capture.memory.image import Chunk, MemoryImage, PageBlock, PfnRanges, contiguous
from capture.progress import Progress

if TYPE_CHECKING:
    from capture.dumpfile.elf import ElfWriter

_AHEAD = 2
"""Chunks in flight beyond one a thread: what keeps a thread busy while the writer writes."""
_SAMPLES = 8
"""Words of a page looked at before all of it is."""
_WORD = 8


@dataclass(slots=True)
class CopyStatistics:
    """Pages copied so far, by what became of them; ``data_bytes`` is their size in the dump."""

    pages: int = 0
    zero_pages: int = 0
    raw_pages: int = 0
    data_bytes: int = 0
    unreadable: PfnRanges = field(default_factory=PfnRanges)


class _Counts(NamedTuple):
    pages: int
    zero_pages: int
    raw_pages: int
    data_bytes: int
    unreadable: tuple[int, ...]


class _Worked(NamedTuple):
    packed: PackedPages
    counts: _Counts


class Copier:
    """Copies pages of ``image`` through ``codec``; with ``share_zero_pages`` those of zeros take no data.

    Without ``checksums`` pages that are not compressed get none: not every format has a place for them.

    ``statistics`` counts a page once its descriptor is in the dump; ask again after ``writer.finish``.
    """

    def __init__(
        self, image: MemoryImage, codec: Codec, *, share_zero_pages: bool, threads: int, checksums: bool = True
    ) -> None:
        self._image = image
        self._codec = codec
        self._share_zero_pages = share_zero_pages
        self._checksums = checksums
        self._threads = threads
        self._writer: KdumpWriter | ElfWriter | None = None
        self._found = 0
        """Pages that the dump had before."""
        self._statistics = CopyStatistics()
        self._uncounted: deque[_Counts] = deque()

    def run(self, chunks: Iterable[Chunk], writer: KdumpWriter | ElfWriter, progress: Progress) -> None:
        """Copy ``chunks`` to ``writer`` in their order.

        Raises:
            TargetError: the writer could not write; all chunks before are written.
        """
        self._writer = writer
        self._found = writer.pages_written
        if self._codec.pace is not None and isinstance(writer, KdumpWriter):
            self._codec.pace.threads = self._threads
            writer.on_step = self._codec.pace.stepped
        waiting: deque[Future[_Worked]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="copier") as pool:
            try:
                for chunk in chunks:
                    waiting.append(pool.submit(self._work, chunk))
                    if len(waiting) >= self._threads + _AHEAD:
                        self._write(waiting.popleft().result(), writer, progress)
                while waiting:
                    self._write(waiting.popleft().result(), writer, progress)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @property
    def statistics(self) -> CopyStatistics:
        """What is in the dump by now. The writer may have dropped its newest pages: a full disk, a failed sync."""
        self._count_kept()
        return self._statistics

    def _count_kept(self) -> None:
        """Count the blocks that have their descriptors."""
        statistics = self._statistics
        kept = self._writer.pages_written - self._found if self._writer is not None else 0
        while self._uncounted and statistics.pages + self._uncounted[0].pages <= kept:
            counts = self._uncounted.popleft()
            statistics.pages += counts.pages
            statistics.zero_pages += counts.zero_pages
            statistics.raw_pages += counts.raw_pages
            statistics.data_bytes += counts.data_bytes
            for pfn in counts.unreadable:
                statistics.unreadable.add(pfn)

    def _write(self, worked: _Worked, writer: KdumpWriter | ElfWriter, progress: Progress) -> None:
        writer.append(worked.packed)
        self._uncounted.append(worked.counts)
        progress.advance(worked.counts.pages * self._image.page_size)
        self._count_kept()

    def _work(self, chunk: Chunk) -> _Worked:
        block = self._image.fetch(chunk)
        size = self._image.page_size
        zero = find_zero_pages(block, size) if self._share_zero_pages else np.zeros(len(block.pfns), dtype=np.bool_)
        stored = np.flatnonzero(~zero)
        kept = block.offsets[stored]
        sizes = np.zeros(len(block.pfns), dtype=np.int64)
        flags = np.zeros(len(block.pfns), dtype=np.uint32)
        checksums = np.zeros(len(block.pfns), dtype=np.uint64)
        if self._codec.pack is None or not len(kept):
            pieces: list[bytes | memoryview] = [block.buffer[start:end] for start, end in _stretches(kept, size)]
            sizes[stored] = size
            if self._checksums:
                checksums[stored] = _checksums(block.buffer, kept, size)
            raw_pages = len(kept)
        else:
            data, packed = self._codec.pack(block.buffer, kept, size)
            raw = packed >= size
            pieces = _replace_raw(data, packed, raw, block, kept, size) if raw.any() else [data]
            raw_pages = int(raw.sum())
            sizes[stored] = np.where(raw, size, packed)
            flags[stored] = np.where(raw, 0, self._codec.flag)
            checksums[stored[raw]] = _checksums(block.buffer, kept[raw], size)
            if not self._codec.checked:
                starts = (np.cumsum(packed) - packed)[~raw]
                checksums[stored[~raw]] = _checksums(memoryview(data), starts, packed[~raw])
        if block.unreadable:
            checksums[np.isin(block.pfns, block.unreadable, assume_unique=True)] = np.uint64(kdump.UNREADABLE << 32)
        counts = _Counts(len(sizes), int(zero.sum()), raw_pages, int(sizes.sum()), block.unreadable)
        return _Worked(PackedPages(block.pfns, sizes, flags, checksums, pieces), counts)


def find_zero_pages(block: PageBlock, page_size: int) -> NDArray[np.bool_]:
    """Return which pages of a block hold nothing but zeros. One pass over the pages that look so at a few words."""
    zero = np.zeros(len(block.pfns), dtype=np.bool_)
    skew = int(block.offsets[0]) % _WORD
    if not block.adjacent and (block.offsets % _WORD != skew).any():  # of a damaged source: nothing else lies so
        zero[:] = [not any(block.buffer[start : start + page_size]) for start in block.offsets.tolist()]
        return zero
    words = np.frombuffer(block.buffer, dtype="<u8", count=(len(block.buffer) - skew) // _WORD, offset=skew)
    first = (block.offsets // _WORD).astype(np.intp)
    per_page = page_size // _WORD
    step = per_page // _SAMPLES
    if block.adjacent:
        start = int(first[0])
        sampled = words[start : start + len(zero) * per_page].reshape(-1, per_page)[:, ::step]
    else:
        sampled = words[first[:, np.newaxis] + np.arange(0, per_page, step)]
    likely = np.flatnonzero(np.bitwise_or.reduce(sampled, axis=1) == 0)
    if block.adjacent and len(likely):
        # One call for all of them: reduceat takes pairs (start, end), and what lies between is of this block as well.
        bounds = np.empty((len(likely), 2), dtype=np.intp)
        bounds[:, 0] = first[likely]
        bounds[:, 1] = bounds[:, 0] + per_page
        inside = bounds.ravel() if bounds[-1, 1] < len(words) else bounds.ravel()[:-1]
        zero[likely] = np.bitwise_or.reduceat(words, inside)[::2] == 0
    elif len(likely):
        # What lies between was left out, and is never read: it may be poisoned memory.
        for low, high in contiguous(block.offsets[likely], page_size):
            run = likely[low:high]
            pages = words[first[run[0]] : first[run[-1]] + per_page].reshape(-1, per_page)
            zero[run] = np.bitwise_or.reduce(pages, axis=1) == 0
    return zero


def _checksums(
    buffer: memoryview, offsets: NDArray[np.uint64] | NDArray[np.int64], sizes: NDArray[np.int64] | int
) -> list[int]:
    """Return the checksum of each stored page; ``sizes`` in bytes, of each or of all of them."""
    ends = (offsets.astype(np.int64) + sizes).tolist()
    return [kdump.checksum(buffer[start:end]) for start, end in zip(offsets.tolist(), ends, strict=True)]


def _stretches(offsets: NDArray[np.uint64], page_size: int) -> list[tuple[int, int]]:
    """Return the byte ranges that pages at ``offsets`` cover, neighbours joined."""
    if not len(offsets):
        return []
    return [(int(offsets[first]), int(offsets[end - 1]) + page_size) for first, end in contiguous(offsets, page_size)]


def _replace_raw(
    data: bytes,
    packed: NDArray[np.int64],
    raw: NDArray[np.bool_],
    block: PageBlock,
    offsets: NDArray[np.uint64],
    page_size: int,
) -> list[bytes | memoryview]:
    """Return ``data`` with the pages that did not shrink replaced by their own bytes, straight from the source."""
    view = memoryview(data)
    ends = np.cumsum(packed)
    pieces: list[bytes | memoryview] = []
    changes = np.flatnonzero(np.diff(raw)) + 1
    for first, end in pairwise([0, *map(int, changes), len(raw)]):
        if raw[first]:
            pieces += [block.buffer[low:high] for low, high in _stretches(offsets[first:end], page_size)]
        else:
            pieces.append(view[int(ends[first] - packed[first]) : int(ends[end - 1])])
    return pieces
