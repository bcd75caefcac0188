"""Goes on from a dump that was cut short: what is in it is read back, and what is right need not be saved again.

Full disks get room, disks that vanished come back, and the rescue shell has the same dead memory still. Whether it is
the same is told by the notes: registers of every CPU, CRASHTIME and the kernel's build ID are in them.
"""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capture.dumpfile import kdump
from capture.dumpfile.passes import Passes
from capture.dumpfile.reader import NOT_WRITTEN, KdumpFile
from capture.dumpfile.selection import RUNS_WINDOW
from capture.dumpfile.writer import DumpPlan, KdumpWriter
from capture.errors import SourceError, TargetError
from capture.progress import Progress


class Found(NamedTuple):
    """What an unfinished dump has, in pages: those that are right, and those that cannot be read back.

    ``late``: the time was over before all of it was read back; nothing may be written to it then.
    """

    level: int
    pages: int
    right: int
    damaged: int
    late: bool = False

    def line(self, path: Path) -> str:
        """Return what a person has to know before it goes on."""
        if self.late:
            return (
                f"{path}: the time was over after {self.right} of {self.pages} pages were read back; it stays as it is"
            )
        damaged = f"; {self.damaged} are damaged and saved again" if self.damaged else ""
        return f"{path}: {self.right} of {self.pages} pages (level {self.level}) are there already{damaged}; going on"


def can_resume(path: Path, plan: DumpPlan) -> bool:
    """Whether ``path`` is a dump of this crash, as far as its headers say: unfinished, or it lacks its name only."""
    try:
        with KdumpFile(path) as dump:
            return why_other(dump, plan) is None
    except SourceError:
        return False


def why_other(dump: KdumpFile, plan: DumpPlan) -> str | None:
    """Return why a dump cannot be gone on with as ``plan`` says, None when it can."""
    try:
        notes = dump.notes()
    except SourceError as error:
        return str(error)
    if notes != plan.notes.blob:
        return "it is of another crash: its notes differ"
    if dump.page_size != plan.page_size or dump.max_mapnr != plan.max_mapnr:
        return "it is of other memory"
    layout = kdump.Layout(plan.page_size, len(plan.notes.blob), plan.max_mapnr, 0)
    if (dump.bitmap1, dump.bitmap2, dump.descriptor_table) != (layout.bitmap1, layout.bitmap2, layout.descriptor_table):
        return "its header is damaged"  # (what is appended would not be where a reader looks)
    return None


def take_over(
    path: Path,
    writer: KdumpWriter,
    passes: Passes,
    plan: DumpPlan,
    *,
    progress: bool,
    deadline: float | None = None,
) -> Found:
    """Read back what the unfinished dump at ``path`` has; ``writer``, which has it open, goes on behind that.

    A page that cannot be read back loses its descriptor first: it counts as not written from then on. To read takes as
    long as to write did: from ``deadline`` (on ``time.monotonic``'s clock) on no more is, but of one that was finished.

    Raises:
        TargetError: it is no dump of this crash, or its descriptors cannot be written.
    """
    try:
        with KdumpFile(path) as dump:
            reason = why_other(dump, plan)
            if reason is not None:
                raise TargetError(f"{path}: cannot go on with it: {reason}; remove it, or use --force")
            pages = dump.page_count()
            writer.take_over(pages, dump.level, int(dump.header["status"]))
            right = damaged = number = 0
            windows = array("q")
            deadline = deadline if dump.incomplete else None  # it would stay marked, with every page in it
            with Progress("reading back", pages * dump.page_size, enabled=progress) as meter:
                for batch in dump.pages():
                    if deadline is not None and time.monotonic() >= deadline:
                        return Found(dump.level, pages, right, damaged, late=True)
                    there = np.ones(len(batch.pfns), dtype=np.bool_)
                    there[list(batch.bad)] = False
                    there &= ~batch.unreadable  # perhaps they can be read now; else they are named again
                    good = writer.found(number, there)
                    lost = [index for index, why in batch.bad.items() if why != NOT_WRITTEN]
                    lost += np.flatnonzero(there & ~good).tolist()
                    if lost:
                        writer.forget(number + np.array(lost, dtype=np.int64))
                    passes.note_done(batch.pfns[good])
                    right += int(np.count_nonzero(good))
                    damaged += len(lost)
                    number += len(batch.pfns)
                    known = batch.pfns // RUNS_WINDOW  # ascending
                    last = windows[-1] if windows else -1
                    windows.extend(known[np.diff(known, prepend=last) != 0].tolist())
                    meter.advance(len(batch.pfns) * dump.page_size)
            writer.look_only_at(windows)
            return Found(dump.level, pages, right, damaged)
    except SourceError as error:
        raise TargetError(f"{error}: cannot go on with it; remove it, or use --force") from None
