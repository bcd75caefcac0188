"""Realistic inputs, and where the integers in them are."""

from __future__ import annotations

import json
import struct
import tempfile
from functools import cache
from pathlib import Path

import zstandard

from capture.dump import write_dump
from capture.dumpfile.output import HASH_BLOCK, digests_of
from capture.dumpfile.reader import KdumpFile
from capture.options import DumpOptions
from capture.selftest import elf_core, note
from capture.vmcore import open_vmcore
from tests import builders, dumps
from tests.builders import DIRECT_MAP, PAGE, PrintkRing, filled, prstatus_note, raw_notes, simple_core, vmcoreinfo_note
from tests.fuzz.kernel import MEM_MAP_SEGMENT, MODELS, Oddity, aliased, kernel_seed
from tests.fuzz.mutation import Field, Seed
from tests.pagetables import FORMATS, Format, Tables
from tests.structpages import ERAS


def _elf_fields(data: bytes) -> tuple[Field, ...]:
    header = ((4, 1), (5, 1), (16, 2), (18, 2), (32, 8), (40, 8), (54, 2), (56, 2), (60, 2))
    (count,) = struct.unpack_from("<H", data, builders.E_PHNUM)
    table = [
        (builders.program_header(number, offset), width)
        for number in range(min(count, 16))
        for offset, width in ((0, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 8))
    ]
    return (*header, *table)


def _elf_seed(data: bytes) -> Seed:
    return Seed(data, _elf_fields(data))


@cache
def elf_seeds() -> list[Seed]:
    overlapping = [
        (0xFFFF_FFFF_8100_0000, 0x2000, filled("k", "k")),
        (DIRECT_MAP + 0x1000, 0x1000, filled("a", "k", "k")),
    ]
    odd = [(DIRECT_MAP, 0x1234, b"o" * 5000), (DIRECT_MAP, 0x9000, b"p" * 100)]
    raw = raw_notes([prstatus_note(1, 1), b"", prstatus_note(2, 2), vmcoreinfo_note()])
    arm = elf_core(
        [prstatus_note(1, 1, registers=34)], [(0xFFFF_0000_0000_0000, 0x4000_0000, filled("a"))], machine=183
    )
    large_pages = simple_core(*"ab.c" * 8, keys={**builders.READABLE_BY_DRGN, "PAGESIZE": "65536"})
    cores = [simple_core("a", ".", "b"), elf_core(raw, overlapping), elf_core([], odd), arm, large_pages]
    many = builders.pn_xnum_core(64)[: -240 * PAGE]
    section_fields = ((64 + 44, 4), (builders.E_SHOFF, 8))
    return [*map(_elf_seed, cores), Seed(many, (*_elf_fields(many), *section_fields))]


@cache
def note_seeds() -> list[Seed]:
    strange = [note(b"LINUX", 0x700, b"device dump"), note(b"", 9, b"x"), note(b"CORE", 1, bytes(100))]
    blobs = [[b"".join([prstatus_note(1, 1), *strange, vmcoreinfo_note()])], raw_notes([*strange, vmcoreinfo_note()])]
    seeds = []
    for segments in blobs:
        data = elf_core(segments, [(DIRECT_MAP + 0x1000, 0x1000, filled("m"))])
        first = builders.EHDR + (len(segments) + 1) * builders.PHDR
        inside = tuple((first + at, 4) for at in (0, 4, 8, 356, 360, 364, 400, 404))
        seeds.append(Seed(data, (*_elf_fields(data)[9:], *inside, *inside)))
    return seeds


@cache
def text_seeds() -> list[Seed]:
    """VMCOREINFO texts: of small kernels, of every format of page tables, of every era's struct page."""
    ring = PrintkRing()
    arm = {"NUMBER(kimage_voffset)": "0xffff7fffc0000000", "SYMBOL(_stext)": "ffff800008000000", "PAGESIZE": "16384"}
    texts = [
        builders.vmcoreinfo_text(),
        builders.vmcoreinfo_text(ring.keys(0x20_0000)),
        builders.vmcoreinfo_text(arm),
        *(f"PAGESIZE={form.page_size}\n{form.keys}".encode() for form in FORMATS),
        *(builders.vmcoreinfo_text(era.info.keys) for era in ERAS),
    ]
    return list(map(Seed, texts))


