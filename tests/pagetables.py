"""Page tables by hand, in a dictionary of physical memory: every format that an arm64 or x86_64 kernel can have.

Written from the architecture manuals' pictures, independently of the walker: entries are put together here bit by bit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from capture.memory.image import UnreadableMemory
from capture.notes import vmcoreinfo
from capture.notes.vmcoreinfo import VmcoreInfo

KERNEL_MAP = 0xFFFF_FFFF_8000_0000
STEXT_ARM = 0xFFFF_8000_0801_0000
ALL_ONES = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Format:
    """One page-table format. ``shifts`` from the first level down; ``root_bits`` index the first table.

    ``leaves`` are the shifts at which an entry may map memory itself; ``wide`` is how physical address bits from 48 on
    are kept: "in place" (x86_64), "12" (64 KiB pages: bits 15:12), "8" (LPA2: bits 49:48 in place, 51:50 in 9:8),
    or "" (there are none).
    """

    name: str
    machine: str
    page_size: int
    shifts: tuple[int, ...]
    root_bits: int
    leaves: tuple[int, ...]
    wide: str
    keys: str

    @property
    def info(self) -> VmcoreInfo:
        """The VMCOREINFO that tells of this format, with the first table at ``ROOT``."""
        return vmcoreinfo.parse(f"PAGESIZE={self.page_size}\n{self.keys}".encode())

    @property
    def first(self) -> int:
        """The lowest virtual address of the kernel's half."""
        width = self.shifts[0] + self.root_bits - (self.machine == "x86_64")
        if self.name == "64K/48 on a kernel for 52":
            width = 48
        return (1 << 64) - (1 << width)

    def bits(self, depth: int) -> int:
        """Index bits of a table at a depth."""
        if depth == 0:
            return self.root_bits
        return self.shifts[depth - 1] - self.shifts[depth]

    def entry(self, physical: int, depth: int, *, leaf: bool) -> int:
        """Return a valid entry."""
        last = depth == len(self.shifts) - 1
        if self.machine == "x86_64":
            return physical | 0x063 | (0x080 if leaf and not last else 0) | (1 << 63 if leaf else 0)
        kind = 0b01 if leaf and not last else 0b11
        attributes = 0x0060_0000_0000_0400 | (0x704 if self.wide != "8" else 0x404)
        low = physical & ((1 << 48) - 1)
        high = physical >> 48
        if self.wide == "12":
            low |= high << 12
        elif self.wide == "8":
            low = physical & ((1 << 50) - 1) | (physical >> 50) << 8
            attributes &= ~0x300
        return low | attributes | kind


ROOT = 0x4_0000
"""Physical address of the first table."""


def arm(
    name: str, page_size: int, width: int, shifts: tuple[int, ...], leaves: tuple[int, ...], wide: str, *,
    built: int | None = None, physical_bits: int = 48, root_bits: int | None = None,
) -> Format:  # fmt: skip
    """An arm64 format: ``width`` is what the machine does, ``built`` what the kernel was built for."""
    keys = (
        f"SYMBOL(_stext)={STEXT_ARM:x}\nSYMBOL(swapper_pg_dir)={STEXT_ARM + 0x200_0000:x}\n"
        f"NUMBER(kimage_voffset)={STEXT_ARM + 0x200_0000 - ROOT:#x}\nNUMBER(VA_BITS)={built or width}\n"
        f"NUMBER(TCR_EL1_T1SZ)={64 - width:#x}\nNUMBER(PHYS_OFFSET)=0x40000000\n"
        f"NUMBER(MAX_PHYSMEM_BITS)={physical_bits}\n"
    )
    return Format(name, "aarch64", page_size, shifts, root_bits or width - shifts[0], leaves, wide, keys)


def x86(name: str, shifts: tuple[int, ...], more: str) -> Format:
    """An x86_64 format."""
    keys = f"SYMBOL(init_top_pgt)={KERNEL_MAP + 0x0220_0000:x}\nNUMBER(phys_base)={ROOT - 0x0220_0000}\n{more}"
    return Format(name, "x86_64", 4096, shifts, 9, (30, 21, 12), "in place", keys)


