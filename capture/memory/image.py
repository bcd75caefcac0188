"""MemoryImage: physical addresses and PFNs → bytes; overlaps, partial and unreadable pages are settled here, once.

Nothing above this module sees a segment. Segments overlap (the kernel image lies over the direct map), are not sorted
and not page-aligned; a page is its PFN and is there once. Where segments overlap, the one that starts lower wins:
both name the same bytes. A page that segments cover only in part is put together from the pieces, the rest is zeros.

Memory: a few arrays of the size of the program header table, and one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from capture.memory.patience import Patience
from capture.memory.source import ByteSource

_Bytes = TypeVar("_Bytes", bytes, memoryview)

EXTENT = np.dtype([("pfn", "<i8"), ("pages", "<i8"), ("offset", "<u8")])
"""Whole pages that are contiguous both as PFNs and in the source; ``offset`` of the first in the source, in bytes."""

CHUNK_PAGES, CHUNK_BYTES = 512, 2 << 20
"""What a chunk holds at most: enough to make the cost of a call vanish, little enough to have several."""
_WINDOW_GAP = 128 << 10
"""Bytes between two pages that are not worth a mapping more: mapping what lies between them takes less time."""
_WINDOW_BYTES = 8 << 20
"""A mapping spans at most so many bytes."""

MAX_LISTED_RANGES = 10_000
MAX_SHOWN = 3
"""Ranges of PFNs that a line for a person names."""


class LinearMap(NamedTuple):
    """Virtual addresses that the ELF header says lie linearly over physical ones (p_vaddr of a PT_LOAD), in bytes."""

    virtual: int
    physical: int
    size: int


class Chunk(NamedTuple):
    """Pages to be read together.

    ``offsets`` are source offsets in bytes, one for each of ``pfns``; None for a single page that is put together
    from pieces. ``adjacent``: each lies right behind the one before.
    """

    pfns: NDArray[np.int64]
    offsets: NDArray[np.uint64] | None
    adjacent: bool = False


class PageBlock(NamedTuple):
    """Pages as bytes: page ``i`` lies at ``offsets[i]`` of ``buffer``. ``unreadable`` PFNs are zero-filled there.

    ``adjacent``: each lies right behind the one before.
    """

    pfns: NDArray[np.int64]
    buffer: memoryview
    offsets: NDArray[np.uint64]
    unreadable: tuple[int, ...] = ()
    adjacent: bool = False

    def stretches(self, page_size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Yield PFNs and bytes, a row for each page, of pages that lie one behind the other in ``buffer``."""
        for first, end in contiguous(self.offsets, page_size):
            start, length = int(self.offsets[first]), (end - first) * page_size
            data = np.frombuffer(self.buffer, dtype=np.uint8, count=length, offset=start)
            yield self.pfns[first:end], data.reshape(-1, page_size)


@dataclass(slots=True)
class PfnRanges:
    """A set of PFNs that is added to in ascending order, time after time, and kept as ranges; bounded in memory."""

    count: int = 0
    _ranges: list[list[int]] = field(default_factory=list)

    @property
    def ranges(self) -> list[list[int]]:
        """The ranges [first, last], ascending, neighbours joined."""
        found: list[list[int]] = []
        for first, last in sorted(self._ranges):
            if found and found[-1][1] >= first - 1:
                found[-1][1] = max(found[-1][1], last)
            else:
                found.append([first, last])
        return found

    def add(self, pfn: int) -> None:
        """Count one PFN, and list it while there is room (MAX_LISTED_RANGES)."""
        self.count += 1
        if self._ranges and self._ranges[-1][1] == pfn - 1:
            self._ranges[-1][1] = pfn
        elif len(self._ranges) < MAX_LISTED_RANGES:
            self._ranges.append([pfn, pfn])

    def text(self) -> str:
        """Return the first ranges for a person: ``PFN 0x9f, 0x100-0x1ff, ...``."""
        ranges = self.ranges
        shown = [f"{first:#x}" if first == last else f"{first:#x}-{last:#x}" for first, last in ranges[:MAX_SHOWN]]
        return "PFN " + ", ".join(shown + ["..."] * (len(ranges) > MAX_SHOWN))

    @property
    def listed(self) -> int:
        """How many of the PFNs are in ``ranges``."""
        return sum(last - first + 1 for first, last in self.ranges)


def contiguous(offsets: NDArray[np.uint64] | NDArray[np.int64], step: int) -> list[tuple[int, int]]:
    """Return index ranges [first, end) of ``offsets`` (not empty) within which each follows the last by ``step``."""
    breaks = np.flatnonzero(np.diff(offsets) != step) + 1
    return list(pairwise([0, *map(int, breaks), len(offsets)]))


