"""struct page → class: what a page of the dead kernel's memory was used for, in blocks of thousands at once.

The order of decisions is makedumpfile's (first match wins): free, cache, private cache, user, offline; the rules are
those of ``capture.kernel.pagerules``. Two things are done differently, to save more rather than less:

- hwpoison comes first and is looked at for every page, tails of compound pages too: a poisoned page is never read, and
  its healthy neighbours are not lost with it (but those of hugetlb, whose head alone carries the mark).
- What cannot be, is kept: a free page with references, a free block that is too large or not aligned, a page on an
  LRU list or anonymous with a page type of its own, a struct page that was never initialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.kernel.pagerules import InSecondPage, PageRules, PageType

KERNEL, FREE, CACHE, CACHE_PRIVATE, USER, HWPOISON, OFFLINE, UNKNOWN = range(8)
"""Classes. KERNEL is everything that no dump level leaves out; UNKNOWN has no struct page that can be read."""
CLASS_NAMES = ("kernel", "free", "cache", "cache_private", "user", "hwpoison", "offline", "unknown")
TABLES, FIRST, TYPED, SLAB, OTHER, LAST = range(6)
"""Turns in which pages are saved. TABLES are the kernel's own page tables: a reader needs them before it can tell
anything of the rest. FIRST is what no crash is understood without, and known from elsewhere; TYPED pages have a page
type of their own: page tables of processes, and what else the kernel marks so; OTHER are the rest of class KERNEL, LAST
all that is not."""
BLOCK_PAGES = 65536
"""Struct pages looked at together: 4 MiB of them; what is worked out of them fits in a second-level cache."""
_NEAR_PAGES = 8192
"""Struct pages whose fields are fetched together: 512 KiB of them stay in a second-level cache."""

FREE_BIT, USER_BIT, CACHE_PRIVATE_BIT, CACHE_BIT = 16, 8, 4, 2

_LONG_SPAN = 32
"""Pages from which on filling a span by itself is cheaper than with others."""
_PROBES = 512
"""Pages of a class and block whose links and references are looked at."""
_NOTHING = np.zeros(0, dtype=np.intp)
_ALL_FLAGS = 0xFFFF_FFFF
_NEVER_INITIALISED = 0xFFFF_FFFF_FFFF_FFFF
"""PAGE_POISON_PATTERN, mm/debug.c: what struct pages of memory that was never brought online are filled with."""


def excluded_classes(level: int) -> NDArray[np.bool_]:
    """Return, by class, whether a dump of this level leaves it out. 4 implies 2; poisoned and offline pages always."""
    left_out = np.zeros(len(CLASS_NAMES), dtype=np.bool_)
    left_out[[HWPOISON, OFFLINE]] = True
    left_out[CACHE] = bool(level & (CACHE_BIT | CACHE_PRIVATE_BIT))
    left_out[CACHE_PRIVATE] = bool(level & CACHE_PRIVATE_BIT)
    left_out[USER] = bool(level & USER_BIT)
    left_out[FREE] = bool(level & FREE_BIT)
    return left_out


@dataclass(slots=True)
class Oddities:
    """How many pages of each kind were looked at closely, and how many of them cannot be what they say."""

    looked_at: dict[int, int] = field(default_factory=dict)
    impossible: dict[int, int] = field(default_factory=dict)

    def add(self, kind: int, looked_at: int, impossible: int) -> None:
        """Count pages of a class."""
        self.looked_at[kind] = self.looked_at.get(kind, 0) + looked_at
        self.impossible[kind] = self.impossible.get(kind, 0) + impossible


class PageClassifier:
    """Classifies struct pages block by block, in ascending PFN order.

    A free block or a compound page may reach into later blocks: how far, and as what, is carried from call to call.
    ``oddities`` collects what cannot be; ``free_pages`` counts pages of free blocks of the buddy allocator,
    ``poisoned_pages`` those that are marked poisoned. Without ``poison`` these are taken for what they were.

    ``turns`` says, of the block that was classified last, in which turn pages are to be saved if they are of class
    KERNEL: TYPED, SLAB or OTHER.
    """

    def __init__(self, rules: PageRules, *, poison: bool = True) -> None:
        self._rules = rules if poison else rules._replace(hwpoison=0)
        self._carried_to = 0
        self._carried_kind = KERNEL
        self._turn_to, self._turn = 0, OTHER
        self.turns = np.zeros(0, dtype=np.uint8)
        self.oddities = Oddities()
        self.free_pages = 0
        self.poisoned_pages = 0

    def classify(self, first_pfn: int, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the class of each page from ``first_pfn`` on; ``rows`` is (pages, SIZE(page)) bytes, C order.

        A head in the last row of a block cannot be understood without the row after it; it is taken for one page.
        """
        rules = self._rules
        flags, mapcount, tail, anonymous = self._columns(rows)
        seen = int(np.bitwise_or.reduce(flags))  # a flag that none of these pages has needs no look at each
        typed = mapcount < -1
        elsewhere = typed | tail  # what tells the class of these is looked for further down, or in their head
        if rules.slab_flag & seen:
            anonymous &= flags & rules.slab_flag == 0
        cache = flags & rules.lru != 0
        if rules.swap_cache and rules.swap_cache & seen == rules.swap_cache:
            cache |= flags & rules.swap_cache == rules.swap_cache
        cache = np.greater(cache, anonymous | elsewhere)  # of truth values: the one and not the other
        user = np.greater(anonymous, elsewhere)
        kinds: NDArray[np.uint8] = user.view(np.uint8) * np.uint8(USER)
        kinds += cache.view(np.uint8) * np.uint8(CACHE)
        if rules.private_flag & seen:
            kinds += (cache & (flags & rules.private_flag != 0)).view(np.uint8) * np.uint8(CACHE_PRIVATE - CACHE)
        compound = huge = _NOTHING
        if rules.head and rules.head & seen == rules.head:
            compound = np.flatnonzero(np.greater(flags & rules.head == rules.head, tail))
            huge = self._hugetlb(rows, compound, mapcount)
            kinds[huge[kinds[huge] == KERNEL]] = USER

        spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        types = np.flatnonzero(np.greater(typed, tail))
        if len(types):
            spans += self._free_blocks(first_pfn, rows, flags, mapcount, types, kinds)
            if rules.offline:
                offline = types[_is(mapcount[types], rules.offline)]
                offline = offline[(kinds[offline] == KERNEL) & (flags[offline] & rules.slab_flag == 0)]
                kinds[offline] = OFFLINE
        self._take_turns(first_pfn, rows, flags, mapcount, types, compound)
        compound = compound[(kinds[compound] != KERNEL) & (kinds[compound] != FREE)]
        if len(compound):
            spans.append(self._compound(first_pfn, rows, compound))
        self._probe(rows, kinds)
        self._spread(first_pfn, kinds, spans)

        if rules.hwpoison & seen:
            marked = np.flatnonzero(flags & rules.hwpoison)
            self._poison(first_pfn, rows, kinds, marked, huge, spans)
        if seen == _ALL_FLAGS:
            kinds[_column(rows, rules.flags, "<u8") == _NEVER_INITIALISED] = UNKNOWN
        return kinds

    def _take_turns(
        self,
        first_pfn: int,
        rows: NDArray[np.uint8],
        flags: NDArray[np.uint32],
        mapcount: NDArray[np.int32],
        typed: NDArray[np.intp],
        compound: NDArray[np.intp],
    ) -> None:
        """Work ``turns`` out; all of a compound page has the turn of its head."""
        rules, count = self._rules, len(rows)
        turns = self.turns = np.full(count, OTHER, dtype=np.uint8)
        turns[typed] = TYPED
        if rules.slab is not None:
            turns[typed[_is(mapcount[typed], rules.slab)]] = SLAB
        if rules.slab_flag:
            turns[flags & rules.slab_flag != 0] = SLAB
        turns[: min(count, max(0, self._turn_to - first_pfn))] = self._turn
        heads, pages = self._compound(first_pfn, rows, compound[turns[compound] != OTHER])
        for start, length in zip(heads[pages > 1].tolist(), pages[pages > 1].tolist(), strict=True):
            turns[start : start + length] = turns[start]
            if start + length > count:
                self._turn_to, self._turn = first_pfn + start + length, int(turns[start])

    def _columns(
        self, rows: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return flags, _mapcount, tail and anonymous of every page.

        Of the flags the lower half: no flag that is looked at is above it. All fields of some pages are fetched before
        the next pages are: struct pages come from memory once.
        """
        rules, count = self._rules, len(rows)
        flags, mapcount = np.empty(count, dtype=np.uint32), np.empty(count, dtype=np.int32)
        tail, anonymous = np.empty(count, dtype=np.uint8), np.empty(count, dtype=np.uint8)
        fields = (
            (_column(rows, rules.flags, "<u4"), flags),
            (_column(rows, rules.mapcount, "<i4"), mapcount),
            (_column(rows, rules.tail, "u1"), tail),
            (_column(rows, rules.mapping, "u1"), anonymous),  # PAGE_MAPPING_ANON is bit 0
        )
        for start in range(0, count, _NEAR_PAGES):
            near = slice(start, start + _NEAR_PAGES)
            for source, column in fields:
                column[near] = source[near]
        tail &= 1
        anonymous &= 1
        return flags, mapcount, tail.view(np.bool_), anonymous.view(np.bool_)

    def _hugetlb(
        self, rows: NDArray[np.uint8], heads: NDArray[np.intp], mapcount: NDArray[np.int32]
    ) -> NDArray[np.intp]:
        """Return those of the heads of compound pages that are hugetlb."""
        rules = self._rules
        if rules.hugetlb:
            return heads[_is(mapcount[heads], rules.hugetlb)]
        if rules.hugetlb_second is None:
            return _NOTHING
        heads = heads[heads < len(rows) - 1]
        huge: NDArray[np.intp] = heads[_second(rows, heads, rules.hugetlb_second) == rules.hugetlb_value]
        return huge

    def _free_blocks(
        self,
        first_pfn: int,
        rows: NDArray[np.uint8],
        flags: NDArray[np.uint32],
        mapcount: NDArray[np.int32],
        typed: NDArray[np.intp],
        kinds: NDArray[np.uint8],
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Mark heads of free blocks among pages that have a type, and yield (indices, pages) of them."""
        rules = self._rules
        if rules.unaccepted and rules.max_order:
            heads = typed[_is(mapcount[typed], rules.unaccepted)]
            if len(heads):
                kinds[heads] = FREE
                yield _aligned(first_pfn, heads, np.full(len(heads), rules.max_order - 1, dtype=np.int64))
        if not rules.buddy or rules.private is None or not rules.max_order:
            return
        heads = typed[_is(mapcount[typed], rules.buddy)]
        heads = heads[flags[heads] & rules.slab_flag == 0]
        if not len(heads):
            return
        order = _column(rows, rules.private, "<u8")[heads]
        impossible = order >= rules.max_order
        order = np.where(impossible, 0, order).astype(np.int64)
        impossible |= (first_pfn + heads) & ((1 << order) - 1) != 0
        impossible |= flags[heads] & (rules.lru | rules.head) != 0
        if rules.refcount is not None:
            impossible |= _column(rows, rules.refcount, "<u4")[heads] != 0
        self.oddities.add(FREE, len(heads), int(np.count_nonzero(impossible)))
        if impossible.any():
            heads, order = heads[~impossible], order[~impossible]
        kinds[heads] = FREE
        pages = np.int64(1) << order
        self.free_pages += int(pages.sum())
        yield heads, pages

    def _compound(
        self, first_pfn: int, rows: NDArray[np.uint8], heads: NDArray[np.intp]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (indices, pages) of compound pages."""
        heads = heads[heads < len(rows) - 1]
        if self._rules.order is None or not len(heads):
            return heads, np.ones(len(heads), dtype=np.int64)
        order = _second(rows, heads, self._rules.order).astype(np.int64)
        return _aligned(first_pfn, heads, order)

    def _probe(self, rows: NDArray[np.uint8], kinds: NDArray[np.uint8]) -> None:
        """Look closely at some pages of user and cache: a mapping is a kernel pointer; cache may have none."""
        step = max(1, len(kinds) // _PROBES)
        some, pointer = kinds[::step], _column(rows, self._rules.mapping, "<u8")[::step]
        odd = (pointer >> np.uint64(60) != 0xF) & (pointer > 3)  # (1 to 3: freed while we crashed)
        looked_at = np.bincount(some, minlength=len(CLASS_NAMES)).tolist()
        impossible = np.bincount(some[odd], minlength=len(CLASS_NAMES)).tolist()
        for kind in (USER, CACHE, CACHE_PRIVATE):
            if looked_at[kind]:
                self.oddities.add(kind, looked_at[kind], impossible[kind])

    def _spread(
        self, first_pfn: int, kinds: NDArray[np.uint8], spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> None:
        """Give every page of a free block or compound page the class of its head, and keep what reaches further."""
        count = len(kinds)
        carried = min(count, max(0, self._carried_to - first_pfn))
        kind_before = self._carried_kind
        starts = np.concatenate([span[0] for span in spans]) if spans else _NOTHING
        pages = np.concatenate([span[1] for span in spans]) if spans else _NOTHING
        more = np.flatnonzero(pages > 1)
        if len(more):
            more = more[np.argsort(starts[more], kind="stable")]
            starts = starts[more]
            ends = starts + pages[more]
            # Blocks are aligned to their size: one that begins in another lies in it whole, and is its part.
            reached = np.maximum.accumulate(np.concatenate([[carried], ends[:-1]]))
            inside = starts < reached
            if inside.any():
                starts, ends = starts[~inside], ends[~inside]
        else:
            starts = ends = _NOTHING
        if len(starts):
            if int(ends[-1]) > count:
                self._carried_to, self._carried_kind = first_pfn + int(ends[-1]), int(kinds[starts[-1]])
                ends[-1] = count
            pages = ends - starts
            long = pages >= _LONG_SPAN
            alone = np.flatnonzero(long)
            for start, end in zip(starts[alone].tolist(), ends[alone].tolist(), strict=True):
                kinds[start:end] = kinds[start]
            short = np.flatnonzero(~long)
            starts, pages = starts[short], pages[short]
            places = np.repeat(starts - np.cumsum(pages) + pages, pages)
            places += np.arange(len(places))
            kinds[places] = np.repeat(kinds[starts], pages)
        if carried:
            kinds[:carried] = kind_before

    def _poison(
        self,
        first_pfn: int,
        rows: NDArray[np.uint8],
        kinds: NDArray[np.uint8],
        marked: NDArray[np.intp],
        huge: NDArray[np.intp],
        spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    ) -> None:
        """Mark poisoned pages, and all of a hugetlb page whose head is; not those that were never initialised."""
        poisoned = marked[_column(rows, self._rules.flags, "<u8")[marked] != _NEVER_INITIALISED]
        self.poisoned_pages += len(poisoned)
        kinds[poisoned] = HWPOISON
        whole = set(poisoned.tolist()) & set(huge.tolist()) if len(huge) else set()
        for starts, pages in spans if whole else ():
            for start, length in zip(starts.tolist(), pages.tolist(), strict=True):
                if start in whole:
                    kinds[start : start + length] = HWPOISON
                    if start + length > len(kinds):
                        self._carried_to, self._carried_kind = first_pfn + start + length, HWPOISON


def _column(rows: NDArray[np.uint8], offset: int, dtype: str) -> NDArray[Any]:
    """Return one field of every struct page, as a view."""
    return np.ndarray((len(rows),), dtype, buffer=rows.data, offset=offset, strides=(rows.strides[0],))


def _second(rows: NDArray[np.uint8], heads: NDArray[np.intp], where: InSecondPage) -> NDArray[np.uint64]:
    """Return a fact from the struct page after each head; no head is the last row."""
    fields = _column(rows, where.offset, {1: "u1", 8: "<u8"}[where.width])
    values: NDArray[np.uint64] = fields[heads + 1].astype(np.uint64) & np.uint64(where.mask)
    return values


def _is(mapcount: NDArray[np.int32], kind: PageType) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = mapcount.view(np.uint32) & np.uint32(kind.mask) == np.uint32(kind.value)
    return found


def _aligned(
    first_pfn: int, heads: NDArray[np.intp], order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return heads with the pages of each: 2^order, or one where that is impossible (too large, or not aligned)."""
    order = np.where(order < 40, order, 0)
    pages = np.int64(1) << order
    return heads, np.where((first_pfn + heads) & (pages - 1) == 0, pages, 1)
