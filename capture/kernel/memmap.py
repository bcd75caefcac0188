"""mem_map: where the struct pages of the dead kernel lie, and their bytes in blocks.

SPARSEMEM_EXTREME, plain SPARSEMEM and FLATMEM, told apart by VMCOREINFO (mm/sparse.c, include/linux/mmzone.h). Where
there is no mem_section that can be read, SYMBOL(vmemmap) (a value, since 6.9) says as much. Memory: one root of
mem_section and one window of struct pages, whatever the machine has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.kernel.address import KernelMemory
from capture.kernel.pages import BLOCK_PAGES
from capture.kernel.pagetable import MAX_PHYSICAL_BITS
from capture.memory.image import MemoryImage, UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

SECTION_BITS = {"x86_64": 27, "aarch64": 30}
"""SECTION_SIZE_BITS where VMCOREINFO does not say; arch/*/include/asm/sparsemem.h."""
_PRESENT = 1
_FLAG_BITS = 6
"""Low bits of section_mem_map that are flags: SECTION_MAP_LAST_BIT is 5, or 6 (6.15 on, with ZONE_DEVICE)."""
_PIECE_PAGES = 8192
"""Struct pages put together where mappings meet; a compound page's first two are never apart."""
_GAP = 4096
"""Step in bytes over addresses that are not mapped."""
_MAX_GAPS = 1 << 14
"""Such steps in one walk; then all that follows counts as not mapped. Damaged tables could take days."""
_MAX_ROOTS = 1 << 22
_POINTER = 8
_ROOTS_AT_ONCE = 512


class Span(NamedTuple):
    """Pages whose struct pages follow each other from ``virtual`` on."""

    pfn: int
    pages: int
    virtual: int


class StructPages(NamedTuple):
    """Struct pages from ``pfn`` on, (pages, SIZE(page)) bytes. ``unknown`` index ranges could not be had: zeros."""

    pfn: int
    rows: NDArray[np.uint8]
    unknown: tuple[tuple[int, int], ...]


class NoMemMap(Exception):  # noqa: N818  (an answer, not a failure of the program)
    """The struct pages cannot be found; the text says what is missing."""


class MemMap:
    """The struct pages of pages below ``image.max_pfn``.

    Raises:
        NoMemMap: VMCOREINFO or memory does not lead to them.
    """

    def __init__(self, image: MemoryImage, memory: KernelMemory, info: VmcoreInfo, machine: str, size: int) -> None:
        self._image = image
        self._memory = memory
        self.struct_size = size
        """SIZE(page), bytes."""
        bits = info.number("SECTION_SIZE_BITS") or SECTION_BITS[machine]
        shift = bits - (image.page_size.bit_length() - 1)
        if not 8 <= shift <= 24:
            raise NoMemMap(f"sections of 2^{bits} bytes cannot be")
        self._bits, self._section_pages = bits, 1 << shift
        self._info = info
        self.kind = ""
        """How the struct pages were found, for people."""
        self._gaps = 0
        self._open()

    def spans(self) -> Iterator[Span]:
        """Yield where struct pages are, ascending by PFN; neighbours joined."""
        last: Span | None = None
        for pfn, virtual in self._sections():
            pages = min(self._section_pages, self._image.max_pfn - pfn)
            joined = last is not None and last.pfn + last.pages == pfn
            if last is not None and joined and last.virtual + last.pages * self.struct_size == virtual:
                last = Span(last.pfn, last.pages + pages, last.virtual)
                continue
            if last is not None:
                yield last
            last = Span(pfn, pages, virtual)
        if last is not None:
            yield last

    def blocks(self) -> Iterator[StructPages]:
        """Yield all struct pages, ascending, in blocks that end at multiples of _PIECE_PAGES, most at BLOCK_PAGES."""
        size = self.struct_size
        self._gaps = 0
        for span in self.spans():
            pfn, end = span.pfn, span.pfn + span.pages
            while pfn < end:
                start = span.virtual + (pfn - span.pfn) * size
                stop = min(end, pfn - pfn % BLOCK_PAGES + BLOCK_PAGES)
                data: memoryview | bytearray = self._window(start, (stop - pfn) * size)
                unknown: tuple[tuple[int, int], ...] = ()
                if len(data) < (stop - pfn) * size:
                    stop = pfn + len(data) // size
                    stop -= stop % _PIECE_PAGES
                if stop <= pfn:  # where mappings meet
                    stop = min(end, pfn - pfn % _PIECE_PAGES + _PIECE_PAGES)
                    data, unknown = self._assemble(start, (stop - pfn) * size)
                count = stop - pfn
                rows = np.frombuffer(data, dtype=np.uint8, count=count * size).reshape(count, size)
                yield StructPages(pfn, rows, unknown)
                pfn = stop

    def physical_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (physical address, bytes) of where the struct pages themselves lie."""
        self._gaps = 0
        for span in self.spans():
            for _, physical, length in self._pieces(span.virtual, span.pages * self.struct_size):
                if physical is not None:
                    yield physical, length

    def described_by(self) -> Iterator[tuple[int, int, int]]:
        """Yield (physical address, first PFN, pages): struct pages that lie together, whole pages of memory of them.

        What the vmemmap exclusion needs; a struct page that crosses the end of a mapping ends a range early.
        """
        self._gaps = 0
        for span in self.spans():
            for virtual, physical, length in self._pieces(span.virtual, span.pages * self.struct_size):
                if physical is not None and (virtual - span.virtual) % self.struct_size == 0:
                    yield physical, span.pfn + (virtual - span.virtual) // self.struct_size, length // self.struct_size

    def _window(self, start: int, length: int) -> memoryview:
        """Return a view of what lies together in physical memory from a virtual address on; empty where nothing is."""
        mapping = self._memory.mapping(start)
        if mapping is None:
            return memoryview(b"")
        physical, room = mapping.physical + start - mapping.virtual, mapping.virtual + mapping.size - start
        while room < length:
            mapping = self._memory.mapping(start + room)
            if mapping is None or mapping.physical + start + room - mapping.virtual != physical + room:
                break
            room = mapping.virtual + mapping.size - start
        return self._view(physical, min(room, length))

    def _view(self, physical: int | None, length: int) -> memoryview:
        """Return physical memory, nothing of it where it is not all there."""
        if physical is not None:
            with contextlib.suppress(UnreadableMemory):
                return self._image.view(physical, length)
        return memoryview(b"")

    def _assemble(self, start: int, length: int) -> tuple[bytearray, tuple[tuple[int, int], ...]]:
        """Put a block together from several mappings."""
        data = bytearray(length)
        unknown: list[tuple[int, int]] = []
        for virtual, physical, count in self._pieces(start, length):
            at = virtual - start
            view = self._view(physical, count)
            if len(view) == count:
                data[at : at + count] = view
            else:
                unknown.append((at // self.struct_size, -(-(at + count) // self.struct_size)))
        return data, tuple(unknown)

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, int | None, int]]:
        """Yield (virtual, physical or None, bytes) of a virtual range, mapping by mapping."""
        end = start + length
        while start < end:
            mapping = self._memory.mapping(start)
            if mapping is None:
                self._gaps += 1
                count = end - start if self._gaps > _MAX_GAPS else min(end, start - start % _GAP + _GAP) - start
                yield start, None, count
            else:
                count = min(end, mapping.virtual + mapping.size) - start
                yield start, mapping.physical + start - mapping.virtual, count
            start += count

    def _open(self) -> None:
        """Find out which memory model this is, and that its first step can be taken."""
        info = self._info
        self._roots, self._array, self._virtual = 0, 0, 0
        entry, field = info.size("mem_section"), info.offset("mem_section.section_mem_map")
        symbol, length = info.symbol("mem_section"), info.length("mem_section")
        if symbol is not None and entry is not None and field is not None and 8 <= field + 8 <= entry <= 4096:
            self._entry, self._field = entry, field
            self._per_root = self._image.page_size // entry
            sections = -(-self._image.max_pfn // self._section_pages)
            width = info.number("MAX_PHYSMEM_BITS")
            every = (
                1 << (width - self._bits) if width is not None and self._bits <= width <= MAX_PHYSICAL_BITS else None
            )
            if length is not None and every is not None and length == every and length != -(-every // self._per_root):
                self._array, self._count = symbol, length
                self.kind = "SPARSEMEM"
                if any(True for _ in self._array_sections(sections)):
                    return
            for roots in (symbol, self._pointer(symbol)):
                if roots is None:
                    continue
                self._array, self._roots, self._count = 0, roots, min(length or _MAX_ROOTS, _MAX_ROOTS)
                self.kind = "SPARSEMEM_EXTREME"
                if any(True for _ in self._root_sections()):
                    return
            self._array = self._roots = 0
        vmemmap = info.symbol("vmemmap")
        if vmemmap is not None:
            self._virtual, self.kind = vmemmap, "vmemmap"
            return
        flat = info.symbol("mem_map")
        if flat is not None:
            found = self._pointer(flat)
            if found:
                self._virtual, self.kind = found, "FLATMEM"
                return
        raise NoMemMap("VMCOREINFO leads to no mem_map: no mem_section, vmemmap or mem_map that can be read")

    def _sections(self) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, virtual address of its struct page) of each section that is there, ascending."""
        if self._roots:
            yield from self._root_sections()
        elif self._array:
            yield from self._array_sections(-(-self._image.max_pfn // self._section_pages))
        else:
            for pfn in self._image.inhabited(self._section_pages):
                yield pfn, self._virtual + pfn * self.struct_size

    def _root_sections(self) -> Iterator[tuple[int, int]]:
        sections = -(-self._image.max_pfn // self._section_pages)
        count = min(self._count, -(-sections // self._per_root))
        for first in range(0, count, _ROOTS_AT_ONCE):
            some = min(count - first, _ROOTS_AT_ONCE)
            try:
                roots = np.frombuffer(self._memory.read(self._roots + first * _POINTER, some * _POINTER), dtype="<u8")
            except UnreadableMemory:
                continue
            for number in (np.flatnonzero(roots) + first).tolist():
                start = number * self._per_root
                yield from self._table(int(roots[number - first]), start, min(sections, start + self._per_root))

    def _array_sections(self, sections: int) -> Iterator[tuple[int, int]]:
        for first in range(0, min(self._count, sections), self._per_root):
            last = min(self._count, sections, first + self._per_root)
            yield from self._table(self._array + first * self._entry, first, last)

    def _table(self, address: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        try:
            raw = self._memory.read(address, (end - first) * self._entry)
        except UnreadableMemory:
            return
        maps = np.ndarray((end - first,), "<u8", buffer=raw, offset=self._field, strides=(self._entry,))
        for index in np.flatnonzero(maps & np.uint64(_PRESENT)).tolist():
            base = int(maps[index]) >> _FLAG_BITS << _FLAG_BITS
            pfn = (first + index) * self._section_pages
            virtual = (base + pfn * self.struct_size) % (1 << 64)
            if base and virtual >> 56 == 0xFF:
                yield pfn, virtual

    def _pointer(self, address: int) -> int | None:
        try:
            return self._memory.read_unsigned(address, _POINTER)
        except UnreadableMemory:
            return None
