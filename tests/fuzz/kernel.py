"""A whole kernel in 120 KiB of file: everything that the program looks for in dead memory, on x86_64 and aarch64.

Page tables, mem_section, mem_map with pages of every class, zones, printk ring, names, kallsyms, per-CPU areas, a stack
in vmalloc's part. Most of its 320 pages share bytes of the file: what a page holds does not matter to a filter.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping

from capture.selftest import elf_core
from tests import builders
from tests.builders import CPU, DIRECT_MAP, PAGE, PrintkRing, new_utsname, prstatus_note, vmcoreinfo_note
from tests.fuzz.mutation import Field, Seed
from tests.kernels import AREA_AT, AREA_SIZE, LIST_SIZE, LISTS, ZONE_SIZE, ZONES_AT, node_data
from tests.pagetables import FORMATS, ROOT, Format, Tables
from tests.structpages import ERAS, MAPPING, MAX_ORDER, SIZE, Era, PageArray

PAGES = 320
MEM_MAP_PFN, MEM_MAP_PAGES = 0x50, PAGES * SIZE // PAGE
DATA_PFN, DATA_PAGES = 0x10, 16
ROOTS, SECTIONS, NODE, RING, VARIABLES, NAMES, TOKENS, AREA, STACK = (
    DATA_PFN + at for at in (1, 2, 3, 4, 6, 7, 8, 9, 10)
)
"""PFNs of what lies in the data pages; the ring has two, the stack four."""
TABLES_PFN = 0x100
ALIASES = (0x20, 0x30, *range(0x60, TABLES_PFN, 0x10), 0x120, 0x130)
"""PFNs from which on memory has the same bytes in the file as the data pages."""
MEM_MAP_SEGMENT = 2
"""Behind the notes and the data pages."""
COUNT_AT = 2048
NAMES_OFFSET, PER_CPU_OFFSETS, NUMBERS, NODES = 0, 512, 1024, 1536
"""In the page of variables: init_uts_ns.name, __per_cpu_offset, numbers of 8 bytes each, node_data."""
OFFSETS, TOKEN_INDEX = 2048, 2048
"""In the page of names: kallsyms_offsets. In that of tokens: kallsyms_token_index."""
CPUS = 3
"""Of which the last never came up: its __per_cpu_offset is 0."""

MODELS = ("extreme", "array", "vmemmap", "flat")
"""Ways to mem_map: capture/kernel/memmap.py."""
FAR_SECTIONS, FAR_PFN = (9, 18), 18 << 15
"""Sections of 2^15 pages that have struct pages; of the last there is memory, too."""
GIANT_ORDER = 14
"""Of a compound page that reaches into the next block of struct pages."""


class Oddity(enum.Flag):
    """What a kernel may have on top."""

    NONE = 0
    NUMA = enum.auto()
    """Nodes are found through an array of pointers."""
    NO_KALLSYMS = enum.auto()
    """The kernel image is known from a segment of its own only."""
    POISONED_MEM_MAP = enum.auto()
    FAR = enum.auto()
    """Memory 2 GiB above all else."""
    GIANT_SLAB = enum.auto()
    GIANT_USER = enum.auto()
    GIANT_POISONED = enum.auto()
    """Page 0 is the head of a compound page of 64 MiB: slab, anonymous, hugetlb that is broken."""
    IMPOSSIBLE = enum.auto()
    """User pages that point nowhere, a free block that is not aligned."""
    FULL = enum.auto()
    """Not one free page."""
    BROKEN = enum.auto()
    """A quarter of all pages is poisoned, over and over: more than any machine goes on running with."""
    DEEP_VMALLOC = enum.auto()
    """A table of each level, over and over: every second page of vmalloc's 512 GiB is mapped."""


