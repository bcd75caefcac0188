"""A small kernel in 16 MiB of memory: image, page tables, mem_section, mem_map, zones, log — as x86_64 lays them out.

What a page filter needs to find its way, and nothing else. Every page holds its own PFN, so that one that is read by
mistake shows.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from capture.selftest import elf_core
from tests.builders import DIRECT_MAP, PAGE, READABLE_BY_DRGN, prstatus_note, vmcoreinfo_note
from tests.structpages import ERAS, MAPCOUNT, MAX_ORDER, PRIVATE, SIZE, Era, PageArray

PAGES = 4096
IMAGE_PFN, IMAGE_PAGES = 0x100, 0x80
TABLES_PFN, TABLES = 0x200, 8
ROOTS_PFN, SECTIONS_PFN, NODE_PFN = 0x240, 0x241, 0x244
MEM_MAP_PFN, MEM_MAP_PAGES = 0x400, PAGES * SIZE // PAGE
STACK_PFN, STACK_VIRTUAL = 0x500, 0xFFFF_C900_0000_4000
"""A stack in vmalloc's part of the address space: four pages."""
KERNEL_MAP = 0xFFFF_FFFF_8000_0000
VMEMMAP = 0xFFFF_EA00_0000_0000
VMALLOC = 0xFFFF_C900_0000_0000
ZONE_SIZE, AREA_AT, AREA_SIZE, ZONES_AT, COUNT_AT = 1536, 256, 88, 64, 4096 * 2
"""struct zone with its free_area, struct pglist_data with node_zones and nr_zones."""
LISTS, LIST_SIZE = 5, 16
PRESENT, LARGE = 0x63, 0xE3
RSP = 19
"""Index of rsp among the registers of NT_PRSTATUS."""


def node_data(free: Mapping[int, int], count_at: int = COUNT_AT) -> bytes:
    """Return a struct pglist_data: one zone, with so many free blocks by order; nr_zones at ``count_at``."""
    node = bytearray(count_at + 4)
    struct.pack_into("<I", node, count_at, 1)
    for order in range(MAX_ORDER):
        struct.pack_into("<Q", node, ZONES_AT + AREA_AT + order * AREA_SIZE + LISTS * LIST_SIZE, free.get(order, 0))
    return bytes(node)


