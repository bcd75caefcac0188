"""What is fuzzed, with which seeds, how they are mutated, and what must hold for every input.

A dead kernel may hand us anything. Whatever it is, a parser succeeds or raises a CaptureError; what it says is one
line without control characters; memory and time are bounded; no file stays open.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

import zstandard

from capture import cli, report
from capture.dump import write_dump
from capture.dumpfile.assemble import assemble
from capture.dumpfile.reader import KdumpFile
from capture.errors import CaptureError, SourceError
from capture.kernel.address import KernelMemory
from capture.kernel.printk import format_record
from capture.kernel.utsname import FIELDS, read_utsname
from capture.memory import elfcore
from capture.memory.image import MemoryImage
from capture.memory.source import Source
from capture.notes import vmcoreinfo
from capture.notes.elfnote import read_notes
from capture.notes.vmcoreinfo import PAGE_SIZES
from capture.options import DumpOptions
from capture.pagefilter import PageFilter
from capture.selftest import elf_core, note
from capture.vmcore import open_vmcore
from tests import builders, dumps
from tests.builders import (
    DIRECT_MAP,
    PAGE,
    PrintkRing,
    as_file,
    filled,
    prstatus_note,
    raw_notes,
    simple_core,
    vmcoreinfo_note,
)
from tests.kernels import TABLES_PFN, busy_kernel
from tests.structpages import ERAS

MAX_SECONDS = 2.0
"""Processor time for one input, with the memory of every allocation being traced."""
MAX_BYTES = 256 << 20
"""Peak of what Python and NumPy allocate for one input."""

Field = tuple[int, int]
"""Offset and width in bytes of an integer that steers a parser."""


class FindingError(Exception):
    """An input that breaks what must hold; the message says how."""


class Overdue(BaseException):  # not an Exception: nothing that is fuzzed may catch it
    """An input takes too long."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A realistic input and where the integers in it are."""

    data: bytes
    fields: tuple[Field, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """``run`` takes a file with the input and returns the lines that a person would read."""

    name: str
    run: Callable[[Path], Sequence[str]]
    seeds: Callable[[], Sequence[Seed]]


# --- What must hold -------------------------------------------------------------------------------------------------


def check(target: Target, data: bytes, path: Path) -> None:
    """Run one input, written to ``path``.

    Raises:
        FindingError: it breaks what must hold.
    """
    path.unlink(missing_ok=True)  # a new file: ext4 writes one that is replaced in place to the disk at once
    path.write_bytes(data)
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    files = _open_files()
    try:
        with _time_limit():
            lines = _run(target, path)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced:
            tracemalloc.stop()
    if peak > MAX_BYTES:
        raise FindingError(f"{peak >> 20} MiB of memory")
    if _open_files() > files:
        raise FindingError("a file stays open")
    for line in lines:
        if not line.isprintable():
            raise FindingError(f"not one printable line: {line!r}")


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (the quickest way)


def _run(target: Target, path: Path) -> Sequence[str]:
    try:
        return target.run(path)
    except CaptureError as error:
        return [str(error)]
    except FindingError:
        raise
    except Overdue:
        raise FindingError(f"more than {MAX_SECONDS} seconds") from None
    except (Exception, SystemExit) as error:
        raise FindingError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def overdue(_signal: int, _frame: FrameType | None) -> None:
        raise Overdue

    previous = signal.signal(signal.SIGPROF, overdue)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    started = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    if time.process_time() - started > 2 * MAX_SECONDS:  # in one call into C, which no signal interrupts
        raise FindingError(f"more than {2 * MAX_SECONDS} seconds")


# --- Mutation -------------------------------------------------------------------------------------------------------

_EXTREMES = (
    0, 1, 2, 3, 7, 8, 63, 64, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 4095, 4096, 4097, 1 << 20, (1 << 31) - 1,
    1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 52) - 1, 1 << 52, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE,
    (1 << 64) - 1, DIRECT_MAP,
)  # fmt: skip
_TEXT_NUMBER = re.compile(rb"(?<==)-?(?:0x)?[0-9a-f]+(?=\n)")
MAX_INPUT = 1 << 20


