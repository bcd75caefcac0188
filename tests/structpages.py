"""struct page arrays by hand, as the kernels of each era lay them out, with the VMCOREINFO that goes with them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from capture.kernel import pages as classes
from capture.notes import vmcoreinfo
from capture.notes.vmcoreinfo import VmcoreInfo

FLAGS, HEAD_AT, MAPPING, PRIVATE, MAPCOUNT, REFCOUNT, SIZE = 0, 8, 24, 40, 48, 52, 64
"""Offsets in struct page of x86_64 and aarch64 with the usual configuration, and its size."""
MAX_ORDER = 11
ANON, CACHE_POINTER = 0xFFFF_8880_1234_5679, 0xFFFF_8880_1234_5678
"""Pointers as ``mapping`` has them: bit 0 says anonymous."""

COMMON = f"""
PAGESIZE=4096
SIZE(page)={SIZE}
OFFSET(page.flags)={FLAGS}
OFFSET(page.mapping)={MAPPING}
OFFSET(page.private)={PRIVATE}
OFFSET(page._mapcount)={MAPCOUNT}
OFFSET(page._refcount)={REFCOUNT}
LENGTH(zone.free_area)={MAX_ORDER}
"""


@dataclass(frozen=True, slots=True)
class Era:
    """How the kernels from one release on tell pages apart.

    ``order_at``, ``dtor_at`` are offsets into the struct page after a head. Page types are values of ``_mapcount``;
    None: this kernel has no such type.
    """

    name: str
    keys: str
    flags: dict[str, int]
    buddy: int
    offline: int
    order_at: int
    order_mask: int = 0xFF
    slab: int | None = None
    hugetlb: int | None = None
    hugetlb_flag: int | None = None
    dtor_at: int | None = None
    unaccepted: int | None = None

    @property
    def info(self) -> VmcoreInfo:
        """The VMCOREINFO of this era."""
        numbers = "".join(f"NUMBER(PG_{name})={bit}\n" for name, bit in self.flags.items() if name != "head")
        numbers += f"NUMBER(PG_head_mask)={1 << self.flags['head']}\n"
        numbers += (
            f"NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)={self.buddy}\nNUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)={self.offline}\n"
        )
        for name, value in (("SLAB", self.slab), ("HUGETLB", self.hugetlb), ("UNACCEPTED", self.unaccepted)):
            if value is not None:
                numbers += f"NUMBER(PAGE_{name}_MAPCOUNT_VALUE)={value}\n"
        if self.hugetlb_flag is not None:
            numbers += f"NUMBER(PG_hugetlb)={self.hugetlb_flag}\n"
        return vmcoreinfo.parse((COMMON + self.keys + numbers).encode())


OLD_FLAGS = {"lru": 4, "private": 13, "swapcache": 10, "swapbacked": 19, "slab": 9, "hwpoison": 23, "head": 16}
NEW_FLAGS = {"lru": 5, "private": 14, "swapcache": 10, "swapbacked": 17, "hwpoison": 20, "head": 6}
COMPOUND_HEAD = f"OFFSET(page.compound_head)={HEAD_AT}\n"

IN_PAGE = "OFFSET(page.compound_dtor)=16\nOFFSET(page.compound_order)=17\n"
IN_FOLIO = "OFFSET(folio._folio_dtor)=80\nOFFSET(folio._folio_order)=81\n"
DTOR = "NUMBER(HUGETLB_PAGE_DTOR)=2\n"

ERAS = (
    Era("5.10", COMPOUND_HEAD + IN_PAGE + DTOR,
        OLD_FLAGS, -129, -257, order_at=17, dtor_at=16),
    Era("6.3", COMPOUND_HEAD + IN_FOLIO + DTOR,
        OLD_FLAGS, -129, -257, order_at=17, dtor_at=16),
    Era("6.6", COMPOUND_HEAD, OLD_FLAGS, -129, -257, order_at=FLAGS, hugetlb_flag=8),
    Era("6.9", COMPOUND_HEAD, OLD_FLAGS, -129, -257, order_at=FLAGS, hugetlb=-2049),
    Era("6.10", COMPOUND_HEAD, NEW_FLAGS, -129, -257, order_at=FLAGS, hugetlb=-2049, slab=-4097),
    Era("6.12", COMPOUND_HEAD, NEW_FLAGS, -268435456, -251658240, order_at=FLAGS, hugetlb=-201326592, slab=-184549376),
    Era("6.16", COMPOUND_HEAD, NEW_FLAGS, -268435456, -251658240, order_at=FLAGS, hugetlb=-201326592, slab=-184549376,
        unaccepted=-134217728),
    Era("7.1", f"OFFSET(page.compound_info)={HEAD_AT}\n", NEW_FLAGS, -268435456, -251658240, order_at=FLAGS,
        hugetlb=-201326592, slab=-184549376, unaccepted=-134217728),
)  # fmt: skip


@dataclass(slots=True)
class PageArray:
    """Struct pages from ``first`` on, all of them plain kernel pages to begin with; ``expected`` has their classes."""

    era: Era
    count: int
    first: int = 0
    data: bytearray = field(init=False)
    expected: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.data = bytearray(self.count * SIZE)
        self.expected = np.full(self.count, classes.KERNEL, dtype=np.uint8)
        for pfn in range(self.first, self.first + self.count):
            self.put(pfn, MAPCOUNT, "<i", -1)
            self.put(pfn, REFCOUNT, "<i", 1)

    @property
    def rows(self) -> NDArray[np.uint8]:
        """All of them, as the classifier takes them."""
        return np.frombuffer(bytes(self.data), dtype=np.uint8).reshape(-1, SIZE)

    def put(self, pfn: int, offset: int, form: str, value: int) -> None:
        """Set one field."""
        struct.pack_into(form, self.data, (pfn - self.first) * SIZE + offset, value)

    def flag(self, pfn: int, *names: str) -> None:
        """Set page flags on top of those that are there."""
        (flags,) = struct.unpack_from("<Q", self.data, (pfn - self.first) * SIZE + FLAGS)
        for name in names:
            flags |= 1 << self.era.flags[name]
        self.put(pfn, FLAGS, "<Q", flags)

    def expect(self, pfn: int, order: int, kind: int) -> None:
        """Say what 2^order pages are to be taken for."""
        self.expected[pfn - self.first : pfn - self.first + (1 << order)] = kind

    def compound(self, pfn: int, order: int) -> None:
        """Make a compound page of 2^order pages: head flag, order, tails that point to the head."""
        if not order:
            return
        self.flag(pfn, "head")
        for tail in range(pfn + 1, pfn + (1 << order)):
            self.put(tail, HEAD_AT, "<Q", 0xFFFF_EA00_0000_0000 + pfn * SIZE + 1)
        self.put(pfn + 1, self.era.order_at, "<B", order)

    def free(self, pfn: int, order: int) -> None:
        """A block of the buddy allocator."""
        self.put(pfn, MAPCOUNT, "<i", self.era.buddy)
        self.put(pfn, PRIVATE, "<Q", order)
        for each in range(pfn, pfn + (1 << order)):
            self.put(each, REFCOUNT, "<i", 0)
        self.expect(pfn, order, classes.FREE)

    def unaccepted(self, pfn: int) -> None:
        """A largest block of memory that the guest has not accepted yet."""
        assert self.era.unaccepted is not None
        self.put(pfn, MAPCOUNT, "<i", self.era.unaccepted)
        self.expect(pfn, MAX_ORDER - 1, classes.FREE)

    def cache(self, pfn: int, order: int = 0, *, private: bool = False) -> None:
        """Page cache, with private data (buffers) or without."""
        self.compound(pfn, order)
        self.flag(pfn, "lru", *(["private"] if private else []))
        self.put(pfn, MAPPING, "<Q", CACHE_POINTER)
        self.expect(pfn, order, classes.CACHE_PRIVATE if private else classes.CACHE)

    def swap_cache(self, pfn: int) -> None:
        """A page of the swap cache that is on no list at the moment and no longer anonymous."""
        self.flag(pfn, "swapcache", "swapbacked")
        self.expect(pfn, 0, classes.CACHE)

    def anonymous(self, pfn: int, order: int = 0) -> None:
        """Anonymous memory of a process."""
        self.compound(pfn, order)
        self.flag(pfn, "lru", "swapbacked")
        self.put(pfn, MAPPING, "<Q", ANON)
        self.expect(pfn, order, classes.USER)

    def hugetlb(self, pfn: int, order: int = 9) -> None:
        """A page of the hugetlb pool."""
        self.compound(pfn, order)
        if self.era.hugetlb is not None:
            self.put(pfn, MAPCOUNT, "<i", self.era.hugetlb)
        elif self.era.hugetlb_flag is not None:
            self.put(pfn + 1, FLAGS, "<Q", 1 << self.era.hugetlb_flag | order)
        else:
            assert self.era.dtor_at is not None
            self.put(pfn + 1, self.era.dtor_at, "<B", 2)
        self.expect(pfn, order, classes.USER)

    def slab(self, pfn: int, order: int = 0) -> None:
        """Slab pages: what anonymous memory has in ``mapping`` is a slab's own business."""
        self.compound(pfn, order)
        if self.era.slab is not None:
            self.put(pfn, MAPCOUNT, "<i", self.era.slab)
        else:
            self.flag(pfn, "slab")
        self.put(pfn, MAPPING, "<Q", ANON)

    def offline(self, pfn: int) -> None:
        """A page that a balloon driver took."""
        self.put(pfn, MAPCOUNT, "<i", self.era.offline)
        self.expect(pfn, 0, classes.OFFLINE)

    def poison(self, pfn: int) -> None:
        """Broken memory."""
        self.flag(pfn, "hwpoison")
        self.expect(pfn, 0, classes.HWPOISON)