FORMATS = (
    x86("x86_64, 4 levels", (39, 30, 21, 12), "NUMBER(pgtable_l5_enabled)=0\nNUMBER(sme_mask)=0\n"),
    x86("x86_64, 5 levels", (48, 39, 30, 21, 12), "NUMBER(pgtable_l5_enabled)=1\nNUMBER(sme_mask)=0\n"),
    arm("4K/39", 4096, 39, (30, 21, 12), (30, 21, 12), ""),
    arm("4K/48", 4096, 48, (39, 30, 21, 12), (30, 21, 12), ""),
    arm("4K/52", 4096, 52, (48, 39, 30, 21, 12), (39, 30, 21, 12), "8", physical_bits=52),
    arm("4K/48 on a kernel for 52", 4096, 48, (39, 30, 21, 12), (30, 21, 12), "", built=52, physical_bits=52),
    arm("16K/47", 16384, 47, (36, 25, 14), (25, 14), ""),
    arm("16K/48", 16384, 48, (47, 36, 25, 14), (25, 14), ""),
    arm("16K/52", 16384, 52, (47, 36, 25, 14), (36, 25, 14), "8", physical_bits=52),
    arm("64K/42", 65536, 42, (29, 16), (29, 16), ""),
    arm("64K/48", 65536, 48, (42, 29, 16), (29, 16), ""),
    arm("64K/48, 52-bit physical", 65536, 48, (42, 29, 16), (42, 29, 16), "12", physical_bits=52),
    arm("64K/52", 65536, 52, (42, 29, 16), (42, 29, 16), "12", physical_bits=52),
    arm(
        "64K/48 on a kernel for 52",
        65536,
        48,
        (42, 29, 16),
        (42, 29, 16),
        "12",
        built=52,
        physical_bits=52,
        root_bits=10,
    ),
)


@dataclass(slots=True)
class Tables:
    """Physical memory that holds page tables of one format, and nothing else."""

    format: Format
    memory: dict[int, bytearray] = field(default_factory=dict)
    """Tables by physical address."""
    next_table: int = 0x10_0000

    def __post_init__(self) -> None:
        self.memory[ROOT] = bytearray(8 << self.format.bits(0))

    def read(self, address: int, length: int) -> bytes:
        """Read as MemoryImage.read does."""
        table = self.memory.get(address)
        if table is None or len(table) < length:
            raise UnreadableMemory(f"physical address {address:#x}")
        return bytes(table[:length])

    def index(self, virtual: int, depth: int) -> int:
        """Return which entry of the table at ``depth`` an address goes through."""
        return virtual >> self.format.shifts[depth] & ((1 << self.format.bits(depth)) - 1)

    def put(self, table: int, index: int, entry: int) -> None:
        """Set one entry."""
        struct.pack_into("<Q", self.memory[table], index * 8, entry)

    def get(self, table: int, index: int) -> int:
        """Return one entry."""
        (entry,) = struct.unpack_from("<Q", self.memory[table], index * 8)
        return int(entry)

    def path(self, virtual: int, shift: int) -> tuple[int, int]:
        """Return (table, index) of the entry that covers 2^shift bytes at ``virtual``; make the tables above it."""
        table = ROOT
        for depth, each in enumerate(self.format.shifts):
            index = self.index(virtual, depth)
            if each == shift:
                return table, index
            entry = self.get(table, index)
            if entry:
                (table,) = (
                    known for known in self.memory
                    if self.format.entry(known, depth, leaf=False) == entry
                )  # fmt: skip
                continue
            self.put(table, index, self.format.entry(self.next_table, depth, leaf=False))
            table = self.next_table
            self.memory[table] = bytearray(8 << self.format.bits(depth + 1))
            self.next_table += max(self.format.page_size, 8 << self.format.bits(depth + 1))
        raise AssertionError(shift)

    def map(self, virtual: int, physical: int, shift: int) -> None:
        """Map 2^shift bytes."""
        table, index = self.path(virtual, shift)
        self.put(table, index, self.format.entry(physical, self.format.shifts.index(shift), leaf=True))
