"""mem_map: every memory model, sections that are there in part, struct pages across the ends of mappings."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from capture.kernel import memmap
from capture.kernel.memmap import MemMap, NoMemMap
from capture.kernel.pages import BLOCK_PAGES
from capture.kernel.pagetable import Mapping as Leaf
from capture.memory.image import UnreadableMemory
from capture.notes import vmcoreinfo
from tests.builders import PAGE, image_of

VMEMMAP = 0xFFFF_EA00_0000_0000
ROOTS, TABLE, FLAT = 0xFFFF_8880_0001_0000, 0xFFFF_8880_0002_0000, 0xFFFF_8880_0003_0000
SECTION = 32768
"""Pages of a section of 128 MiB."""


@dataclass
class Memory:
    """Kernel memory of a few words, and mappings of vmemmap by hand."""

    words: dict[int, bytes] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)

    def read(self, address: int, length: int) -> bytes:
        for start, data in self.words.items():
            if start <= address and address + length <= start + len(data):
                return data[address - start :][:length]
        raise UnreadableMemory(f"virtual address {address:#x}")

    def read_unsigned(self, address: int, size: int) -> int:
        return int.from_bytes(self.read(address, size), "little")

    def mapping(self, address: int) -> Leaf | None:
        return next((leaf for leaf in self.leaves if leaf.virtual <= address < leaf.virtual + leaf.size), None)


MEMORY_PAGES = 3000
"""Physical memory that the struct pages lie in: each page of it is full of its own number."""


def info(keys: Mapping[str, object]) -> vmcoreinfo.VmcoreInfo:
    return vmcoreinfo.parse("".join(f"{key}={value}\n" for key, value in keys.items()).encode())


EXTREME = {
    "SYMBOL(mem_section)": f"{ROOTS:x}", "LENGTH(mem_section)": 2048, "SIZE(mem_section)": 16,
    "OFFSET(mem_section.section_mem_map)": 0, "NUMBER(SECTION_SIZE_BITS)": 27, "NUMBER(MAX_PHYSMEM_BITS)": 46,
}  # fmt: skip


def section(flags: int = 0b11) -> bytes:
    """struct mem_section: where the struct page of page 0 would be, and flags."""
    return struct.pack("<QQ", VMEMMAP | flags, 0)


def spans(memory: Memory, keys: Mapping[str, object], max_pfn: int, size: int = 64) -> list[tuple[int, int, int]]:
    with image_of([((max_pfn - 1) * PAGE, bytes(PAGE))]) as image:
        found = MemMap(image, memory, info(keys), "x86_64", size)  # type: ignore[arg-type]
        return [(span.pfn, span.pages, span.virtual) for span in found.spans()]


def test_sparsemem_extreme_joins_sections_that_follow_each_other() -> None:
    table = section() + section() + bytes(16) + section()
    memory = Memory({ROOTS: struct.pack("<Q", TABLE) + bytes(16376), TABLE: table.ljust(4096, b"\0")})
    assert spans(memory, EXTREME, 4 * SECTION - 5) == [
        (0, 2 * SECTION, VMEMMAP),
        (3 * SECTION, SECTION - 5, VMEMMAP + 3 * SECTION * 64),
    ]


def test_a_section_that_is_not_present_is_passed_over() -> None:
    table = section(0b10) + section() + struct.pack("<QQ", 0b11, 0) + struct.pack("<QQ", 0x1234_5603, 0)
    memory = Memory({ROOTS: struct.pack("<Q", TABLE) + bytes(16376), TABLE: table.ljust(4096, b"\0")})
    assert spans(memory, EXTREME, 4 * SECTION) == [(SECTION, SECTION, VMEMMAP + SECTION * 64)]


def test_six_flag_bits_are_no_address() -> None:
    memory = Memory({ROOTS: struct.pack("<Q", TABLE) + bytes(16376), TABLE: section(0b111111).ljust(4096, b"\0")})
    assert spans(memory, EXTREME, SECTION) == [(0, SECTION, VMEMMAP)]


def test_the_symbol_may_be_the_pointer_itself() -> None:
    pointer = 0xFFFF_FFFF_8200_0000
    memory = Memory({
        pointer: struct.pack("<Q", ROOTS),
        ROOTS: struct.pack("<Q", TABLE) + bytes(16376), TABLE: section().ljust(4096, b"\0"),
    })  # fmt: skip
    assert spans(memory, {**EXTREME, "SYMBOL(mem_section)": f"{pointer:x}"}, SECTION) == [(0, SECTION, VMEMMAP)]


def test_plain_sparsemem_is_one_array() -> None:
    keys = {**EXTREME, "LENGTH(mem_section)": 1 << (36 - 27), "NUMBER(MAX_PHYSMEM_BITS)": 36}
    memory = Memory({ROOTS: (section() + bytes(16) + section()).ljust(16 * 512, b"\0")})
    assert spans(memory, keys, 3 * SECTION) == [
        (0, SECTION, VMEMMAP), (2 * SECTION, SECTION, VMEMMAP + 2 * SECTION * 64),
    ]  # fmt: skip


def test_vmemmap_says_enough_where_mem_section_does_not() -> None:
    assert spans(Memory(), {"SYMBOL(vmemmap)": f"{VMEMMAP:x}"}, SECTION + 7) == [(SECTION, 7, VMEMMAP + SECTION * 64)]


def test_flatmem_is_one_array_too() -> None:
    memory = Memory({FLAT: struct.pack("<Q", VMEMMAP)})
    assert spans(memory, {"SYMBOL(mem_map)": f"{FLAT:x}"}, 7) == [(0, 7, VMEMMAP)]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"SYMBOL(mem_map)": f"{FLAT:x}"},
        EXTREME,
        {**EXTREME, "SIZE(mem_section)": 0},
        {"NUMBER(SECTION_SIZE_BITS)": 60},
    ],
)
def test_without_a_way_to_it_there_is_none(keys: Mapping[str, object]) -> None:
    with pytest.raises(NoMemMap):
        spans(Memory(), keys, SECTION)


# --- their bytes


@pytest.fixture
def numbered_memory() -> list[tuple[int, bytes]]:
    return [(0, b"".join(struct.pack("<Q", pfn) * (PAGE // 8) for pfn in range(MEMORY_PAGES)))]


def rows_of(
    loads: list[tuple[int, bytes]], leaves: list[Leaf], pages: int, size: int
) -> list[tuple[int, np.ndarray[tuple[int, ...], np.dtype[np.uint8]], tuple[tuple[int, int], ...]]]:
    with image_of([*loads, (MEMORY_PAGES * PAGE, bytes(PAGE))]) as image:
        image.max_pfn = pages
        memory = Memory({}, leaves)
        found = MemMap(image, memory, info({"SYMBOL(vmemmap)": f"{VMEMMAP:x}"}), "x86_64", size)  # type: ignore[arg-type]
        return [(block.pfn, block.rows.copy(), block.unknown) for block in found.blocks()]


@pytest.mark.parametrize("size", [56, 64, 80])
def test_struct_pages_across_scattered_mappings_are_put_together(
    size: int, numbered_memory: list[tuple[int, bytes]]
) -> None:
    """vmemmap in single pages, in no order: struct pages that cross from one to the next are whole."""
    count = 500
    frames = [(number * 7919) % 2900 for number in range(-(-count * size // PAGE))]
    leaves = [Leaf(VMEMMAP + number * PAGE, frame * PAGE, PAGE) for number, frame in enumerate(frames)]
    expected = b"".join(struct.pack("<Q", frame) * (PAGE // 8) for frame in frames)[: count * size]
    ((pfn, rows, unknown),) = rows_of(numbered_memory, leaves, count, size)
    assert (pfn, unknown) == (0, ())
    assert rows.tobytes() == expected


def test_what_is_not_mapped_is_unknown_and_the_rest_is_there(numbered_memory: list[tuple[int, bytes]]) -> None:
    """A section that is there in part: 2 MiB of vmemmap map a part of it."""
    leaves = [Leaf(VMEMMAP + 2 * PAGE, 10 * PAGE, 3 * PAGE)]
    ((_, rows, unknown),) = rows_of(numbered_memory, leaves, 8 * 64, 64)
    assert unknown == ((0, 64), (64, 128), (320, 384), (384, 448), (448, 512))
    assert rows[128:320].tobytes() == b"".join(struct.pack("<Q", pfn) * 512 for pfn in (10, 11, 12))
    assert not rows[:128].any()


def test_what_is_mapped_to_no_memory_is_unknown(numbered_memory: list[tuple[int, bytes]]) -> None:
    ((_, _, unknown),) = rows_of(numbered_memory, [Leaf(VMEMMAP, 1 << 45, 1 << 21)], 128, 64)
    assert unknown == ((0, 128),)


def blocks_of(sections: int, leaves: list[Leaf], loads: list[tuple[int, bytes]]) -> list[tuple[int, int]]:
    table = (section() * sections).ljust(4096, b"\0")
    memory = Memory({ROOTS: struct.pack("<Q", TABLE) + bytes(16376), TABLE: table}, leaves)
    with image_of([*loads, (((sections - 1) * SECTION + 99) * PAGE, bytes(PAGE))]) as image:
        found = MemMap(image, memory, info(EXTREME), "x86_64", 64)  # type: ignore[arg-type]
        return [(block.pfn, len(block.rows)) for block in found.blocks()]


def test_blocks_end_at_multiples_of_the_block_size() -> None:
    struct_pages = [(0, bytes(4 * SECTION * 64))]
    whole = blocks_of(4, [Leaf(VMEMMAP, 0, 1 << 30)], struct_pages)
    assert whole == [(0, BLOCK_PAGES), (BLOCK_PAGES, 3 * SECTION + 100 - BLOCK_PAGES)]


def test_blocks_are_joined_over_mappings_that_lie_together_and_end_where_they_do_not() -> None:
    struct_pages = [(0, bytes(4 * SECTION * 64))]
    size = 1 << 21
    near = [Leaf(VMEMMAP + number * size, number * size, size) for number in range(4)]
    assert blocks_of(4, near, struct_pages)[0] == (0, BLOCK_PAGES)
    apart = [Leaf(VMEMMAP + number * size, (3 - number) * size, size) for number in range(4)]
    assert [pages for _, pages in blocks_of(4, apart, struct_pages)] == [SECTION, SECTION, SECTION, 100]


def test_the_memory_of_mem_map_itself_is_named(numbered_memory: list[tuple[int, bytes]]) -> None:
    with image_of(numbered_memory) as image:
        leaves = [Leaf(VMEMMAP, 100 * PAGE, 2 * PAGE), Leaf(VMEMMAP + 2 * PAGE, 50 * PAGE, 2 * PAGE)]
        found = MemMap(image, Memory({}, leaves), info({"SYMBOL(vmemmap)": f"{VMEMMAP:x}"}), "x86_64", 64)  # type: ignore[arg-type]
        image.max_pfn = 200
        assert list(found.physical_ranges()) == [(100 * PAGE, 2 * PAGE), (50 * PAGE, 200 * 64 - 2 * PAGE)]
        assert list(found.described_by()) == [(100 * PAGE, 0, 128), (50 * PAGE, 128, 72)]


def test_one_page_far_above_all_others_costs_no_time() -> None:
    keys = {"SYMBOL(vmemmap)": f"{VMEMMAP:x}"}
    assert spans(Memory(), keys, 1 << 40) == [((1 << 40) - SECTION, SECTION, VMEMMAP + ((1 << 40) - SECTION) * 64)]


def test_terabytes_that_are_not_mapped_are_not_gone_through_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memmap, "_MAX_GAPS", 50)
    asked: list[int] = []

    class Counting(Memory):
        def mapping(self, address: int) -> Leaf | None:
            asked.append(address)
            return super().mapping(address)

    with image_of([(0, bytes(PAGE)), ((1 << 40) - PAGE, bytes(PAGE))]) as image:
        found = MemMap(image, Counting(), info({"SYMBOL(vmemmap)": f"{VMEMMAP:x}"}), "x86_64", 256)  # type: ignore[arg-type]
        assert not list(found.physical_ranges())
        assert not list(found.described_by())
        blocks = list(found.blocks())
    assert len(asked) < 400  # of 4096
    assert all(block.unknown == ((0, len(block.rows)),) for block in blocks[50:])
    assert sum(len(block.rows) for block in blocks) == 2 * SECTION
