"""A vmcore opened: its source, header, notes, VMCOREINFO and memory, in the one order in which they are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from capture.dumpfile import kdump
from capture.errors import SourceError
from capture.memory import elfcore
from capture.memory.elfcore import ElfCore
from capture.memory.image import MemoryImage
from capture.memory.source import PROC_KCORE, ByteSource, open_source
from capture.notes import vmcoreinfo
from capture.notes.elfnote import Notes, read_notes
from capture.notes.vmcoreinfo import VmcoreInfo

_PHYSICAL_BITS = range(46, 52)
"""MAX_PHYSMEM_BITS of x86_64 (46 with 4 levels of page tables) and aarch64 (48); 52 is what both can have at most."""


class Vmcore(NamedTuple):
    """What the capture side knows of a dead kernel before it looks into its memory."""

    source: ByteSource
    core: ElfCore
    notes: Notes
    info: VmcoreInfo
    image: MemoryImage
    level: int = 0
    """The dump level that was used already, where SOURCE is a dump."""

    @property
    def live(self) -> bool:
        """Whether this is the running kernel, whose memory changes while it is read."""
        return self.source.name == PROC_KCORE

    @property
    def problems(self) -> list[str]:
        """What is wrong with the source so far, a line each; none of it stops a dump."""
        problems = [*self.core.problems, *self.notes.problems]
        if self.core.missing_bytes:
            problems.append(f"{self.source.name} is truncated: {self.core.missing_bytes} bytes of memory are missing")
        if self.notes.vmcoreinfo() is None:
            problems.append(f"{self.source.name} has no VMCOREINFO: no log, and readers need the page size told")
        if self.source.map_refused:
            problems.append(self.source.map_refused)
        return problems


@contextmanager
def open_vmcore(name: str, *, can_map: bool = True) -> Iterator[Vmcore]:
    """Open SOURCE (a path to a vmcore or a kdump-compressed dump, or ``oldmem:``) for reading.

    Without ``can_map`` it is read where it could be mapped (old memory through /dev/mem can only be mapped).

    Raises:
        SourceError: it is neither, or cannot be used.
    """
    start = kdump.start_of(name)
    if (advice := kdump.wrapped(start)) is not None:
        raise SourceError(f"{name}: {advice}")
    if start.startswith(kdump.SIGNATURE):
        from capture.dumpfile.source import DumpImage, KdumpSource  # with every codec that there is

        with KdumpSource(name) as dump:
            core = dump.core()
            notes, info = _notes(dump, core)
            yield Vmcore(dump, core, notes, info, DumpImage(dump, core.loads), level=dump.dump.level)
        return
    with open_source(name, can_map=can_map) as source:
        core = elfcore.parse(source)
        notes, info = _notes(source, core)
        bits = info.number("MAX_PHYSMEM_BITS")
        if bits is not None and bits in _PHYSICAL_BITS:
            core = elfcore.narrowed(source, core, bits)
        yield Vmcore(source, core, notes, info, MemoryImage(source, core.loads, info.page_size))


def _notes(source: ByteSource, core: ElfCore) -> tuple[Notes, VmcoreInfo]:
    notes = read_notes(source, core.notes)
    note = notes.vmcoreinfo()
    return notes, vmcoreinfo.parse(note.descriptor) if note else VmcoreInfo({})