class Places:
    """Virtual addresses: of physical address 0 in the kernel image, the direct map, vmemmap, vmalloc."""

    def __init__(self, machine: str) -> None:
        x86 = machine == "x86_64"
        self.image = 0xFFFF_FFFF_8000_0000 if x86 else 0xFFFF_8000_0800_0000
        self.direct = DIRECT_MAP if x86 else 0xFFFF_0000_0000_0000
        self.vmemmap = 0xFFFF_EA00_0000_0000 if x86 else 0xFFFF_FC00_0000_0000
        self.vmalloc = 0xFFFF_C900_0000_0000 if x86 else 0xFFFF_8000_8000_0000


def format_of(machine: str) -> Format:
    """The page-table format of this kernel."""
    name = "x86_64, 4 levels" if machine == "x86_64" else "4K/48"
    return next(each for each in FORMATS if each.name == name)


def kernel_seed(
    machine: str = "x86_64", era: Era = ERAS[-1], model: str = "extreme", oddity: Oddity = Oddity.NONE
) -> Seed:
    """The vmcore of such a kernel, and where the numbers in it are."""
    places, tables = Places(machine), Tables(format_of(machine), next_table=TABLES_PFN * PAGE)
    array = _struct_pages(era, oddity)
    data = _data_pages(machine, places, array, model)
    if Oddity.FAR in oddity:
        for section in FAR_SECTIONS:
            at = (SECTIONS - DATA_PFN) * PAGE + 16 * section
            data[at : at + 8] = struct.pack("<Q", places.vmemmap | 0b1111)
    for large in range(-(-PAGES * PAGE >> 21) or 1):
        tables.map(places.direct + (large << 21), large << 21, 21)
    for page in range(MEM_MAP_PAGES):
        tables.map(places.vmemmap + page * PAGE, (MEM_MAP_PFN + page) * PAGE, 12)
    for page in range(MEM_MAP_PAGES, 512) if Oddity.BROKEN in oddity else ():
        tables.map(places.vmemmap + page * PAGE, MEM_MAP_PFN * PAGE, 12)
    for page in range(4):
        tables.map(places.vmalloc + (4 + page) * PAGE, (STACK + page) * PAGE, 12)
    if Oddity.DEEP_VMALLOC in oddity:
        _deepen(tables, places.vmalloc)
    notes = b"".join(_registers(machine, number, places) for number in range(CPUS - 1))
    aliases = [(places.direct + pfn * PAGE, pfn * PAGE, b"") for pfn in ALIASES]
    if Oddity.FAR in oddity:
        aliases.append((places.direct + FAR_PFN * PAGE, FAR_PFN * PAGE, b""))
    if Oddity.NO_KALLSYMS in oddity:
        aliases.append((places.image + DATA_PFN * PAGE, DATA_PFN * PAGE, b""))
    core = elf_core(
        [notes + vmcoreinfo_note(_keys(machine, places, era, model, oddity))],
        [
            (places.direct + DATA_PFN * PAGE, DATA_PFN * PAGE, bytes(data)),
            (places.direct + MEM_MAP_PFN * PAGE, MEM_MAP_PFN * PAGE, bytes(array.data)),
            *((places.direct + at, at, bytes(table)) for at, table in sorted(tables.memory.items())),
            *aliases,
        ],
        machine={"x86_64": 62, "aarch64": 183}[machine],
    )
    return aliased(core, 1, len(aliases), len(data))


def _deepen(tables: Tables, virtual: int) -> None:
    """Let every entry of the tables on the way to ``virtual`` lead to the next one on it; of the last every second."""
    form = tables.format
    table, first = tables.path(virtual, form.shifts[0])
    entry = tables.get(table, first)
    for depth in range(1, len(form.shifts)):
        table = next(at for at in tables.memory if form.entry(at, depth - 1, leaf=False) == entry)
        entry = next(filter(None, (tables.get(table, index) for index in range(512))))
        last = depth == len(form.shifts) - 1
        for index in range(0, 512, 2 if last else 1):
            tables.put(table, index, entry)


