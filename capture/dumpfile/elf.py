"""Writes a dump as an ELF core, for gdb and whatever else reads nothing but that.

In the file: ELF header, program headers, (with more of them than e_phnum holds) section header 0, the notes as one
PT_NOTE, then the pages of the dump in PFN order, from a page boundary on. Page frame numbers are p_paddr; p_vaddr is
where the dead kernel had the page: in the direct map; in the mapping of its image, and of the stacks that CPUs were on
(vmalloc), which are PT_LOADs of their own over the same bytes of the file, so that no page is there twice. In the
notes each CPU has a PID of its own, for gdb.

Pages of zeros, where the dump level leaves them out, are holes in the file. Segments are the runs of pages that the
dump has; with more of them than MAX_RUNS, the smallest gaps become holes that read as zeros, and the header says so
(GAPS).

A page has its place before it is written, in whatever order that is: until the dump is whole, which the header says as
makedumpfile's does (INCOMPLETE: DUMP_ELF_INCOMPLETE of its elf_info.h, crash reads it), what is not written yet reads
as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile.output import Output, ScratchFile, TargetFullError, cut_pieces
from capture.dumpfile.selection import BitmapPlaces, Selection
from capture.dumpfile.writer import DumpPlan, PackedPages, take_mark_off
from capture.memory.elfcore import (
    ELF_HEADER,
    ELF_HEADER_SIZE,
    ET_CORE,
    GAPS,
    IDENTITY,
    INCOMPLETE,
    MACHINES,
    MAX_SEGMENTS,
    PN_XNUM,
    PROGRAM_HEADER,
    PT_LOAD,
    PT_NOTE,
    SH_INFO,
)
from capture.memory.image import LinearMap, contiguous
from capture.notes.prstatus import told_apart

MAX_RUNS = 1 << 15
"""Runs of pages that are told apart. A reader has a table of them; gdb goes through it again and again."""
MAX_MAPS = 64
"""Linear mappings that are taken: two of every kernel; a damaged header may have any number."""
_READ_WRITE_EXECUTE = 7
_RUN = np.dtype([("pfn", "<i8"), ("pages", "<i8"), ("offset", "<i8")])
"""Pages that have their places one behind the other; ``offset`` of the first, in bytes from the first page's."""
_GAP_BITS = 64


