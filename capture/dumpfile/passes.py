"""In which order pages are saved: what a crash is explained with first, what is large and seldom looked at last.

Data may lie in any order in a dump, readers follow the descriptors. One that is cut short (a full disk, a power cut, a
deadline) then lacks what hurts least. The passes are bitmaps, five of 32 KiB for a GiB of memory, in a file beside the
dump that has no name and is gone with the process. Where it cannot be made or written, there is one pass, in PFN order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capture import pulse
from capture.dumpfile.output import target_error, unnamed_file
from capture.dumpfile.selection import Selection
from capture.errors import TargetError
from capture.kernel.pages import LAST

NAMED = LAST
"""Passes whose pages are noted; one more has all the others."""
_DONE = NAMED
"""The bitmap of pages that are saved already."""


class Passes:
    """Which pages go in which pass.

    PFNs are below ``max_pfn``; the file is made in ``directory``. ``failure`` says why there is one pass only.
    """

    def __init__(self, directory: Path, max_pfn: int) -> None:
        self._directory = directory
        self._bytes = -(-max_pfn // 8)
        self._some_done = False
        self._fd = -1
        self.failure: str | None = None
        try:
            self._fd = unnamed_file(directory)
        except OSError as error:
            self.failure = f"a file in {directory}: {error.strerror}"

    def note(self, first_pfn: int, passes: Iterable[NDArray[np.bool_]]) -> None:
        """Put pages from ``first_pfn`` (a multiple of 8) on into the first passes, a truth value for each of them."""
        try:
            for number, pages in enumerate(passes if self.failure is None else ()):
                bits = np.packbits(pages, bitorder="little").tobytes()
                with pulse.at_target():
                    written = os.pwrite(self._fd, bits, number * self._bytes + first_pfn // 8)
                if written < len(bits):
                    self.failure = "no room for the order of pages"
        except OSError as error:
            self.failure = f"the order of pages cannot be written: {error.strerror}"

    def note_done(self, pfns: NDArray[np.int64]) -> None:
        """Leave pages (ascending) out of every pass: they are saved already.

        Raises:
            TargetError: there is no room to remember it.
        """
        if not len(pfns):
            return
        if self._fd < 0:
            raise TargetError(f"what is saved already cannot be noted: {self.failure}")
        first = int(pfns[0]) // 8 * 8
        done = self._bits(_DONE, first, -(-(int(pfns[-1]) + 1 - first) // 8) * 8)
        done[pfns - first] = True
        try:
            bits = np.packbits(done, bitorder="little").tobytes()
            with pulse.at_target():
                written = os.pwrite(self._fd, bits, _DONE * self._bytes + first // 8)
        except OSError as error:
            raise TargetError(f"{self._directory}: what is saved already cannot be noted: {error.strerror}") from None
        if written < len(bits):
            raise TargetError(f"{self._directory}: what is saved already cannot be noted: no room")
        self._some_done = True

    def give_up(self, reason: str) -> None:
        """Have one pass only."""
        self.failure = reason

    def runs(self, writer: Selection) -> Iterator[Iterator[tuple[int, int]]]:
        """Yield, pass by pass, the runs (first PFN, pages) of the pages that ``writer`` has selected.

        Raises:
            TargetError: from the runs: what was noted cannot be read back. To guess would lose pages: one that its own
                pass does not see is not in the last one either.
        """
        if self.failure is not None:
            yield writer.selected(self._open if self._some_done else None)
            return
        for number in range(NAMED):
            yield writer.selected(partial(self._named, number))
        yield writer.selected(self._others)

    def _named(self, number: int, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        return self._bits(number, first_pfn, pages) & self._open(first_pfn, pages)

    def _others(self, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        others = self._open(first_pfn, pages)
        for number in range(NAMED):
            others &= ~self._bits(number, first_pfn, pages)
        return others

    def _open(self, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        """Return which pages are not saved yet."""
        if not self._some_done:
            return np.ones(pages, dtype=np.bool_)
        return ~self._bits(_DONE, first_pfn, pages)

    def _bits(self, number: int, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        length = -(-pages // 8)
        room = max(0, min(length, self._bytes - first_pfn // 8))
        try:
            with pulse.at_target():
                raw = os.pread(self._fd, room, number * self._bytes + first_pfn // 8)
        except OSError as error:
            raise target_error(self._directory, "reading the order of pages back", error) from None
        bits = np.frombuffer(raw.ljust(length, b"\0"), dtype=np.uint8)  # (nothing was noted behind the file's end)
        return np.unpackbits(bits, bitorder="little", count=pages).view(np.bool_)

    def close(self) -> None:
        """Let the file go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
