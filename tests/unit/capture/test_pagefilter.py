"""The page filter: on real vmcores the same pages as makedumpfile's at every level; and what it does not trust."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dumpfile.reader import KdumpFile
from capture.kernel.pages import CLASS_NAMES, KERNEL
from capture.pagefilter import MAX_POISONED_PROTECTED, PageFilter, Verdict
from capture.vmcore import Vmcore, open_vmcore
from tests.builders import PAGE, as_file
from tests.kernels import (
    IMAGE_PAGES,
    IMAGE_PFN,
    MEM_MAP_PAGES,
    MEM_MAP_PFN,
    NODE_PFN,
    PAGES,
    STACK_PFN,
    TABLES_PFN,
    SmallKernel,
    busy_kernel,
)
from tests.outcome import Run
from tests.structpages import ERAS, REFCOUNT, SIZE, Era, PageArray
from tests.unit.conftest import corpus_folder

PARTIAL_PFN = 0x9F
"""The first 640 KiB end within it: we keep what there is of it, makedumpfile leaves it out."""
LEVELS = range(32)
DROPPED_BY_DEBIAN = 27_426
"""Pages that makedumpfile 1.7.2 keeps of the 6.12 vmcore at level 31, where 19,321 are right."""


@dataclass(frozen=True, slots=True)
class Real:
    """A vmcore of the corpus, open, with makedumpfile's own answer for every level."""

    name: str
    vmcore: Vmcore
    answers: list[dict[str, Any]]


@pytest.fixture(scope="module")
def real(corpus_vmcore: Path) -> Iterator[Real]:
    answers = json.loads((corpus_folder() / f"{corpus_vmcore.stem}.json").read_text())
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        yield Real(corpus_vmcore.stem, vmcore, answers)