@dataclass(slots=True)
class SmallKernel:
    """Its struct pages are in ``array``: mark pages there, then ask for ``core``."""

    era: Era = ERAS[0]
    array: PageArray = field(init=False)

    def __post_init__(self) -> None:
        self.array = PageArray(self.era, PAGES)

    def keys(self) -> dict[str, str | int]:
        """Return VMCOREINFO."""
        own: dict[str, str | int] = {
            "SYMBOL(swapper_pg_dir)": f"{KERNEL_MAP + TABLES_PFN * PAGE:x}",
            "SYMBOL(_stext)": f"{KERNEL_MAP + IMAGE_PFN * PAGE:x}",
            "SYMBOL(mem_section)": f"{DIRECT_MAP + ROOTS_PFN * PAGE:x}",
            "LENGTH(mem_section)": 2048,
            "SIZE(mem_section)": 16,
            "OFFSET(mem_section.section_mem_map)": 0,
            "NUMBER(SECTION_SIZE_BITS)": 27,
            "NUMBER(MAX_PHYSMEM_BITS)": 46,
            "NUMBER(VMALLOC_START)": f"{VMALLOC:#x}",
            "SYMBOL(contig_page_data)": f"{DIRECT_MAP + NODE_PFN * PAGE:x}",
            "SIZE(zone)": ZONE_SIZE,
            "SIZE(free_area)": AREA_SIZE,
            "OFFSET(pglist_data.node_zones)": ZONES_AT,
            "OFFSET(pglist_data.nr_zones)": COUNT_AT,
            "OFFSET(zone.free_area)": AREA_AT,
            "LENGTH(free_area.free_list)": LISTS,
            "SIZE(list_head)": LIST_SIZE,
        }
        return {**READABLE_BY_DRGN, **own, **self.era.info.keys}

    def memory(self, *, free: Mapping[int, int] | None = None) -> bytearray:
        """Return the 16 MiB; ``free`` is the kernel's own number of free blocks by order, all by default."""
        memory = bytearray(b"".join(struct.pack("<Q", pfn) * (PAGE // 8) for pfn in range(PAGES)))

        def put(pfn: int, data: bytes, at: int = 0) -> None:
            memory[pfn * PAGE + at : pfn * PAGE + at + len(data)] = data

        for pfn in [*range(TABLES_PFN, TABLES_PFN + 16), *range(ROOTS_PFN, NODE_PFN + 4)]:
            put(pfn, bytes(PAGE))
        root, upper, middle, upper2, middle2, lower, upper3, middle3 = range(TABLES_PFN, TABLES_PFN + TABLES)
        paths = (
            (VMEMMAP, (root, upper, middle)), (VMALLOC, (root, upper2, middle2, lower)),
            (DIRECT_MAP, (root, upper3, middle3)),
        )  # fmt: skip
        for virtual, path in paths:
            for shift, (table, following) in zip((39, 30, 21), pairwise(path), strict=False):
                put(table, struct.pack("<Q", following * PAGE | PRESENT), (virtual >> shift & 511) * 8)
        put(middle, struct.pack("<Q", MEM_MAP_PFN * PAGE | LARGE), (VMEMMAP >> 21 & 511) * 8)
        for large in range(PAGES * PAGE >> 21):
            put(middle3, struct.pack("<Q", large << 21 | LARGE), (DIRECT_MAP >> 21 & 511) * 8 + large * 8)
        for page in range(4):
            put(lower, struct.pack("<Q", (STACK_PFN + page) * PAGE | PRESENT), ((STACK_VIRTUAL >> 12) + page & 511) * 8)
        put(ROOTS_PFN, struct.pack("<Q", DIRECT_MAP + SECTIONS_PFN * PAGE))
        put(SECTIONS_PFN, struct.pack("<QQ", VMEMMAP | 0b1111, 0))
        counts = self.free_blocks() if free is None else free
        put(NODE_PFN, node_data(counts))
        put(MEM_MAP_PFN, bytes(self.array.data))
        return memory

    def free_blocks(self) -> dict[int, int]:
        """Return how many free blocks of each order there are."""
        counts: dict[int, int] = {}
        for pfn in range(PAGES):
            (kind,) = struct.unpack_from("<i", self.array.data, pfn * SIZE + MAPCOUNT)
            (order,) = struct.unpack_from("<Q", self.array.data, pfn * SIZE + PRIVATE)
            if kind == self.era.buddy:
                counts[order] = counts.get(order, 0) + 1
        return counts

    def parts(self) -> bytes:
        """Return a vmcore of nothing but what a filter looks at: tables, mem_section, nodes, mem_map; 350 KB."""
        memory = bytes(self.memory())
        ranges = ((TABLES_PFN, TABLES), (ROOTS_PFN, NODE_PFN + 4 - ROOTS_PFN), (MEM_MAP_PFN, MEM_MAP_PAGES))
        return elf_core(
            [prstatus_note(1, STACK_VIRTUAL + 0x2000 - RSP) + vmcoreinfo_note(self.keys())],
            [(DIRECT_MAP + pfn * PAGE, pfn * PAGE, memory[pfn * PAGE : (pfn + count) * PAGE]) for pfn, count in ranges],
        )

    def core(self, *, free: Mapping[int, int] | None = None, keys: Mapping[str, str | int] | None = None) -> bytes:
        """Return the vmcore: two segments, as the kernel writes them: its image, then all of memory."""
        memory = bytes(self.memory(free=free))
        registers = prstatus_note(1, STACK_VIRTUAL + 0x2000 - RSP)
        image = memory[IMAGE_PFN * PAGE : (IMAGE_PFN + IMAGE_PAGES) * PAGE]
        return elf_core(
            [registers + vmcoreinfo_note(self.keys() if keys is None else keys)],
            [(KERNEL_MAP + IMAGE_PFN * PAGE, IMAGE_PFN * PAGE, image), (DIRECT_MAP, 0, memory)],
        )


def busy_kernel(era: Era = ERAS[0]) -> SmallKernel:
    """A kernel with pages of every class: a free half, cache, anonymous memory, compound pages, broken and offline."""
    kernel = SmallKernel(era)
    array = kernel.array
    for pfn in (2048, 3072):
        array.free(pfn, 10)
    for pfn in range(0x600, 0x640):
        array.cache(pfn, private=pfn % 4 == 0)
    for pfn in range(0x640, 0x680):
        array.anonymous(pfn)
    array.cache(0x680, order=4)
    array.anonymous(0x6C0, order=5)
    array.slab(0x700, order=3)
    array.offline(0x710)
    array.poison(0x720)
    array.free(0x740, 3)
    return kernel
