"""Page tables of every page size and width, valid and not; and of real kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.kernel.address import KernelMemory
from capture.kernel.arch import aarch64, x86_64
from capture.kernel.pagetable import Geometry, Mapping, PageTables
from capture.memory.image import UnreadableMemory
from capture.notes import vmcoreinfo
from capture.vmcore import open_vmcore
from tests.pagetables import ALL_ONES, FORMATS, KERNEL_MAP, ROOT, Format, Tables

ARCHITECTURES = {"x86_64": x86_64, "aarch64": aarch64}


@pytest.fixture(params=FORMATS, ids=lambda each: each.name)
def form(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


def geometry_of(form: Format) -> Geometry:
    found: Geometry | None = ARCHITECTURES[form.machine].geometry(form.info)
    assert found is not None
    return found


def walker(tables: Tables) -> PageTables:
    return PageTables(tables.read, geometry_of(tables.format))


def widest(form: Format) -> int:
    """Physical address bits of a format."""
    return 52 if form.wide else 48


def test_the_first_table_is_found(form: Format) -> None:
    geometry = geometry_of(form)
    assert geometry.root == ROOT
    assert geometry.page_size == form.page_size
    assert (geometry.first, geometry.last) == (form.first, ALL_ONES)


def test_every_size_of_leaf_is_found_wherever_it_lies(form: Format) -> None:
    """At the ends of the kernel's half and in between, mapped to low and to the highest physical memory."""
    for shift in form.leaves:
        size = 1 << shift
        for virtual in (form.first, form.first + 5 * size, ALL_ONES + 1 - size, ALL_ONES + 1 - 9 * size):
            if virtual < form.first:
                continue
            for physical in (size, (1 << widest(form)) - size, (1 << (widest(form) - 1)) + size):
                tables = Tables(form)
                tables.map(virtual, physical, shift)
                pages = walker(tables)
                expected = Mapping(virtual, physical, size)
                assert pages.lookup(virtual) == expected
                assert pages.lookup(virtual + size - 1) == expected
                assert list(pages.mappings(0, ALL_ONES)) == [expected]
                if virtual + size <= ALL_ONES:
                    assert walker(tables).lookup(virtual + size) is None
                if virtual > form.first:
                    assert walker(tables).lookup(virtual - 1) is None


def test_leaves_of_all_sizes_beside_each_other_come_in_order(form: Format) -> None:
    tables = Tables(form)
    expected = []
    virtual = form.first
    for number, shift in enumerate(sorted(form.leaves, reverse=True)):
        virtual += 3 << max(form.leaves) if number else 0
        for step in (0, 1, 4):
            mapping = Mapping(virtual + (step << shift), (16 + number) << max(form.leaves), 1 << shift)
            if mapping.virtual > ALL_ONES or mapping.physical >= 1 << widest(form):
                continue
            tables.map(mapping.virtual, mapping.physical, shift)
            expected.append(mapping)
    pages = walker(tables)
    assert list(pages.mappings(0, ALL_ONES)) == sorted(expected, key=lambda mapping: mapping.virtual)
    assert [pages.lookup(mapping.virtual + 7) for mapping in expected] == expected


