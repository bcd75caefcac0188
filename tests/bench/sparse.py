"""Vmcores of machines with up to terabytes of memory that take little room on the disk.

Nearly all of such a machine is free, in largest blocks, of which only the first struct page says anything. The other
struct pages are zeros, as the free memory itself is: holes of the file. Each 64 MiB repeat the same few used pages, of
every class, so that all that grows on a real machine grows here: struct pages and the page tables that map them,
mem_section, free blocks, used pages between them, stacks that vmalloc maps.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capture.kernel.pages import CLASS_NAMES, FREE, KERNEL, excluded_classes
from capture.memory.elfcore import ELF_HEADER_SIZE, PROGRAM_HEADER
from capture.selftest import elf_core
from tests.builders import DIRECT_MAP, PAGE, READABLE_BY_DRGN, new_utsname, numbered, prstatus_note, vmcoreinfo_note
from tests.kernels import (
    IMAGE_PAGES,
    IMAGE_PFN,
    KERNEL_MAP,
    NODE_PFN,
    ROOTS_PFN,
    RSP,
    STACK_VIRTUAL,
    VMALLOC,
    VMEMMAP,
    SmallKernel,
    node_data,
)
from tests.pagetables import FORMATS, ROOT, Tables
from tests.structpages import ERAS, MAX_ORDER, SIZE, Era, PageArray

GROUP = 1 << 14
"""Pages that repeat: 64 MiB. Their struct pages are 1 MiB."""
SECTION = 1 << 15
"""Pages of a section (SECTION_SIZE_BITS is 27). Their struct pages are 2 MiB: one entry of a page table."""
MOST = 1 << 31
"""Pages of the largest machine, 8 TiB: its page tables fit in the first group, its vmcore in a file of ext4."""
HOLE = (0xC0000, 0x100000)
"""PFNs between which a PC has no memory: 3 GiB to 4 GiB."""
STACK = 4
"""Pages of a stack, the first ones of each group; vmalloc maps them all."""
CONTENTS = ((0, STACK), (8, 1))
"""What of a group is not zeros, (first, pages): the stack and a slab page."""
NAMES_PFN = IMAGE_PFN + 1
TABLES_PFN = 0x400
"""From here on in the first group: page tables, then tables of mem_section."""
SECTIONS_A_TABLE = PAGE // 16
"""struct mem_section has 16 bytes."""
FLAGS = 0b1111
"""SECTION_MARKED_PRESENT, SECTION_HAS_MEM_MAP, SECTION_IS_ONLINE, SECTION_IS_EARLY."""


class Pattern:
    """The struct pages of a group (``rows``), the classes of its pages (``kinds``), its free blocks by order."""

    def __init__(self, era: Era) -> None:
        array = PageArray(era, GROUP)  # pages that nothing is said of are the kernel's own: the stack
        array.cache(4)
        array.cache(5, private=True)
        array.anonymous(6)
        array.swap_cache(7)
        array.slab(8)
        array.offline(9)
        array.poison(10)
        # What is left of the first largest block, split as the buddy allocator does, then largest blocks.
        blocks = [(11, 0), (12, 2), *((1 << order, order) for order in range(4, MAX_ORDER - 1))]
        blocks += [(first, MAX_ORDER - 1) for first in range(1 << (MAX_ORDER - 1), GROUP, 1 << (MAX_ORDER - 1))]
        for first, order in blocks:
            array.free(first, order)
        self.free_blocks = Counter(order for _, order in blocks)
        self.kinds = array.expected
        self.rows = array.rows.copy()
        silent = self.kinds == FREE
        silent[[first for first, _ in blocks]] = False
        self.rows[silent] = 0

    def pieces(self) -> list[tuple[int, bytes]]:
        """Return what of the struct pages is not zeros, by offset, in whole pages: all else is a hole."""
        pages = self.rows.reshape(-1, PAGE)
        edges = np.flatnonzero(np.diff(pages.any(axis=1), prepend=False, append=False)).tolist()
        return [(low * PAGE, pages[low:high].tobytes()) for low, high in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class SparseKernel:
    """A machine with so many ``pages`` of memory, whole sections; ``write`` makes its vmcore.

    In its first group lie the kernel image, page tables and mem_section; mem_map is the end of memory.
    """

    pages: int
    era: Era = ERAS[0]

    def __post_init__(self) -> None:
        if not 2 * SECTION <= self.pages <= MOST or self.pages % SECTION:
            raise ValueError(f"{self.pages} pages: whole sections of {SECTION} pages, two of them to {MOST} pages")

    @cached_property
    def pattern(self) -> Pattern:
        """What all groups hold but those of the kernel's own."""
        return Pattern(self.era)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where memory is: (first PFN, pages)."""
        low = min(self.pages, HOLE[0])
        return [(0, low)] + ([(HOLE[1], self.pages - low)] if self.pages > low else [])

    @property
    def mem_map(self) -> int:
        """The physical address of the struct pages; they lie together, in the order of PFNs."""
        first, pages = self.ranges[-1]
        return (first + pages - self.pages * SIZE // PAGE) // GROUP * GROUP * PAGE

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """The first PFNs of the groups that hold the pattern."""
        every = np.concatenate([np.arange(first, first + pages, GROUP, dtype=np.int64) for first, pages in self.ranges])
        return every[(every >= GROUP) & (every < self.mem_map // PAGE)]

    @property
    def classes(self) -> dict[str, int]:
        """Pages of each class, by name."""
        counts = np.bincount(self.pattern.kinds, minlength=len(CLASS_NAMES)) * len(self.groups)
        counts[KERNEL] += self.pages - GROUP * len(self.groups)
        return dict(zip(CLASS_NAMES, counts.tolist(), strict=True))

    def kept(self, level: int) -> int:
        """Return how many pages a dump of this level has to have."""
        left_out = excluded_classes(level)
        return sum(pages for kind, pages in enumerate(self.classes.values()) if not left_out[kind])

    def write(self, path: Path) -> None:
        """Write the vmcore."""
        header = self._header()
        with path.open("wb", buffering=0) as file:
            os.truncate(file.fileno(), len(header) + self.pages * PAGE)
            os.pwrite(file.fileno(), header, 0)
            for physical, data in self._memory():
                os.pwrite(file.fileno(), data, len(header) + self._place(physical))

    def _place(self, physical: int) -> int:
        """Return where a physical address lies behind the header: memory follows memory, without the hole."""
        return physical if physical < HOLE[0] * PAGE else physical - (HOLE[1] - HOLE[0]) * PAGE

    def _header(self) -> bytes:
        """Return ELF header, program headers and notes, padded to a page. The image lies over the direct map."""
        loads = [(KERNEL_MAP, IMAGE_PFN, IMAGE_PAGES), *((DIRECT_MAP, first, pages) for first, pages in self.ranges)]
        keys: dict[str, str | int] = {
            **SmallKernel(self.era).keys(),
            "SYMBOL(swapper_pg_dir)": f"{KERNEL_MAP + ROOT:x}",
            "SYMBOL(init_top_pgt)": f"{KERNEL_MAP + ROOT:x}",
            "SYMBOL(init_uts_ns)": f"{KERNEL_MAP + NAMES_PFN * PAGE:x}",
            "OFFSET(uts_namespace.name)": 0,
        }
        notes = prstatus_note(1, STACK_VIRTUAL + 0x2000 - RSP) + vmcoreinfo_note(keys)
        core = bytearray(elf_core([notes], [(base + pfn * PAGE, pfn * PAGE, b"") for base, pfn, _ in loads]))
        core += bytes(-len(core) % PAGE)
        table = np.frombuffer(core, PROGRAM_HEADER, len(loads), ELF_HEADER_SIZE + PROGRAM_HEADER.itemsize)
        table["p_offset"] = [len(core) + self._place(pfn * PAGE) for _, pfn, _ in loads]
        table["p_filesz"] = table["p_memsz"] = [pages * PAGE for _, _, pages in loads]
        return bytes(core)

    def _memory(self) -> Iterator[tuple[int, bytes]]:
        """Yield what of memory is not zeros: (physical address, bytes)."""
        yield IMAGE_PFN * PAGE, numbered(IMAGE_PFN, IMAGE_PAGES)
        release = READABLE_BY_DRGN["OSRELEASE"]
        yield NAMES_PFN * PAGE, new_utsname("Linux", "sparse", release, "#1 SMP", "x86_64", "(none)")
        free = {order: blocks * len(self.groups) for order, blocks in self.pattern.free_blocks.items()}
        yield NODE_PFN * PAGE, node_data(free)
        tables = self._tables()
        yield from ((physical, bytes(table)) for physical, table in tables.memory.items())
        yield from self._sections(tables.next_table)
        pieces = self.pattern.pieces()
        for number, pfn in zip(self._numbers(self.groups).tolist(), self.groups.tolist(), strict=True):
            for offset, data in pieces:
                yield self.mem_map + number * SIZE + offset, data
            for first, pages in CONTENTS:
                yield (pfn + first) * PAGE, numbered(pfn + first, pages)

    def _numbers(self, pfns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many pages there are before each PFN: its place in mem_map."""
        return np.where(pfns < HOLE[0], pfns, pfns - (HOLE[1] - HOLE[0]))

    def _tables(self) -> Tables:
        """Return the page tables: struct pages and the image by 2 MiB, the direct map by 1 GiB, stacks by pages."""
        tables = Tables(next(each for each in FORMATS if each.name == "x86_64, 4 levels"), next_table=TABLES_PFN * PAGE)
        for first, pages in self.ranges:
            begin = self.mem_map + int(self._numbers(np.array([first]))[0]) * SIZE
            leaves = np.arange(begin, begin + pages * SIZE, 2 << 20, dtype=np.uint64)
            map_leaves(tables, VMEMMAP + first * SIZE, leaves, 21)
        map_leaves(tables, KERNEL_MAP, np.arange(0, 16 << 20, 2 << 20, dtype=np.uint64), 21)
        end = sum(self.ranges[-1]) * PAGE
        map_leaves(tables, DIRECT_MAP, np.arange(0, end, 1 << 30, dtype=np.uint64), 30)
        stacks = self.groups[:, None] + np.arange(STACK)
        map_leaves(tables, VMALLOC, stacks.astype(np.uint64).ravel() * np.uint64(PAGE), 12)
        return tables

    def _sections(self, tables_at: int) -> Iterator[tuple[int, bytes]]:
        """Yield mem_section: its roots, and the tables that they point to, from ``tables_at`` on."""
        last = sum(self.ranges[-1]) // SECTION
        entries = np.zeros((-(-last // SECTIONS_A_TABLE), SECTIONS_A_TABLE, 2), dtype="<u8")
        for first, pages in self.ranges:
            entries.reshape(-1, 2)[first // SECTION : (first + pages) // SECTION, 0] = VMEMMAP | FLAGS
        roots = DIRECT_MAP + tables_at + np.arange(0, entries.nbytes, PAGE, dtype=np.uint64)
        assert roots.nbytes <= PAGE, "the page of roots is full"
        assert tables_at + entries.nbytes <= GROUP * PAGE, "the first group is full"
        yield ROOTS_PFN * PAGE, roots.tobytes()
        yield tables_at, entries.tobytes()


def map_leaves(tables: Tables, virtual: int, physical: NDArray[np.uint64], shift: int) -> None:
    """Map 2^``shift`` bytes at each of the physical addresses, one after another from ``virtual`` on."""
    depth = tables.format.shifts.index(shift)
    leaf = np.uint64(tables.format.entry(0, depth, leaf=True))
    done = 0
    while done < len(physical):
        table, index = tables.path(virtual + (done << shift), shift)
        some = physical[done : done + (1 << tables.format.bits(depth)) - index]
        np.frombuffer(tables.memory[table], dtype="<u8")[index : index + len(some)] = some | leaf
        done += len(some)
