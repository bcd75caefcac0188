"""Other people's readers, as the reference: pyelftools and plain reads for the ELF vmcore, drgn for dumps."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import drgn
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

PAGE = 4096
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Load:
    """One PT_LOAD: physical address, offset in the file, size, all in bytes."""

    physical: int
    offset: int
    size: int


def loads(vmcore: Path) -> list[Load]:
    with vmcore.open("rb") as file:
        segments = ELFFile(file).iter_segments("PT_LOAD")
        return [Load(s["p_paddr"], s["p_offset"], s["p_filesz"]) for s in segments if s["p_filesz"]]


def different_pages(dump: Path, vmcore: Path) -> tuple[int, int]:
    """Compare every byte of physical memory that the ELF vmcore has with what drgn reads from the dump.

    Returns (pages compared, pages that differ). drgn raises for a page that the dump does not have.
    """
    program = drgn.Program()
    program.set_core_dump(dump)
    pages = wrong = 0
    with vmcore.open("rb") as file:
        for load in loads(vmcore):
            for start, length in _blocks(load.physical, load.size):
                file.seek(load.offset + start - load.physical)
                expected = file.read(length)
                found = program.read(start, length, physical=True)
                pages += -(-length // PAGE)
                if expected != found:
                    wrong += sum(expected[at : at + PAGE] != found[at : at + PAGE] for at in range(0, length, PAGE))
    return pages, wrong


def _blocks(start: int, size: int) -> Iterator[tuple[int, int]]:
    end = start + size
    while start < end:
        length = min(BLOCK - start % BLOCK, end - start)
        yield start, length
        start += length


def prstatus_instruction_pointers(vmcore: Path) -> list[int]:
    """RIP of every NT_PRSTATUS note of an x86_64 vmcore: pr_reg is at 112 of struct elf_prstatus, rip its 17th word."""
    rip_offset = 112 + 16 * 8
    with vmcore.open("rb") as file:
        return [
            struct.unpack_from("<Q", note["n_descdata"], rip_offset)[0]
            for segment in ELFFile(file).iter_segments("PT_NOTE")
            if isinstance(segment, NoteSegment)
            for note in segment.iter_notes()
            if note["n_name"] == "CORE" and note["n_type"] in (1, "NT_PRSTATUS")
        ]
