"""Physical addresses and PFNs → bytes: overlaps, holes, partial and unreadable pages."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture.memory import elfcore
from capture.memory.image import CHUNK_PAGES, MemoryImage, PfnRanges, UnreadableMemory
from capture.memory.source import Source
from capture.selftest import elf_core
from tests import builders
from tests.builders import PAGE, as_file, filled, image_of, load_table
from tests.faults import memory_with_holes
from tests.readers import model

Loads = Sequence[tuple[int, bytes]]
WriteFile = Callable[[bytes], str]


def pages_of(image: MemoryImage) -> dict[int, bytes]:
    """Every page by PFN, through chunks, as the copier takes them."""
    pages: dict[int, bytes] = {}
    last = -1
    for chunk in image.chunks():
        block = image.fetch(chunk)
        assert 0 < len(block.pfns) <= CHUNK_PAGES
        assert not block.unreadable
        for pfn, offset in zip(block.pfns.tolist(), block.offsets.tolist(), strict=True):
            assert pfn > last
            last = pfn
            pages[pfn] = bytes(block.buffer[offset : offset + image.page_size])
    return pages


def page(*parts: tuple[str, int]) -> bytes:
    """One page: ``page(("a", 10), (".", 0))`` is ten bytes "a", then zeros."""
    data = b"".join((b"\0" if letter == "." else letter.encode()) * length for letter, length in parts)
    return data.ljust(PAGE, b"\0")


@dataclass(frozen=True)
class Case:
    name: str
    loads: Loads
    expect: dict[int, bytes]


CASES = [
    Case("one segment", [(0x1000, filled("a", "b"))], {1: filled("a"), 2: filled("b")}),
    Case("unsorted segments", [(0x5000, filled("e")), (0x1000, filled("a"))], {1: filled("a"), 5: filled("e")}),
    Case("a hole between", [(0, filled("a")), (0x10000, filled("b"))], {0: filled("a"), 16: filled("b")}),
    Case("adjacent, apart in the file", [(0x1000, filled("a")), (0x9000, filled("z")), (0x2000, filled("b"))],
         {1: filled("a"), 2: filled("b"), 9: filled("z")}),
    Case("the same page twice", [(0x1000, filled("a")), (0x1000, filled("a"))], {1: filled("a")}),
    Case("the kernel image over the direct map", [(0x2000, filled("k", "k")), (0x1000, filled("a", "k", "k", "d"))],
         {1: filled("a"), 2: filled("k"), 3: filled("k"), 4: filled("d")}),
    Case("one segment inside another", [(0x1000, filled("a", "b", "c")), (0x2000, filled("b"))],
         {1: filled("a"), 2: filled("b"), 3: filled("c")}),
    Case("overlap at the end", [(0x1000, filled("a", "b")), (0x2000, filled("b", "c"))],
         {1: filled("a"), 2: filled("b"), 3: filled("c")}),
    Case("the first 640 KiB: 0x1000 + 0x9ec00 bytes", [(0x1000, b"a" * 0x9EC00)],
         {**{pfn: filled("a") for pfn in range(1, 0x9F)}, 0x9F: page(("a", 0xC00))}),
    Case("a segment that begins within a page", [(0x1F00, b"a" * 0x100 + filled("b"))],
         {1: page((".", 0xF00), ("a", 0x100)), 2: filled("b")}),
    Case("a segment within one page", [(0x1234, b"abc")], {1: page((".", 0x234), ("a", 1), ("b", 1), ("c", 1))}),
    Case("one byte", [(0x1FFF, b"z")], {1: page((".", 0xFFF), ("z", 1))}),
    Case("two segments share a page", [(0x1000, b"a" * 0x800), (0x1800, b"b" * 0x800)],
         {1: page(("a", 0x800), ("b", 0x800))}),
    Case("two segments share a page, a hole between", [(0x1F00, b"b" * 0x100), (0x1000, b"a" * 0x100)],
         {1: page(("a", 0x100), (".", 0xE00), ("b", 0x100))}),
    Case("a page in pieces that another segment holds whole", [(0x1800, b"b" * 0x1000), (0x1000, filled("b", "b"))],
         {1: filled("b"), 2: filled("b")}),
    Case("a partial page between whole ones", [(0x0, filled("a") + b"x" * 16), (0x2000, filled("c"))],
         {0: filled("a"), 1: page(("x", 16)), 2: filled("c")}),
    Case("empty segments", [(0x1000, b""), (0x2000, filled("a")), (0x2800, b"")], {2: filled("a")}),
    Case("PFN 0", [(0, filled("a"))], {0: filled("a")}),
    Case("the last page of 52 bits", [((1 << 52) - PAGE, filled("a"))], {(1 << 40) - 1: filled("a")}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pages(case: Case) -> None:
    with image_of(case.loads) as image:
        assert pages_of(image) == case.expect
        assert image.page_count == len(case.expect)
        assert image.max_pfn == max(case.expect) + 1
        assert [pfn for first, pages in image.runs() for pfn in range(first, first + pages)] == sorted(case.expect)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_structures_are_read_at_any_address_of_the_pages(case: Case) -> None:
    with image_of(case.loads) as image:
        for pfn, data in case.expect.items():
            assert image.read(pfn * PAGE, PAGE) == data
            assert image.read(pfn * PAGE + 0x7F0, 0x20) == data[0x7F0:0x810]
            if pfn + 1 in case.expect:
                assert image.read(pfn * PAGE + PAGE - 3, 6) == data[-3:] + case.expect[pfn + 1][:3]
            else:
                with pytest.raises(UnreadableMemory):
                    image.read(pfn * PAGE + PAGE - 3, 6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_pages_come_out_where_nothing_can_be_mapped(case: Case, vmcore_file: WriteFile) -> None:
    name = vmcore_file(elf_core([], [(0, physical, data) for physical, data in case.loads]))
    with Source(name, can_map=False) as source:
        assert pages_of(MemoryImage(source, elfcore.parse(source).loads, PAGE)) == case.expect


def test_where_segments_differ_the_one_that_starts_lower_wins() -> None:
    with image_of([(0x2000, filled("x", "c")), (0x1000, filled("a", "b"))]) as image:
        assert pages_of(image) == {1: filled("a"), 2: filled("b"), 3: filled("c")}


SMALL = 64
"""A page size for property tests: everything happens within a few hundred bytes. (A multiple of 8, no more.)"""

layouts = st.lists(st.tuples(st.integers(0, 12 * SMALL), st.integers(0, 5 * SMALL)), min_size=1, max_size=8)


def memory_at(physical: int, length: int) -> bytes:
    """Bytes that are a function of their address, as overlapping segments of a real machine are."""
    return bytes((address * 131 + address // SMALL * 7) % 251 + 1 for address in range(physical, physical + length))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(layouts.filter(lambda layout: any(length for _, length in layout)))
def test_any_layout_of_segments_gives_the_pages_of_the_naive_model(layout: list[tuple[int, int]]) -> None:
    loads = [(physical, memory_at(physical, length)) for physical, length in layout]
    expect = model(loads, SMALL)
    with image_of(loads, SMALL) as image:
        assert pages_of(image) == expect
        assert image.page_count == len(expect)
        assert [pfn for first, count in image.runs() for pfn in range(first, first + count)] == list(expect)
        assert b"".join(expect[pfn] for pfn in expect) == b"".join(image.read(pfn * SMALL, SMALL) for pfn in expect)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])
@given(layouts.filter(lambda layout: any(length for _, length in layout)), st.integers(0, 20), st.integers(0, 20))
def test_chunks_of_a_range_are_that_range(layout: list[tuple[int, int]], first: int, end: int) -> None:
    loads = [(physical, memory_at(physical, length)) for physical, length in layout]
    with image_of(loads, SMALL) as image:
        pfns = [int(pfn) for chunk in image.chunks([(first, end - first)]) for pfn in chunk.pfns]
    assert pfns == [pfn for pfn in model(loads, SMALL) if first <= pfn < end]


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])
@given(layouts.filter(lambda layout: any(length for _, length in layout)), st.integers(1, 400))
def test_a_truncated_file_gives_the_bytes_that_are_left(layout: list[tuple[int, int]], cut: int) -> None:
    loads = [(physical, memory_at(physical, length)) for physical, length in layout]
    whole = elf_core([], [(0, physical, data) for physical, data in loads])
    size = len(whole) - min(cut, sum(length for _, length in layout) - 1)
    left: list[tuple[int, bytes]] = []
    offset = 64 + 56 * len(loads)
    for physical, data in loads:
        left.append((physical, data[: max(0, size - offset)]))
        offset += len(data)
    with as_file(whole[:size]) as name, Source(name) as source:
        core = elfcore.parse(source)
        assert core.missing_bytes == len(whole) - size
        assert pages_of(MemoryImage(source, core.loads, SMALL)) == model(left, SMALL)


def test_seventy_thousand_single_pages_come_out_in_order(vmcore_file: WriteFile) -> None:
    with Source(vmcore_file(builders.pn_xnum_core(70_000))) as source:
        image = MemoryImage(source, elfcore.parse(source).loads, PAGE)
        pages = pages_of(image)
    assert list(pages) == list(range(0, 140_000, 2))
    assert all(pages[2 * number] == bytes([number % 256]) * PAGE for number in range(0, 70_000, 997))


def test_a_page_that_a_truncation_took_is_zeros_and_counted_and_the_rest_goes_on(vmcore_file: WriteFile) -> None:
    """The file is cut after it was opened: mapping it would be SIGBUS, the kernel says EFAULT or less comes back."""
    name = vmcore_file(elf_core([], [(0, 0x1000, filled("a", "b", "c"))]))
    with Source(name) as source:
        image = MemoryImage(source, elfcore.parse(source).loads, PAGE)
        os.truncate(name, 64 + 56 + 2 * PAGE)
        (chunk,) = image.chunks()
        block = image.fetch(chunk)
        assert block.unreadable == (3,)
        data = [bytes(block.buffer[offset : offset + PAGE]) for offset in block.offsets.tolist()]
        assert data == [filled("a"), filled("b"), bytes(PAGE)]
        with pytest.raises(UnreadableMemory):
            image.read(0x3000, 8)


def test_pages_that_fail_with_eio_are_zeros_and_listed() -> None:
    data = filled("a", "b", "c", "d", "e")
    with memory_with_holes(data, (1, 3)) as address, Source("/proc/self/mem", size=1 << 47) as source:
        image = MemoryImage(source, load_table((0x10_0000, address, 5 * PAGE)), PAGE)
        (chunk,) = image.chunks()
        block = image.fetch(chunk)
        found = [bytes(block.buffer[offset : offset + PAGE]) for offset in block.offsets.tolist()]
    assert block.unreadable == (0x101, 0x103)
    assert found == [filled("a"), bytes(PAGE), filled("c"), bytes(PAGE), filled("e")]


def test_a_partial_page_with_an_unreadable_piece_is_unreadable() -> None:
    buffer = ctypes.create_string_buffer(b"q" * 64, 64)
    with Source("/proc/self/mem", size=1 << 47) as source:
        image = MemoryImage(source, load_table((0x1000, ctypes.addressof(buffer), 64), (0x1800, PAGE, 64)), PAGE)
        (chunk,) = image.chunks()
        block = image.fetch(chunk)
        assert block.unreadable == (1,)
        with pytest.raises(UnreadableMemory):
            image.read(0x1000, 8)


def test_scattered_pages_do_not_map_what_lies_between(vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages that are 1 GiB apart in the file must not become one mapping of 1 GiB."""
    name = vmcore_file(b"")
    Path(name).touch()
    with Path(name).open("r+b") as file:
        file.write(filled("a"))
        file.seek(1 << 30)
        file.write(filled("b"))
    with Source(name) as source:
        image = MemoryImage(source, load_table((0x1000, 0, PAGE), (0x2000, 1 << 30, PAGE)), PAGE)
        lengths: list[int] = []
        for name in ("map", "read"):
            real = getattr(source, name)

            def noted(offset: int, length: int, real: Callable[[int, int], Any] = real) -> Any:
                lengths.append(length)
                return real(offset, length)

            monkeypatch.setattr(source, name, noted)
        assert pages_of(image) == {1: filled("a"), 2: filled("b")}
        assert lengths == [PAGE, PAGE]


def test_ranges_of_unreadable_pages_are_counted_beyond_what_is_listed() -> None:
    ranges = PfnRanges()
    for pfn in (1, 2, 3, 7):
        ranges.add(pfn)
    assert ranges.ranges == [[1, 3], [7, 7]]
    for pfn in range(100, 100 + 2 * 20_000, 2):
        ranges.add(pfn)
    assert ranges.count == 4 + 20_000
    assert len(ranges.ranges) == 10_000
    assert ranges.listed == 4 + 9_998
