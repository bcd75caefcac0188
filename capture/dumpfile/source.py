"""A kdump-compressed dump as a SOURCE: its pages as memory by physical address, its notes, its bitmaps.

So a dump can be filtered again at another level, compressed again, verified against, or asked for its log, with the
same code as a vmcore. Not for the capture kernel: a dump has many runs of pages, and each is remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile import foreign
from capture.dumpfile.reader import KdumpFile
from capture.errors import SourceError
from capture.memory.elfcore import MACHINES, PROGRAM_HEADER, PT_LOAD, PT_NOTE, ElfCore
from capture.memory.image import MemoryImage

MAX_RUNS = 1 << 22
NOTES_AT = 1 << 60
"""Where the notes are, in the source's bytes: beyond every physical address."""
_CACHED_PAGES = 256
_MACHINE_OFFSET, _NAME_BYTES = 4 * 65, 65
"""struct new_utsname, include/uapi/linux/utsname.h."""


class KdumpSource:
    """The bytes of physical memory that a dump has, by physical address; a ByteSource.

    Raises:
        SourceError: it is no dump that can be read.
    """

    header_offset = 0
    remedy = ""
    map_refused: str | None = None
    size: int | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.dump = KdumpFile(Path(name))
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        try:
            self._notes = self.dump.notes()
            self._check()
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at a physical address, or of the notes at NOTES_AT.

        Raises:
            OSError: a page is not in the dump, or cannot be decompressed (EIO).
        """
        if offset >= NOTES_AT:
            return self._notes[offset - NOTES_AT : offset - NOTES_AT + length]
        size = self.dump.page_size
        first, end = offset // size, -(-(offset + length) // size)
        data = self._page(first) if end - first == 1 else b"".join(self.dump.read_run(first, end - first))
        return data[offset - first * size :][:length]

    def map(self, offset: int, length: int) -> memoryview | None:  # noqa: ARG002
        """Return None: there is nothing to map."""
        return None

    def close(self) -> None:
        """Close the file."""
        self.dump.close()

    def __enter__(self) -> KdumpSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _page(self, pfn: int) -> bytes:
        if pfn in self._pages:
            self._pages.move_to_end(pfn)
            return self._pages[pfn]
        (page,) = self.dump.read_run(pfn, 1)
        self._pages[pfn] = page
        if len(self._pages) > _CACHED_PAGES:
            self._pages.popitem(last=False)
        return page

    def _check(self) -> None:
        """Refuse a dump whose pages cannot be had."""
        if (line := foreign.missing_library(int(self.dump.header["status"]))) is not None:
            raise SourceError(f"{self.name}: {line}")
        if int(self.dump.sub_header["split"]):
            raise SourceError(f"{self.name}: one part of a dump that was split: not supported; use the whole dump")

    def core(self) -> ElfCore:
        """Return what an ELF core header would say: a segment for each run of pages that the dump has."""
        machine = (
            bytes(self.dump.header["utsname"])[_MACHINE_OFFSET:][:_NAME_BYTES]
            .split(b"\0")[0]
            .decode("ascii", "replace")
        )
        if machine not in MACHINES.values():
            said = repr(machine)[1:-1] or "unknown"  # (it may have control characters)
            raise SourceError(f"{self.name}: machine {said}: only x86_64 and aarch64 are read")
        starts: list[int] = []
        lengths: list[int] = []
        for first, pages in self.dump.runs(self.dump.bitmap2):
            starts.append(first)
            lengths.append(pages)
            if len(starts) > MAX_RUNS:
                raise SourceError(f"{self.name}: more than {MAX_RUNS} runs of pages: the bitmaps are damaged")
        if not starts:
            raise SourceError(f"{self.name}: no page in it: nothing to read")
        loads = np.zeros(len(starts), dtype=PROGRAM_HEADER)
        loads["p_type"] = PT_LOAD
        loads["p_paddr"] = loads["p_offset"] = np.array(starts, dtype="<u8") * np.uint64(self.dump.page_size)
        loads["p_filesz"] = loads["p_memsz"] = np.array(lengths, dtype="<u8") * np.uint64(self.dump.page_size)
        notes = np.zeros(1, dtype=PROGRAM_HEADER)
        notes["p_type"], notes["p_offset"], notes["p_filesz"] = PT_NOTE, NOTES_AT, len(self._notes)
        return ElfCore(machine, loads, notes, 0, tuple(self._problems()))

    def _problems(self) -> Iterator[str]:
        if self.dump.incomplete:
            yield f"{self.name} is marked incomplete: pages that were not written are zeros"
        if self.dump.level & ~1:
            yield f"{self.name} is a dump of level {self.dump.level}: what it left out stays out"


class DumpImage(MemoryImage):
    """The memory of a dump: all pages that there were are in ``runs``, those that the dump has in ``extents``."""

    def __init__(self, source: KdumpSource, loads: NDArray[np.void]) -> None:
        super().__init__(source, loads, source.dump.page_size)
        self._dump = source.dump
        self.max_pfn = source.dump.max_mapnr

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, pages) of bitmap 1; a damaged one may lack pages that the dump has."""
        return self._dump.runs(self._dump.bitmap1, self._dump.bitmap2)