def _windows(offsets: NDArray[np.uint64], size: int) -> list[tuple[int, int]]:
    """Return index ranges [first, end) of pages that lie close enough together, in ascending order, to be mapped."""
    steps = np.diff(offsets.astype(np.int64))
    far = (steps <= 0) | (steps > size + _WINDOW_GAP)
    if far.any() or int(offsets[-1]) - int(offsets[0]) >= _WINDOW_BYTES:
        far |= np.diff(offsets // np.uint64(_WINDOW_BYTES)) != 0
    return list(pairwise([0, *(np.flatnonzero(far) + 1).tolist(), len(offsets)]))


class UnreadableMemory(Exception):  # noqa: N818  (an answer, not a failure of the program)
    """Physical memory at an address is not in the source, or cannot be read."""


class MemoryImage:
    """The dead kernel's physical memory.

    ``extents`` are the whole pages, sorted by PFN, disjoint. ``max_pfn`` is the highest PFN plus one.
    """

    def __init__(self, source: ByteSource, loads: NDArray[np.void], page_size: int) -> None:
        self.source = source
        self.page_size = page_size
        self._patience = Patience()
        self.linear_maps = tuple(
            LinearMap(int(load["p_vaddr"]), int(load["p_paddr"]), int(load["p_filesz"]))
            for load in loads
            if load["p_vaddr"]
        )
        order = np.argsort(loads["p_paddr"], kind="stable")
        self.extents, self._partial = _resolve(loads[order], page_size)
        self.page_count = int(self.extents["pages"].sum()) + len(self._partial)
        ends = [int((self.extents["pfn"] + self.extents["pages"]).max())] if len(self.extents) else []
        ends += [max(self._partial) + 1] if self._partial else []
        self.max_pfn = max(ends, default=0)

    @property
    def pages_not_tried(self) -> int:
        """Pages that count as unreadable because reads about there took too long to fail."""
        return self._patience.not_tried

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, pages) for every run of pages that exist, in PFN order, partial pages included."""
        for chunk_first, pages, _ in self._ordered():
            yield chunk_first, pages

    def chunks(self, runs: Iterable[tuple[int, int]] | None = None, most: int | None = None) -> Iterator[Chunk]:
        """Yield pages once, in PFN order, in chunks (``most`` pages, CHUNK_BYTES): all, or those in ``runs``.

        ``runs`` are (first PFN, pages), ascending and disjoint; what of them is not in memory is passed over.
        """
        limit = max(1, min(most or CHUNK_PAGES, CHUNK_BYTES // self.page_size))
        pending: list[tuple[int, int, int]] = []
        room, end = limit, 0

        def flush() -> Iterator[Chunk]:
            nonlocal pending, room
            if pending:
                yield self._chunk(pending)
            pending, room = [], limit

        for piece_first, piece_pages, piece_offset in self._ordered() if runs is None else self._within(runs):
            if piece_offset is None:
                yield from flush()
                yield Chunk(np.array([piece_first], dtype=np.int64), None)
                continue
            first, left, offset = piece_first, piece_pages, piece_offset
            # Far from the pages before it: they go alone if they are many, so that none of them is copied.
            if room <= limit // 2 and not 0 <= offset - end <= _WINDOW_GAP:
                yield from flush()
            while left:
                pages = min(room, left)
                pending.append((first, pages, offset))
                first, left, offset = first + pages, left - pages, offset + pages * self.page_size
                room -= pages
                if not room:
                    yield from flush()
            end = offset
        yield from flush()

    def fetch(self, chunk: Chunk) -> PageBlock:
        """Return the bytes of a chunk: mapped where possible, else read; unreadable pages become zeros. Never raises
        for what the source does.

        What lies close together is one mapping, and is not copied; pages from several places are gathered.
        """
        if chunk.offsets is None:
            return self._assemble(int(chunk.pfns[0]))
        windows = [(0, len(chunk.pfns))] if chunk.adjacent else _windows(chunk.offsets, self.page_size)
        if len(windows) == 1:
            view = self._map_pages(chunk.offsets)
            if view is not None:
                return PageBlock(chunk.pfns, view, chunk.offsets - chunk.offsets[0], adjacent=chunk.adjacent)
        return self._gather(chunk, windows)

    def read(self, address: int, length: int) -> bytes:
        """Return ``length`` bytes of physical memory at ``address``, for small structures.

        Raises:
            UnreadableMemory: some of it is not in the source or cannot be read.
        """
        pieces: list[bytes] = []
        while length > 0:
            pfn, within = divmod(address, self.page_size)
            there = self._find(address)
            if there is not None:
                take = min(length, there[1])
                piece = self._read_exactly(there[0], take)
            elif pfn in self._partial:
                take = min(length, self.page_size - within)
                block = self._assemble(pfn)
                piece = None if block.unreadable else bytes(block.buffer[within : within + take])
            else:
                piece = None
            if piece is None:
                raise UnreadableMemory(f"physical address {address:#x}")
            pieces.append(piece)
            address += take
            length -= take
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def view(self, address: int, length: int) -> memoryview:
        """Return ``length`` bytes of physical memory at ``address`` without a copy where they can be mapped.

        Raises:
            UnreadableMemory: some of it is not in the source or cannot be read.
        """
        there = self._find(address)
        if there is not None and length <= there[1]:
            view = self._map(there[0], length)
            if view is not None:
                return view
        return memoryview(self.read(address, length))

    def holds(self, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        """Return which of the pages from ``first_pfn`` on there are."""
        there = np.zeros(pages, dtype=np.bool_)
        ends = self.extents["pfn"] + self.extents["pages"]
        for extent in self.extents[int(np.searchsorted(ends, first_pfn, side="right")) :]:
            start = int(extent["pfn"]) - first_pfn
            if start >= pages:
                break
            there[max(0, start) : start + int(extent["pages"])] = True
        for pfn in self._partial:
            if 0 <= pfn - first_pfn < pages:
                there[pfn - first_pfn] = True
        return there

    def inhabited(self, pages: int) -> Iterator[int]:
        """Yield the first PFN of every window of so many pages in which there is memory, ascending."""
        after = 0
        for run_first, run_pages in self.runs():
            for window in range(max(after, run_first - run_first % pages), run_first + run_pages, pages):
                yield window
                after = window + pages

    def _find(self, address: int) -> tuple[int, int] | None:
        """Return where in the source a physical address lies, and how many bytes follow in the same extent."""
        pfn, within = divmod(address, self.page_size)
        index = int(np.searchsorted(self.extents["pfn"], pfn, side="right")) - 1
        if index < 0:
            return None
        extent = self.extents[index]
        skip = (pfn - int(extent["pfn"])) * self.page_size + within
        room = int(extent["pages"]) * self.page_size - skip
        return (int(extent["offset"]) + skip, room) if room > 0 else None

    def _within(self, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int | None]]:
        """Yield what of ``_ordered`` lies in ``runs``."""
        pieces = self._ordered()
        piece = next(pieces, None)
        for first, pages in runs:
            end = first + pages
            while piece is not None and piece[0] < end:
                low, high = max(first, piece[0]), min(end, piece[0] + piece[1])
                if low < high:
                    yield low, high - low, None if piece[2] is None else piece[2] + (low - piece[0]) * self.page_size
                if piece[0] + piece[1] > end:
                    break
                piece = next(pieces, None)

    def _ordered(self) -> Iterator[tuple[int, int, int | None]]:
        """Yield extents and partial pages (offset None) in PFN order."""
        partial = iter(sorted(self._partial))
        waiting = next(partial, None)
        for extent in self.extents:
            pfn = int(extent["pfn"])
            while waiting is not None and waiting < pfn:
                yield waiting, 1, None
                waiting = next(partial, None)
            yield pfn, int(extent["pages"]), int(extent["offset"])
        while waiting is not None:
            yield waiting, 1, None
            waiting = next(partial, None)

    def _chunk(self, runs: list[tuple[int, int, int]]) -> Chunk:
        if len(runs) == 1:
            ((pfn, pages, offset),) = runs
            offsets = np.arange(offset, offset + pages * self.page_size, self.page_size, dtype=np.uint64)
            return Chunk(np.arange(pfn, pfn + pages, dtype=np.int64), offsets, adjacent=True)
        table = np.array(runs, dtype=EXTENT)
        counts = table["pages"]
        within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        pfns = np.repeat(table["pfn"], counts) + within
        offsets = np.repeat(table["offset"], counts) + within.astype(np.uint64) * np.uint64(self.page_size)
        return Chunk(pfns, offsets)

    def _map_pages(self, offsets: NDArray[np.uint64]) -> memoryview | None:
        """Return a view from the first of ascending ``offsets`` to the end of the last page, None where that fails."""
        first = int(offsets[0])
        return self._map(first, int(offsets[-1]) + self.page_size - first)

    def _map(self, offset: int, length: int) -> memoryview | None:
        return self._tried(self.source.map, offset, length)

    def _read_exactly(self, offset: int, length: int) -> bytes | None:
        data = self._tried(self.source.read, offset, length)
        return data if data is not None and len(data) == length else None

    def _tried(self, action: Callable[[int, int], _Bytes | None], offset: int, length: int) -> _Bytes | None:
        """Return what ``action`` gives of the source, None where it fails or the region is not worth a try."""
        if self._patience.given_up(offset):
            return None
        try:
            with self._patience.reading(offset):
                return action(offset, length)
        except OSError:
            return None

    def _gather(self, chunk: Chunk, windows: list[tuple[int, int]]) -> PageBlock:
        """Copy pages from several places together; what cannot be mapped is read run by run, then page by page."""
        assert chunk.offsets is not None
        size = self.page_size
        buffer = bytearray(len(chunk.pfns) * size)
        unreadable: list[int] = []
        for low, high in windows:
            offsets = chunk.offsets[low:high]
            view = self._map_pages(offsets) if len(windows) > 1 else None  # a single window was tried already
            base = int(offsets[0])
            for first, end in contiguous(offsets, size):
                start, length = int(offsets[first]), (end - first) * size
                into = (low + first) * size
                if view is not None:
                    buffer[into : into + length] = view[start - base : start - base + length]
                    continue
                data = self._read_exactly(start, length)
                if data is not None:
                    buffer[into : into + length] = data
                    continue
                unreadable += self._read_pages(chunk.pfns[low + first : low + end], start, buffer, into)
        offsets = np.arange(len(chunk.pfns), dtype=np.uint64) * np.uint64(size)
        return PageBlock(chunk.pfns, memoryview(buffer), offsets, tuple(unreadable), adjacent=True)

    def _read_pages(self, pfns: NDArray[np.int64], offset: int, buffer: bytearray, into: int) -> Iterator[int]:
        """Read pages one by one from ``offset`` on, and yield the PFNs of those that cannot be read."""
        size = self.page_size
        for number, pfn in enumerate(pfns.tolist()):
            page = self._read_exactly(offset + number * size, size)
            if page is None:
                self._patience.count(offset + number * size)
                yield pfn
            else:
                buffer[into + number * size : into + (number + 1) * size] = page

    def _assemble(self, pfn: int) -> PageBlock:
        """Put a partial page together; it counts as unreadable when any piece of it is."""
        page = bytearray(self.page_size)
        bad = False
        for within, length, offset in self._partial[pfn]:
            data = self._read_exactly(offset, length)
            if data is None:
                bad = True
            else:
                page[within : within + length] = data
        pfns = np.array([pfn], dtype=np.int64)
        return PageBlock(pfns, memoryview(page), np.zeros(1, dtype=np.uint64), (pfn,) if bad else ())


def _resolve(loads: NDArray[np.void], page_size: int) -> tuple[NDArray[np.void], dict[int, list[tuple[int, int, int]]]]:
    """Turn segments sorted by address into disjoint extents, and pieces (within, length, offset) of partial pages."""
    extents: list[tuple[int, int, int]] = []
    covered = 0  # every page below this PFN that a segment holds whole is in ``extents``
    for load in loads:
        start, length, offset = int(load["p_paddr"]), int(load["p_filesz"]), int(load["p_offset"])
        first, end = -(-start // page_size), (start + length) // page_size
        first = max(first, covered)
        if first >= end:
            continue
        where = offset + first * page_size - start
        if (
            extents
            and extents[-1][0] + extents[-1][1] == first
            and extents[-1][2] + extents[-1][1] * page_size == where
        ):
            extents[-1] = (extents[-1][0], extents[-1][1] + end - first, extents[-1][2])
        else:
            extents.append((first, end - first, where))
        covered = end
    table = np.array(extents, dtype=EXTENT)
    partial: dict[int, list[tuple[int, int, int]]] = {}
    for load in loads:
        start, length, offset = int(load["p_paddr"]), int(load["p_filesz"]), int(load["p_offset"])
        for pfn in {start // page_size, (start + length - 1) // page_size}:
            low, high = max(start, pfn * page_size), min(start + length, (pfn + 1) * page_size)
            if high - low < page_size and not _holds(table, pfn):
                partial.setdefault(pfn, []).append((low - pfn * page_size, high - low, offset + low - start))
    return table, partial


def _holds(extents: NDArray[np.void], pfn: int) -> bool:
    index = int(np.searchsorted(extents["pfn"], pfn, side="right")) - 1
    return index >= 0 and pfn < int(extents[index]["pfn"]) + int(extents[index]["pages"])
