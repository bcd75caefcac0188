"""The vmemmap exclusion: leave out pages of mem_map that describe only pages which the dump does not have.

On a machine with a terabyte they are most of a filtered dump. Works on bitmap 2 in the file, so that memory stays
fixed. Where several parts of mem_map share a page (hugetlb vmemmap optimisation), one that describes a page of the
dump keeps it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile.selection import Selection
from capture.kernel.memmap import MemMap

_PIECE = 1 << 17
"""Struct pages looked at together."""


def exclude_vmemmap(writer: Selection, mem_map: MemMap, page_size: int) -> int:
    """Take them out of what ``writer`` has selected; return how many they are."""
    before = writer.pages
    others = _not_selected(writer, mem_map, page_size)
    for first_pfn, described in _described(writer, mem_map, page_size):
        writer.change_selection(first_pfn, described, to=False)
    for first_pfn, described in _described(writer, mem_map, page_size):
        for first, end in others.within(first_pfn, len(described)):
            described[first - first_pfn : end - first_pfn] = False
        writer.change_selection(first_pfn, described, to=True)
    return before - writer.pages


class _Ranges:
    """Ranges of PFNs [first, end); those that follow each other are one."""

    def __init__(self) -> None:
        self._first, self._end = array("q"), array("q")

    def add(self, first: int, end: int) -> None:
        if self._end and self._end[-1] == first:
            self._end[-1] = end
        else:
            self._first.append(first)
            self._end.append(end)

    def within(self, first: int, pages: int) -> Iterator[tuple[int, int]]:
        """Yield what of them lies in a range of pages. (Few: mem_map is in few pieces, and one page of it in one.)"""
        for low, high in zip(self._first, self._end, strict=True):
            if low < first + pages and first < high:
                yield max(first, low), min(first + pages, high)


def _not_selected(writer: Selection, mem_map: MemMap, page_size: int) -> _Ranges:
    """Return the pages of mem_map that are not selected anyway: not there, or poisoned. They must not come into it."""
    found = _Ranges()
    for first_pfn, described in _described(writer, mem_map, page_size):
        absent = np.concatenate([[False], ~writer.selection(first_pfn, len(described)), [False]])
        edges = np.flatnonzero(absent[1:] != absent[:-1]) + first_pfn
        for first, end in edges.reshape(-1, 2).tolist():
            found.add(first, end)
    return found


def _described(writer: Selection, mem_map: MemMap, page_size: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield, for stretches of mem_map: its own first PFN, and for each page of it whether it describes selected ones.

    Only whole pages of a stretch: what its ends share with other things stays as it is.
    """
    size = mem_map.struct_size
    for physical, first, pages in mem_map.described_by():
        own = -(-physical // page_size)
        end = (physical + pages * size) // page_size
        step = max(1, _PIECE * size // page_size)
        for low in range(own, end, step):
            high = min(end, low + step)
            edges = np.arange(low, high + 1, dtype=np.int64) * page_size - physical
            starts, ends = edges[:-1] // size, -(-edges[1:] // size)
            base = int(starts[0])
            chosen = writer.selection(first + base, int(ends[-1]) - base)
            total = np.concatenate([[0], np.cumsum(chosen)])
            yield low, total[ends - base] > total[starts - base]
