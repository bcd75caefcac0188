"""struct page → class: every kind of page of every era, blocks that end anywhere, and bytes that mean nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture.kernel import pages as module
from capture.kernel.pagerules import PageRules, PageType, page_rules
from capture.kernel.pages import (
    CACHE,
    CACHE_PRIVATE,
    CLASS_NAMES,
    FREE,
    HWPOISON,
    KERNEL,
    OFFLINE,
    OTHER,
    SLAB,
    TYPED,
    UNKNOWN,
    USER,
    PageClassifier,
    excluded_classes,
)
from tests.structpages import (
    ANON,
    CACHE_POINTER,
    ERAS,
    FLAGS,
    HEAD_AT,
    MAPCOUNT,
    MAPPING,
    MAX_ORDER,
    PRIVATE,
    REFCOUNT,
    SIZE,
    Era,
    PageArray,
)

ERA_IDS = [era.name for era in ERAS]


@pytest.fixture(params=ERAS, ids=ERA_IDS)
def era(request: pytest.FixtureRequest) -> Era:
    found: Era = request.param
    return found


def classified(array: PageArray, block: int = module.BLOCK_PAGES) -> NDArray[np.uint8]:
    """Classify in blocks that end at multiples of ``block``."""
    classifier = PageClassifier(page_rules(array.era.info))
    found, pfn = [], array.first
    while pfn < array.first + array.count:
        end = min(array.first + array.count, pfn - pfn % block + block)
        found.append(classifier.classify(pfn, array.rows[pfn - array.first : end - array.first]))
        pfn = end
    return np.concatenate(found)


def check(array: PageArray, block: int = module.BLOCK_PAGES) -> None:
    found = classified(array, block)
    wrong = np.flatnonzero(found != array.expected)
    assert not len(wrong), {
        int(pfn) + array.first: (CLASS_NAMES[found[pfn]], CLASS_NAMES[array.expected[pfn]]) for pfn in wrong[:5]
    }


def every_kind(era: Era) -> PageArray:
    array = PageArray(era, 8192)
    array.free(0, 0)
    array.free(2, 1)
    array.free(1024, 10)
    array.cache(8)
    array.cache(9, private=True)
    array.cache(16, order=4)
    array.cache(64, order=6, private=True)
    array.swap_cache(10)
    array.anonymous(11)
    array.anonymous(512, order=9)
    array.hugetlb(2048)
    array.hugetlb(4096, order=11)
    array.slab(12)
    array.slab(128, order=3)
    array.offline(13)
    array.poison(14)
    if era.unaccepted is not None:
        array.unaccepted(3072)
    return array


def test_every_kind_of_page_of_every_era(era: Era) -> None:
    check(every_kind(era))


@pytest.mark.parametrize("block", [2, 4, 64, 512, 1024])
def test_blocks_may_end_in_the_middle_of_anything(era: Era, block: int) -> None:
    check(every_kind(era), block)


def test_a_gigantic_page_reaches_over_many_blocks_and_no_further(era: Era) -> None:
    array = PageArray(era, 1 << 14)
    array.hugetlb(1 << 13, order=13)
    array.anonymous(11)
    check(array, 1 << 10)


def test_tails_that_show_the_head_again_belong_to_the_first_head() -> None:
    """hugetlb vmemmap optimisation, 5.14 to 7.0: the struct pages of a hugetlb page share the memory of the first."""
    for era in ERAS:
        array = PageArray(era, 2048)
        array.hugetlb(512)
        page = array.data[512 * SIZE : 576 * SIZE]
        for copy in range(576, 1024, 64):
            array.data[copy * SIZE : (copy + 64) * SIZE] = page
        check(array)
        check(array, 64)


# --- what is wanted first


@pytest.mark.parametrize("block", [2, 64, module.BLOCK_PAGES])
def test_slab_and_pages_with_a_type_are_saved_before_others_with_all_of_their_pages(era: Era, block: int) -> None:
    array = every_kind(era)
    array.slab(7168, order=5)
    array.put(4, MAPCOUNT, "<i", -0x0400_0001)  # a type that VMCOREINFO does not name
    classifier = PageClassifier(page_rules(era.info))
    found, turns = [], []
    for first in range(0, array.count, block):
        found.append(classifier.classify(first, array.rows[first : first + block]))
        turns.append(classifier.turns)
    kernel = np.concatenate(found) == KERNEL
    assert np.flatnonzero(kernel & (np.concatenate(turns) == TYPED)).tolist() == [4]
    slab = [12, *range(128, 136), *range(7168, 7200)]
    assert np.flatnonzero(kernel & (np.concatenate(turns) == SLAB)).tolist() == slab
    assert set(np.concatenate(turns).tolist()) == {TYPED, SLAB, OTHER}


# --- poisoned pages


def test_a_poisoned_tail_of_a_page_that_is_kept_is_found(era: Era) -> None:
    array = PageArray(era, 64)
    array.slab(8, order=3)
    array.poison(11)
    check(array)


def test_a_poisoned_head_does_not_cost_its_neighbours(era: Era) -> None:
    """makedumpfile leaves out the whole compound page: 7 pages of a slab that are good."""
    array = PageArray(era, 64)
    array.slab(8, order=3)
    array.poison(8)
    check(array)
    assert int((classified(array) == HWPOISON).sum()) == 1


def test_a_poisoned_page_in_a_class_that_is_left_out_is_poisoned_first(era: Era) -> None:
    array = PageArray(era, 2048)
    array.anonymous(512, order=9)
    array.poison(700)
    array.free(1024, 10)
    array.poison(1030)
    check(array)


def test_all_of_a_hugetlb_page_is_poisoned_when_its_head_is(era: Era) -> None:
    """The kernel marks the head alone and lists which page it was (folio_set_hugetlb_hwpoison, mm/memory-failure.c)."""
    array = PageArray(era, 2048)
    array.hugetlb(1024, order=10)
    array.poison(1024)
    array.expect(1024, 10, HWPOISON)
    check(array)
    check(array, 256)


# --- what cannot be


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("too large an order", lambda array: array.put(16, PRIVATE, "<Q", MAX_ORDER)),
        ("an absurd order", lambda array: array.put(16, PRIVATE, "<Q", 2**64 - 1)),
        ("not aligned", lambda array: array.put(16, PRIVATE, "<Q", 5)),
        ("referenced", lambda array: array.put(16, REFCOUNT, "<i", 1)),
        ("on a list", lambda array: array.flag(16, "lru")),
        ("a compound head", lambda array: array.flag(16, "head")),
    ],
)
def test_a_free_block_that_cannot_be_is_kept_and_counted(
    era: Era, what: str, spoil: Callable[[PageArray], None]
) -> None:
    array = PageArray(era, 64)
    array.free(16, 2)
    array.free(32, 3)
    spoil(array)
    array.expect(16, 2, KERNEL)
    classifier = PageClassifier(page_rules(era.info))
    found = classifier.classify(0, array.rows)
    assert found.tolist() == array.expected.tolist(), what
    assert classifier.oddities.looked_at[FREE] == 2
    assert classifier.oddities.impossible[FREE] == 1
    assert classifier.free_pages == 8


def test_an_anonymous_page_with_a_page_type_is_kept() -> None:
    """A slab of 6.10 on looks like one where VMCOREINFO does not tell the slab's type: dumps were lost to that."""
    for era in ERAS:
        if era.slab is not None:
            array = PageArray(replace(era, slab=None, flags={**era.flags, "slab": 7}), 64)
            array.put(8, MAPCOUNT, "<i", era.slab)
            array.put(8, MAPPING, "<Q", ANON)
            check(array)