class ElfWriter(Selection):
    """Writes one dump to ``output``; use it as KdumpWriter. ``close`` it before ``output`` is closed.

    ``maps`` are where the dead kernel had its memory, ``pages`` where it had single ones besides; bitmaps are kept in a
    file without a name in ``scratch``.

    Raises:
        TargetError: from every method; what was written before stays readable, marked incomplete.
    """

    def __init__(
        self,
        output: Output,
        plan: DumpPlan,
        machine: str,
        maps: Sequence[LinearMap],
        pages: Sequence[LinearMap],
        scratch: Path,
    ) -> None:
        bitmap_bytes = -(-plan.max_mapnr // 8)
        self._bitmaps = ScratchFile(scratch)
        super().__init__(self._bitmaps, BitmapPlaces(0, bitmap_bytes, bitmap_bytes), plan.max_mapnr)
        self._output = output
        self._plan = plan
        self._machine = next(number for number, name in MACHINES.items() if name == machine)
        self._maps = merged(maps)
        self._maps += list(self._beyond_the_maps(pages))
        self._runs_written = np.zeros(0, dtype=_RUN)
        self._header = np.zeros((), dtype=ELF_HEADER)
        self._data = 0
        """Where the first page lies in the file."""
        self.pages_written = 0
        self.gap_pages = 0
        """Pages that the dump does not have and that read as zeros all the same."""
        self.maps_left_out = 0
        """Mappings for which the file has no room: of a kernel's own two and its stacks none."""

    def start(self, _level: int) -> None:
        """Make the dump readable, without a page yet, as long as it will be; the header comes last, synced."""
        size = self._plan.page_size
        gap = self._least_gap()
        self._runs_written = np.array(list(self._joined(gap)), dtype=_RUN)
        pages = int(self._runs_written["pages"].sum())
        self.gap_pages = pages - self.pages
        loads = self._loads()
        notes = told_apart(self._plan.notes)
        count = len(loads) + 1
        sections = SH_INFO.itemsize if count >= PN_XNUM else 0
        table = ELF_HEADER_SIZE + count * PROGRAM_HEADER.itemsize
        self._data = -(-(table + sections + len(notes)) // size) * size
        self._describe(count, table if sections else 0)
        note = np.zeros(1, dtype=PROGRAM_HEADER)
        note["p_type"], note["p_offset"] = PT_NOTE, table + sections
        note["p_filesz"] = note["p_memsz"] = len(notes)
        loads["p_offset"] += np.uint64(self._data)
        section = np.zeros((), dtype=SH_INFO)
        section["sh_info"] = count
        if pages:
            self._output.write([b"\0"], self._data + pages * size - 1)
        parts = [note.tobytes(), loads.tobytes(), section.tobytes()[:sections], notes]
        self._output.write([part for part in parts if part], ELF_HEADER_SIZE)
        self._output.sync()
        self._write_header(incomplete=True)
        self._output.sync()

    def append(self, packed: PackedPages) -> None:
        """Write pages to their places; those without data, of zeros, are there."""
        if self._output.full:
            raise TargetFullError(f"{self._output.name}: no room left; make room or choose another target")
        size = self._plan.page_size
        places = self._places_of(packed.pfns[packed.sizes > 0])
        if len(places):
            runs = contiguous(places, size)
            parts = cut_pieces(packed.pieces, [(end - first) * size for first, end in runs])
            for part, (first, _) in zip(parts, runs, strict=True):
                self._output.write(part, int(places[first]))
        self.pages_written += len(packed.pfns)

    def checkpoint(self) -> None:
        """Bring what was written to the disk."""
        self._output.sync()

    def finish(self, *, complete: bool) -> None:
        """Bring everything to the disk; when ``complete``, take the incomplete mark off as the very last write."""
        self._output.sync()
        if complete:
            take_mark_off(self._output, self._write_header)

    def close(self) -> None:
        """Let the bitmaps go."""
        self._bitmaps.close()

    def _least_gap(self) -> int:
        """Return how many pages there have to be between two runs that are told apart, so that they are not too many.

        Powers of two: to count them takes no memory.
        """
        gaps = [0] * (_GAP_BITS + 1)
        end = None
        for first, pages in self.selected():
            if end is not None:
                gaps[(first - end).bit_length()] += 1
            end = first + pages
        bits, runs = _GAP_BITS, 1
        while bits and runs + gaps[bits] <= MAX_RUNS:
            runs += gaps[bits]
            bits -= 1
        return 1 << bits

    def _joined(self, least_gap: int) -> Iterator[tuple[int, int, int]]:
        """Yield runs with their places; those with less than ``least_gap`` pages between them as one."""
        start, end, place = 0, 0, 0
        for first, pages in self.selected():
            if end > start and first - end < least_gap:
                end = first + pages
                continue
            if end > start:
                yield start, end - start, place
                place += (end - start) * self._plan.page_size
            start, end = first, first + pages
        if end > start:
            yield start, end - start, place

    def _beyond_the_maps(self, pages: Sequence[LinearMap]) -> Iterator[LinearMap]:
        shifts = {linear.virtual - linear.physical for linear in self._maps}
        for page in dict.fromkeys(pages):
            if page.virtual - page.physical not in shifts:
                yield page

    def _loads(self) -> NDArray[np.void]:
        """Return the PT_LOADs: of each linear mapping what runs have of it, and without an address what none has."""
        size = self._plan.page_size
        starts, ends = self._runs_written["pfn"], self._runs_written["pfn"] + self._runs_written["pages"]
        found, taken = [], []
        room = MAX_SEGMENTS - 1 - len(starts) - len(self._maps) - 1  # besides the notes, and what has no address
        for linear in self._maps:
            end = -(-(linear.physical + linear.size) // size)
            span = _Span.of(starts, ends, linear.physical // size, end, shift=linear)
            if len(span.runs) <= room:
                found.append(span)
                taken.append(linear)
                room -= len(span.runs)
        self.maps_left_out = len(self._maps) - len(taken)
        bare, low = [], 0
        for linear in sorted(taken, key=lambda linear: linear.physical):
            bare.append(_Span.of(starts, ends, low, linear.physical // size))
            low = max(low, -(-(linear.physical + linear.size) // size))
        bare.append(_Span.of(starts, ends, low, self._plan.max_mapnr))
        spans = [span for span in (*found, *bare) if len(span.runs)]
        loads = np.zeros(sum(len(span.runs) for span in spans), dtype=PROGRAM_HEADER)
        loads["p_type"], loads["p_flags"] = PT_LOAD, _READ_WRITE_EXECUTE
        at = 0
        for span in spans:
            rows = loads[at : at + len(span.runs)]
            within = (span.first - starts[span.runs]) * size
            rows["p_offset"] = self._runs_written["offset"][span.runs] + within
            rows["p_paddr"] = span.first * size
            if span.shift is not None:
                rows["p_vaddr"] = rows["p_paddr"] + np.uint64((span.shift.virtual - span.shift.physical) % (1 << 64))
            rows["p_filesz"] = rows["p_memsz"] = (span.end - span.first) * size
            at += len(rows)
        return loads

    def _places_of(self, pfns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the file each of some selected pages lies."""
        runs = self._runs_written
        index = np.searchsorted(runs["pfn"], pfns, side="right") - 1
        places: NDArray[np.int64] = runs["offset"][index] + (pfns - runs["pfn"][index]) * self._plan.page_size
        return places + self._data

    def _describe(self, count: int, section: int) -> None:
        """Fill the header in: ``count`` program headers; section header 0 is at ``section`` where it has to say so."""
        header = self._header
        header["e_ident"] = np.void(IDENTITY)
        header["e_type"], header["e_machine"], header["e_version"] = ET_CORE, self._machine, 1
        header["e_phoff"] = header["e_ehsize"] = ELF_HEADER_SIZE
        header["e_phentsize"], header["e_phnum"] = PROGRAM_HEADER.itemsize, min(count, PN_XNUM)
        if section:
            header["e_shoff"], header["e_shentsize"], header["e_shnum"] = section, SH_INFO.itemsize, 1

    def _write_header(self, *, incomplete: bool) -> None:
        self._header["e_flags"] = (INCOMPLETE if incomplete else 0) | (GAPS if self.gap_pages else 0)
        self._output.write([self._header.tobytes()], 0)


class _Span(NamedTuple):
    """What ``runs`` (their numbers) have of a range of pages: from ``first`` to ``end`` of each; ``shift``, if any, is
    where that is mapped."""

    runs: NDArray[np.intp]
    first: NDArray[np.int64]
    end: NDArray[np.int64]
    shift: LinearMap | None

    @classmethod
    def of(
        cls, starts: NDArray[np.int64], ends: NDArray[np.int64], low: int, high: int, shift: LinearMap | None = None
    ) -> _Span:
        """Look runs (PFNs, ascending, none within another) up in the pages from ``low`` to ``high``, if any."""
        first, end = np.searchsorted(ends, low, side="right"), np.searchsorted(starts, high, side="left")
        runs = np.arange(first, end) if low < high else np.zeros(0, dtype=np.intp)
        return cls(runs, np.maximum(starts[runs], low), np.minimum(ends[runs], high), shift)


def merged(maps: Sequence[LinearMap]) -> list[LinearMap]:
    """Return linear mappings with those of the same shift as one: a direct map is one, whatever holes memory has.

    The ones that come first in the source stay first, MAX_MAPS of them.
    """
    shifts: dict[int, LinearMap] = {}
    for linear in maps:
        shift = linear.virtual - linear.physical
        before = shifts.get(shift)
        if before is None:
            if len(shifts) < MAX_MAPS:
                shifts[shift] = linear
            continue
        low = min(before.physical, linear.physical)
        high = max(before.physical + before.size, linear.physical + linear.size)
        shifts[shift] = LinearMap(low + shift, low, high - low)
    return list(shifts.values())
