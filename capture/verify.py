"""Read every page of a dump back: descriptors, checksums, the manifest's SHA-256, and against its source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile import kdump
from capture.dumpfile.output import HASH_BLOCK, MANIFEST, digests_of
from capture.dumpfile.reader import NOT_WRITTEN, KdumpFile, ReadPages
from capture.errors import IncompleteError, SourceError
from capture.memory.elfcore import MAGIC
from capture.memory.image import MemoryImage
from capture.progress import Progress

MAX_NAMED = 20
"""Bad pages that are named; the rest is counted."""
_WINDOW_PAGES = 1 << 19


class Dump(Protocol):
    """A dump that can be read back: KdumpFile, or ElfFile. ``level`` None: it does not say what it left out.

    ``gaps``: pages that it left out may read as zeros.
    """

    path: Path
    page_size: int
    bitmap1: int
    bitmap2: int

    @property
    def incomplete(self) -> bool:
        """Whether it is marked incomplete."""

    @property
    def level(self) -> int | None:
        """The dump level it was made with."""

    @property
    def gaps(self) -> bool:
        """Whether pages that it left out may read as zeros."""

    def page_count(self) -> int:
        """Return the number of its pages."""

    def pages(self) -> Iterator[ReadPages]:
        """Yield every page, in PFN order."""

    def bits(self, bitmap: int, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        """Return which pages from ``first_pfn`` on are in ``bitmap1`` (known of) or ``bitmap2`` (there)."""

    def runs(self, *bitmaps: int) -> Iterator[tuple[int, int]]:
        """Yield (first PFN, pages) of every run of pages that are in any of the bitmaps."""


@contextmanager
def open_dump(path: Path) -> Iterator[Dump]:
    """Open a dump of either format.

    Raises:
        SourceError: it is none that can be read.
    """
    if kdump.start_of(str(path)).startswith(MAGIC):
        from capture.elfdump import open_elf

        with open_elf(path) as elf:
            yield elf
        return
    with KdumpFile(path) as dump:
        yield dump


@dataclass(slots=True)
class VerifyReport:
    """What became of the pages of a dump.

    ``unreadable`` ones are zeros because they could not be read when they were saved, which the dump's mark says.
    ``damaged`` ones cannot be read back, ``unwritten`` ones have no data yet, ``different`` ones are not what the
    source has, ``absent`` ones are only in the source, ``extra`` only in the dump. ``left_out`` by its dump level are
    pages that the dump knows of. ``changed`` are blocks of the file whose SHA-256 is not the one in the manifest
    beside it; ``hashed`` is whether there is such a manifest. ``named`` are the first of those that are wrong, a line
    each.
    """

    pages: int = 0
    unreadable: int = 0
    damaged: int = 0
    unwritten: int = 0
    different: int = 0
    absent: int = 0
    extra: int = 0
    left_out: int = 0
    level: int | None = 0
    incomplete: bool = False
    compared: bool = False
    hashed: bool = False
    changed: int = 0
    named: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing at all is wrong, the mark included."""
        return not (self._wrong or self.unwritten or self.absent or self.incomplete)

    @property
    def _wrong(self) -> int:
        return self.damaged + self.different + self.extra + self.changed

    @property
    def exit_status(self) -> int:
        """0: good; 3: every page is right but pages are missing and it says so (marked incomplete); 1: damaged."""
        if self.good:
            return 0
        return IncompleteError.exit_status if self.incomplete and not self._wrong else 1

    def values(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return {**asdict(self), "good": self.good}

    def text(self) -> str:
        """Return one line, then a line for each page that is named."""
        found = [
            f"{count} {what}"
            for count, what in (
                (self.unreadable, "could not be read when they were saved"),
                (self.damaged, "cannot be read back"),
                (self.unwritten, "were not written"),
                (self.different, "differ from the source"),
                (self.absent, "of the source are not in the dump"),
                (self.extra, "are not in the source"),
            )
            if count
        ]
        how = "equal the source" if self.compared else "read back well"
        level = "" if self.level is None else f" by level {self.level}"
        state = f"; {self.left_out} left out{level}" if self.left_out else ""
        state += "; marked incomplete" if self.incomplete else ""
        if self.hashed:
            state += (
                f"; the SHA-256 of {self.changed} blocks is not the manifest's"
                if self.changed
                else "; SHA-256 as in the manifest"
            )
        summary = f"{self.pages} pages" + (f": {', '.join(found)}" if found else f" {how}") + state
        return "\n".join([summary, *self.named])

    def name(self, line: str) -> None:
        """Keep a line about one page while there is room."""
        if len(self.named) < MAX_NAMED:
            self.named.append(line)


def verify(dump: Dump, image: MemoryImage | None, *, progress: bool) -> VerifyReport:
    """Check every page of ``dump``; with ``image``, that each is the same there, and that the dump knows of all others.

    Pages that the dump left out are not read: they may be poisoned.

    Raises:
        SourceError: the dump and ``image`` have pages of different sizes.
    """
    if image is not None and image.page_size != dump.page_size:
        raise SourceError(
            f"{dump.path}: page size {dump.page_size}, but that of {image.source.name} is {image.page_size}: "
            "they are not of the same crash"
        )
    report = VerifyReport(incomplete=dump.incomplete, compared=image is not None, level=dump.level)
    source = _SourcePages(image, dump) if image else None
    total = dump.page_count() * dump.page_size if progress else 0  # counting reads all of bitmap 2
    with Progress("verifying", total, enabled=progress) as meter:
        for batch in dump.pages():
            report.pages += len(batch.pfns)
            report.unreadable += int(np.count_nonzero(batch.unreadable))
            for pfn in batch.pfns[batch.unreadable].tolist():
                report.name(f"PFN {pfn:#x}: could not be read when it was saved")
            for index, reason in batch.bad.items():
                if reason == NOT_WRITTEN:
                    report.unwritten += 1
                else:
                    report.damaged += 1
                report.name(f"PFN {int(batch.pfns[index]):#x}: {reason}")
            if source is not None:
                source.compare(batch, report)
            meter.advance(len(batch.pfns) * dump.page_size)
    if image is not None:
        _count_others(dump, image, report)
    _compare_digests(dump.path, report)
    return report


def _compare_digests(path: Path, report: VerifyReport) -> None:
    """Hold the file against the manifest beside it, if that names it: what no page is made of is covered as well."""
    try:
        manifest = json.loads((path.parent / MANIFEST).read_bytes())
        said, block = manifest["files"][path.name], int(manifest["hash_block"])
        expected = said.get("sha256_blocks") or [said["sha256"]]
        size = int(said["size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # none, or not ours
    if block != HASH_BLOCK:
        return
    report.hashed = True
    found = digests_of(path)
    for number in range(max(len(found), len(expected))):
        if number >= len(found) or number >= len(expected) or found[number] != expected[number]:
            report.changed += 1
            report.name(
                f"bytes {number * block:#x} to {(number + 1) * block:#x}: changed since the manifest was written"
            )
    if not report.changed and path.stat().st_size != size:
        report.changed += 1
        report.name(f"{path.stat().st_size} bytes, {size} in the manifest")


def _count_others(dump: Dump, image: MemoryImage, report: VerifyReport) -> None:
    """Count pages of the source that the dump left out, and those that it does not know."""
    for first in image.inhabited(_WINDOW_PAGES):
        there = image.holds(first, min(_WINDOW_PAGES, image.max_pfn - first))
        existing, kept = (dump.bits(bitmap, first, len(there)) for bitmap in (dump.bitmap1, dump.bitmap2))
        report.left_out += int(np.count_nonzero(there & existing & ~kept))
        absent = np.flatnonzero(there & ~existing & ~kept)
        report.absent += len(absent)
        for pfn in absent[:MAX_NAMED].tolist():
            report.name(f"PFN {first + pfn:#x}: not in the dump")


class _SourcePages:
    """The pages of the source, walked in step with those of the dump. Both are in PFN order."""

    def __init__(self, image: MemoryImage, dump: Dump) -> None:
        self._image = image
        self._dump = dump
        self._chunks = self._read()
        self._current: tuple[NDArray[np.int64], NDArray[np.uint8]] | None = next(self._chunks, None)

    def _read(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        for chunk in self._image.chunks(self._dump.runs(self._dump.bitmap2)):
            yield from self._image.fetch(chunk).stretches(self._image.page_size)

    def compare(self, batch: ReadPages, report: VerifyReport) -> None:
        """Hold one batch of the dump against the source."""
        good = np.ones(len(batch.pfns), dtype=np.bool_)
        good[list(batch.bad)] = False
        seen = np.zeros(len(batch.pfns), dtype=np.bool_)
        last = int(batch.pfns[-1])
        while self._current is not None and int(self._current[0][0]) <= last:
            pfns, data = self._current
            here = pfns <= last
            _, ours, theirs = np.intersect1d(pfns, batch.pfns, assume_unique=True, return_indices=True)
            seen[theirs] = True
            wrong = (data.view("<u8")[ours] != batch.data.view("<u8")[theirs]).any(axis=1) & good[theirs]
            if self._dump.gaps:
                gaps = wrong & ~batch.data[theirs].any(axis=1)
                report.left_out += int(np.count_nonzero(gaps))
                report.pages -= int(np.count_nonzero(gaps))
                wrong &= ~gaps
            for pfn in batch.pfns[theirs[wrong]]:
                report.different += 1
                report.name(f"PFN {int(pfn):#x}: differs from {self._image.source.name}")
            if not here.all():
                self._current = (pfns[~here], data[~here])
                break
            self._current = next(self._chunks, None)
        for pfn in batch.pfns[~seen]:
            report.extra += 1
            report.name(f"PFN {int(pfn):#x}: not in {self._image.source.name}")