@cache
def printk_seeds() -> list[Seed]:
    seeds = []
    for layout, fits_end, records in (
        (builders.RING_LAYOUT, False, 9),
        (builders.RING_LAYOUT, True, 70),
        (builders.SHUFFLED_LAYOUT, False, 40),
        ({**builders.RING_LAYOUT, "OFFSET(printk_info.text_len)": 86}, False, 5),
    ):
        ring = PrintkRing(desc_bits=4, text_bits=10, fits_end=fits_end, layout=layout)
        for number in range(records):
            ring.add(b"line %d\nof \x1b[2J record" % number, caller=number, reserve=40)
        ring.add(b"").add_without_room().add(b"BUG: \xff\x1b]0;x\x07\n", caller=builders.CPU | 1)
        memory = ring.memory(0x20_0000)
        data = ring.core(notes=[prstatus_note(3, 3)])
        start = len(data) - len(memory) - -len(memory) % PAGE
        steering = [
            ("printk_ringbuffer.desc_ring", "prb_desc_ring.count_bits", 4),
            ("printk_ringbuffer.desc_ring", "prb_desc_ring.descs", 8),
            ("printk_ringbuffer.desc_ring", "prb_desc_ring.infos", 8),
            ("printk_ringbuffer.desc_ring", "prb_desc_ring.head_id", 8),
            ("printk_ringbuffer.desc_ring", "prb_desc_ring.tail_id", 8),
            ("printk_ringbuffer.text_data_ring", "prb_data_ring.size_bits", 4),
            ("printk_ringbuffer.text_data_ring", "prb_data_ring.data", 8),
        ]
        in_ring = tuple(
            (start + 64 + layout[f"OFFSET({ring_name})"] + layout[f"OFFSET({name})"], width)
            for ring_name, name, width in steering
        )
        in_descs = tuple(
            (start + 512 + number * layout["SIZE(prb_desc)"] + at, 8) for number in range(4) for at in (0, 8, 16)
        )
        infos = start + 512 + 16 * layout["SIZE(prb_desc)"]
        lengths = tuple((infos + number * layout["SIZE(printk_info)"] + layout["OFFSET(printk_info.text_len)"], 2)
                        for number in range(4))  # fmt: skip
        seeds.append(Seed(data, (*in_ring, *in_ring, *in_descs, *lengths)))
    return seeds


_HEADER_VERSION = 8
_KDUMP_HEADER_FIELDS = tuple(
    (at, 4)
    for at in (
        _HEADER_VERSION,
        dumps.STATUS,
        dumps.BLOCK_SIZE,
        dumps.SUB_HDR_SIZE,
        dumps.BITMAP_BLOCKS,
        dumps.MAX_MAPNR,
    )
)


_LZO, _SNAPPY = 2, 4
"""DUMP_DH_COMPRESSED_LZO, DUMP_DH_COMPRESSED_SNAPPY."""


