"""Pages that no dump may lack, whatever struct page says of them: they are kept, and counted when it says otherwise.

The kernel image (but for what it frees once it has booted, where kallsyms tells; else all of it), mem_map, page tables
that were walked, the log, the stacks of the CPUs' tasks, per-CPU areas, and everything that vmalloc maps: stacks of all
other tasks (CONFIG_VMAP_STACK), modules. What cannot be found is not guessed at.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.kernel.address import THREAD_SIZE, KernelMemory
from capture.kernel.kallsyms import find_symbols
from capture.kernel.memmap import MemMap
from capture.memory.image import MemoryImage, UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

KINDS = ("kernel image", "mem_map", "page tables", "log", "stacks", "per-CPU areas", "vmalloc", "whole kernel image")
IMAGE, MEM_MAP, PAGE_TABLES, LOG, STACKS, PER_CPU, VMALLOC, WHOLE_IMAGE = range(8)
"""The last two may hold pages that are not the kernel's own: what user space mapped, what was freed after boot."""

MAX_RANGES = 1 << 17
"""Ranges of one kind that are remembered, 16 bytes each; vmalloc of a large server may have more."""
_MAX_TABLES = 1 << 14
_MAX_RING = 1 << 31
_MAX_GAPS, _MAX_PIECES = 1 << 14, 1 << 17
"""Pages that are not mapped, and mappings, that are gone through for ranges of virtual addresses before it ends: a
damaged table of per-CPU areas names terabytes. The largest machines have 8192 CPUs with stacks of four pages."""

_SECTIONS = (
    (("_stext", "_text"), ("_etext",)),
    (("__start_rodata",), ("__end_rodata",)),
    (("_sdata",), ("_edata",)),
    (("__bss_start",), ("__bss_stop", "_end")),
)
"""What of the image stays for ever: between them lie __init_begin .. __init_end and gaps, which are freed after boot
(free_kernel_image_pages; arch/x86/kernel/vmlinux.lds.S, arch/arm64/kernel/vmlinux.lds.S)."""
_FREED_IN_BSS = ("__start_bss_decrypted_unused", "__end_bss_decrypted")
"""What is freed out of .bss without memory encryption (mem_encrypt_free_decrypted_mem, x86_64)."""
_PER_CPU_SYMBOLS = ("__per_cpu_offset", "__per_cpu_start", "__per_cpu_end", "nr_cpu_ids")
_MAX_CPUS = 1 << 14
_VMALLOC_SYMBOL = "vmalloc_base"
"""The variable behind VMALLOC_START on x86_64, which VMCOREINFO names since 6.9."""
_VMALLOC_BYTES_X86_64 = {False: 32 << 40, True: 12800 << 40}
"""VMALLOC_SIZE_TB by 5-level paging; arch/x86/include/asm/pgtable_64_types.h."""
_X86_64_MODULES = (0xFFFF_FFFF_A000_0000, 0xFFFF_FFFF_FEFF_FFFF)
"""MODULES_VADDR (without KASLR) to MODULES_END; with KASLR the image map ends at 0xffffffffc0000000."""