def test_a_part_of_the_address_space_gives_what_overlaps_it(form: Format) -> None:
    tables, size = Tables(form), form.page_size
    base = form.first + (1 << form.shifts[-2])
    for page in range(6):
        tables.map(base + page * size, (100 + page) * size, form.shifts[-1])
    found = list(walker(tables).mappings(base + size + 1, base + 3 * size))
    assert [(mapping.virtual - base) // size for mapping in found] == [1, 2, 3]
    assert list(walker(tables).mappings(base + 6 * size, ALL_ONES)) == []


def test_an_address_outside_of_the_kernels_half_is_not_mapped(form: Format) -> None:
    tables = Tables(form)
    for index in range(1 << form.bits(0)):
        tables.put(ROOT, index, form.entry(0x50_0000, 0, leaf=False))
    for address in (0, 1, 0x7FFF_FFFF_F000, form.first - 1, 1 << 63, ALL_ONES + 1, 1 << 70, -1):
        assert walker(tables).lookup(address) is None


def test_an_entry_that_is_not_valid_ends_the_walk_at_every_level(form: Format) -> None:
    virtual = ALL_ONES + 1 - (7 << form.shifts[-1])
    for depth, shift in enumerate(form.shifts):
        tables = Tables(form)
        tables.map(virtual, 0x7 << 16, form.shifts[-1])
        table, index = tables.path(virtual, shift)
        valid = tables.get(table, index)
        for entry in (0, valid & ~1, valid & ~3):
            tables.put(table, index, entry)
            assert walker(tables).lookup(virtual) is None, depth
            assert list(walker(tables).mappings(0, ALL_ONES)) == []


def test_a_table_that_is_not_in_memory_is_an_answer(form: Format) -> None:
    virtual = form.first
    for depth in range(len(form.shifts) - 1):
        tables = Tables(form)
        tables.map(virtual, 0x7 << 16, form.shifts[-1])
        table, index = tables.path(virtual, form.shifts[depth])
        tables.put(table, index, form.entry(0x7_7777_0000, depth, leaf=False))
        assert walker(tables).lookup(virtual) is None
        assert list(walker(tables).mappings(0, ALL_ONES)) == []
    assert PageTables(Tables(form).read, geometry_of(form)).lookup(form.first) is None


@pytest.mark.parametrize("form", [form for form in FORMATS if form.machine == "aarch64"], ids=lambda each: each.name)
def test_a_block_where_the_architecture_has_none_is_not_believed(form: Format) -> None:
    for depth, shift in enumerate(form.shifts):
        if shift in form.leaves:
            continue
        tables = Tables(form)
        tables.put(ROOT if depth == 0 else tables.path(form.first, shift)[0], 0, 0x4000_0000 | 0x701)
        assert walker(tables).lookup(form.first) is None


@pytest.mark.parametrize("form", [form for form in FORMATS if form.machine == "aarch64"], ids=lambda each: each.name)
def test_the_last_level_has_pages_and_no_blocks(form: Format) -> None:
    tables = Tables(form)
    table, index = tables.path(form.first, form.shifts[-1])
    tables.put(table, index, 0x4000_0000 | 0x701)
    assert walker(tables).lookup(form.first) is None


def test_the_pat_bit_of_a_large_entry_is_no_address_bit() -> None:
    form = FORMATS[0]
    tables = Tables(form)
    tables.map(form.first, (0x4000_0000) | 1 << 12, 21)
    assert walker(tables).lookup(form.first) == Mapping(form.first, 0x4000_0000, 2 << 20)


def test_a_page_that_only_user_space_may_not_touch_is_not_mapped() -> None:
    """_PAGE_PROTNONE is bit 8 with the present bit clear."""
    form = FORMATS[0]
    tables = Tables(form)
    table, index = tables.path(form.first, 12)
    tables.put(table, index, 0x1234_5000 | 1 << 8)
    assert walker(tables).lookup(form.first) is None


def test_the_mask_of_memory_encryption_is_no_address_bit() -> None:
    form = FORMATS[0]
    encrypted = 1 << 47
    info = vmcoreinfo.parse(f"{form.keys}NUMBER(sme_mask)={encrypted}\n".encode())
    tables = Tables(form)
    tables.map(form.first, 0x1234_5000, 12)
    for table in list(tables.memory):
        for index in range(512):
            if entry := tables.get(table, index):
                tables.put(table, index, entry | encrypted)
    geometry = x86_64.geometry(info)
    assert geometry is not None
    assert PageTables(tables.read, geometry).lookup(form.first) == Mapping(form.first, 0x1234_5000, 4096)


def test_without_the_symbols_there_are_no_tables() -> None:
    for machine in (x86_64, aarch64):
        assert machine.geometry(vmcoreinfo.parse(b"")) is None
        assert machine.geometry(vmcoreinfo.parse(b"SYMBOL(swapper_pg_dir)=12345\nNUMBER(VA_BITS)=48\n")) is None
    for bits in (0, 12, 21, 53, 64, -5):
        assert aarch64.geometry(vmcoreinfo.parse(FORMATS[3].keys.replace("VA_BITS)=48", f"VA_BITS)={bits}")
                                                 .replace("TCR_EL1_T1SZ", "UNKNOWN").encode())) is None  # fmt: skip


def test_an_arm_kernel_that_does_not_tell_its_image_is_found_through_the_linear_map() -> None:
    form = next(form for form in FORMATS if form.name == "4K/48")
    keys = form.keys.replace("SYMBOL(_stext)", "SYMBOL(other)")
    start = (1 << 64) - (1 << 48)
    lines = [line for line in keys.splitlines() if "swapper" not in line]
    info = vmcoreinfo.parse("\n".join([*lines, f"SYMBOL(swapper_pg_dir)={start + 0x123_4000:x}"]).encode())
    geometry = aarch64.geometry(info)
    assert geometry is not None
    assert geometry.root == 0x4000_0000 + 0x123_4000


def test_tables_that_lead_to_themselves_end(form: Format) -> None:
    tables = Tables(form)
    for index in range(1 << form.bits(0)):
        tables.put(ROOT, index, form.entry(ROOT, 0, leaf=False))
    pages = walker(tables)
    started = time.monotonic()
    pages.lookup(ALL_ONES)
    assert sum(1 for _ in zip(range(10_000), pages.mappings(0, ALL_ONES, most_tables=50), strict=False)) <= 10_000
    assert time.monotonic() - started < 20


def test_walked_tables_are_named_by_their_frame(form: Format) -> None:
    tables = Tables(form)
    tables.map(form.first, 0x7 << 16, form.shifts[-1])
    pages = walker(tables)
    pages.lookup(form.first)
    assert pages.walked == {address // form.page_size for address in tables.memory}


def test_all_tables_are_noted_whether_they_were_read_or_not(form: Format) -> None:
    """Those of small pages next to each other and far apart; large pages, which are no tables, beside them."""
    tables, last = Tables(form), form.shifts[-1]
    for offset in (0, 1 << last, 5 << form.shifts[-2]):
        tables.map(form.first + offset, 0x7 << 16, last)
    tables.map(ALL_ONES + 1 - (1 << last), 0x7 << 16, last)
    for shift in form.leaves[:-1]:
        tables.map(form.first + (9 << shift), 0x3 << shift, shift)
    pages = walker(tables)
    pages.note_tables()
    assert pages.walked == {address // form.page_size for address in tables.memory}
    few = walker(tables)
    few.note_tables(len(form.shifts))
    assert few.walked < pages.walked


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_random_tables_never_raise_and_never_map_what_cannot_be(form: Format, seed: int, address: int) -> None:
    random = np.random.default_rng(seed)
    content = random.integers(0, 256, 1 << 16, dtype=np.uint8).tobytes()

    def read(physical: int, length: int) -> bytes:
        if random.random() < 0.1:
            raise UnreadableMemory(f"physical address {physical:#x}")
        return content[:length] if physical % 3 else bytes(length)

    pages = PageTables(read, geometry_of(form))
    for each in (address, address | form.first, KERNEL_MAP + address % (1 << 31)):
        found = pages.lookup(each)
        assert found is None or found.virtual <= each < found.virtual + found.size
    previous = -1
    for _, leaf in zip(range(2000), pages.mappings(0, ALL_ONES, most_tables=30), strict=False):
        assert leaf.virtual > previous
        assert leaf.physical % leaf.size == 0
        assert 0 <= leaf.physical < 1 << 52
        previous = leaf.virtual


# --- real kernels


@pytest.mark.parametrize("name", ["linux-6.1-la57", "linux-6.12"])
def test_tables_of_a_real_kernel_say_what_the_image_rule_and_the_direct_map_say(
    name: str, corpus_file: Callable[[str], Path]
) -> None:
    with open_vmcore(str(corpus_file(name))) as vmcore:
        memory = KernelMemory(vmcore.image, vmcore.info, "x86_64")
        assert memory.tables is not None
        for symbol in ("init_uts_ns", "_stext", "swapper_pg_dir", "prb", "node_data"):
            address = vmcore.info.symbol(symbol)
            assert address is not None
            found = memory.tables.lookup(address)
            assert found is not None
            assert found.physical + address - found.virtual == memory.physical(address)
        linear = [each for each in vmcore.image.linear_maps if each.virtual < KERNEL_MAP]
        assert linear
        for each in linear:
            for at in range(0, each.size, max(4096, each.size // 97 // 4096 * 4096)):
                found = memory.tables.lookup(each.virtual + at)
                assert found is not None
                assert found.physical + each.virtual + at - found.virtual == each.physical + at


@pytest.mark.parametrize("built", [0, -1, -(1 << 40), 65, 1 << 40])
def test_a_width_of_addresses_that_cannot_be_leads_to_no_tables(built: int) -> None:
    keys = f"SYMBOL(swapper_pg_dir)=ffff000040000000\nNUMBER(PHYS_OFFSET)=0\nNUMBER(VA_BITS)={built}\n"
    for narrow in ("", "NUMBER(TCR_EL1_T1SZ)=0x10\n"):
        info = vmcoreinfo.parse((keys + narrow).encode())
        found = aarch64.geometry(info)
        assert found is None or built == 0  # (0 is as good as none: what the machine can do counts)
