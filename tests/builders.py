"""Memory of dead kernels, made to order: ELF cores, notes, VMCOREINFO and printk rings from a few lines.

The small ELF builder is ``capture.selftest``'s; what is here adds what real machines and damaged files have on top.
Byte layouts are written with ``struct`` and plain offsets, so that a wrong declaration in the program shows.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from capture.memory import elfcore
from capture.memory.image import MemoryImage
from capture.memory.source import Source
from capture.selftest import elf_core, note

PAGE = 4096
DIRECT_MAP = 0xFFFF_8880_0000_0000
"""Where 4-level x86_64 maps physical address 0 (page_offset_base without KASLR)."""
U64 = (1 << 64) - 1

EHDR, PHDR = 64, 56
"""sizeof(Elf64_Ehdr), sizeof(Elf64_Phdr)."""
PT_LOAD, PT_NOTE = 1, 4

# Field offsets of Elf64_Ehdr and Elf64_Phdr, elf(5).
E_CLASS, E_DATA, E_TYPE, E_MACHINE, E_PHOFF, E_SHOFF, E_PHENTSIZE, E_PHNUM = 4, 5, 16, 18, 32, 40, 54, 56
P_OFFSET, P_VADDR, P_PADDR, P_FILESZ = 8, 16, 24, 32


def filled(*letters: str) -> bytes:
    """Return one page for each letter, full of it; ``.`` is a page of zeros."""
    return b"".join((b"\0" if letter == "." else letter.encode()) * PAGE for letter in letters)


def numbered(first: int, pages: int) -> bytes:
    """Return pages that compress well and carry their number, so that no two are equal."""
    return b"".join(struct.pack("<Q", number).ljust(64, b"m") * (PAGE // 64) for number in range(first, first + pages))


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    """Return ``data`` with ``values`` packed over it at ``offset``, little endian."""
    changed = bytearray(data)
    struct.pack_into("<" + layout, changed, offset, *values)
    return bytes(changed)


def program_header(number: int, field_offset: int) -> int:
    """Return where a field of program header ``number`` lies in a file of ``elf_core``."""
    return EHDR + number * PHDR + field_offset


@contextmanager
def as_file(data: bytes) -> Iterator[str]:
    """The name of a file that holds ``data``, and goes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.name


@contextmanager
def image_of(loads: Iterable[tuple[int, bytes]], page_size: int = PAGE, *, skew: int = 0) -> Iterator[MemoryImage]:
    """The image of segments (physical address, bytes), in this order; data begin ``skew`` bytes further into a file."""
    notes = [bytes(skew)] if skew else []
    core = elf_core(notes, [(0, physical, data) for physical, data in loads])
    with as_file(core) as name, Source(name) as source:
        yield MemoryImage(source, elfcore.parse(source).loads, page_size)


def load_table(*rows: tuple[int, int, int]) -> NDArray[np.void]:
    """Return segments (physical address, offset in the source, bytes) without a file that says so."""
    table = np.zeros(len(rows), dtype=elfcore.PROGRAM_HEADER)
    for row, (physical, offset, length) in zip(table, rows, strict=True):
        row["p_type"], row["p_paddr"], row["p_offset"], row["p_filesz"] = PT_LOAD, physical, offset, length
    return table


# --- VMCOREINFO and notes -------------------------------------------------------------------------------------------

READABLE_BY_DRGN = {
    "OSRELEASE": "6.1.0-test",
    "PAGESIZE": "4096",
    "SYMBOL(swapper_pg_dir)": "ffffffff82610000",
    "NUMBER(phys_base)": "0",
    "KERNELOFFSET": "0",
    "NUMBER(pgtable_l5_enabled)": "0",
    "CRASHTIME": "1700000000",
}
"""What drgn insists on before it opens a dump."""


def vmcoreinfo_text(keys: Mapping[str, str | int] = READABLE_BY_DRGN) -> bytes:
    """Return a VMCOREINFO text of ``keys``."""
    return "".join(f"{key}={value}\n" for key, value in keys.items()).encode()


