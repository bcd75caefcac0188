"""Reads an ELF core back page by page, as capture.dumpfile.reader does a kdump-compressed dump: for verify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile.reader import ReadPages
from capture.memory.elfcore import GAPS, INCOMPLETE
from capture.vmcore import Vmcore, open_vmcore


@contextmanager
def open_elf(path: Path) -> Iterator[ElfFile]:
    """Open an ELF core.

    Raises:
        SourceError: it is none.
    """
    with open_vmcore(str(path)) as vmcore:
        yield ElfFile(path, vmcore)


class ElfFile:
    """An open ELF core. It does not know of pages that it left out, nor what its pages have to be."""

    bitmap1, bitmap2 = 1, 2
    """Which of the two is asked for; there are none in the file."""
    level = None

    def __init__(self, path: Path, vmcore: Vmcore) -> None:
        self.path = path
        self.page_size = vmcore.image.page_size
        self._vmcore = vmcore

    @property
    def incomplete(self) -> bool:
        """Whether it is marked incomplete, or is cut short."""
        return bool(self._vmcore.core.flags & INCOMPLETE) or self._vmcore.core.missing_bytes > 0

    @property
    def gaps(self) -> bool:
        """Whether pages that it left out may read as zeros."""
        return bool(self._vmcore.core.flags & GAPS)

    def page_count(self) -> int:
        """Return the number of its pages."""
        return self._vmcore.image.page_count

    def pages(self) -> Iterator[ReadPages]:
        """Yield every page in PFN order; one that cannot be read is in ``bad``."""
        image = self._vmcore.image
        for chunk in image.chunks():
            block = image.fetch(chunk)
            data = np.concatenate([rows for _, rows in block.stretches(self.page_size)])
            unreadable = np.isin(block.pfns, list(block.unreadable), assume_unique=True)
            bad = {int(index): "cannot be read" for index in np.flatnonzero(unreadable)}
            yield ReadPages(block.pfns, data, bad, np.zeros(len(block.pfns), dtype=np.bool_))

    def bits(self, bitmap: int, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        """Return which pages from ``first_pfn`` on it has; it may know of all (``bitmap1``), and does not tell."""
        if bitmap == self.bitmap1:
            return np.ones(pages, dtype=np.bool_)
        return self._vmcore.image.holds(first_pfn, pages)

    def runs(self, *_bitmaps: int) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, pages) of every run of pages that it has."""
        return self._vmcore.image.runs()