@cache
def kdump_seeds() -> list[Seed]:
    """Our dumps, and pages compressed as makedumpfile can, by hand."""
    seeds = []
    for compression, page_size in (("none", 4096), ("zlib", 4096), ("zstd", 4096), ("zstd", 16384)):
        keys: dict[str, str | int] = {**builders.READABLE_BY_DRGN, "PAGESIZE": page_size}
        core = simple_core(*"ab.cd.ea" * (8 if page_size > 4096 else 3), physical=0x10_0000, keys=keys)
        (seed,) = _dumps_of(core, (compression,), level=1)
        seeds += [seed] if page_size > 4096 or compression != "zstd" else [seed, _with_content_size(seed)]
    lzo = bytes.fromhex("0278787878") + b"\x20" + bytes(15) + bytes.fromhex("da10000c") + b"x" * 15 + b"\x11\0\0"
    snappy = b"\x80\x20\0x" + b"\xfe\x01\0" * 63 + b"\xfa\x01\0"
    short = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100)
    packed = {
        16: (dumps.ZLIB, b"x" * 20), 17: (_LZO, b"lzo"), 18: (_SNAPPY, b"\x80\x20snappy"), 19: (_LZO, lzo),
        20: (_SNAPPY, snappy), 21: (dumps.ZSTD, short), 40: (0, b"r" * PAGE), 41: (8, b"?"),
    }  # fmt: skip
    for status in (dumps.ZLIB, _LZO, _SNAPPY):
        data = dumps.dump_of(packed, status=status)
        seeds.append(Seed(data, (*_KDUMP_HEADER_FIELDS, *_descriptor_fields(4 * PAGE, len(packed)))))
    text = builders.vmcoreinfo_text()
    old = builders.patched(dumps.dump_of(packed), PAGE + 32, "QQ", PAGE + 512, len(text))
    old = old[: PAGE + 512] + text + old[PAGE + 512 + len(text) :]
    old = builders.patched(old, dumps.STATUS, "I", 0)
    machine = b"x86_64"
    old = old[: 12 + 260] + machine + old[12 + 260 + len(machine) :]
    places = tuple((PAGE + at, 8) for at in (32, 40, 48, 56, 96))
    seeds += _dumps_of(kernel_seed().data, ("zstd",), level=31)
    return [*seeds, Seed(old, (*_KDUMP_HEADER_FIELDS, *places, *_descriptor_fields(4 * PAGE, len(packed))))]


def _dumps_of(core: bytes, compressions: tuple[str, ...], *, level: int) -> list[Seed]:
    """Dump a vmcore; the last of the fields is the offset in the first descriptor, where the table begins."""
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "core", Path(folder) / "dump"
        source.write_bytes(core)
        for compression in compressions:
            options = DumpOptions(
                levels=(level,), compression=compression, threads=1, replace=True, progress=False, hashed=False
            )
            with open_vmcore(str(source)) as vmcore:
                write_dump(vmcore, target, options)
            with KdumpFile(target) as dump:
                table, page_size = dump.descriptor_table, dump.page_size
            sub_header = tuple((page_size + at, width) for at, width in ((8, 4), (12, 4), (48, 8), (56, 8), (96, 8)))
            fields = (*_KDUMP_HEADER_FIELDS, *sub_header, *_descriptor_fields(table, 4)[::-1])
            seeds.append(Seed(target.read_bytes(), fields))
    return seeds


def _descriptor_fields(table: int, count: int) -> tuple[Field, ...]:
    return tuple(
        (table + number * dumps.DESCRIPTOR_BYTES + at, width)
        for number in range(count)
        for at, width in ((0, 8), (8, 4), (12, 4))
    )


