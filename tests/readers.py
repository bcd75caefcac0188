"""Readers that are not ours, to hold ours against: plain ``struct`` and loops, drgn, makedumpfile.

What is written here follows elf(5) and makedumpfile's diskdump_mod.h and takes nothing from the program.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import drgn
import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from tests.builders import PAGE, PHDR, PT_LOAD, PT_NOTE
from tests.dumps import DESCRIPTOR, DESCRIPTOR_BYTES, INCOMPLETE, STATUS, ZLIB, ZSTD

NT_PRSTATUS = 1


def model(loads: Iterable[tuple[int, bytes]], page_size: int = PAGE) -> dict[int, bytes]:
    """The pages of segments (physical address, bytes) by PFN.

    Naively: write each segment into pages piece by piece, the last ones first so that the first wins.
    """
    pages: dict[int, bytearray] = {}
    for physical, data in sorted(loads, key=lambda load: load[0])[::-1]:
        position = 0
        while position < len(data):
            pfn, within = divmod(physical + position, page_size)
            take = min(page_size - within, len(data) - position)
            page = pages.setdefault(pfn, bytearray(page_size))
            page[within : within + take] = data[position : position + take]
            position += take
    return {pfn: bytes(pages[pfn]) for pfn in sorted(pages)}


# --- ELF vmcores ----------------------------------------------------------------------------------------------------


class ProgramHeader(NamedTuple):
    """Elf64_Phdr."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def program_headers(core: bytes | mmap.mmap) -> list[ProgramHeader]:
    """The program headers of a vmcore, in the order of the file."""
    (phoff,), (phnum,) = struct.unpack_from("<Q", core, 32), struct.unpack_from("<H", core, 56)
    return [ProgramHeader(*struct.unpack_from("<IIQQQQQQ", core, phoff + number * PHDR)) for number in range(phnum)]


def note_segment(core: bytes | mmap.mmap) -> bytes:
    """The one PT_NOTE segment of a vmcore whose notes the kernel merged."""
    (found,) = [header for header in program_headers(core) if header.type == PT_NOTE]
    return core[found.offset : found.offset + found.filesz]


def prstatus_descriptors(core: bytes | mmap.mmap) -> list[bytes]:
    """The struct elf_prstatus of each CPU of a vmcore with merged notes."""
    notes, found, at = note_segment(core), [], 0
    while at + 12 <= len(notes):
        name, length, kind = struct.unpack_from("<III", notes, at)
        if not name:
            break
        start = at + 12 + (name + 3) // 4 * 4
        if kind == NT_PRSTATUS and notes[at + 12 : at + 17] == b"CORE\0":
            found.append(notes[start : start + length])
        at = start + (length + 3) // 4 * 4
    return found


