"""A dump against the vmcore it was made from: drgn reads the one, plain reads the other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.builders import PAGE, PT_LOAD
from tests.readers import bitmaps, drgn_reader, mapped, program_headers, prstatus_descriptors

BLOCK_PAGES = 256


def different_pages(dump: Path, vmcore: Path) -> tuple[int, int]:
    """Compare every page that the dump has, as drgn reads it, with the ELF vmcore that it was made from.

    Returns (pages compared, pages that differ). drgn raises for a page that the dump does not have; a page that is in
    no segment of the vmcore differs.
    """
    read, core = drgn_reader(dump), mapped(vmcore)
    _, kept = bitmaps(dump)
    pages = wrong = 0
    for load in program_headers(core):
        if load.type != PT_LOAD:
            continue
        first, end = load.paddr // PAGE, -(-(load.paddr + load.filesz) // PAGE)
        for low, high in _runs(kept[first:end]):
            start = max(load.paddr, (first + low) * PAGE)
            stop = min(load.paddr + load.filesz, (first + high) * PAGE)
            at = load.offset + start - load.paddr
            expected, found = core[at : at + stop - start], read(start, stop - start)
            pages += high - low
            if expected != found:
                size = stop - start
                wrong += sum(expected[at : at + PAGE] != found[at : at + PAGE] for at in range(0, size, PAGE))
        kept[first:end] = False  # segments overlap: each page once
    return pages, wrong + int(kept.sum())


def _runs(kept: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield [first, end) of runs of True, cut at BLOCK_PAGES."""
    edges = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    for low, high in edges.tolist():
        for first in range(low, high, BLOCK_PAGES):
            yield first, min(high, first + BLOCK_PAGES)


def prstatus_instruction_pointers(vmcore: Path) -> list[int]:
    """RIP of every NT_PRSTATUS note of an x86_64 vmcore: pr_reg is at 112 of struct elf_prstatus, rip its 17th word."""
    rip_offset = 112 + 16 * 8
    return [struct.unpack_from("<Q", cpu, rip_offset)[0] for cpu in prstatus_descriptors(mapped(vmcore))]