@cache
def flattened_seeds() -> list[Seed]:
    """Dumps cut into records of a thousand bytes, the last ones first."""
    seeds = []
    for seed in kdump_seeds()[::2]:
        stream, fields = bytearray(b"makedumpfile\0\0\0\0" + struct.pack(">qq", 1, 1)), []
        stream = stream.ljust(4096, b"\0")
        for offset in range((len(seed.data) - 1) // 1000 * 1000, -1, -1000):
            fields += [(len(stream), 8), (len(stream) + 8, 8)]
            record = seed.data[offset : offset + 1000]
            stream += struct.pack(">qq", offset, len(record)) + record
        seeds.append(Seed(bytes(stream + struct.pack(">qq", -1, -1)), (*fields, (len(stream), 8), (16, 8), (24, 8))))
    return seeds


@cache
def kernel_seeds() -> list[Seed]:
    """A small kernel of each era, in each way that leads to mem_map, of each architecture."""
    kernels = [
        kernel_seed("aarch64" if number % 2 else "x86_64", era, MODELS[number % len(MODELS)])
        for number, era in enumerate((*ERAS, *ERAS[-1:], ERAS[0]))
    ]
    odd = [
        kernel_seed("aarch64" if number % 2 else "x86_64", ERAS[0 if number % 3 else -1], "extreme", oddity)
        for number, oddity in enumerate(
            (
                Oddity.NUMA | Oddity.NO_KALLSYMS,
                Oddity.FAR | Oddity.GIANT_POISONED,
                Oddity.FAR | Oddity.GIANT_SLAB | Oddity.POISONED_MEM_MAP,
                Oddity.FAR | Oddity.GIANT_USER,
                Oddity.IMPOSSIBLE,
                Oddity.FULL,
                Oddity.FAR | Oddity.BROKEN,
            )
        )
    ]
    absent = builders.patched(kernels[-1].data, builders.program_header(MEM_MAP_SEGMENT, 0), "I", 0)  # PT_NULL
    seeds = [*kernels, *odd, Seed(absent, kernels[-1].fields)]
    return [Seed(seed.data, (*_elf_fields(seed.data)[9:], *seed.fields)) for seed in seeds]


@cache
def filter_seeds() -> list[Seed]:
    """These, and one whose vmalloc takes half a second."""
    deep = kernel_seed(oddity=Oddity.DEEP_VMALLOC)
    return [*kernel_seeds(), Seed(deep.data, (*_elf_fields(deep.data)[9:], *deep.fields))]


@cache
def table_seeds() -> list[Seed]:
    """Page tables of every format, alone in memory: an address mapped at each level that can map memory.

    And a hundred tables below the first one, all of which have the same bytes in the file.
    """
    return [*(_tables_seed(form) for form in FORMATS), _many_tables()]


def _many_tables() -> Seed:
    form = FORMATS[0]
    tables = Tables(form)
    for number in range(100):
        tables.map(form.first + (number << form.shifts[0]), 1 << 30, form.leaves[0])
    root, *others = sorted(tables.memory)
    core = elf_core(
        [note(b"VMCOREINFO", 0, f"PAGESIZE={PAGE}\n{form.keys}".encode())],
        [(0, at, bytes(tables.memory[at])) for at in (root, others[0])] + [(0, at, b"") for at in others[1:]],
    )
    return aliased(core, 2, len(others) - 1, PAGE)


def _tables_seed(form: Format) -> Seed:
    tables = Tables(form)
    for number, shift in enumerate(form.leaves):
        for step in range(2):
            virtual = form.first + (2 * number << form.leaves[0]) + (step << shift)
            tables.map(virtual, 3 + step << shift, shift)
    used = {at: _used(bytes(table)) for at, table in tables.memory.items()}
    info = note(b"VMCOREINFO", 0, f"PAGESIZE={form.page_size}\n{form.keys}".encode())
    machine = {"x86_64": 62, "aarch64": 183}[form.machine]
    core = elf_core([info], [(0, at, table) for at, table in sorted(used.items())], machine=machine)
    numbers = [at for at in range(len(core) - sum(map(len, used.values())), len(core) - 7, 8) if any(core[at : at + 8])]
    return Seed(core, (*_elf_fields(core)[9:], *((at, 8) for at in numbers), *((at, 1) for at in numbers)))


def _used(table: bytes) -> bytes:
    """Cut a table off behind its last entry; at least its first 4 KiB stay."""
    return table[: max(4096, -(-len(table.rstrip(b"\0")) // 8) * 8)]


@cache
def resume_seeds() -> list[Seed]:
    """Dumps of ``RESUMED`` that were cut short, in ways a power cut or a full disk would."""
    seeds = []
    for dump in _dumps_of(RESUMED, ("zstd", "none", "zlib"), level=0):
        data = dump.data
        (status,) = struct.unpack_from("<I", data, dumps.STATUS)
        data = builders.patched(data, dumps.STATUS, "I", status | dumps.INCOMPLETE)
        table = dump.fields[-1][0]
        half = builders.patched(data, table + 2 * dumps.DESCRIPTOR_BYTES, "qIIQ", 0, 0, 0, 0)
        seeds += [Seed(half, dump.fields), Seed(half[: -PAGE // 8], dump.fields)]
    return seeds


RESUMED = simple_core(*"ab.cd.ea" * 4, physical=0x10_0000)
"""The vmcore whose unfinished dump is gone on with."""


@cache
def verify_seeds() -> list[Seed]:
    """A manifest, a byte of zero, and the dump that it names."""
    seeds = []
    large = simple_core(*"ab.cd.ea" * 4, physical=0x10_0000, keys={**builders.READABLE_BY_DRGN, "PAGESIZE": 16384})
    for dump in (*_dumps_of(RESUMED, ("zstd", "none"), level=1), *_dumps_of(large, ("zstd",), level=1)):
        with builders.as_file(dump.data) as name:
            digests = digests_of(Path(name))
        said = {"size": len(dump.data), "sha256_blocks": digests}
        other = {"size": len(dump.data) + 1, "sha256": digests[0]}
        for entry, block in ((said, HASH_BLOCK), (other, HASH_BLOCK), (said, 1 << 20)):
            manifest = json.dumps({"files": {"vmcore": entry}, "hash_block": block}).encode() + b"\0"
            fields = tuple((len(manifest) + at, width) for at, width in dump.fields)
            seeds.append(Seed(manifest + dump.data, fields))
    return seeds


@cache
def command_line_seeds() -> list[Seed]:
    """Kernel command lines: text without any structure but words."""
    return [
        Seed(b"root=/dev/sda1 elfcorehdr=0x7f000000 vmcapture.target=LABEL=crash vmcapture.path=/var/crash ro\n"),
        Seed(b"elfcorehdr=1M@2G vmcapture.level=1,17,31 vmcapture.compress=zstd:-5 vmcapture.wait=3600"),
        Seed(b"vmcapture.final=poweroff vmcapture.failure=halt vmcapture.deadline=600 vmcapture.keep=9 elfcorehdr=07K"),
        Seed(b"vmcapture.free=10% vmcapture.compress=zlib:9 vmcapture.nothing=1 vmcapture.free=500M vmcapture.keep"),
        Seed(
            b"vmcapture.compress=none vmcapture.path=/a/../b vmcapture.compress=zstd:auto vmcapture.level=32 \xc3\xa9"
        ),
        Seed(b"vmcapture.level=" + b"1," * 40 + b"1 vmcapture.level vmcapture.compress=zstd:99 elfcorehdr=0x10Q"),
    ]


def _with_content_size(seed: Seed) -> Seed:
    """Give the first page a zstd frame that says how long its content is, in 8 bytes (RFC 8878, 3.1.1.1)."""
    plain = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * PAGE)
    window = plain[5:6]
    frame = plain[:4] + bytes([0xC0]) + window + struct.pack("<Q", PAGE) + plain[6:]
    table = seed.fields[-1][0]
    data = builders.patched(seed.data, table, "qII", len(seed.data), len(frame), dumps.ZSTD) + frame
    return Seed(data, (*seed.fields, *[(len(seed.data) + 6, 8)] * 4))


ALL_CORES = (elf_seeds, note_seeds, printk_seeds, kernel_seeds)


@cache
def old_memory_seeds() -> list[Seed]:
    """Physical memory as a file, the raw hand-over's header in it; the first 8 bytes say where."""
    seeds = []
    for header_at, notes in ((0x3000, 1), (0x3100, 3)):
        memory = bytearray(filled(*"abcdefgh") * 2)
        contents = [(prstatus_note(number, number) + vmcoreinfo_note()).ljust(1024, b"\0") for number in range(notes)]
        count = notes + 3
        header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
            "<HHIQQQIHHHHHH", 4, 62, 1, 0, builders.EHDR, 0, 0, builders.EHDR, builders.PHDR, count, 0, 0, 0
        )
        table = b"".join(
            struct.pack("<IIQQQQQQ", builders.PT_NOTE, 0, 0x5000 + 1024 * number, 0, 0, 1024, 1024, 0)
            for number in range(notes)
        )
        for start, length in ((0, 0x2800), (0x8000, 0x3000), (0xF000, 0x4000)):  # (the last one ends beyond memory)
            table += struct.pack("<IIQQQQQQ", builders.PT_LOAD, 0, start, DIRECT_MAP + start, start, length, length, 0)
        memory[0x5000 : 0x5000 + 1024 * notes] = b"".join(contents)
        memory[header_at : header_at + len(header) + len(table)] = header + table
        memory[:8] = struct.pack("<Q", header_at)
        fields = tuple((header_at + at, width) for at, width in _elf_fields(header + table))
        seeds.append(Seed(bytes(memory), ((0, 8), *fields)))
    return seeds


@cache
def core_seeds() -> list[Seed]:
    """Vmcores of every kind."""
    return [seed for seeds in ALL_CORES for seed in seeds()]