class ProtectedPages(NamedTuple):
    """Ranges of PFNs [first, end), sorted and disjoint, each with its kind.

    ``found`` says which kinds could be looked for; ``cut_short`` those that have more ranges than are remembered.
    """

    first: NDArray[np.int64]
    end: NDArray[np.int64]
    kind: NDArray[np.uint8]
    found: tuple[str, ...]
    cut_short: tuple[str, ...]

    def within(self, first_pfn: int, pages: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the first page, index of the end, kind) of what lies in a window of pages."""
        at = int(np.searchsorted(self.end, first_pfn, side="right"))
        limit = int(np.searchsorted(self.first, first_pfn + pages, side="left"))
        for index in range(at, limit):
            low, high = int(self.first[index]) - first_pfn, int(self.end[index]) - first_pfn
            yield max(0, low), min(pages, high), int(self.kind[index])


def find_protected(
    image: MemoryImage,
    memory: KernelMemory,
    info: VmcoreInfo,
    machine: str,
    mem_map: MemMap,
    stack_pointers: Iterable[int],
) -> ProtectedPages:
    """Look for all of them. Never raises for what memory holds."""
    finder = _Finder(image, memory)
    symbols = find_symbols(
        memory,
        info,
        [
            *(name for pair in _SECTIONS for names in pair for name in names),
            *_FREED_IN_BSS,
            *_PER_CPU_SYMBOLS,
            _VMALLOC_SYMBOL,
        ],
    )
    stays = list(_image_ranges(symbols))
    for start, end in stays or _whole_image(image, info):
        finder.virtual(IMAGE if stays else WHOLE_IMAGE, start, end)
    finder.physical(MEM_MAP, mem_map.physical_ranges())
    for start, length in _log_ranges(memory, info):
        finder.virtual(LOG, start, start + length)
    for pointer in stack_pointers:
        start = pointer - pointer % THREAD_SIZE
        finder.virtual(STACKS, start, start + THREAD_SIZE)
    for start, end in _per_cpu(memory, symbols):
        finder.virtual(PER_CPU, start, end)
    for first, last in _vmalloc(memory, info, symbols, machine):
        finder.mapped(VMALLOC, first, last)
    if memory.tables is not None:
        size = image.page_size
        finder.physical(PAGE_TABLES, ((pfn * size, size) for pfn in sorted(memory.tables.walked)))
    return finder.result()


class _Finder:
    def __init__(self, image: MemoryImage, memory: KernelMemory) -> None:
        self._memory = memory
        self._page_size = image.page_size
        self._ranges = [array("q") for _ in KINDS]
        self._cut_short: set[int] = set()
        self._gaps = self._pieces = 0

    def physical(self, kind: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Add (physical address, bytes)."""
        own = self._ranges[kind]
        for address, length in ranges:
            first, end = address // self._page_size, -(-(address + length) // self._page_size)
            if own and own[-1] == first:
                own[-1] = end
            elif len(own) >= 2 * MAX_RANGES:
                self._cut_short.add(kind)
                return
            elif length > 0:
                own.extend((first, end))

    def virtual(self, kind: int, start: int, end: int) -> None:
        """Add what a range of virtual addresses is mapped to."""
        self.physical(kind, self._translated(kind, start, end))

    def mapped(self, kind: int, first: int, last: int) -> None:
        """Add everything that page tables map between two virtual addresses."""
        if self._memory.tables is not None:
            leaves = self._memory.tables.mappings(first, last, most_tables=_MAX_TABLES)
            self.physical(kind, ((leaf.physical, leaf.size) for leaf in leaves))

    def _translated(self, kind: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        image = self._memory.image_physical(start, end) if start < end else None
        if image is not None:
            yield image, end - start
            return
        while start < end:
            if self._gaps > _MAX_GAPS or self._pieces > _MAX_PIECES:
                self._cut_short.add(kind)
                return
            mapping = self._memory.mapping(start)
            step = self._page_size - start % self._page_size
            if mapping is None:
                self._gaps += 1
            else:
                self._pieces += 1
                step = mapping.virtual + mapping.size - start
                yield mapping.physical + start - mapping.virtual, min(step, end - start)
            start += step

    def result(self) -> ProtectedPages:
        """Sort the ranges; where kinds overlap, the earlier kind has the page."""
        pairs = [np.array(own, dtype=np.int64).reshape(-1, 2) for own in self._ranges]
        kinds = np.repeat(np.arange(len(KINDS), dtype=np.uint8), [len(pair) for pair in pairs])
        table = np.concatenate(pairs)
        order = np.argsort(table[:, 0], kind="stable")
        first, end, kinds = table[order, 0], table[order, 1], kinds[order]
        if len(first):
            reached = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
            first = np.maximum(first, reached)
            left = first < end
            first, end, kinds = first[left], end[left], kinds[left]
        return ProtectedPages(
            first,
            end,
            kinds,
            tuple(name for name, own in zip(KINDS, self._ranges, strict=True) if own),
            tuple(KINDS[kind] for kind in sorted(self._cut_short)),
        )


def _image_ranges(symbols: dict[str, int]) -> list[tuple[int, int]]:
    """Return the virtual ranges of the kernel image that stay; none where symbols do not say what is freed."""
    ranges: list[tuple[int, int]] = []
    for starts, ends in _SECTIONS:
        start = min((symbols[name] for name in starts if name in symbols), default=None)
        end = next((symbols[name] for name in ends if name in symbols), None)
        if start is None or end is None or not 0 < end - start <= _MAX_RING:
            return []
        ranges.append((start, end))
    first_freed, end_freed = (symbols.get(name) for name in _FREED_IN_BSS)
    start, end = ranges[-1]
    if first_freed is not None and end_freed is not None and start <= first_freed < end_freed <= end:
        ranges[-1:] = [(start, first_freed), (end_freed, end)]
    return ranges


def _whole_image(image: MemoryImage, info: VmcoreInfo) -> list[tuple[int, int]]:
    """Return the virtual range of all that the ELF header says belongs to the kernel image."""
    stext = info.symbol("_stext")
    for linear in image.linear_maps:
        if stext is not None and linear.virtual <= stext < linear.virtual + linear.size:
            return [(linear.virtual, linear.virtual + linear.size)]
    return []


def _log_ranges(memory: KernelMemory, info: VmcoreInfo) -> Iterator[tuple[int, int]]:
    """Yield (virtual address, bytes) of the parts of the printk ring buffer (kernel/printk/printk_ringbuffer.h)."""
    try:
        pointer = info.symbol("prb")
        if pointer is None:
            return
        ring = memory.read_unsigned(pointer, 8)
        yield ring, info.size("printk_ringbuffer") or 0
        descriptors, data = info.offset("printk_ringbuffer.desc_ring"), info.offset("printk_ringbuffer.text_data_ring")
        offsets = [info.offset(f"prb_desc_ring.{name}") for name in ("count_bits", "descs", "infos")]
        bits_at, data_at = info.offset("prb_data_ring.size_bits"), info.offset("prb_data_ring.data")
        sizes = (info.size("prb_desc"), info.size("printk_info"))
        if None in (descriptors, data, bits_at, data_at, *offsets, *sizes):
            return
        count = 1 << min(memory.read_unsigned(ring + (descriptors or 0) + (offsets[0] or 0), 4), 32)
        for offset, size in zip(offsets[1:], sizes, strict=True):
            start = memory.read_unsigned(ring + (descriptors or 0) + (offset or 0), 8)
            yield start, min(count * (size or 0), _MAX_RING)
        start = memory.read_unsigned(ring + (data or 0) + (data_at or 0), 8)
        yield start, min(1 << min(memory.read_unsigned(ring + (data or 0) + (bits_at or 0), 4), 31), _MAX_RING)
    except UnreadableMemory:
        return


def _per_cpu(memory: KernelMemory, symbols: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yield the virtual range of every CPU's copy of the kernel's own per-CPU variables (setup_per_cpu_areas).

    What comes after them in a CPU's area is given back in part (pcpu_embed_first_chunk, mm/percpu.c).
    """
    offsets, start, end, count_at = (symbols.get(name) for name in _PER_CPU_SYMBOLS)
    if offsets is None or start is None or end is None or count_at is None or not 0 < end - start <= _MAX_RING:
        return
    try:
        count = min(memory.read_unsigned(count_at, 4), _MAX_CPUS)
        table = np.frombuffer(memory.read(offsets, 8 * count), dtype="<u8")
    except UnreadableMemory:
        return
    for offset in table.tolist():
        if offset:
            yield (start + offset) % (1 << 64), (end + offset) % (1 << 64)


def _vmalloc(
    memory: KernelMemory, info: VmcoreInfo, symbols: dict[str, int], machine: str
) -> Iterator[tuple[int, int]]:
    """Yield the virtual ranges [first, last] of vmalloc and of modules."""
    start, end = info.number("VMALLOC_START"), info.number("VMALLOC_END")
    if start is None and _VMALLOC_SYMBOL in symbols:
        with contextlib.suppress(UnreadableMemory):
            start = memory.read_unsigned(symbols[_VMALLOC_SYMBOL], 8)
    if start is not None:
        start %= 1 << 64
        if end is None and machine == "x86_64":
            end = start + _VMALLOC_BYTES_X86_64[bool(info.number("pgtable_l5_enabled"))]
        if end is not None:
            yield start, end % (1 << 64) - 1
    if machine == "x86_64":
        low = (1 << 64) - (1 << 31) + (info.number("KERNEL_IMAGE_SIZE") or 0)
        yield max(low, _X86_64_MODULES[0]), _X86_64_MODULES[1]
    else:
        modules, modules_end = info.number("MODULES_VADDR"), info.number("MODULES_END")
        if modules is not None and modules_end is not None:
            yield modules % (1 << 64), modules_end % (1 << 64) - 1