def vmcoreinfo_note(keys: Mapping[str, str | int] = READABLE_BY_DRGN) -> bytes:
    """Return a VMCOREINFO note of ``keys``."""
    return note(b"VMCOREINFO", 0, vmcoreinfo_text(keys))


def prstatus_note(pid: int, first_register: int, *, registers: int = 27) -> bytes:
    """Return an NT_PRSTATUS note whose registers count up from ``first_register`` (27 of x86_64, 34 of aarch64).

    struct elf_prstatus: pr_pid at 32, pr_reg at 112, pr_fpvalid behind the registers.
    """
    descriptor = bytearray(112 + registers * 8 + 8)
    struct.pack_into("<i", descriptor, 32, pid)
    struct.pack_into(f"<{registers}Q", descriptor, 112, *range(first_register, first_register + registers))
    return note(b"CORE", 1, bytes(descriptor))


def raw_notes(cpus: Iterable[bytes], *, room: int = 1024) -> list[bytes]:
    """Return PT_NOTE segments as a raw core header has them: one for each CPU, padded with zeros to ``room``."""
    return [cpu.ljust(room, b"\0") for cpu in cpus]


def simple_core(*letters: str, physical: int = 0x10_0000, keys: Mapping[str, str | int] = READABLE_BY_DRGN) -> bytes:
    """Return a vmcore of one segment, one page for each letter, with VMCOREINFO and two CPUs."""
    notes = prstatus_note(7, 1000) + prstatus_note(0, 2000) + vmcoreinfo_note(keys)
    return elf_core([notes], [(DIRECT_MAP + physical, physical, filled(*letters))])


def pn_xnum_core(segments: int, *, with_section: bool = True) -> bytes:
    """Return a vmcore of ``segments`` PT_LOADs of one page each, every second PFN, beyond what e_phnum can count.

    All segments name the same 256 pages of data in turn; page N of the file is full of byte N.
    """
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 4, 62, 1, 0, EHDR + 64, EHDR if with_section else 0, 0, EHDR, PHDR, 0xFFFF, 64, 1, 0
    )
    section = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, segments, 0, 0)
    data = EHDR + 64 + segments * PHDR
    table = b"".join(
        struct.pack("<IIQQQQQQ", PT_LOAD, 4, data + number % 256 * PAGE, 0, number * 2 * PAGE, PAGE, PAGE, 0)
        for number in range(segments)
    )
    return header + section + table + b"".join(bytes([number]) * PAGE for number in range(256))


# --- printk rings ---------------------------------------------------------------------------------------------------

ID_MASK = (1 << 62) - 1
RESERVED, COMMITTED, FINALIZED, REUSABLE = 0, 1, 2, 3
"""enum desc_state, kernel/printk/printk_ringbuffer.h."""
FAILED, EMPTY_LINE = 1, 3
"""FAILED_LPOS; EMPTY_LINE_LPOS (NO_LPOS before 6.10)."""
TASK, CPU = 0, 0x8000_0000

RING_LAYOUT: dict[str, int] = {
    "SIZE(printk_ringbuffer)": 88,
    "OFFSET(printk_ringbuffer.desc_ring)": 0,
    "OFFSET(printk_ringbuffer.text_data_ring)": 48,
    "OFFSET(printk_ringbuffer.fail)": 80,
    "SIZE(prb_desc_ring)": 48,
    "OFFSET(prb_desc_ring.count_bits)": 0,
    "OFFSET(prb_desc_ring.descs)": 8,
    "OFFSET(prb_desc_ring.infos)": 16,
    "OFFSET(prb_desc_ring.head_id)": 24,
    "OFFSET(prb_desc_ring.tail_id)": 32,
    "SIZE(prb_desc)": 24,
    "OFFSET(prb_desc.state_var)": 0,
    "OFFSET(prb_desc.text_blk_lpos)": 8,
    "OFFSET(prb_data_blk_lpos.begin)": 0,
    "OFFSET(prb_data_blk_lpos.next)": 8,
    "SIZE(printk_info)": 88,
    "OFFSET(printk_info.seq)": 0,
    "OFFSET(printk_info.ts_nsec)": 8,
    "OFFSET(printk_info.text_len)": 16,
    "OFFSET(printk_info.caller_id)": 20,
    "OFFSET(printk_info.dev_info)": 24,
    "SIZE(prb_data_ring)": 32,
    "OFFSET(prb_data_ring.size_bits)": 0,
    "OFFSET(prb_data_ring.data)": 8,
    "OFFSET(prb_data_ring.head_lpos)": 16,
    "OFFSET(prb_data_ring.tail_lpos)": 24,
    "OFFSET(atomic_long_t.counter)": 0,
}
"""As Debian's 6.1 kernel exports it (its VMCOREINFO)."""

