"""Which bits and bytes of struct page tell what a page is, chosen by the keys of VMCOREINFO, never by a version.

One line a fact; where kernels differ the lines stand one below the other, the newest first, and the first whose keys
are all there is used (struct page and struct folio, include/linux/mm_types.h; page flags and page types,
include/linux/page-flags.h; the keys, kernel/vmcore_info.c, before 6.9 kernel/crash_core.c):

=============  =======================================================================  ===============
fact           where                                                                    kernels
=============  =======================================================================  ===============
tail page      bit 0 of OFFSET(page.compound_info)                                      7.1 on
               bit 0 of OFFSET(page.compound_head)                                      before
order of a     low byte of the flags of the page after the head, told by the presence   6.6 on
compound page  of NUMBER(PG_hugetlb) or NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)
               a byte, OFFSET(folio._folio_order) from the head                         6.3 to 6.5
               a byte, OFFSET(page.compound_order) of the page after the head           before
hugetlb        _mapcount of the head is NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)             6.9 on
               bit NUMBER(PG_hugetlb) of the flags of the page after the head           6.6 to 6.8
               a byte is NUMBER(HUGETLB_PAGE_DTOR), OFFSET(folio._folio_dtor)           6.3 to 6.5
               a byte is NUMBER(HUGETLB_PAGE_DTOR), OFFSET(page.compound_dtor)          before
slab           _mapcount is NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)                            6.10 on
               bit NUMBER(PG_slab) of the flags                                         before
free           _mapcount is NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE); 2^private pages          all
not accepted   _mapcount is NUMBER(PAGE_UNACCEPTED_MAPCOUNT_VALUE); a largest block     6.16 on
offline        _mapcount is NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)                         all
anonymous      bit 0 of mapping (PAGE_MAPPING_ANON), and not slab                       all
hwpoison       bit NUMBER(PG_hwpoison) of the flags                                     all
=============  =======================================================================  ===============
"""

from __future__ import annotations

from typing import NamedTuple

from capture.notes.vmcoreinfo import VmcoreInfo

MAX_STRUCT_PAGE = 256
"""Bytes; struct page has 56 to 80, more with debugging."""
_FLAGS = 0xFFFF_FFFF
"""The half of a page's flags in which they are; above lie node, zone, section."""
_PAGE_TYPE_OWNER_BITS = (1 << 24) - 1
"""Since 6.12 a page type is the top byte of _mapcount, and the rest belongs to the page's owner."""


class RulesMissing(Exception):  # noqa: N818  (an answer, not a failure of the program)
    """VMCOREINFO does not say enough to tell one page from another; the text names the first key that is missing."""


class PageType(NamedTuple):
    """A value of ``_mapcount`` that names what a page is used for: ``(_mapcount & mask) == value``, 32 bits."""

    value: int
    mask: int = 0xFFFF_FFFF


class InSecondPage(NamedTuple):
    """A fact kept in the struct page after the head: ``width`` bytes at ``offset`` of it, masked."""

    offset: int
    width: int
    mask: int


class PageRules(NamedTuple):
    """Offsets in bytes into struct page of ``size`` bytes, masks of its flags, page types; None: this kernel has none.

    ``max_order`` is LENGTH(zone.free_area): free blocks have fewer than 2^max_order pages. ``missing`` names, by dump
    level bit, the key without which that class of pages cannot be told.
    """

    size: int
    flags: int
    mapping: int
    mapcount: int
    tail: int
    refcount: int | None
    private: int | None
    max_order: int
    lru: int
    private_flag: int
    swap_cache: int
    """All of these bits together: a page of the swap cache."""
    slab_flag: int
    hwpoison: int
    head: int
    buddy: PageType | None
    unaccepted: PageType | None
    offline: PageType | None
    slab: PageType | None
    hugetlb: PageType | None
    hugetlb_second: InSecondPage | None
    hugetlb_value: int
    order: InSecondPage | None
    missing: dict[int, str]


def page_rules(info: VmcoreInfo) -> PageRules:
    """Choose the rules for one kernel.

    Raises:
        RulesMissing: struct page cannot be read at all.
    """
    size = _needed(info.size("page"), "SIZE(page)")
    if not 32 <= size <= MAX_STRUCT_PAGE:
        raise RulesMissing(f"SIZE(page)={size} is not the size of a struct page")
    rules = _choose(info, size)
    for name, offset, width in (
        ("flags", rules.flags, 8),
        ("mapping", rules.mapping, 8),
        ("_mapcount", rules.mapcount, 4),
        ("compound_head", rules.tail, 8),
        ("_refcount", rules.refcount or 0, 4),
        ("private", rules.private or 0, 8),
        *(("the second page", where.offset, where.width) for where in (rules.order, rules.hugetlb_second) if where),
    ):
        if offset + width > size:
            raise RulesMissing(f"offset {offset} of {name} lies outside of struct page ({size} bytes)")
    return rules