def test_struct_pages_that_were_never_initialised_are_kept(era: Era) -> None:
    array = PageArray(era, 64)
    array.data[8 * SIZE : 16 * SIZE] = b"\xff" * (8 * SIZE)
    array.expected[8:16] = UNKNOWN
    check(array)


def test_an_impossible_mapping_is_counted(era: Era) -> None:
    array = PageArray(era, 64)
    for pfn in range(4):
        array.anonymous(pfn)
        array.cache(8 + pfn)
    array.put(0, MAPPING, "<Q", 0x1235)
    array.put(8, MAPPING, "<Q", 0x1234_5678)
    array.put(9, MAPPING, "<Q", 0)
    classifier = PageClassifier(page_rules(era.info))
    classifier.classify(0, array.rows)
    assert classifier.oddities.looked_at == {USER: 4, CACHE: 4}
    assert classifier.oddities.impossible == {USER: 1, CACHE: 1}


# --- the same, one page after another


def naive(rules: PageRules, first: int, rows: NDArray[np.uint8]) -> list[int]:
    """makedumpfile's order of decisions, page by page in plain Python, with the exceptions that the module names."""
    count = len(rows)
    data = rows.tobytes()

    def word(index: int, offset: int, form: str) -> int:
        value: int = struct.unpack_from(form, data, index * rules.size + offset)[0]
        return value

    def typed(index: int, kind: PageType | None) -> bool:
        return kind is not None and word(index, rules.mapcount, "<I") & kind.mask == kind.value

    kinds = [KERNEL] * count
    reach = 0
    poisoned_to = 0
    for index in range(count):
        flags = word(index, rules.flags, "<Q")
        whole = not word(index, rules.tail, "<Q") & 1
        slab = typed(index, rules.slab) if rules.slab else bool(flags & rules.slab_flag)
        anonymous = bool(word(index, rules.mapping, "<Q") & 1) and not slab
        has_type = word(index, rules.mapcount, "<i") < -1
        cache = bool(flags & rules.lru) or flags & rules.swap_cache == rules.swap_cache
        head = flags & rules.head == rules.head
        hugetlb = False
        if head and rules.hugetlb:
            hugetlb = typed(index, rules.hugetlb)
        elif head and rules.hugetlb_second and index + 1 < count:
            second = rules.hugetlb_second
            value = word(index + 1, second.offset, {1: "<B", 8: "<Q"}[second.width])
            hugetlb = value & second.mask == rules.hugetlb_value
        kind, order = KERNEL, 0
        if not whole:
            pass
        elif typed(index, rules.buddy) and not slab and not (
            flags & (rules.lru | rules.head) or word(index, rules.refcount or 0, "<I")
            or (size := word(index, rules.private or 0, "<Q")) >= rules.max_order or (first + index) % (1 << size)
        ):  # fmt: skip
            kind, order = FREE, word(index, rules.private or 0, "<Q")
        elif typed(index, rules.unaccepted):
            kind, order = FREE, rules.max_order - 1
            order = 0 if (first + index) % (1 << order) else order
        else:
            if cache and not anonymous and not has_type:
                kind = CACHE_PRIVATE if flags & rules.private_flag else CACHE
            elif (anonymous and not has_type) or hugetlb:
                kind = USER
            elif typed(index, rules.offline) and not slab:
                kind = OFFLINE
            if kind != KERNEL and head and rules.order and index + 1 < count:
                order = word(index + 1, rules.order.offset, "<B") & rules.order.mask
                if order >= 40 or (first + index) % (1 << order):
                    order = 0
        if kind != KERNEL and index >= reach:
            end = index + (1 << order)
            for each in range(index, min(count, end)):
                kinds[each] = kind
            reach = max(reach, end)
            if hugetlb and flags & rules.hwpoison and flags != 2**64 - 1:
                poisoned_to = max(poisoned_to, end)
        if (rules.hwpoison and flags & rules.hwpoison) or index < poisoned_to:
            kinds[index] = HWPOISON
        if flags == 2**64 - 1:
            kinds[index] = UNKNOWN
    return kinds


