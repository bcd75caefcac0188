"""Kernel virtual addresses → bytes.

The kernel image (its place is in VMCOREINFO) and the direct map (``p_vaddr`` of the PT_LOADs) are looked up; all else,
vmalloc and vmemmap, is found through the page tables in the dead memory. An address that nothing covers is "not
mapped".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

from capture.kernel.arch import aarch64, x86_64
from capture.kernel.pagetable import Mapping, PageTables
from capture.memory.image import LinearMap, MemoryImage, UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

THREAD_SIZE = 16 << 10
"""Of a task's stack, which is aligned to it, on both architectures; KASAN doubles it."""
_TEXT_SHIFT = 21
"""The kernel image begins at a multiple of 2 MiB; _stext may lie a little behind."""
_MAX_IMAGE = 1 << 30
"""More than any kernel image has."""

_ARCHITECTURES: dict[str, ModuleType] = {"x86_64": x86_64, "aarch64": aarch64}


class KernelMemory:
    """Reads the dead kernel's memory by virtual address.

    ``tables`` are its page tables, None where VMCOREINFO does not lead to them.
    """

    def __init__(self, image: MemoryImage, info: VmcoreInfo, machine: str) -> None:
        self._image = image
        self._info = info
        architecture = _ARCHITECTURES[machine]
        self._rule: Callable[[int, VmcoreInfo], int | None] = architecture.kernel_image_physical
        geometry = architecture.geometry(info)
        self.tables = None if geometry is None else PageTables(image.read, geometry)
        self._last: LinearMap | None = None
        """Where the last address lay: the next one is near it, and there may be thousands of maps."""

    def physical(self, address: int) -> int | None:
        """Return the physical address, or None: not mapped as far as we can tell."""
        mapping = self.mapping(address)
        return None if mapping is None else mapping.physical + address - mapping.virtual

    def mapping(self, address: int) -> Mapping | None:
        """Return what lies together with ``address`` in physical memory, None where it is not mapped.

        Of the kernel image, no more than its page: VMCOREINFO does not say where the image ends.
        """
        found = self._rule(address, self._info)
        if found is not None:
            within = address % self._image.page_size
            return Mapping(address - within, found - within, self._image.page_size) if found >= within else None
        linear = self._linear(address)
        if linear is not None:
            return Mapping(linear.virtual, linear.physical, linear.size)
        return None if self.tables is None else self.tables.lookup(address)

    def image_physical(self, start: int, end: int) -> int | None:
        """Return the physical address of ``start`` where all from there to ``end`` can belong to the kernel image.

        That it does belong to it is for the caller to know. None for all else.
        """
        first, last = self._rule(start, self._info), self._rule(end - 1, self._info)
        return first if first is not None and last is not None and last - first == end - 1 - start else None

    def read(self, address: int, length: int) -> bytes:
        """Return ``length`` bytes at a virtual address.

        Raises:
            UnreadableMemory: some of it is not mapped, or its memory is not in the source.
        """
        pieces: list[bytes] = []
        while length > 0:
            mapping = self.mapping(address)
            if mapping is None:
                raise UnreadableMemory(f"virtual address {address:#x} is not mapped")
            take = min(length, mapping.virtual + mapping.size - address)
            pieces.append(self._image.read(mapping.physical + address - mapping.virtual, take))
            address += take
            length -= take
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_unsigned(self, address: int, size: int) -> int:
        """Return a little-endian unsigned number of ``size`` bytes; raises as ``read`` does."""
        return int.from_bytes(self.read(address, size), "little")

    def linear_maps(self) -> list[LinearMap]:
        """Return where the dead kernel had its image and the direct map: what the source says of that, else what page
        tables do.

        A kdump-compressed dump has no virtual addresses. Empty where nothing leads to them.
        """
        if self._image.linear_maps:
            return list(self._image.linear_maps)
        return [] if self.tables is None else [*self._mapped_image(self.tables), *self._direct_map(self.tables)]

    def stack_pages(self, pointer: int) -> Iterator[LinearMap]:
        """Yield the pages of a task's stack from its stack pointer up, as far as they are mapped."""
        size = self._image.page_size
        end = (pointer | max(THREAD_SIZE, size) - 1) + 1
        for page in range(pointer - pointer % size, end, size):
            physical = self.physical(page)
            if physical is None:
                return
            yield LinearMap(page, physical, size)

    def _mapped_image(self, tables: PageTables) -> Iterator[LinearMap]:
        """Yield the kernel image, from its first mapped page to the last: VMCOREINFO has no symbol for its end."""
        text = self._info.symbol("_stext")
        if text is None:
            return
        leaves = (
            leaf
            for leaf in tables.mappings(text >> _TEXT_SHIFT << _TEXT_SHIFT, text + _MAX_IMAGE - 1)
            if self._rule(leaf.virtual, self._info) == leaf.physical
        )
        first = last = next(leaves, None)
        for last in leaves:  # noqa: B007  (the last of them is what is wanted)
            pass
        if first is not None and last is not None:
            yield LinearMap(first.virtual, first.physical, last.virtual + last.size - first.virtual)

    def _direct_map(self, tables: PageTables) -> Iterator[LinearMap]:
        """Yield the direct map: what lies first in the kernel's half of addresses, on both architectures
        (Documentation/arch/x86/x86_64/mm.rst, arch/arm64/memory.rst). It has to map the first page table, too.
        """
        geometry = tables.geometry
        leaf = next(tables.mappings(geometry.first, geometry.last), None)
        if leaf is None:
            return
        shift = leaf.virtual - leaf.physical
        root = tables.lookup(geometry.root + shift)
        if root is not None and root.virtual - root.physical == shift:
            yield LinearMap(leaf.virtual, leaf.physical, self._image.max_pfn * self._image.page_size - leaf.physical)

    def _linear(self, address: int) -> LinearMap | None:
        if self._last is None or not 0 <= address - self._last.virtual < self._last.size:
            maps = (linear for linear in self._image.linear_maps if 0 <= address - linear.virtual < linear.size)
            self._last = next(maps, None)
        return self._last