def _choose(info: VmcoreInfo, size: int) -> PageRules:
    tail = info.offset("page.compound_info")
    if tail is None:
        tail = _needed(info.offset("page.compound_head"), "OFFSET(page.compound_head)")
    flags = _needed(info.offset("page.flags"), "OFFSET(page.flags)")
    lru, private_flag = _flag(info, "PG_lru"), _flag(info, "PG_private")
    slab = _page_type(info, "SLAB")
    slab_flag = 0 if slab else _flag(info, "PG_slab")
    head = info.number("PG_head_mask") or 0
    head = head if 0 < head <= _FLAGS else 0
    buddy = _page_type(info, "BUDDY")
    private = info.offset("page.private")
    max_order = info.length("zone.free_area")
    order = _order(info, size, flags)
    hugetlb = _page_type(info, "HUGETLB")
    second, value = _hugetlb_second(info, size, flags)

    missing: dict[int, str] = {}
    no_slab = "" if slab or slab_flag else "NUMBER(PG_slab) or NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)"
    no_order = "" if order and head else "the order of compound pages"
    no_cache = "" if lru else "NUMBER(PG_lru)"
    for bit, reasons in (
        (2, (no_cache, "" if private_flag else "NUMBER(PG_private)", no_slab, no_order)),
        (4, (no_cache, no_slab, no_order)),
        (8, (no_slab, no_order)),
        (
            16,
            (
                "" if buddy else "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)",
                "" if private is not None else "OFFSET(page.private)",
                "" if max_order and 1 <= max_order <= 64 else "LENGTH(zone.free_area)",
            ),
        ),
    ):
        if any(reasons):
            missing[bit] = next(filter(None, reasons))
    return PageRules(
        size=size,
        flags=flags,
        mapping=_needed(info.offset("page.mapping"), "OFFSET(page.mapping)"),
        mapcount=_needed(info.offset("page._mapcount"), "OFFSET(page._mapcount)"),
        tail=tail,
        refcount=info.offset("page._refcount"),
        private=private,
        max_order=max_order or 0,
        lru=lru,
        private_flag=private_flag,
        swap_cache=(swap := _flag(info, "PG_swapcache")) | (_flag(info, "PG_swapbacked") if swap else 0),
        slab_flag=slab_flag,
        hwpoison=_flag(info, "PG_hwpoison"),
        head=head,
        buddy=buddy,
        unaccepted=_page_type(info, "UNACCEPTED"),
        offline=_page_type(info, "OFFLINE"),
        slab=slab,
        hugetlb=hugetlb,
        hugetlb_second=None if hugetlb else second,
        hugetlb_value=value,
        order=order,
        missing=missing,
    )


def _order(info: VmcoreInfo, size: int, flags: int) -> InSecondPage | None:
    if info.number("PG_hugetlb") is not None or info.number("PAGE_HUGETLB_MAPCOUNT_VALUE") is not None:
        return InSecondPage(flags, 1, 0xFF)
    if (offset := info.offset("folio._folio_order")) is not None and offset >= size:
        return InSecondPage(offset - size, 1, 0xFF)
    if (offset := info.offset("page.compound_order")) is not None:
        return InSecondPage(offset, 1, 0xFF)
    return None


def _hugetlb_second(info: VmcoreInfo, size: int, flags: int) -> tuple[InSecondPage | None, int]:
    """Return where the page after the head says that this is hugetlb, and the value it has there."""
    if (bit := info.number("PG_hugetlb")) is not None and 0 <= bit < 64:
        return InSecondPage(flags, 8, 1 << bit), 1 << bit
    value = info.number("HUGETLB_PAGE_DTOR")
    if value is None:
        return None, 0
    if (offset := info.offset("folio._folio_dtor")) is not None and offset >= size:
        return InSecondPage(offset - size, 1, 0xFF), value
    if (offset := info.offset("page.compound_dtor")) is not None:
        return InSecondPage(offset, 1, 0xFF), value
    return None, 0


def _page_type(info: VmcoreInfo, name: str) -> PageType | None:
    number = info.number(f"PAGE_{name}_MAPCOUNT_VALUE")
    if number is None:
        return None
    value = number & 0xFFFF_FFFF
    return PageType(value) if value & _PAGE_TYPE_OWNER_BITS else PageType(value, 0xFF00_0000)


def _flag(info: VmcoreInfo, name: str) -> int:
    """Return the mask of a page flag, 0 where this kernel does not name it."""
    bit = info.number(name)
    return 1 << bit & _FLAGS if bit is not None and 0 <= bit < 64 else 0


def _needed(value: int | None, key: str) -> int:
    if value is None:
        raise RulesMissing(f"VMCOREINFO has no {key}")
    return value
