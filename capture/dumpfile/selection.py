"""Which pages there are, and which of them a dump has: two bitmaps in a file, a bit for each page.

They are looked at window by window, so that memory stays fixed whatever the machine has.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_BITMAP_WINDOW = 1 << 19
"""Pages of a bitmap that are put together at once."""
RUNS_WINDOW = 1 << 17
"""Pages of a bitmap that are looked at together."""

BitmapWindow = tuple[int, NDArray[np.bool_]]
"""A piece of a bitmap: its first PFN, a multiple of 8, and a bit for each page from there on."""


class BitmapStore(Protocol):
    """What bitmaps are kept in; every method raises TargetError."""

    def write_bitmap(self, bits: bytes, offset: int) -> None:
        """Write bytes that will be read back."""

    def read_back(self, offset: int, length: int) -> bytes:
        """Return bytes written before; what was never written reads as zeros."""


class BitmapPlaces(NamedTuple):
    """Where in a store the bitmaps lie, and the size of each; in bytes."""

    bitmap1: int
    bitmap2: int
    bitmap_bytes: int


class Selection:
    """Bitmap 1, the pages that there are, and bitmap 2, the pages of the dump.

    Raises:
        TargetError: from every method.
    """

    def __init__(self, store: BitmapStore, places: BitmapPlaces, max_mapnr: int) -> None:
        self._store = store
        self._places = places
        self.pages = 0
        """Pages of the dump, as selected."""
        self._windows: Sequence[int] = range(-(-max_mapnr // RUNS_WINDOW))
        """Windows of RUNS_WINDOW pages in which bitmaps may have ones, ascending."""

    def map_memory(self, runs: Iterable[tuple[int, int]]) -> None:
        """Write bitmap 1: the pages that there are, (first PFN, pages), ascending."""
        windows = array("q")
        self._write_bitmap(self._places.bitmap1, _windows_of(_watched(runs, windows)))
        self.look_only_at(windows)  # one damaged segment may lie 2^40 pages above all others

    def look_only_at(self, windows: Sequence[int]) -> None:
        """Take it that bitmaps have ones in these windows of RUNS_WINDOW pages only, ascending: memory may be far apart
        and what lies between, bitmaps of gigabytes, takes minutes to be gone through.
        """
        self._windows = windows

    def select(self, windows: Iterable[BitmapWindow]) -> int:
        """Write bitmap 2, the pages of the dump, in place of what was selected before; return how many they are.

        Where the windows do not reach, there are none; a second selection has the windows of the first.
        """
        self.pages = self._write_bitmap(self._places.bitmap2, windows)
        return self.pages

    def select_all(self) -> None:
        """Select every page of bitmap 1."""
        self.select(_windows_of(self._runs(self._places.bitmap1)))

    def selected(self, within: Callable[[int, int], NDArray[np.bool_]] | None = None) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, pages) of every run of bitmap 2, read back from the file.

        ``within`` says, for a first PFN and a number of pages, which of them are wanted; all where it is None.
        """
        return self._runs(self._places.bitmap2, within)

    def selection(self, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        """Return which of the pages from ``first_pfn`` on are selected, read back from the file; none beyond it."""
        start, end = self._bitmap_bytes(first_pfn, pages)
        selected = np.zeros(pages, dtype=np.bool_)
        if end > start:  # (a damaged page table may say that mem_map lies beyond all memory)
            bits = np.unpackbits(np.frombuffer(self._store.read_back(start, end - start), np.uint8), bitorder="little")
            there = bits[first_pfn % 8 :][:pages]
            selected[: len(there)] = there
        return selected

    def change_selection(self, first_pfn: int, described: NDArray[np.bool_], *, to: bool) -> None:
        """Select those of the pages from ``first_pfn`` on that are True in ``described``, or drop those that are not.

        ``to`` says which of the two.
        """
        start, end = self._bitmap_bytes(first_pfn, len(described))
        if end <= start:
            return
        bits = np.unpackbits(np.frombuffer(self._store.read_back(start, end - start), np.uint8), bitorder="little")
        part = bits[first_pfn % 8 :][: len(described)]
        before = int(np.count_nonzero(part))
        part[described[: len(part)] == to] = to
        self.pages += int(np.count_nonzero(part)) - before
        self._store.write_bitmap(np.packbits(bits, bitorder="little").tobytes(), start)

    def _bitmap_bytes(self, first_pfn: int, pages: int) -> tuple[int, int]:
        """Return where in the file the bits of bitmap 2 for some pages lie; cut off at its end."""
        end = min(first_pfn + pages, 8 * self._places.bitmap_bytes)
        return self._places.bitmap2 + first_pfn // 8, self._places.bitmap2 + -(-end // 8)

    def _write_bitmap(self, start: int, windows: Iterable[BitmapWindow]) -> int:
        """Write a bitmap window by window, and return its bits. What no window reaches is a hole: zeros."""
        bits = 0
        for first_pfn, window in windows:
            room = self._places.bitmap_bytes - first_pfn // 8
            self._store.write_bitmap(np.packbits(window, bitorder="little").tobytes()[:room], start + first_pfn // 8)
            bits += int(np.count_nonzero(window))
        return bits

    def _runs(
        self, start: int, within: Callable[[int, int], NDArray[np.bool_]] | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, pages) of every run of ones of a bitmap in the file, of those that are ``within``."""
        first, end = 0, 0
        for window in self._windows:
            first_pfn = window * RUNS_WINDOW
            length = min(RUNS_WINDOW // 8, self._places.bitmap_bytes - first_pfn // 8)
            data = self._store.read_back(start + first_pfn // 8, length)
            if data.count(0) == length:
                continue
            bits = np.zeros(8 * length + 2, dtype=np.uint8)
            bits[1:-1] = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            if within is not None:
                bits[1:-1] &= within(first_pfn, 8 * length)
            edges = np.flatnonzero(bits[1:] != bits[:-1])
            for low, high in (edges.reshape(-1, 2) + first_pfn).tolist():
                if low != end:
                    if end > first:
                        yield first, end - first
                    first = low
                end = high
        if end > first:
            yield first, end - first


def _watched(runs: Iterable[tuple[int, int]], windows: array[int]) -> Iterator[tuple[int, int]]:
    """Pass runs (ascending) on, and note in which windows of RUNS_WINDOW pages they are."""
    for first, pages in runs:
        low = max(first // RUNS_WINDOW, windows[-1] + 1 if windows else 0)
        windows.extend(range(low, (first + pages - 1) // RUNS_WINDOW + 1))
        yield first, pages


def _windows_of(runs: Iterable[tuple[int, int]]) -> Iterator[BitmapWindow]:
    """Yield the windows of a bitmap that has ``runs`` as ones; windows without any are left out."""
    start = -1
    bits = np.zeros(_BITMAP_WINDOW, dtype=np.bool_)
    for run_first, pages in runs:
        first, end = run_first, run_first + pages
        while first < end:
            window = first - first % _BITMAP_WINDOW
            if window != start:
                if start >= 0:
                    yield start, bits
                bits[:] = False
                start = window
            stop = min(end, window + _BITMAP_WINDOW)
            bits[first - window : stop - window] = True
            first = stop
    if start >= 0:
        yield start, bits