def aliased(core: bytes, first: int, count: int, length: int) -> Seed:
    """Give the last ``count`` segments the bytes of the segment ``first``; mark the numbers of the file."""
    (segments,) = struct.unpack_from("<H", core, builders.E_PHNUM)
    (offset,) = struct.unpack_from("<Q", core, builders.program_header(first, builders.P_OFFSET))
    changed = bytearray(core)
    for number in range(segments - count, segments):
        struct.pack_into("<Q", changed, builders.program_header(number, builders.P_OFFSET), offset)
        struct.pack_into("<QQ", changed, builders.program_header(number, builders.P_FILESZ), length, length)
    return Seed(bytes(changed), tuple(_numbers(changed, offset)))


def _numbers(data: bytearray, start: int) -> list[Field]:
    """Return where there are numbers of 8 bytes, in the pages that are not mem_map more of them than in it."""
    words = [at for at in range(start, len(data) - 7, 8) if data[at : at + 8] not in (bytes(8), b"\x7f" * 8)]
    mem_map = range(start + DATA_PAGES * PAGE, start + (DATA_PAGES + MEM_MAP_PAGES) * PAGE)
    inside = [at for at in words if at in mem_map]
    return [(at, 8) for at in words if at not in mem_map] + [(at, 8) for at in inside[:: 1 + len(inside) // 200]]


def _struct_pages(era: Era, oddity: Oddity) -> PageArray:
    array = PageArray(era, PAGES)
    giants = {Oddity.GIANT_SLAB: array.slab, Oddity.GIANT_USER: array.anonymous, Oddity.GIANT_POISONED: array.hugetlb}
    for giant, make in giants.items():
        if giant in oddity:
            make(0, 1)
            array.put(1, era.order_at, "<B", GIANT_ORDER)
    if Oddity.GIANT_POISONED in oddity:
        array.poison(0)
    if Oddity.POISONED_MEM_MAP in oddity:
        array.poison(MEM_MAP_PFN + 1)
    if Oddity.FULL not in oddity:
        array.free(0x80, 5)
        array.free(0xC0, 4)
    if Oddity.IMPOSSIBLE in oddity:
        array.free(0xB1, 3)
        for pfn in range(0x100, 0x130):
            array.anonymous(pfn)
            array.put(pfn, MAPPING, "<Q", 0x1235)
    for pfn in range(16) if Oddity.BROKEN in oddity else ():
        array.poison(pfn)
    for pfn in range(0x60, 0x68):
        array.cache(pfn, private=pfn % 4 == 0)
    for pfn in range(0x68, 0x70):
        array.anonymous(pfn)
    array.cache(0x70, order=2)
    array.anonymous(0x78, order=3)
    array.slab(0xA0, order=3)
    array.offline(0xA8)
    array.poison(0xA9)
    array.swap_cache(0xAA)
    array.hugetlb(0xE0, order=4)
    array.poison(0x130)
    if era.unaccepted is not None:
        array.put(0xB0, 48, "<i", era.unaccepted)
    return array


def _data_pages(machine: str, places: Places, array: PageArray, model: str) -> bytearray:
    data = bytearray(DATA_PAGES * PAGE)

    def put(pfn: int, content: bytes, at: int = 0) -> None:
        start = (pfn - DATA_PFN) * PAGE + at
        assert start + len(content) <= len(data), pfn
        data[start : start + len(content)] = content

    # Behind the names nothing looks like millions of empty ones: they would be gone through one by one.
    for pfn in (DATA_PFN, NAMES, TOKENS, AREA, *range(STACK, DATA_PFN + DATA_PAGES)):
        put(pfn, b"\x7f" * PAGE)
    section = struct.pack("<QQ", places.vmemmap | 0b1111, 0)
    put(ROOTS, section if model == "array" else struct.pack("<Q", places.direct + SECTIONS * PAGE))
    put(SECTIONS, section)
    put(NODE, _node(array))
    ring = PrintkRing(desc_bits=4, text_bits=10)
    for number in range(6):
        ring.add(b"line %d" % number, caller=number)
    ring.add(b"BUG: kernel NULL pointer dereference", caller=1).add(
        b"CPU: 1 UID: 0 PID: 8 Comm: sh Not tainted", caller=1
    ).add(b"Kernel panic - not syncing: sysrq", caller=CPU | 1)
    put(RING, ring.memory(RING * PAGE, virtual_base=places.direct))
    put(VARIABLES, new_utsname("Linux", "db7", "6.12.0-test", "#1 SMP", machine, "(none)"))
    put(
        VARIABLES,
        struct.pack("<QQ", places.direct + AREA * PAGE, places.direct + AREA * PAGE + PAGE // 2),
        PER_CPU_OFFSETS,
    )
    symbols = _symbols(places)
    names, tokens, index, offsets = kallsyms(symbols, places.image)
    put(VARIABLES, struct.pack("<QQQQQ", CPUS, places.vmalloc, len(symbols), places.image, places.vmemmap), NUMBERS)
    put(VARIABLES, struct.pack("<QQ", places.direct + NODE * PAGE, 0), NODES)
    put(NAMES, names)
    put(NAMES, offsets, OFFSETS)
    put(TOKENS, tokens)
    put(TOKENS, index, TOKEN_INDEX)
    return data


def _symbols(places: Places) -> dict[str, int]:
    def at(pfn: int, offset: int = 0) -> int:
        return places.image + pfn * PAGE + offset

    return {
        "__per_cpu_start": 0, "__per_cpu_end": 0x200, "_text": at(0), "_stext": at(0x10), "_etext": at(0x11),
        "__start_rodata": at(0x11), "__end_rodata": at(0x13), "_sdata": at(0x13), "_edata": at(0x17),
        "__per_cpu_offset": at(VARIABLES, PER_CPU_OFFSETS), "nr_cpu_ids": at(VARIABLES, NUMBERS),
        "vmalloc_base": at(VARIABLES, NUMBERS + 8), "__bss_start": at(0x17), "x" * 140: at(0x17),
        "__start_bss_decrypted_unused": at(0x18), "__end_bss_decrypted": at(0x19), "__bss_stop": at(0x1C),
    }  # fmt: skip


def kallsyms(symbols: Mapping[str, int], base: int) -> tuple[bytes, bytes, bytes, bytes]:
    """Return names, tokens, their index, and offsets from ``base``, as scripts/kallsyms.c of 6.1 writes them."""
    tokens = [bytes([code]) for code in range(256)]
    tokens[0x80], tokens[0x81], tokens[0x82] = b"__", b"per_cpu", b"Tstart"
    names = b""
    for name in symbols:
        text, code = b"T" + name.encode(), b""
        while text:
            token = max((token for token in tokens if text.startswith(token)), key=len)
            code += bytes([tokens.index(token)])
            text = text[len(token) :]
        names += bytes([len(code)]) if len(code) < 128 else bytes([0x80 | len(code) & 0x7F, len(code) >> 7])
        names += code
    starts = [sum(len(token) + 1 for token in tokens[:number]) for number in range(256)]
    offsets = [address if address < 1 << 31 else (base - 1 - address) % (1 << 32) for address in symbols.values()]
    return (
        names,
        b"".join(token + b"\0" for token in tokens),
        struct.pack("<256H", *starts),
        struct.pack(f"<{len(offsets)}I", *offsets),
    )


def _node(array: PageArray) -> bytes:
    node = bytearray(node_data({5: 1, 4: 1}, COUNT_AT))
    if array.era.unaccepted is not None:
        struct.pack_into("<Q", node, ZONES_AT + AREA_AT + LISTS * LIST_SIZE, 7)
    return bytes(node)


def _registers(machine: str, number: int, places: Places) -> bytes:
    count, stack_pointer = (27, 19) if machine == "x86_64" else (34, 31)
    first = places.vmalloc + 6 * PAGE - stack_pointer + 64 * number
    return prstatus_note(number * 8, first, registers=count)


def _keys(machine: str, places: Places, era: Era, model: str, oddity: Oddity) -> dict[str, str | int]:
    def image(pfn: int, offset: int = 0) -> str:
        return f"{places.image + pfn * PAGE + offset:x}"

    ring = PrintkRing().keys(RING * PAGE, virtual_base=places.direct)
    keys: dict[str, str | int] = {
        **ring,
        "SYMBOL(swapper_pg_dir)": f"{places.image + ROOT:x}",
        "SYMBOL(_stext)": image(0x10),
        "SYMBOL(init_uts_ns)": image(VARIABLES, NAMES_OFFSET),
        "OFFSET(uts_namespace.name)": 0,
        "SYMBOL(contig_page_data)": f"{places.direct + NODE * PAGE:x}",
        "SIZE(zone)": ZONE_SIZE,
        "SIZE(free_area)": AREA_SIZE,
        "OFFSET(pglist_data.node_zones)": ZONES_AT,
        "OFFSET(pglist_data.nr_zones)": COUNT_AT,
        "OFFSET(zone.free_area)": AREA_AT,
        "LENGTH(free_area.free_list)": LISTS,
        "SIZE(list_head)": LIST_SIZE,
        "SYMBOL(kallsyms_names)": image(NAMES),
        "SYMBOL(kallsyms_num_syms)": image(VARIABLES, NUMBERS + 16),
        "SYMBOL(kallsyms_token_table)": image(TOKENS),
        "SYMBOL(kallsyms_token_index)": image(TOKENS, TOKEN_INDEX),
        "SYMBOL(kallsyms_offsets)": image(NAMES, OFFSETS),
        "SYMBOL(kallsyms_relative_base)": image(VARIABLES, NUMBERS + 24),
        "NUMBER(SECTION_SIZE_BITS)": 27,
        "NUMBER(MAX_PHYSMEM_BITS)": 46,
    }
    if machine == "aarch64":
        keys |= {
            "NUMBER(kimage_voffset)": f"{places.image:#x}",
            "NUMBER(VA_BITS)": 48,
            "NUMBER(TCR_EL1_T1SZ)": "0x10",
            "NUMBER(PHYS_OFFSET)": "0x0",
            "NUMBER(VMALLOC_START)": f"{places.vmalloc:#x}",
            "NUMBER(VMALLOC_END)": f"{places.vmalloc + (1 << 30):#x}",
            "NUMBER(MODULES_VADDR)": f"{places.image - (1 << 27):#x}",
            "NUMBER(MODULES_END)": f"{places.image:#x}",
        }
    if model in ("extreme", "array"):
        keys |= {
            "SYMBOL(mem_section)": f"{places.direct + ROOTS * PAGE:x}",
            "LENGTH(mem_section)": 2048 if model == "extreme" else 1 << 19,
            "SIZE(mem_section)": 16,
            "OFFSET(mem_section.section_mem_map)": 0,
        }
    elif model == "vmemmap":
        keys["SYMBOL(vmemmap)"] = f"{places.vmemmap:x}"
    else:
        keys["SYMBOL(mem_map)"] = image(VARIABLES, NUMBERS + 32)
    if Oddity.NUMA in oddity:
        del keys["SYMBOL(contig_page_data)"]
        keys |= {"SYMBOL(node_data)": image(VARIABLES, NODES), "LENGTH(node_data)": 2}
    if Oddity.NO_KALLSYMS in oddity:
        del keys["SYMBOL(kallsyms_names)"]
    return {**keys, **{key: value for key, value in era.info.keys.items() if key not in keys}, "SIZE(page)": SIZE,
            "LENGTH(zone.free_area)": MAX_ORDER}  # fmt: skip
