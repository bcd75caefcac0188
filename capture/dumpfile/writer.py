"""Writes a kdump-compressed dump: valid from the first second, finished at the last.

Order on the disk, each synced before the next: bitmaps and notes, with zeros for descriptors; the header, marked
incomplete; then page data and, once it is on the disk, its descriptors, in steps; at the end the header without the
mark. At any instant a reader finds a dump in which every page that has a descriptor is right.

A step is synced by a thread of the writer's own while data of the next one is appended: the disk and the CPUs work at
the same time. When the disk is slower, ``append`` waits: never more than two steps are under way.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture import footprint
from capture.dumpfile import kdump
from capture.dumpfile.output import Output, TargetFullError
from capture.dumpfile.selection import RUNS_WINDOW, BitmapPlaces, Selection
from capture.errors import TargetError
from capture.notes.elfnote import Notes

SYNC_BYTES = 16 << 20
"""Page data between two syncs: what may be dirty in memory, and what a power cut costs. 64 MiB are not faster."""
LEAST_SYNC_BYTES = 2 << 20
_SYNC_SHARE = 16
"""With less memory a step is smaller: this part of what is available. Two of them may be dirty."""
SYNC_PAGES = 1 << 15
"""Descriptors held back between two syncs (24 bytes each)."""
FIRST_SYNC_BYTES = 4 << 20
"""The first step is smaller: it tells soon how fast the disk is."""
_NUMBER_WINDOW = 1 << 13
"""Pages whose descriptors' numbers are worked out together."""


class DumpPlan(NamedTuple):
    """What a dump says of itself, decided before its first page is read.

    ``max_mapnr`` is the highest PFN plus one; ``utsname`` 390 bytes; ``crash_time`` seconds since 1970. ``level`` may
    turn out lower: ``KdumpWriter.start``.
    """

    page_size: int
    max_mapnr: int
    level: int
    compression: int
    utsname: bytes
    crash_time: int
    phys_base: int
    cpus: int
    notes: Notes
    excluded_vmemmap: bool = False


class PackedPages(NamedTuple):
    """Selected pages ready to be written, ``pfns`` ascending.

    ``pieces`` joined are the data of the pages that are not zero pages, in order; ``sizes`` (bytes), ``flags`` and
    ``checksums`` (kdump.checksum, UNREADABLE, or 0) are one a page, with size 0 for a zero page, which shares the one
    that the dump begins with.
    """

    pfns: NDArray[np.int64]
    sizes: NDArray[np.int64]
    flags: NDArray[np.uint32]
    checksums: NDArray[np.uint64]
    pieces: Sequence[bytes | memoryview]


class Step(NamedTuple):
    """One step that reached the disk.

    ``size`` bytes took ``sync`` seconds to sync, ``seconds`` after the step before; of that time ``append`` spent
    ``blocked`` seconds on the disk: in writes, and in waiting for the sync before.
    """

    size: int
    sync: float
    seconds: float
    blocked: float


class _Described(NamedTuple):
    """Descriptors, and the number of each in the table."""

    numbers: NDArray[np.int64]
    table: NDArray[np.void]


class _Batch(NamedTuple):
    """Pages on their way to the disk: descriptors, bytes of data that are not synced, the end of the data."""

    descriptors: list[_Described]
    unsynced: int
    end: int