@st.composite
def page_arrays(draw: st.DrawFn) -> PageArray:
    """Struct pages whose fields have values that mean something, in mixes that no kernel makes."""
    era = draw(st.sampled_from(ERAS))
    array = PageArray(era, draw(st.sampled_from([2, 16, 64])), first=draw(st.sampled_from([0, 64, 4096])))
    types = [-1, 0, 5, era.buddy, era.offline, *(kind for kind in (era.slab, era.hugetlb, era.unaccepted) if kind)]
    bits = [1 << bit for bit in era.flags.values()]
    for pfn in range(array.first, array.first + array.count):
        if draw(st.booleans()):
            continue
        flags = sum(draw(st.sets(st.sampled_from(bits), max_size=4)))
        array.put(pfn, FLAGS, "<Q", draw(st.sampled_from([flags, flags, flags | draw(st.integers(0, 12)), 2**64 - 1])))
        array.put(pfn, MAPCOUNT, "<i", draw(st.sampled_from(types)))
        array.put(pfn, MAPPING, "<Q", draw(st.sampled_from([0, 1, ANON, CACHE_POINTER, 2**64 - 1])))
        array.put(pfn, PRIVATE, "<Q", draw(st.sampled_from([0, 1, 2, 3, 10, 11, 2**63])))
        array.put(pfn, REFCOUNT, "<i", draw(st.sampled_from([0, 0, 1, -1])))
        array.put(pfn, HEAD_AT, "<Q", draw(st.sampled_from([0, 0, 0xFFFF_EA00_0000_0001])))
        if draw(st.booleans()):
            array.put(pfn, 16, "<B", draw(st.sampled_from([0, 2])))  # what 5.10 to 6.5 keep in the second page
            array.put(pfn, 17, "<B", draw(st.sampled_from([0, 1, 2, 3, 9, 63, 64, 255])))
    return array


@given(page_arrays())
def test_blocks_say_what_one_page_after_another_says(array: PageArray) -> None:
    rules = page_rules(array.era.info)
    assert PageClassifier(rules).classify(array.first, array.rows).tolist() == naive(rules, array.first, array.rows)


@given(st.sampled_from(ERAS), st.integers(0, 2**64 - 1))
def test_random_bytes_are_classified_alike(era: Era, seed: int) -> None:
    rules = page_rules(era.info)
    rows = np.random.default_rng(seed).integers(0, 256, (64, SIZE), dtype=np.uint8)
    assert PageClassifier(rules).classify(0, rows).tolist() == naive(rules, 0, rows)


# --- levels


def test_levels_are_makedumpfiles_bits() -> None:
    always = {HWPOISON, OFFLINE}
    for level in range(32):
        expected = set(always)
        expected |= {CACHE} if level & 6 else set()
        expected |= {CACHE_PRIVATE} if level & 4 else set()
        expected |= {USER} if level & 8 else set()
        expected |= {FREE} if level & 16 else set()
        assert set(np.flatnonzero(excluded_classes(level)).tolist()) == expected