def mutated(seed: Seed, others: Sequence[Seed], rng: random.Random) -> bytes:
    """Return ``seed`` damaged in one to five ways."""
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        rng.choice(_MUTATIONS)(data, seed, others, rng)
    return bytes(data[:MAX_INPUT])


def _flip_bits(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    for _ in range(rng.randint(1, 16)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _extreme_field(data: bytearray, seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        if seed.fields:
            _put(data, *rng.choice(seed.fields), _extreme(len(data), rng))


def _extreme_anywhere(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    width = rng.choice((1, 2, 4, 8))
    _put(data, rng.randrange(len(data) + 1) // width * width, width, _extreme(len(data), rng))


def _swap_fields(data: bytearray, seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    if seed.fields:
        (one, width), (other, other_width) = rng.choice(seed.fields), rng.choice(seed.fields)
        value = bytes(data[one : one + width])
        _put(data, one, width, int.from_bytes(data[other : other + other_width], "little"))
        _put(data, other, other_width, int.from_bytes(value, "little"))


def _extreme_text(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    """Replace a number of VMCOREINFO by another text of the same length where there is room, else move the rest."""
    found = list(_TEXT_NUMBER.finditer(data))
    if found:
        match = rng.choice(found)
        value = _extreme(len(data), rng)
        text = rng.choice((b"%d" % value, b"%x" % value, b"-%d" % value, b"", b"9" * 30, b"\x1b[2J", b"\xff\n"))
        end = match.end()
        if rng.random() < 0.8:  # the note's size stays right
            text = text[: end - match.start()].rjust(end - match.start(), b"0")
        data[match.start() : end] = text


def _cut(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _lengthen(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    data += rng.choice((bytes(PAGE), b"\xff" * 100, rng.randbytes(64), bytes(data[:PAGE])))


def _splice(data: bytearray, _seed: Seed, others: Sequence[Seed], rng: random.Random) -> None:
    other = rng.choice(others).data
    if other:
        start = rng.randrange(len(other))
        piece = other[start : start + rng.choice((8, 64, 512, PAGE))]
        at = rng.randrange(len(data) + 1)
        data[at : at + len(piece) if rng.random() < 0.8 else at] = piece


def _remove(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 4, 8, 56, 100))]


def _fill(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    length = min(rng.choice((8, 64, 512, PAGE)), len(data) - at)
    data[at : at + length] = bytes([rng.choice((0, 0xFF, 0x41))]) * length


_MUTATIONS = (
    _flip_bits, _extreme_field, _extreme_field, _extreme_field, _extreme_anywhere, _swap_fields, _extreme_text,
    _extreme_text, _cut, _lengthen, _splice, _remove, _fill,
)  # fmt: skip


def _extreme(size: int, rng: random.Random) -> int:
    if rng.random() < 0.2:
        return 1 << rng.randrange(64)
    return rng.choice((*_EXTREMES, size, size - 1, size + 1, size // 2, -size, rng.getrandbits(64)))


def _put(data: bytearray, offset: int, width: int, value: int) -> None:
    data[offset : offset + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def inputs(target: Target, seed: object) -> Iterator[bytes]:
    """Yield mutated inputs without end, the same ones for the same ``seed``; the seeds themselves come first."""
    seeds = target.seeds()
    yield from (entry.data for entry in seeds)
    rng = random.Random(f"{seed}/{target.name}")
    while True:
        yield mutated(rng.choice(seeds), seeds, rng)


# --- Seeds ----------------------------------------------------------------------------------------------------------


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
    many = builders.pn_xnum_core(64)
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
    ring = PrintkRing()
    arm = {"NUMBER(kimage_voffset)": "0xffff7fffc0000000", "SYMBOL(_stext)": "ffff800008000000", "PAGESIZE": "16384"}
    return [Seed(builders.vmcoreinfo_text(keys)) for keys in (builders.READABLE_BY_DRGN, ring.keys(0x20_0000), arm)]


@cache
def printk_seeds() -> list[Seed]:
    seeds = []
    for layout, fits_end, records in (
        (builders.RING_LAYOUT, False, 9),
        (builders.RING_LAYOUT, True, 70),
        (builders.SHUFFLED_LAYOUT, False, 40),
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


@cache
def kdump_seeds() -> list[Seed]:
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "core", Path(folder) / "dump"
        for compression in ("none", "zlib", "zstd"):
            for page_size in PAGE_SIZES[:: 2 if compression == "zstd" else 3]:
                keys: dict[str, str | int] = {**builders.READABLE_BY_DRGN, "PAGESIZE": page_size}
                source.write_bytes(simple_core(*"ab.cd.ea" * 8, physical=0x10_0000, keys=keys))
                options = DumpOptions(compression=compression, threads=1, replace=True, progress=False)
                with open_vmcore(str(source)) as vmcore:
                    write_dump(vmcore, target, options)
                table = KdumpFile(target).descriptor_table
                fields = tuple(
                    (table + number * dumps.DESCRIPTOR_BYTES + at, width)
                    for number in range(4)
                    for at, width in ((0, 8), (8, 4), (12, 4))
                )
                sub_header = tuple((page_size + at, width) for at, width in ((8, 4), (96, 8)))
                seed = Seed(target.read_bytes(), (*_KDUMP_HEADER_FIELDS, *sub_header, *fields))
                seeds += [seed] if compression != "none" else [seed, _with_content_size(seed, table)]
    return seeds


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
def filter_seeds() -> list[Seed]:
    """A small kernel of each era; its page tables, mem_section and VMCOREINFO are most of what is changed."""
    seeds = []
    for era in ERAS[::2]:
        data = busy_kernel(era).parts()
        table = data.index(struct.pack("<Q", (TABLES_PFN + 1) * PAGE | 0x63))
        start = table - table % 8 - 8 * 512
        fields = [(at, 8) for at in range(max(0, start), len(data) - 8, 8) if any(data[at : at + 8])][:200]
        seeds.append(Seed(data, (*_elf_fields(data), *fields)))
    return seeds


def _with_content_size(seed: Seed, table: int) -> Seed:
    """Give the first page a zstd frame that says how long its content is, in 8 bytes (RFC 8878, 3.1.1.1)."""
    plain = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * PAGE)
    window = plain[5:6]
    frame = plain[:4] + bytes([0xC0]) + window + struct.pack("<Q", PAGE) + plain[6:]
    data = builders.patched(seed.data, table, "qII", len(seed.data), len(frame), dumps.ZSTD) + frame
    return Seed(data, (*seed.fields, *[(len(seed.data) + 6, 8)] * 4))


# --- Targets --------------------------------------------------------------------------------------------------------


def _every_page(image: MemoryImage) -> None:
    for chunk in image.chunks():
        block = image.fetch(chunk)
        for offset in map(int, block.offsets):
            if len(block.buffer[offset : offset + image.page_size]) != image.page_size:
                raise FindingError(f"a page of {len(block.buffer)} bytes is cut short at {offset:#x}")


def run_elf(path: Path) -> list[str]:
    with Source(str(path)) as source:
        core = elfcore.parse(source)
        for page_size in PAGE_SIZES:
            _every_page(MemoryImage(source, core.loads, page_size))
    return []


def run_notes(path: Path) -> list[str]:
    with Source(str(path)) as source:
        found = read_notes(source, elfcore.parse(source).notes)
    for entry in found.notes:
        if found.blob[entry.offset : entry.offset + len(entry.descriptor)] != entry.descriptor:
            raise FindingError(f"a descriptor is not at its offset {entry.offset:#x}")
    with open_vmcore(str(path)) as vmcore:
        _, problems = report.registers(vmcore)
        return [*found.problems, *vmcore.problems, *problems]


def run_vmcoreinfo(path: Path) -> list[str]:
    info = vmcoreinfo.parse(path.read_bytes())
    names = {key.partition("(")[2].rstrip(")") for key in info.keys}
    for name in names:
        for value in (info.symbol(name), info.offset(name), info.size(name), info.length(name), info.number(name)):
            if value is not None and not -(1 << 63) <= value < 1 << 64:
                raise FindingError(f"{name} has {value}")
    if info.page_size not in PAGE_SIZES:
        raise FindingError(f"page size {info.page_size}")
    # The same text in a note of a whole vmcore: everything that steers by it.
    memory = PrintkRing().add(b"x").memory(0x20_0000)
    note_of_it = note(b"VMCOREINFO", 0, path.read_bytes())
    with as_file(elf_core([note_of_it], [(DIRECT_MAP + 0x20_0000, 0x20_0000, memory)])) as name:
        return run_printk(Path(name))


def run_printk(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
        names = read_utsname(memory, vmcore.info, vmcore.core.machine)
        if len(names.raw) != 390:
            raise FindingError(f"names of {len(names.raw)} bytes")
        for name in FIELDS:
            names.text(name)
        panic = report.find_panic(vmcore)
        lines = [panic.line, *vmcore.problems]
        for record in report.open_log(vmcore).records():
            text = format_record(record, caller=True)
            lines += [line.replace("\t", " ") for line in text.decode("ascii").split("\n")]
    return lines


def run_kdump(path: Path) -> list[str]:
    dump = KdumpFile(path)
    lines: list[str] = []
    try:
        for batch in dump.pages():
            if batch.data.shape != (len(batch.pfns), dump.page_size):
                raise FindingError(f"{len(batch.pfns)} pages have data of shape {batch.data.shape}")
            lines += batch.bad.values()
    finally:
        dump.close()
    return lines


def run_filter(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        page_filter = PageFilter(vmcore)
        pages = sum(int(window.there.sum()) for window in page_filter.windows())
        if pages != vmcore.image.page_count or pages != int(page_filter.census.classes.sum()):
            raise FindingError(f"{pages} of {vmcore.image.page_count} pages have a class")
        return [reason for level in range(32) for reason in page_filter.verdict(level).reasons]


def run_flattened(path: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        made = assemble(str(path), Path(folder) / "dump", progress=False)
        if (made.path.name == "dump") != (made.failure is None):
            raise FindingError(f"{made.failure}: but it is called {made.path.name}")
        if made.failure is None:
            return []
        with KdumpFile(made.path) as dump:
            if not dump.incomplete:
                raise FindingError(f"{made.failure}: but it is not marked incomplete")
        return [made.failure.replace(str(path), "")]


def run_dump_as_source(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        _every_page(vmcore.image)
        return [*vmcore.problems, *run_filter(path)]


def run_cli(path: Path) -> list[str]:
    lines: list[str] = []
    for command in ("info", "dmesg"):
        status, out, err = _command([command, str(path)])
        if status not in (0, 3, SourceError.exit_status):
            raise FindingError(f"{command}: exit status {status}: {err[-500:]!r}")
        if status and len(err.splitlines()) != 1:
            raise FindingError(f"{command}: a failure of {len(err.splitlines())} lines: {err[-500:]!r}")
        lines += err.splitlines()
        lines += [line.replace("\t", " ") for line in out.splitlines()]
    return lines


def _command(arguments: Sequence[str]) -> tuple[int, str, str]:
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    out.flush()
    return status, out.buffer.getvalue().decode(), err.getvalue()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("elf", run_elf, elf_seeds),
        Target("notes", run_notes, note_seeds),
        Target("vmcoreinfo", run_vmcoreinfo, text_seeds),
        Target("printk", run_printk, printk_seeds),
        Target("kdump", run_kdump, kdump_seeds),
        Target("flattened", run_flattened, flattened_seeds),
        Target("filter", run_filter, filter_seeds),
        Target("dump as source", run_dump_as_source, kdump_seeds),
        Target("cli", run_cli, lambda: [*elf_seeds(), *note_seeds(), *printk_seeds()]),
    )
}