class KdumpWriter(Selection):
    """Writes one dump to ``output``. ``close`` it before ``output`` is closed.

    First ``begin``, which dumps all pages; or ``map_memory``, ``select`` (again, if need be) and ``start``. Then
    ``append`` for all pages of the dump, and ``finish``. ``on_step`` is told of each step, in a thread.

    Raises:
        TargetError: from every method; what was written before stays readable after ``finish(complete=False)``.
    """

    def __init__(self, output: Output, plan: DumpPlan) -> None:
        self._output = output
        self._plan = plan
        self.layout = layout = kdump.Layout(plan.page_size, len(plan.notes.blob), plan.max_mapnr, 0)
        places = BitmapPlaces(layout.bitmap1, layout.bitmap2, layout.bitmap_bytes)
        super().__init__(output, places, plan.max_mapnr)
        self._zero_page = self._position = 0
        self._zero_checksum = np.uint64(kdump.checksum(bytes(plan.page_size)))
        self._pending: list[_Described] = []
        self._numbers = _Numbers(self.selection, lambda: self._windows)
        self._pending_pages = 0
        self._unsynced = 0
        self.pages_written = 0
        """Pages whose descriptors are in the file, behind data that is on the disk."""
        self._kept_to = 0
        """The end of their data."""
        self.on_step: Callable[[Step], object] | None = None
        self._full_step = _step_bytes(footprint.memory("MemAvailable"))
        self._sync_bytes = min(FIRST_SYNC_BYTES, self._full_step)
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="syncer")
        self._syncing: Future[None] | None = None
        self._last_step, self._last_blocked = time.monotonic(), 0.0
        self._blocked = 0.0
        self._blocked_since: float | None = None

    def begin(self, runs: Iterable[tuple[int, int]]) -> None:
        """Write everything but page data and descriptors, and sync it. ``runs`` are the pages of memory and dump."""
        self.map_memory(runs)
        self.select_all()
        self.start(self._plan.level)

    def start(self, level: int) -> None:
        """Make the dump readable, without a page yet: notes, room for descriptors, then the header, synced.

        The header comes last: a file that has one has everything that a reader looks for next.
        """
        self._plan = self._plan._replace(level=level)
        self.layout = self.layout._replace(descriptors=self.pages)
        self._zero_page = self._position = self._kept_to = self.layout.data
        self._write_notes()
        # The bitmaps may end in a hole, and there may be no descriptor to reserve.
        self._output.reserve(self.layout.descriptor_table, self.layout.data - self.layout.descriptor_table)
        if level & 1:
            self._position += self._output.write([bytes(self._plan.page_size)], self._zero_page)
            self._kept_to = self._position
        self._output.sync()
        self._write_header(incomplete=True)
        self._output.sync()
        self._last_step = time.monotonic()

    def take_over(self, pages: int, level: int, status: int) -> None:
        """Go on with a dump of ``pages`` pages that is in the file already, instead of ``start``.

        ``status`` is its header's: what it says of the pages that are there stays true. What is in it is told by
        ``found`` afterwards; nothing is written over, but for the mark of one that does not have it any more, which it
        gets again: it may be damaged.
        """
        self.pages = pages
        self._plan = self._plan._replace(
            level=level,
            compression=self._plan.compression | status & ~(kdump.INCOMPLETE | kdump.EXCLUDED_VMEMMAP),
            excluded_vmemmap=bool(status & kdump.EXCLUDED_VMEMMAP),
        )
        self.layout = self.layout._replace(descriptors=pages)
        self._zero_page = self._position = self._kept_to = self.layout.data
        torn = (self._output.size - self.layout.descriptor_table) % kdump.PAGE_DESCRIPTOR.itemsize
        if torn and self._output.size < self.layout.data:  # the file ends within a descriptor, which would come whole
            self._output.truncate(self._output.size - torn)
        if not status & kdump.INCOMPLETE:
            self._write_header(incomplete=True)
            self._output.sync()
        if level & 1:
            self._position = self._kept_to = self._position + self._plan.page_size
            if any(self._output.read_back(self._zero_page, self._plan.page_size)):
                self._output.write([bytes(self._plan.page_size)], self._zero_page)
        self._last_step = time.monotonic()

    def found(self, number: int, written: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Count the pages from descriptor ``number`` on that are there and right; data goes on behind theirs.

        Return which they are: what lies where descriptors do will be written over (bitmap 2 has bits that it had not).
        """
        width = kdump.PAGE_DESCRIPTOR.itemsize
        raw = self._output.read_back(self.layout.descriptor_table + number * width, len(written) * width)
        table = np.frombuffer(raw, kdump.PAGE_DESCRIPTOR)
        written = written & (table["offset"] >= self.layout.data)
        table = table[written]
        self.pages_written += len(table)
        if len(table):
            end = int((table["offset"] + table["size"].astype(np.int64)).max())
            self._position = self._kept_to = max(self._position, end)
        return written

    def forget(self, numbers: NDArray[np.int64]) -> None:
        """Take descriptors back: their pages are damaged."""
        empty = bytes(kdump.PAGE_DESCRIPTOR.itemsize)
        for number in numbers.tolist():
            self._output.write([empty], self.layout.descriptor_table + number * len(empty))

    def append(self, packed: PackedPages) -> None:
        """Write the data of the next pages; their descriptors follow with the next sync."""
        if self._output.full:
            raise TargetFullError(f"{self._output.name}: no room left; make room or choose another target")
        try:
            with self._on_the_disk():
                written = self._output.write(packed.pieces, self._position)
        except TargetFullError:
            self._give_back()
            raise
        descriptors = np.zeros(len(packed.sizes), dtype=kdump.PAGE_DESCRIPTOR)
        zero = packed.sizes == 0
        descriptors["offset"] = self._position + np.cumsum(packed.sizes) - packed.sizes
        descriptors["offset"][zero] = self._zero_page
        descriptors["size"] = np.where(zero, self._plan.page_size, packed.sizes)
        descriptors["flags"] = packed.flags
        descriptors["page_flags"] = np.where(zero & (packed.checksums == 0), self._zero_checksum, packed.checksums)
        self._position += written
        self._unsynced += written
        self._pending.append(_Described(self._numbers.of(packed.pfns), descriptors))
        self._pending_pages += len(descriptors)
        if self._unsynced >= min(self._sync_bytes, SYNC_BYTES) or self._pending_pages >= SYNC_PAGES:
            self._start_step()

    def checkpoint(self) -> None:
        """Sync page data, then write its descriptors: never a descriptor of bytes that may be lost."""
        self._start_step()
        self._settle()

    def _start_step(self) -> None:
        """Have what was appended synced and described, once the step before is."""
        self._settle()
        if self._pending or self._unsynced:
            batch = _Batch(self._pending, self._unsynced, self._position)
            self._pending, self._pending_pages, self._unsynced = [], 0, 0
            self._sync_bytes = self._full_step
            self._syncing = self._syncer.submit(self._finish_step, batch)

    def _finish_step(self, batch: _Batch) -> None:
        """Bring a step to the disk; the one place outside of the caller's thread."""
        described = self.pages_written
        if self._output.sequential:  # behind its data: that is there when they are
            self._describe_step(batch)
        started = time.monotonic()
        if batch.unsynced:
            try:
                self._output.sync()
            except TargetError:
                self.pages_written = described
                raise
            if self._full_step < SYNC_BYTES:
                self._output.forget(self._kept_to, batch.end - self._kept_to)
        synced = time.monotonic()
        self._kept_to = batch.end  # whatever becomes of the descriptors: some of them may be written
        if not self._output.sequential:
            self._describe_step(batch)
        if batch.unsynced and self.on_step is not None:
            since, blocked = self._blocked_since, self._blocked
            blocked += synced - since if since is not None else 0.0
            self.on_step(Step(batch.unsynced, synced - started, synced - self._last_step, blocked - self._last_blocked))
            self._last_step, self._last_blocked = synced, blocked

    def _describe_step(self, batch: _Batch) -> None:
        parts = batch.descriptors
        if len(parts) > 1 and not self.pages_written:
            # Page tables come first. Without their descriptors a reader finds none of the pages that have theirs.
            self._describe(parts[0].numbers, parts[0].table)
            if not self._output.sequential:
                self._output.sync()
            parts = parts[1:]
        if parts:  # none: the disk was full, and they were given back
            self._describe(
                np.concatenate([part.numbers for part in parts]), np.concatenate([part.table for part in parts])
            )

    def _describe(self, numbers: NDArray[np.int64], table: NDArray[np.void]) -> None:
        """Write descriptors to their places, and count their pages."""
        if len(numbers) > 1 and not (np.diff(numbers) > 0).all():  # a step in which one pass ends and another begins
            order = np.argsort(numbers, kind="stable")
            numbers, table = numbers[order], table[order]
        for written in self._output.write_rows(numbers, table, self.layout.descriptor_table):
            self.pages_written += written

    def _settle(self) -> None:
        """Wait for the step that is under way.

        Raises:
            TargetError: it failed; what it held, and all after it, is forgotten.
        """
        if self._syncing is None:
            return
        with self._on_the_disk():
            error = self._syncing.exception()
        self._syncing = None
        if error is not None:
            self._forget_pending(cut=isinstance(error, TargetFullError))
            raise error

    @contextlib.contextmanager
    def _on_the_disk(self) -> Iterator[None]:
        """Count the time spent inside as time that the disk took."""
        self._blocked_since = started = time.monotonic()
        try:
            yield
        finally:
            self._blocked_since = None
            self._blocked += time.monotonic() - started

    def close(self) -> None:
        """End the writer's thread, once it is done with what it does."""
        self._syncer.shutdown()

    def finish(self, *, complete: bool) -> None:
        """Write what is held back; when ``complete``, take the incomplete mark off as the very last write."""
        self.checkpoint()
        self._output.sync()
        if complete:
            take_mark_off(self._output, self._write_header)

    def _give_back(self) -> None:
        """On a full disk, drop the newest pages that have no descriptor yet: the manifest needs some room as well.

        What went into a stream stays there, and it has kept room.
        """
        if self._pending and not self._output.sequential:
            dropped = self._pending.pop().table
            self._pending_pages -= len(dropped)
            own = dropped["offset"] != self._zero_page
            self._position -= int(dropped["size"][own].sum())
        self._output.truncate(self._position)

    def _forget_pending(self, *, cut: bool) -> None:
        """Drop pages whose data may not have reached the disk.

        Linux tells of a failed write once: the next sync would say nothing, and descriptors would point at lost bytes.
        """
        self._pending, self._pending_pages, self._unsynced = [], 0, 0
        self._position = self._kept_to
        if cut:
            self._output.truncate(self._position)

    def _write_header(self, *, incomplete: bool) -> None:
        plan, layout = self._plan, self.layout
        header = np.zeros((), dtype=kdump.DISK_DUMP_HEADER)
        header["signature"] = kdump.SIGNATURE
        header["header_version"] = kdump.HEADER_VERSION
        header["utsname"] = np.void(plan.utsname)
        header["tv_sec"] = plan.crash_time
        excluded = kdump.EXCLUDED_VMEMMAP if plan.excluded_vmemmap else 0
        header["status"] = plan.compression | excluded | (kdump.INCOMPLETE if incomplete else 0)
        header["block_size"] = plan.page_size
        header["sub_hdr_size"] = layout.sub_header_blocks
        header["bitmap_blocks"] = 2 * layout.bitmap_bytes // plan.page_size
        header["max_mapnr"] = min(plan.max_mapnr, 0xFFFF_FFFF)
        header["nr_cpus"] = plan.cpus
        self._output.write([header.tobytes().ljust(layout.sub_header, b"\0")], 0)

    def _write_notes(self) -> None:
        plan, layout = self._plan, self.layout
        sub = np.zeros((), dtype=kdump.KDUMP_SUB_HEADER)
        sub["phys_base"] = plan.phys_base % (1 << 64)
        sub["dump_level"] = plan.level
        sub["end_pfn"] = sub["end_pfn_64"] = sub["max_mapnr_64"] = plan.max_mapnr
        vmcoreinfo = plan.notes.vmcoreinfo()
        if vmcoreinfo is not None:
            sub["offset_vmcoreinfo"] = layout.notes + vmcoreinfo.offset
            sub["size_vmcoreinfo"] = len(vmcoreinfo.descriptor)
        if plan.notes.blob:
            sub["offset_note"] = layout.notes
            sub["size_note"] = len(plan.notes.blob)
        blocks = (sub.tobytes() + plan.notes.blob).ljust(layout.sub_header_blocks * plan.page_size, b"\0")
        self._output.write([blocks], layout.sub_header)


class _Numbers:
    """The numbers of descriptors: how many selected pages come before a page.

    Memory: 8 bytes for each window of pages in which there are any, a quarter of a MiB for a TiB of memory.
    """

    def __init__(
        self, selection: Callable[[int, int], NDArray[np.bool_]], inhabited: Callable[[], Sequence[int]]
    ) -> None:
        self._selection = selection
        self._inhabited = inhabited
        self._before = array("q", [0])
        """Selected pages below each window of those that are inhabited, as far as it was asked for."""
        self._window = -1
        self._within = np.zeros(1, dtype=np.int64)
        """Of the window, selected pages below each of its pages; at last, all of them."""

    def of(self, pfns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each of ``pfns``, which ascend and are selected."""
        numbers = np.empty(len(pfns), dtype=np.int64)
        windows = pfns // _NUMBER_WINDOW
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(pfns)]):
            window = int(windows[start])
            before = self._before[self._look_at(window)]
            numbers[start:end] = before + self._within[pfns[start:end] - window * _NUMBER_WINDOW]
        return numbers

    def _look_at(self, window: int) -> int:
        """Count up to a window; return which of those that are inhabited it is."""
        inhabited, each = self._inhabited(), RUNS_WINDOW // _NUMBER_WINDOW
        place = bisect_left(inhabited, window // each) * each + window % each
        for below in range(len(self._before) - 1, place):
            chosen = self._chosen(inhabited[below // each] * each + below % each)
            self._before.append(self._before[below] + int(np.count_nonzero(chosen)))
        if window != self._window:
            chosen = self._chosen(window)
            self._within = np.zeros(len(chosen) + 1, dtype=np.int64)
            np.cumsum(chosen, out=self._within[1:])
            self._window = window
        return place

    def _chosen(self, window: int) -> NDArray[np.bool_]:
        return self._selection(window * _NUMBER_WINDOW, _NUMBER_WINDOW)


def take_mark_off(output: Output, write_header: Callable[..., None]) -> None:
    """Write the header without the incomplete mark (``incomplete=False``), the very last write of a dump.

    Raises:
        TargetError: it did not get to the disk; the mark is back, as far as that can be done.
    """
    try:
        write_header(incomplete=False)
        output.sync()
    except TargetError:
        with contextlib.suppress(TargetError):
            write_header(incomplete=True)
        raise


def _step_bytes(available: int | None) -> int:
    """Return the bytes of a step, with so many bytes of memory available, None where that is not known."""
    return SYNC_BYTES if available is None else min(SYNC_BYTES, max(LEAST_SYNC_BYTES, available // _SYNC_SHARE))
