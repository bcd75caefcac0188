"""The vmemmap exclusion: leave out pages of mem_map that describe only pages which the dump does not have.

On a machine with a terabyte they are most of a filtered dump. Works on bitmap 2 in the file, so that memory stays
fixed. Where several parts of mem_map share a page (hugetlb vmemmap optimisation), one that describes a page of the
dump keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile.writer import KdumpWriter
from capture.kernel.memmap import MemMap

_PIECE = 1 << 17
"""Struct pages looked at together."""


def exclude_vmemmap(writer: KdumpWriter, mem_map: MemMap, page_size: int) -> int:
    """Take them out of what ``writer`` has selected; return how many they are."""
    before = writer.pages
    for first_pfn, described in _described(writer, mem_map, page_size):
        writer.change_selection(first_pfn, described, to=False)
    for first_pfn, described in _described(writer, mem_map, page_size):
        writer.change_selection(first_pfn, described, to=True)
    return before - writer.pages


def _described(writer: KdumpWriter, mem_map: MemMap, page_size: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
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
