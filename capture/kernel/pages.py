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
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.kernel.pagerules import InSecondPage, PageRules, PageType

KERNEL, FREE, CACHE, CACHE_PRIVATE, USER, HWPOISON, OFFLINE, UNKNOWN = range(8)
"""Classes. KERNEL is everything that no dump level leaves out; UNKNOWN has no struct page that can be read."""
CLASS_NAMES = ("kernel", "free", "cache", "cache_private", "user", "hwpoison", "offline", "unknown")
BLOCK_PAGES = 8192
"""Struct pages looked at together: 512 KiB of them, and what is worked out of them fits in a second-level cache."""

FREE_BIT, USER_BIT, CACHE_PRIVATE_BIT, CACHE_BIT = 16, 8, 4, 2

_LONG_SPAN = 64
"""Pages from which on filling a span by itself is cheaper than with others."""
_PROBES = 256
"""Pages of a class and block whose links and references are looked at."""
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
    """

    def __init__(self, rules: PageRules, *, poison: bool = True) -> None:
        self._rules = rules if poison else replace(rules, hwpoison=0)
        self._carried_to = 0
        self._carried_kind = KERNEL
        self.oddities = Oddities()
        self.free_pages = 0
        self.poisoned_pages = 0

    def classify(self, first_pfn: int, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the class of each page from ``first_pfn`` on; ``rows`` is (pages, SIZE(page)) bytes, C order.

        A head in the last row of a block cannot be understood without the row after it; it is taken for one page.
        """
        rules = self._rules
        count = len(rows)
        flags = _column(rows, rules.flags, "<u8").copy()
        mapcount = _column(rows, rules.mapcount, "<u4").copy()
        mapping = _column(rows, rules.mapping, "<u8").copy()
        # Bit 0 alone: it is in the first byte.
        whole = (_column(rows, rules.tail, "u1") & 1) == 0

        typed = mapcount.view("<i4") < -1
        slab = _is(mapcount, rules.slab) if rules.slab else (flags & np.uint64(rules.slab_flag)) != 0
        anonymous = (mapping & np.uint64(1)).astype(np.bool_)
        anonymous &= ~slab
        cache = (flags & np.uint64(rules.lru)) != 0
        if rules.swap_cache:
            cache |= (flags & np.uint64(rules.swap_cache)) == rules.swap_cache
        heads = (flags & np.uint64(rules.head)) == rules.head if rules.head else np.zeros(count, dtype=np.bool_)
        untyped = ~typed
        cache &= whole
        cache &= untyped
        user = anonymous & whole
        user &= untyped
        cache &= ~anonymous

        kinds: NDArray[np.uint8] = user.view(np.uint8) * np.uint8(USER)
        huge = self._hugetlb(rows, heads & whole, mapcount)
        if len(huge):
            kinds[huge] = USER
        private = (flags & np.uint64(rules.private_flag)) != 0
        np.copyto(kinds, np.uint8(CACHE), where=cache)
        np.copyto(kinds, np.uint8(CACHE_PRIVATE), where=cache & private)

        heads &= kinds != KERNEL
        spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        if typed.any():
            typed &= whole
            spans += self._free_blocks(first_pfn, rows, flags, mapcount, typed, slab, kinds)
            if rules.offline:
                offline = _is(mapcount, rules.offline) & typed & (kinds == KERNEL) & ~slab
                kinds[offline] = OFFLINE
                heads |= offline & ((flags & np.uint64(rules.head)) == rules.head if rules.head else False)
        if heads.any():
            spans.append(self._compound(first_pfn, rows, np.flatnonzero(heads)))
        self._probe(kinds, mapping)
        self._spread(first_pfn, kinds, spans)

        if rules.hwpoison:
            poisoned = (flags & np.uint64(rules.hwpoison)) != 0
            if poisoned.any():
                poisoned &= flags != _NEVER_INITIALISED
                self.poisoned_pages += int(np.count_nonzero(poisoned))
                self._poison(first_pfn, kinds, np.flatnonzero(poisoned), huge, spans)
        never = flags == _NEVER_INITIALISED
        if never.any():
            kinds[never] = UNKNOWN
        return kinds

    def _hugetlb(
        self, rows: NDArray[np.uint8], heads: NDArray[np.bool_], mapcount: NDArray[np.uint32]
    ) -> NDArray[np.intp]:
        """Return the indices of heads of hugetlb pages."""
        rules = self._rules
        if rules.hugetlb:
            return np.flatnonzero(_is(mapcount, rules.hugetlb) & heads)
        if rules.hugetlb_second is None or not heads.any():
            return np.zeros(0, dtype=np.intp)
        found: NDArray[np.intp] = np.flatnonzero(heads[:-1])
        huge: NDArray[np.intp] = found[_second(rows, found, rules.hugetlb_second) == rules.hugetlb_value]
        return huge

    def _free_blocks(
        self,
        first_pfn: int,
        rows: NDArray[np.uint8],
        flags: NDArray[np.uint64],
        mapcount: NDArray[np.uint32],
        typed: NDArray[np.bool_],
        slab: NDArray[np.bool_],
        kinds: NDArray[np.uint8],
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Mark heads of free blocks and yield (indices, pages) of them."""
        rules = self._rules
        if rules.unaccepted and rules.max_order:
            heads = np.flatnonzero(_is(mapcount, rules.unaccepted) & typed)
            if len(heads):
                kinds[heads] = FREE
                yield _aligned(first_pfn, heads, np.full(len(heads), rules.max_order - 1, dtype=np.int64))
        if not rules.buddy or rules.private is None or not rules.max_order:
            return
        heads = np.flatnonzero(_is(mapcount, rules.buddy) & typed & ~slab)
        if not len(heads):
            return
        order = _column(rows, rules.private, "<u8")[heads]
        impossible = order >= rules.max_order
        order = np.where(impossible, 0, order).astype(np.int64)
        impossible |= (first_pfn + heads) & ((1 << order) - 1) != 0
        impossible |= (flags[heads] & np.uint64(rules.lru | rules.head)) != 0
        if rules.refcount is not None:
            impossible |= _column(rows, rules.refcount, "<u4")[heads] != 0
        self.oddities.add(FREE, len(heads), int(impossible.sum()))
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

    def _probe(self, kinds: NDArray[np.uint8], mapping: NDArray[np.uint64]) -> None:
        """Look closely at some pages of user and cache: a mapping is a kernel pointer; cache may have none."""
        for kind in (USER, CACHE, CACHE_PRIVATE):
            some = np.flatnonzero(kinds == kind)[:_PROBES]
            if len(some):
                pointer = mapping[some]
                impossible = (pointer >> np.uint64(56) != 0xFF) & (pointer > 3)  # (1 to 3: freed while we crashed)
                self.oddities.add(kind, len(some), int(impossible.sum()))

    def _spread(
        self, first_pfn: int, kinds: NDArray[np.uint8], spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> None:
        """Give every page of a free block or compound page the class of its head, and keep what reaches further."""
        count = len(kinds)
        carried = min(count, max(0, self._carried_to - first_pfn))
        kind_before = self._carried_kind
        starts = np.concatenate([span[0] for span in spans]) if spans else np.zeros(0, dtype=np.int64)
        pages = np.concatenate([span[1] for span in spans]) if spans else np.zeros(0, dtype=np.int64)
        more = pages > 1
        starts, pages = starts[more], pages[more]
        if len(starts):
            order = np.argsort(starts, kind="stable")
            starts, pages = starts[order], pages[order]
            ends = starts + pages
            # Blocks are aligned to their size: one that begins in another lies in it whole, and is its part.
            inside = starts < np.concatenate([[carried], np.maximum(np.maximum.accumulate(ends)[:-1], carried)])
            if inside.any():
                starts, pages, ends = starts[~inside], pages[~inside], ends[~inside]
        if len(starts):
            if int(ends[-1]) > count:
                self._carried_to, self._carried_kind = first_pfn + int(ends[-1]), int(kinds[starts[-1]])
            long = pages >= _LONG_SPAN
            for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
                kinds[start:end] = kinds[start]
            starts, pages = starts[~long], pages[~long]
            if len(starts):
                head = np.repeat(starts, pages)
                place = head + np.arange(len(head)) - np.repeat(np.cumsum(pages) - pages, pages)
                fits = place < count
                kinds[place[fits]] = kinds[head[fits]]
        if carried:
            kinds[:carried] = kind_before

    def _poison(
        self,
        first_pfn: int,
        kinds: NDArray[np.uint8],
        poisoned: NDArray[np.intp],
        huge: NDArray[np.intp],
        spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    ) -> None:
        """Mark poisoned pages, and all of a hugetlb page whose head is."""
        kinds[poisoned] = HWPOISON
        whole = np.intersect1d(poisoned, huge)
        if not len(whole):
            return
        for starts, pages in spans:
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


def _is(mapcount: NDArray[np.uint32], kind: PageType) -> NDArray[np.bool_]:
    masked = mapcount if kind.mask == 0xFFFF_FFFF else mapcount & np.uint32(kind.mask)
    found: NDArray[np.bool_] = masked == np.uint32(kind.value)
    return found


def _aligned(
    first_pfn: int, heads: NDArray[np.intp], order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return heads with the pages of each: 2^order, or one where that is impossible (too large, or not aligned)."""
    order = np.where(order < 40, order, 0)
    pages = np.int64(1) << order
    return heads, np.where((first_pfn + heads) & (pages - 1) == 0, pages, 1)