SHUFFLED_LAYOUT: dict[str, int] = {
    **RING_LAYOUT,
    "OFFSET(printk_ringbuffer.desc_ring)": 72,
    "OFFSET(printk_ringbuffer.text_data_ring)": 16,
    "OFFSET(prb_desc_ring.count_bits)": 60,
    "OFFSET(prb_desc_ring.descs)": 32,
    "OFFSET(prb_desc_ring.infos)": 8,
    "OFFSET(prb_desc_ring.head_id)": 16,
    "OFFSET(prb_desc_ring.tail_id)": 40,
    "SIZE(prb_desc)": 40,
    "OFFSET(prb_desc.state_var)": 24,
    "OFFSET(prb_desc.text_blk_lpos)": 0,
    "OFFSET(prb_data_blk_lpos.begin)": 8,
    "OFFSET(prb_data_blk_lpos.next)": 0,
    "SIZE(printk_info)": 104,
    "OFFSET(printk_info.seq)": 64,
    "OFFSET(printk_info.ts_nsec)": 24,
    "OFFSET(printk_info.text_len)": 40,
    "OFFSET(printk_info.caller_id)": 4,
    "OFFSET(prb_data_ring.size_bits)": 24,
    "OFFSET(prb_data_ring.data)": 0,
    "OFFSET(atomic_long_t.counter)": 8,
}
"""A kernel that moved every member."""


@dataclass(slots=True)
class _Desc:
    ident: int
    state: int
    begin: int
    next: int
    text: bytes
    size: int
    timestamp: int
    caller: int
    flags: int
    sequence: int