class ElfPages:
    """The pages of an ELF core, naively: page by page through every PT_LOAD, those that start lower last."""

    def __init__(self, core: bytes | mmap.mmap, page_size: int = PAGE) -> None:
        self.size = page_size
        self._core = core
        loads = [header for header in program_headers(core) if header.type == PT_LOAD and header.filesz]
        self._loads = sorted(((load.paddr, load.filesz, load.offset) for load in loads), reverse=True)

    def pfns(self) -> list[int]:
        found: set[int] = set()
        for start, length, _ in self._loads:
            found.update(range(start // self.size, -(-(start + length) // self.size)))
        return sorted(found)

    def whole_pfns(self) -> list[int]:
        found: set[int] = set()
        for start, length, _ in self._loads:
            found.update(range(-(-start // self.size), (start + length) // self.size))
        return sorted(found)

    def page(self, pfn: int) -> bytes:
        page = bytearray(self.size)
        for start, length, offset in self._loads:
            low, high = max(start, pfn * self.size), min(start + length, (pfn + 1) * self.size)
            if low < high:
                at = offset + low - start
                page[low - pfn * self.size : high - pfn * self.size] = self._core[at : at + high - low]
        return bytes(page)

    def pages(self) -> dict[int, bytes]:
        return {pfn: self.page(pfn) for pfn in self.pfns()}


# --- dumps ----------------------------------------------------------------------------------------------------------


def zstd_decompress(frame: bytes) -> bytes:
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    data = decompressor.decompress(frame)
    assert decompressor.eof
    assert not decompressor.unused_data
    return data


DECOMPRESS: dict[int, Callable[[bytes], bytes]] = {0: bytes, ZLIB: zlib.decompress, ZSTD: zstd_decompress}


@dataclass(frozen=True)
class HandRead:
    """A dump read naively. ``descriptors`` are (offset, size, flags, page_flags) by PFN; ``pages`` those with data."""

    status: int
    level: int
    max_mapnr: int
    data_start: int
    descriptors: dict[int, tuple[int, int, int, int]]
    pages: dict[int, bytes]

    @property
    def incomplete(self) -> bool:
        return bool(self.status & INCOMPLETE)

    @property
    def missing(self) -> int:
        return len(self.descriptors) - len(self.pages)


def by_hand(path: Path) -> HandRead:
    raw = path.read_bytes()
    assert raw[:8] == b"KDUMP   "
    assert struct.unpack_from("<i", raw, 8) == (6,)
    status, block, sub_blocks, bitmap_blocks = struct.unpack_from("<IiiI", raw, STATUS)
    bitmap1 = (1 + sub_blocks) * block
    bitmap2, table = bitmap1 + bitmap_blocks // 2 * block, bitmap1 + bitmap_blocks * block
    (level,) = struct.unpack_from("<i", raw, block + 8)
    existing, kept = (int.from_bytes(raw[start:end], "little") for start, end in ((bitmap1, bitmap2), (bitmap2, table)))
    assert kept & ~existing == 0  # every page of the dump exists
    pfns = [at * 8 + bit for at, byte in enumerate(raw[bitmap2:table]) if byte for bit in range(8) if byte >> bit & 1]
    descriptors = {
        pfn: struct.unpack_from(DESCRIPTOR, raw, table + DESCRIPTOR_BYTES * index) for index, pfn in enumerate(pfns)
    }
    pages = {
        pfn: DECOMPRESS[flags](raw[offset : offset + size])
        for pfn, (offset, size, flags, _) in descriptors.items()
        if offset
    }
    assert all(len(page) == block for page in pages.values())
    (max_mapnr,) = struct.unpack_from("<Q", raw, block + 96)
    return HandRead(status, level, max_mapnr, table + DESCRIPTOR_BYTES * len(pfns), descriptors, pages)


def bitmaps(path: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both bitmaps of a dump: the page exists, the page is in the dump; one element a PFN."""
    with path.open("rb") as file:
        header = file.read(PAGE)
        assert header[:8] == b"KDUMP   "
        _, block, sub_blocks, bitmap_blocks = struct.unpack_from("<IiiI", header, STATUS)
        file.seek((1 + sub_blocks) * block)
        raw = np.frombuffer(file.read(bitmap_blocks * block), dtype=np.uint8)
    bits = np.unpackbits(raw, bitorder="little").astype(np.bool_)
    return bits[: len(bits) // 2], bits[len(bits) // 2 :]


def drgn_reader(path: Path) -> Callable[[int, int], bytes]:
    """Open a dump with drgn; return a function that reads (address, bytes) of physical memory.

    It raises drgn.FaultError for a page that the dump does not have.
    """
    program = drgn.Program()
    program.set_core_dump(str(path))

    def read(address: int, length: int) -> bytes:
        found: bytes = program.read(address, length, physical=True)
        return found

    return read


def drgn_program(core: Path, vmlinux: Path) -> drgn.Program:
    """Open a dump with drgn, with the kernel's debug symbols."""
    opened = drgn.Program()
    opened.set_core_dump(core)
    opened.load_debug_info([vmlinux])
    return opened


def read_by_drgn(path: Path, pfns: Iterable[int]) -> dict[int, bytes]:
    read = drgn_reader(path)
    return {pfn: read(pfn * PAGE, PAGE) for pfn in pfns}


def makedumpfile(*arguments: str | Path, source: IO[bytes] | None = None, output: IO[bytes] | None = None) -> None:
    """Run makedumpfile, its standard input and output where they matter; skips where there is none."""
    found = shutil.which("makedumpfile") or shutil.which("makedumpfile", path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip("makedumpfile is not installed (Debian package makedumpfile)")
    command: Sequence[str] = [found, *map(str, arguments)]
    subprocess.run(command, check=True, stdin=source, stdout=output or subprocess.PIPE, stderr=subprocess.PIPE)


def makedumpfile_rearrange(stream: bytes, path: Path) -> None:
    """Have makedumpfile put a flattened dump together."""
    with tempfile.TemporaryFile() as file:
        file.write(stream)
        file.seek(0)
        makedumpfile("-R", path, source=file)
