"""A dump against the vmcore it was made from: drgn reads the one, plain reads the other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.builders import PAGE, PT_LOAD
from tests.readers import drgn_reader, mapped, program_headers, prstatus_descriptors

BLOCK = 1 << 20


def different_pages(dump: Path, vmcore: Path) -> tuple[int, int]:
    """Compare every byte of physical memory that the ELF vmcore has with what drgn reads from the dump.

    Returns (pages compared, pages that differ). drgn raises for a page that the dump does not have.
    """
    read, core = drgn_reader(dump), mapped(vmcore)
    pages = wrong = 0
    for load in program_headers(core):
        for start, length in _blocks(load.paddr, load.filesz if load.type == PT_LOAD else 0):
            at = load.offset + start - load.paddr
            expected, found = core[at : at + length], read(start, length)
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
    return [struct.unpack_from("<Q", cpu, rip_offset)[0] for cpu in prstatus_descriptors(mapped(vmcore))]
