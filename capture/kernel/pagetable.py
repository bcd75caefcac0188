"""Page tables in the dead kernel's memory: virtual address → the leaf entry that maps it.

What a table looks like is a ``Geometry``, made by ``capture.kernel.arch``; the walk is the same everywhere. Every
failure is an answer: an entry that is not present, a table that is not in memory, an address that nobody can map are
None. The depth is bounded by the levels, so that tables that point at themselves end too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.memory.image import UnreadableMemory

MAX_PHYSICAL_BITS = 52
CACHED_TABLES = 64
MAX_WALKED = 1 << 15
"""Tables that are remembered as walked."""
_ALL_ONES = (1 << 64) - 1


class Mapping(NamedTuple):
    """What one leaf entry maps: ``size`` bytes from ``virtual`` on lie from ``physical`` on."""

    virtual: int
    physical: int
    size: int


class Level(NamedTuple):
    """One level of tables: an entry covers 2^``shift`` bytes, a table has 2^``bits`` entries of 8 bytes.

    ``leaf_mask`` and ``leaf_value`` tell an entry that maps memory itself; a level without such entries has a value
    that no masked entry has.
    """

    shift: int
    bits: int
    leaf_mask: int
    leaf_value: int


class Geometry(NamedTuple):
    """A table format. ``root`` is the physical address of the first table, ``levels`` from there down.

    ``first`` and ``last`` are the virtual addresses that it covers. An entry counts when ``entry & present_mask ==
    present_value``; ``table_mask`` tells the same of an entry that leads to a table. ``address_mask`` has the bits of
    an entry that are physical address bits in their place; ``high_bits`` are (shift in the entry, bits, shift of the
    address) of those that are not.
    """

    root: int
    page_size: int
    levels: tuple[Level, ...]
    first: int
    last: int
    present_mask: int
    present_value: int
    table_mask: int
    table_value: int
    address_mask: int
    high_bits: tuple[int, int, int] | None = None

    def address(self, entry: int) -> int:
        """Return the physical address in an entry."""
        address = entry & self.address_mask
        if self.high_bits is not None:
            shift, bits, to = self.high_bits
            address |= (entry >> shift & (1 << bits) - 1) << to
        return address


class PageTables:
    """Walks tables of one ``geometry`` with ``read``: (physical address, bytes) → bytes, or UnreadableMemory.

    ``walked`` has the page frame numbers (of ``geometry.page_size``) of the tables that were read, up to MAX_WALKED.
    """

    def __init__(self, read: Callable[[int, int], bytes], geometry: Geometry) -> None:
        self._read = read
        self.geometry = geometry
        self.walked: set[int] = set()
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint64] | None] = OrderedDict()
        self._last: Mapping | None = None

    def lookup(self, address: int) -> Mapping | None:
        """Return the leaf that maps ``address``, None where nothing does."""
        last = self._last
        if last is not None and 0 <= address - last.virtual < last.size:
            return last
        geometry = self.geometry
        if not geometry.first <= address <= geometry.last:
            return None
        table = geometry.root
        for level in geometry.levels:
            entries = self._table(table, level)
            if entries is None:
                return None
            entry = int(entries[address >> level.shift & (1 << level.bits) - 1])
            if entry & geometry.present_mask != geometry.present_value:
                return None
            if entry & level.leaf_mask == level.leaf_value:
                self._last = self._leaf(entry, level, address >> level.shift << level.shift)
                return self._last
            if entry & geometry.table_mask != geometry.table_value:
                return None
            table = geometry.address(entry)
        return None

    def mappings(self, first: int, last: int, *, most_tables: int = 1 << 14) -> Iterator[Mapping]:
        """Yield all leaves that overlap [first, last], ascending; end early once ``most_tables`` were read."""
        geometry = self.geometry
        first, last = max(first, geometry.first), min(last, geometry.last)
        if first <= last:
            base = geometry.first >> (top := geometry.levels[0]).shift + top.bits << top.shift + top.bits
            yield from self._below(geometry.root, 0, base, first, last, [most_tables])

    def note_tables(self, most: int = MAX_WALKED) -> None:
        """Add every table to ``walked`` while there are fewer than ``most``; those of the last level are not read."""
        geometry, tables = self.geometry, {self.geometry.root}
        for level in geometry.levels[:-1]:
            below: set[int] = set()
            for table in sorted(tables):
                entries = self._table(table, level)
                if entries is None:
                    continue
                leads_on = (entries & np.uint64(geometry.table_mask)) == geometry.table_value
                leads_on &= (entries & np.uint64(geometry.present_mask)) == geometry.present_value
                leads_on &= (entries & np.uint64(level.leaf_mask)) != np.uint64(level.leaf_value)
                below.update(geometry.address(entry) for entry in entries[leads_on].tolist())
                if len(below) >= most:
                    break
            tables = below
        for table in sorted(tables)[: max(0, most - len(self.walked))]:
            self.walked.add(table // geometry.page_size)

    def _below(self, table: int, depth: int, base: int, first: int, last: int, budget: list[int]) -> Iterator[Mapping]:
        geometry, level = self.geometry, self.geometry.levels[depth]
        if budget[0] <= 0:
            return
        budget[0] -= 1
        entries = self._table(table, level)
        if entries is None:
            return
        low = max(0, (first - base) >> level.shift)
        high = min((1 << level.bits) - 1, (last - base) >> level.shift)
        there = (entries[low : high + 1] & np.uint64(geometry.present_mask)) == geometry.present_value
        for index in (np.flatnonzero(there) + low).tolist():
            entry, virtual = int(entries[index]), base + (index << level.shift)
            if entry & level.leaf_mask == level.leaf_value:
                leaf = self._leaf(entry, level, virtual)
                if leaf is not None:
                    yield leaf
            elif depth + 1 < len(geometry.levels) and entry & geometry.table_mask == geometry.table_value:
                yield from self._below(geometry.address(entry), depth + 1, virtual, first, last, budget)

    def _leaf(self, entry: int, level: Level, virtual: int) -> Mapping | None:
        size = 1 << level.shift
        physical = self.geometry.address(entry) & ~(size - 1)
        return Mapping(virtual, physical, size) if physical + size <= 1 << MAX_PHYSICAL_BITS else None

    def _table(self, address: int, level: Level) -> NDArray[np.uint64] | None:
        """Return the entries of a table, None where it is not in memory."""
        key = (address, level.bits)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        try:
            entries: NDArray[np.uint64] | None = np.frombuffer(self._read(address, 8 << level.bits), dtype="<u8")
        except UnreadableMemory:
            entries = None
        else:
            if len(self.walked) < MAX_WALKED:
                self.walked.add(address // self.geometry.page_size)
        self._cache[key] = entries
        if len(self._cache) > CACHED_TABLES:
            self._cache.popitem(last=False)
        return entries