@dataclass(slots=True)
class PrintkRing:
    """A printk ring, filled by the kernel's own rules (kernel/printk/printk_ringbuffer.c).

    ``fits_end``: a block may end exactly at the end of the ring (kernels since late 2025); before, it wraps.
    ``survivors`` tells which records must still be readable: sequence numbers and texts, oldest first.
    """

    desc_bits: int = 4
    text_bits: int = 10
    fits_end: bool = False
    layout: Mapping[str, int] = field(default_factory=lambda: RING_LAYOUT)
    _descs: list[_Desc] = field(default_factory=list)
    _text: bytearray = field(init=False)
    _head_lpos: int = field(init=False)
    _tail_lpos: int = field(init=False)
    _sequence: int = 0

    def __post_init__(self) -> None:
        self._text = bytearray(1 << self.text_bits)
        self._head_lpos = self._tail_lpos = -(1 << self.text_bits) & U64  # BLK0_LPOS

    @property
    def count(self) -> int:
        return 1 << self.desc_bits

    def add(
        self,
        text: bytes,
        *,
        caller: int = TASK | 1,
        timestamp: int | None = None,
        level: int = 6,
        flags: int = 0,
        state: int = FINALIZED,
        reserve: int | None = None,
    ) -> PrintkRing:
        """Log one record. ``reserve`` is how much room printk asked for (text and NUL when left out)."""
        if text:
            begin, following = self._allocate(len(text) + 1 if reserve is None else reserve)
        else:
            begin = following = EMPTY_LINE
        return self._add(text, begin, following, caller, timestamp, level << 5 | flags, state)

    def add_without_room(self) -> PrintkRing:
        """Log a record whose text found no room in the ring."""
        return self._add(b"lost", FAILED, FAILED, 1, None, 6 << 5, FINALIZED)

    def survivors(self) -> list[tuple[int, bytes]]:
        return [
            (desc.sequence, desc.text)
            for desc in self._descs
            if desc.state in (COMMITTED, FINALIZED) and desc.begin != FAILED
        ]

    def _add(
        self, text: bytes, begin: int, following: int, caller: int, timestamp: int | None, bits: int, state: int
    ) -> PrintkRing:
        if len(self._descs) == self.count:
            oldest = self._descs.pop(0)
            if oldest.state != REUSABLE and not oldest.begin & 1:
                self._tail_lpos = oldest.next
        ident = (-self.count + self._sequence) & ID_MASK  # the first is DESC0_ID + 1
        when = self._sequence * 1_000_000 if timestamp is None else timestamp
        if not begin & 1:
            self._store(ident, begin, following, text)
        self._descs.append(_Desc(ident, state, begin, following, text, 0, when, caller, bits, self._sequence))
        self._sequence += 1
        return self

    def _allocate(self, room: int) -> tuple[int, int]:
        """data_alloc(): a block is an id and the text, 8-byte aligned; one that would run over the end wraps."""
        size = 1 << self.text_bits
        block = -(-(8 + room) // 8) * 8
        assert block <= size // 2, "data_check_size() refuses such a record"
        begin = self._head_lpos
        end = begin + block
        last = end - 1 if self.fits_end else end
        following = end if begin >> self.text_bits == last >> self.text_bits else (end >> self.text_bits) * size + block
        following &= U64
        while (following - self._tail_lpos) & U64 > size:
            oldest = next(d for d in self._descs if d.state != REUSABLE and not d.begin & 1)
            oldest.state = REUSABLE
            self._tail_lpos = oldest.next
        self._head_lpos = following
        return begin, following

    def _store(self, ident: int, begin: int, following: int, text: bytes) -> None:
        size = 1 << self.text_bits
        start = begin % size
        struct.pack_into("<Q", self._text, start, ident)
        turn = (following - 1) & U64 if self.fits_end else following
        if begin >> self.text_bits != turn >> self.text_bits:
            start = 0
            struct.pack_into("<Q", self._text, start, ident)
        self._text[start + 8 : start + 8 + len(text)] = text

    # --- as memory

    def memory(self, base: int, *, virtual_base: int = DIRECT_MAP) -> bytes:
        """Return the physical memory from ``base`` on: pointer, ring, descriptors, infos, text."""
        at, counter = self.layout, self.layout["OFFSET(atomic_long_t.counter)"]
        desc_size, info_size = at["SIZE(prb_desc)"], at["SIZE(printk_info)"]
        ring_at, descs_at = 64, 512
        infos_at = descs_at + self.count * desc_size
        text_at = -(-(infos_at + self.count * info_size) // 64) * 64
        memory = bytearray(text_at + len(self._text))
        memory[text_at:] = self._text

        def put(offset: int, layout: str, value: int) -> None:
            struct.pack_into("<" + layout, memory, offset, value)

        virtual = virtual_base + base
        put(0, "Q", virtual + ring_at)
        desc_ring = ring_at + at["OFFSET(printk_ringbuffer.desc_ring)"]
        text_ring = ring_at + at["OFFSET(printk_ringbuffer.text_data_ring)"]
        put(desc_ring + at["OFFSET(prb_desc_ring.count_bits)"], "I", self.desc_bits)
        put(desc_ring + at["OFFSET(prb_desc_ring.descs)"], "Q", virtual + descs_at)
        put(desc_ring + at["OFFSET(prb_desc_ring.infos)"], "Q", virtual + infos_at)
        initial = (-self.count - 1) & ID_MASK  # DESC0_ID
        head = self._descs[-1].ident if self._descs else initial
        tail = self._descs[0].ident if len(self._descs) == self.count else initial
        put(desc_ring + at["OFFSET(prb_desc_ring.head_id)"] + counter, "Q", head)
        put(desc_ring + at["OFFSET(prb_desc_ring.tail_id)"] + counter, "Q", tail)
        put(text_ring + at["OFFSET(prb_data_ring.size_bits)"], "I", self.text_bits)
        put(text_ring + at["OFFSET(prb_data_ring.data)"], "Q", virtual + text_at)
        blank = _Desc(initial, REUSABLE, FAILED, FAILED, b"", 0, 0, 0, 0, 0)
        for desc in ([blank] if len(self._descs) < self.count else []) + self._descs:
            where = descs_at + desc.ident % self.count * desc_size
            blk = where + at["OFFSET(prb_desc.text_blk_lpos)"]
            put(where + at["OFFSET(prb_desc.state_var)"] + counter, "Q", desc.state << 62 | desc.ident)
            put(blk + at["OFFSET(prb_data_blk_lpos.begin)"], "Q", desc.begin)
            put(blk + at["OFFSET(prb_data_blk_lpos.next)"], "Q", desc.next)
            info = infos_at + desc.ident % self.count * info_size
            put(info + at["OFFSET(printk_info.seq)"], "Q", desc.sequence)
            put(info + at["OFFSET(printk_info.ts_nsec)"], "Q", desc.timestamp)
            put(info + at["OFFSET(printk_info.text_len)"], "H", len(desc.text))
            put(info + at["OFFSET(printk_info.text_len)"] + 3, "B", desc.flags)
            put(info + at["OFFSET(printk_info.caller_id)"], "I", desc.caller)
        return bytes(memory)

    def keys(self, base: int, *, virtual_base: int = DIRECT_MAP) -> dict[str, str | int]:
        """Return the VMCOREINFO of a kernel whose ring lies at physical ``base``."""
        return {**READABLE_BY_DRGN, "SYMBOL(prb)": f"{virtual_base + base:x}", **self.layout}

    def core(self, base: int = 0x20_0000, *, notes: Sequence[bytes] = (), drop: Sequence[str] = ()) -> bytes:
        """Return a vmcore with this ring in it, without the VMCOREINFO keys in ``drop``."""
        keys = {key: value for key, value in self.keys(base).items() if key not in drop}
        memory = self.memory(base)
        memory += bytes(-len(memory) % PAGE)
        return elf_core([b"".join(notes) + vmcoreinfo_note(keys)], [(DIRECT_MAP + base, base, memory)])


# --- a crashed machine ----------------------------------------------------------------------------------------------

RING_AT, NAMES_AT, MEMORY_AT = 0x20_0000, 0x40_0000, 0x100_0000
"""Where ``crashed_core`` has its segments: the log, the names, the pages."""
PANIC = b"Kernel panic - not syncing: sysrq triggered crash"


def new_utsname(*names: str | bytes) -> bytes:
    """Return a struct new_utsname, include/uapi/linux/utsname.h: six fields of 65 bytes."""
    return b"".join((name.encode() if isinstance(name, str) else name)[:65].ljust(65, b"\0") for name in names)


def crashed_core(
    host: bytes = b"db7",
    *,
    pages: bytes = b"",
    log: PrintkRing | None = None,
    keys: Mapping[str, str | int] = {},
    drop: Sequence[str] = (),
    notes: bool = True,
) -> bytes:
    """Return the vmcore of a machine with two CPUs, a name, a log that ends in a panic on CPU 1, and ``pages``."""
    log = log or PrintkRing().add(b"Linux version 6.1.0-test").add(b"sysrq: crash", caller=CPU | 1).add(
        PANIC, caller=CPU | 1
    )
    ring, names = log.memory(RING_AT), new_utsname("Linux", host, "6.1.0-test", "#1 SMP", "x86_64", "(none)")
    said = {
        **READABLE_BY_DRGN,
        **RING_LAYOUT,
        "SYMBOL(prb)": f"{DIRECT_MAP + RING_AT:x}",
        "SYMBOL(init_uts_ns)": f"{DIRECT_MAP + NAMES_AT:x}",
        "OFFSET(uts_namespace.name)": 0,
        **keys,
    }
    said = {key: value for key, value in said.items() if key not in drop}
    blob = prstatus_note(7, 1000) + prstatus_note(0, 2000) + vmcoreinfo_note(said)
    return elf_core(
        [blob] if notes else [],
        [
            (DIRECT_MAP + RING_AT, RING_AT, ring + bytes(-len(ring) % PAGE)),
            (DIRECT_MAP + NAMES_AT, NAMES_AT, names + bytes(-len(names) % PAGE)),
            (DIRECT_MAP + MEMORY_AT, MEMORY_AT, pages or filled("a", ".", "b")),
        ],
    )