def bitmap(page_filter: PageFilter, level: int, pfns: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The bits of bitmap 2, as many as a dump file has: whole blocks."""
    bits = np.zeros(-(-pfns // 32768) * 32768, dtype=np.bool_)
    for first, kept in page_filter.kept(level):
        bits[first : first + len(kept)] = kept
    return bits


def test_bitmap_2_is_makedumpfiles_at_every_level_but_for_the_partial_page(real: Real) -> None:
    page_filter = PageFilter(real.vmcore)
    assert [answer["level"] for answer in real.answers] == list(LEVELS)
    for answer in real.answers:
        bits = bitmap(page_filter, answer["level"], answer["max_mapnr"])
        assert bits[PARTIAL_PFN]
        bits[PARTIAL_PFN] = False
        assert int(bits.sum()) == answer["bitmap2_pages"]
        assert hashlib.sha256(np.packbits(bits, bitorder="little").tobytes()).hexdigest() == answer["bitmap2_sha256"]


def test_classes_have_the_pages_that_makedumpfile_counts(real: Real) -> None:
    page_filter = PageFilter(real.vmcore)
    for _ in page_filter.windows():
        pass
    found, answer = page_filter.census.by_name(), real.answers[31]
    for name in ("free", "cache", "cache_private", "user", "hwpoison", "offline"):
        assert found[name] == answer[name], name
    assert found["unknown"] == 0
    assert found["kernel"] == answer["bitmap2_pages"] + 1  # the partial page


def test_the_dump_file_says_the_same_and_has_the_zero_pages_that_makedumpfile_counts(
    real: Real, tmp_path: Path, run: Run
) -> None:
    """Level 31, and 27 for a mix; makedumpfile counts zero pages of overlapping segments once, when it copies."""
    for level in (27, 31):
        answer, target = real.answers[level], tmp_path / f"level-{level}"
        ran = run("dump", "-d", str(level), real.vmcore.source.name, target)
        assert (ran.status, ran.err.count("\n")) == (0, 1)
        with KdumpFile(target) as dump:
            assert dump.level == level
            pages = zeros = 0
            for batch in dump.pages():
                assert not batch.bad
                pages += len(batch.pfns)
                zeros += int((~batch.data.any(axis=1)).sum())
        assert pages == answer["bitmap2_pages"] + 1
        assert zeros == answer["zero"] + 1  # the partial page


def test_makedumpfile_of_debian_12_keeps_half_as_many_again_of_linux_6_12(real: Real) -> None:
    if real.name != "linux-6.12":
        pytest.skip("only of the 6.12 vmcore")
    kept = sum(int(kept.sum()) for _, kept in PageFilter(real.vmcore).kept(31))
    assert kept - 1 == 19_321 < DROPPED_BY_DEBIAN


def test_nothing_is_protected_that_makedumpfile_leaves_out_and_all_kinds_are_found(real: Real) -> None:
    page_filter = PageFilter(real.vmcore)
    for _ in page_filter.windows():
        pass
    assert set(page_filter.protects) >= {
        "kernel image", "mem_map", "page tables", "log", "stacks", "per-CPU areas", "vmalloc",
    }  # fmt: skip
    assert not any(page_filter.census.rescued(31).values())


def test_the_free_pages_are_those_that_the_kernel_counts(real: Real) -> None:
    page_filter = PageFilter(real.vmcore)
    for _ in page_filter.windows():
        pass
    assert page_filter.census.free_found > 30_000
    assert page_filter.census.free_found == page_filter.census.free_counted


def test_the_filter_trusts_itself_on_a_healthy_mem_map(real: Real) -> None:
    page_filter = PageFilter(real.vmcore)
    for _ in page_filter.windows():
        pass
    for level in LEVELS:
        verdict = page_filter.verdict(level)
        assert (verdict.level, verdict.reasons) == (level, ())


# --- a small kernel, healthy and not


@pytest.fixture(params=ERAS, ids=lambda era: era.name)
def kernel(request: pytest.FixtureRequest) -> SmallKernel:
    return busy_kernel(request.param)


@contextmanager
def filtering(core: bytes) -> Iterator[PageFilter]:
    """A page filter of a vmcore, after a scan."""
    with as_file(core) as name, open_vmcore(name) as vmcore:
        page_filter = PageFilter(vmcore)
        for _ in page_filter.windows():
            pass
        yield page_filter


def kept_pfns(page_filter: PageFilter, level: int) -> set[int]:
    return {first + int(index) for first, kept in page_filter.kept(level) for index in np.flatnonzero(kept)}


PRECIOUS = {
    *range(IMAGE_PFN, IMAGE_PFN + IMAGE_PAGES),
    *range(TABLES_PFN, TABLES_PFN + 6),  # (the direct map's are not walked: the ELF header has it)
    *range(MEM_MAP_PFN, MEM_MAP_PFN + MEM_MAP_PAGES),
    *range(STACK_PFN, STACK_PFN + 4),
}


def test_a_small_kernel_of_every_era_is_filtered(kernel: SmallKernel) -> None:
    with filtering(kernel.core()) as page_filter:
        assert page_filter.unusable is None
        assert page_filter.verdict(31) == Verdict(31, ())
        classes = page_filter.census.by_name()
        expected = np.bincount(kernel.array.expected, minlength=len(CLASS_NAMES))
        assert classes == dict(zip(CLASS_NAMES, expected.tolist(), strict=True))
        assert kept_pfns(page_filter, 31) == set(np.flatnonzero(kernel.array.expected == KERNEL).tolist())
        assert {"mem_map", "page tables", "stacks", "vmalloc", "whole kernel image"} <= set(page_filter.protects)


def test_what_is_precious_is_kept_although_mem_map_says_that_it_is_free(kernel: SmallKernel) -> None:
    """Until so much of it looks free that the class is not believed at all."""
    for pfn in (STACK_PFN, MEM_MAP_PFN + 3, TABLES_PFN + 1, IMAGE_PFN + 5):
        kernel.array.free(pfn, 0)
    with filtering(kernel.core()) as page_filter:
        assert kept_pfns(page_filter, 31) >= PRECIOUS
        assert page_filter.census.rescued(31)["free"] == 4
        assert "free" not in page_filter.census.rescued(15)
        assert page_filter.verdict(31) == Verdict(31, ())


def test_a_poisoned_page_is_never_kept_even_where_it_is_precious(kernel: SmallKernel) -> None:
    kernel.array.poison(STACK_PFN)
    with filtering(kernel.core()) as page_filter:
        for level in (0, 1, 31):
            assert STACK_PFN not in kept_pfns(page_filter, level)


@pytest.mark.parametrize(
    ("bit", "mark"),
    [
        (16, lambda array, pfn: array.free(pfn, 0)),
        (8, lambda array, pfn: array.anonymous(pfn)),
        (2, lambda array, pfn: array.cache(pfn)),
        (4, lambda array, pfn: array.cache(pfn, private=True)),
    ],
)
def test_a_class_that_claims_the_kernels_own_pages_is_not_trusted(
    bit: int, mark: Callable[[PageArray, int], None], kernel: SmallKernel
) -> None:
    for pfn in range(MEM_MAP_PFN, MEM_MAP_PFN + 20):
        mark(kernel.array, pfn)
    with filtering(kernel.core()) as page_filter:
        verdict = page_filter.verdict(31)
        assert verdict.level == 31 & ~(bit | 4 * (bit == 2))
        (reason,) = verdict.reasons
        assert reason.startswith("20 pages of the kernel's own (mem_map) look like ")
        assert page_filter.verdict(31 & ~bit & ~(6 * (bit in {2, 4}))).reasons == ()
        assert kept_pfns(page_filter, 31) >= PRECIOUS


def test_free_pages_that_the_kernel_does_not_count_are_kept(kernel: SmallKernel) -> None:
    with filtering(kernel.core(free={10: 6})) as page_filter:
        assert page_filter.verdict(31) == Verdict(15, ("2056 free pages found, the kernel counts 6144",))
        assert page_filter.verdict(15) == Verdict(15, ())


def test_free_blocks_that_cannot_be_cost_the_level(kernel: SmallKernel) -> None:
    for pfn in range(0x780, 0x780 + 40):
        kernel.array.free(pfn, 0)
        kernel.array.put(pfn, REFCOUNT, "<i", 1)
    with filtering(kernel.core(free={10: 2, 3: 1})) as page_filter:
        verdict = page_filter.verdict(31)
        assert verdict.level == 15
        assert verdict.reasons == ("40 of 43 free pages cannot be what their struct page says",)


@pytest.mark.parametrize(
    ("key", "level"),
    [
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", 15),
        ("OFFSET(page.private)", 15),
        ("LENGTH(zone.free_area)", 15),
        ("NUMBER(PG_lru)", 25),
        ("NUMBER(PG_private)", 25),
        ("NUMBER(PG_head_mask)", 17),
    ],
)
def test_a_key_that_is_missing_costs_the_classes_that_need_it(kernel: SmallKernel, key: str, level: int) -> None:
    keys = kernel.keys()
    del keys[key]
    with filtering(kernel.core(keys=keys)) as page_filter:
        verdict = page_filter.verdict(31)
        assert verdict.level == level
        assert all("which VMCOREINFO does not have" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    "key",
    ["SIZE(page)", "OFFSET(page.flags)", "OFFSET(page.mapping)", "OFFSET(page._mapcount)", "SYMBOL(mem_section)"],
)
def test_without_struct_pages_every_page_is_kept_and_a_line_says_why(key: str) -> None:
    kernel = busy_kernel()
    keys = kernel.keys()
    del keys[key]
    with filtering(kernel.core(keys=keys)) as page_filter:
        assert page_filter.verdict(31).level == 1
        assert len(page_filter.verdict(31).reasons) == 1
        assert page_filter.verdict(1) == Verdict(1, ())
        assert kept_pfns(page_filter, page_filter.verdict(31).level) == set(range(PAGES))


# --- damage


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ERAS), st.integers(0, 2**64 - 1), st.sampled_from([0.0001, 0.01, 0.5, 1.0]), st.booleans())
def test_a_damaged_mem_map_never_loses_what_is_precious(era: Era, seed: int, share: float, poison: bool) -> None:
    """Random bytes in a part of mem_map, or in all of it: no exception, and the kernel's own pages stay.

    But for a few that are marked poisoned: to read one that really is would cost the rest.
    """
    random = np.random.default_rng(seed)
    kernel = busy_kernel(era)
    data = np.frombuffer(kernel.array.data, dtype=np.uint8)
    hit = random.random(len(data)) < share
    data[hit] = random.integers(0, 256, int(hit.sum()), dtype=np.uint8)
    if not poison:
        data.view("<u8")[:: SIZE // 8] &= np.uint64(~(1 << era.flags["hwpoison"]) % 2**64)
    with filtering(kernel.core(free={10: 2, 3: 1})) as page_filter:
        for level in {31, page_filter.verdict(31).level}:
            lost = PRECIOUS - kept_pfns(page_filter, level)
            assert len(lost) <= (MAX_POISONED_PROTECTED if poison else 0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ERAS), st.integers(0, 2**64 - 1), st.sampled_from([1, 8, 64, 4096]))
def test_damaged_tables_and_sections_are_an_answer_too(era: Era, seed: int, hits: int) -> None:
    """Page tables, mem_section and zones with random bytes: never an exception, never a page of the image lost."""
    random = np.random.default_rng(seed)
    kernel = busy_kernel(era)
    core = bytearray(kernel.core())
    start = core.rindex(bytes(kernel.memory()[:PAGE]))
    places = random.integers(TABLES_PFN * PAGE, (NODE_PFN + 4) * PAGE, hits)
    for place in places.tolist():
        core[start + place] = int(random.integers(0, 256))
    with filtering(bytes(core)) as page_filter:
        assert kept_pfns(page_filter, 31) >= set(range(IMAGE_PFN, IMAGE_PFN + IMAGE_PAGES))
