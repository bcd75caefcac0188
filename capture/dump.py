"""One dump of one vmcore: what `vmcapture dump` does, and the big step of `vmcapture save`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from capture import footprint
from capture.copier import Copier, CopyStatistics
from capture.dumpfile import codec as codecs
from capture.dumpfile.output import Output, OutputFile, named, sync_directory, unfinished_path
from capture.dumpfile.passes import Passes
from capture.dumpfile.writer import DumpPlan, KdumpWriter
from capture.errors import CaptureError, IncompleteError, TargetError, UsageError
from capture.footprint import Footprint
from capture.kernel.address import KernelMemory
from capture.kernel.utsname import read_utsname
from capture.memory.image import Chunk
from capture.notes import prstatus
from capture.options import DumpOptions
from capture.pagefilter import PageFilter
from capture.progress import Progress
from capture.survey import take_survey
from capture.vmcore import Vmcore
from capture.vmemmap import exclude_vmemmap

if TYPE_CHECKING:
    from capture.dumpfile.elf import ElfWriter

    AnyWriter = KdumpWriter | ElfWriter

STANDARD_OUTPUT = Path("-")
"""The path of a dump that goes to standard output, flattened."""
MANIFEST_ROOM = 4 << 20
"""Left free on the target when a level is chosen by size: for the manifest and the capture log."""
SCARCE_MEMORY = 128 << 20
SMALL_CHUNK_PAGES = 256
"""Pages of a chunk where less than that is available: a few MiB less, for a tenth of a microsecond a page."""
_SAMPLE_CHUNKS = 64
"""Chunks between two looks at the memory that is left."""
THREAD_MEMORY = 16 << 20
"""What a thread takes at the worst: chunks that were read, not mapped, and do not shrink; measured with 4 and 16."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """What the page filter did. ``asked`` is the level asked for; ``doubts`` say, a line each, why it was not made.

    ``classes`` are pages by class (CLASS_NAMES), all of those that there are; ``rescued`` pages look as if they may go
    and are kept; ``protects`` names what was found to be kept whatever it looks like; ``free_counted`` is the kernel's
    own count of free pages, None where it is not known.
    """

    asked: int
    level: int
    doubts: tuple[str, ...] = ()
    overridden: bool = False
    classes: dict[str, int] = field(default_factory=dict)
    rescued: dict[str, int] = field(default_factory=dict)
    protects: tuple[str, ...] = ()
    free_found: int = 0
    free_counted: int | None = None
    vmemmap_pages: int = 0
    predicted: dict[int, int] = field(default_factory=dict)
    """Bytes that were predicted, by level, where several were to be tried."""
    room: int | None = None

    def lines(self) -> list[str]:
        """Return what a person has to know of it, before the dump is written."""
        lines = []
        if self.predicted:
            sizes = ", ".join(f"level {level} {size >> 20} MiB" for level, size in self.predicted.items())
            room = "unknown" if self.room is None else f"{self.room >> 20} MiB"
            lines.append(f"predicted size: {sizes}; room on the target: {room}; taking level {self.asked}")
        lines += [f"filter check failed: {doubt}" for doubt in self.doubts]
        if self.doubts and self.overridden:
            lines.append(f"making level {self.level} all the same (--trust-filter)")
        elif self.level != self.asked:
            lines.append(f"making level {self.level} instead of {self.asked}: saving more rather than less")
        if any(self.rescued.values()):
            what = ", ".join(f"{pages} {name}" for name, pages in self.rescued.items() if pages)
            lines.append(f"kept although struct page says that they may go: {what} pages")
        return lines


class DumpReport(NamedTuple):
    """What was written. ``path`` is the finished file, or the incomplete one; ``failure`` says why it is not whole."""

    path: Path
    size: int
    digests: list[str]
    compression: str
    zstd_levels: dict[int, int]
    """Pages by the zstd level that they were compressed with, where the codec chose it."""
    target_speed: float | None
    """Bytes a second that the target took, as far as that was looked at."""
    filtered: Filtered
    statistics: CopyStatistics
    pages: int
    pages_found: int
    """Pages that were in it before: it was cut short, and gone on with. ``statistics`` are of the others."""
    pages_written: int
    missing_bytes: int
    pages_not_tried: int
    """Of those that are unreadable: reading about there took too long to fail (capture.memory.patience)."""
    seconds: float
    failure: str | None
    name_failure: str | None = None
    """Why what is whole does not have its name, or may lose it."""

    @property
    def level(self) -> int:
        """The dump level that was made."""
        return self.filtered.level

    @property
    def whole(self) -> bool:
        """Whether every page of its level is in it."""
        return self.failure is None and not self.statistics.unreadable.count and not self.missing_bytes

    def shortfall(self) -> str | None:
        """Return one line that names what is missing, None when nothing is."""
        reasons = [self.failure] if self.failure else []
        if self.statistics.unreadable.count:
            unreadable = self.statistics.unreadable
            untried = f", {self.pages_not_tried} of them not tried: it took too long" if self.pages_not_tried else ""
            reasons.append(f"{unreadable.count} pages unreadable, zeros in the dump ({unreadable.text()}){untried}")
        if self.missing_bytes:
            reasons.append(f"{self.missing_bytes} bytes missing in the source")
        return "; ".join(reasons) or None


def default_threads() -> int:
    """Return one thread for each CPU that this process may run on, as far as there is memory for them."""
    available = footprint.memory("MemAvailable")
    return max(1, footprint.cpus() if available is None else min(footprint.cpus(), available // THREAD_MEMORY))


def _nothing(_line: str) -> None:
    pass


def write_dump(
    vmcore: Vmcore,
    path: Path,
    options: DumpOptions,
    say: Callable[[str], object] = _nothing,
    taken: Footprint | None = None,
) -> DumpReport:
    """Write ``vmcore`` to ``path``, which gets its name only when everything is in it.

    Until then the file is ``path`` + ".incomplete": readable, and marked incomplete. It stays when the dump is cut
    short (no room, an error, Ctrl-C), with every page written so far; with ``resume`` in the options the next call goes
    on from there. ``say`` is told, line by line, what a person has to know before it is done. ``taken`` is brought up
    to date along the way. To STANDARD_OUTPUT the dump goes flattened, with ``recipients`` flattened and encrypted.

    Where a dump is whole and cannot be given its name, that is in the report.

    Raises:
        UsageError: level, compression or threads are wrong.
        TargetError: nothing readable could be written.
    """
    options.check()
    codec = codecs.codec("none" if options.elf else options.compression)
    threads = options.threads or default_threads()
    place = _place(path, options)
    image = vmcore.image
    plan = _plan(vmcore, options, codec)
    going_on = options.resume and place.unfinished.exists()
    with (
        contextlib.closing(_open(place, options, existing=going_on)) as output,
        contextlib.closing(_writer(vmcore, output, plan, place, options)) as writer,
        contextlib.closing(Passes(place.scratch, image.max_pfn)) as passes,
    ):
        if going_on and isinstance(writer, KdumpWriter):
            filtered = _take_over(vmcore, place.unfinished, writer, passes, plan, options, say)
        else:
            filtered = _begin(vmcore, place, writer, codec, options, passes, say)
        copier = Copier(
            image, codec, share_zero_pages=bool(filtered.level & 1), threads=threads, checksums=not options.elf
        )
        found = writer.pages_written
        with Progress("saving memory", (writer.pages - found) * image.page_size, enabled=options.progress) as progress:
            failure = _copy(copier, writer, passes, vmcore, progress, taken or Footprint(), options.deadline)
            seconds = progress.seconds
        failure = _finish(writer, output, copier, vmcore, failure)
        output.settle()
        report = DumpReport(
            path=path if failure is None else place.unfinished,
            size=output.size,
            digests=output.digests(),
            compression=codec.name,
            zstd_levels={} if codec.pace is None else dict(sorted(codec.pace.pages.items())),
            target_speed=None if codec.pace is None else codec.pace.target_speed,
            filtered=filtered,
            statistics=copier.statistics,
            pages=writer.pages,
            pages_found=found,
            pages_written=writer.pages_written,
            missing_bytes=vmcore.core.missing_bytes,
            pages_not_tried=image.pages_not_tried,
            seconds=seconds,
            failure=failure,
        )
    return report if place.streamed else _named(report, place.unfinished, path)


class _Place(NamedTuple):
    """Where a dump goes: the name that it has until it is finished, and a directory for files without a name."""

    unfinished: Path
    scratch: Path
    streamed: bool = False
    """Whether it goes to standard output, which is not a file of ours."""


def _place(path: Path, options: DumpOptions) -> _Place:
    if path != STANDARD_OUTPUT:
        return _Place(unfinished_path(path, replace=options.replace, resume=options.resume), path.parent)
    import tempfile  # not in a capture kernel's save

    if options.resume or options.replace or options.recipients is not None:
        raise UsageError("to standard output goes one new dump, unencrypted: leave --resume, --force, --recipients out")
    return _Place(path, Path(tempfile.gettempdir()), streamed=True)


def _open(place: _Place, options: DumpOptions, *, existing: bool) -> Output:
    """Open what the dump is written to."""
    if not place.streamed and options.recipients is None:
        return OutputFile(place.unfinished, hashed=options.hashed, existing=existing)
    from capture.dumpfile.flattened import FlattenedOutput, PipeStream, Stream

    stream: Stream = PipeStream(1, "standard output")
    if options.recipients is not None:
        from capture.dumpfile.encrypted import EncryptedFile

        stream = EncryptedFile(place.unfinished, options.recipients, hashed=options.hashed, ballast=True)
    with _removed_on_failure(place):
        try:
            return FlattenedOutput(stream, place.scratch)
        except BaseException:
            stream.close()
            raise


@contextlib.contextmanager
def _removed_on_failure(place: _Place) -> Iterator[None]:
    """Leave no file of a dump that cannot be begun: not a page is in it, perhaps not even a header."""
    try:
        yield
    except (TargetError, KeyboardInterrupt):
        if not place.streamed:
            with contextlib.suppress(OSError):
                place.unfinished.unlink()
        raise


def _writer(vmcore: Vmcore, output: Output, plan: DumpPlan, place: _Place, options: DumpOptions) -> AnyWriter:
    """Return what writes a dump of the kind that was asked for."""
    if not options.elf:
        return KdumpWriter(output, plan)
    from capture.dumpfile.elf import ElfWriter  # not in a capture kernel's save

    machine = vmcore.core.machine
    with _removed_on_failure(place):
        memory = KernelMemory(vmcore.image, vmcore.info, machine)
        cpus, _ = prstatus.parse(vmcore.notes.prstatus(), machine)
        stacks = [page for cpu in cpus for page in memory.stack_pages(cpu.registers[prstatus.STACK_POINTER[machine]])]
        return ElfWriter(output, plan, machine, memory.linear_maps(), stacks, place.scratch)


def _named(report: DumpReport, unfinished: Path, path: Path) -> DumpReport:
    """Give a finished dump its name, and bring that to the disk; what is in it stays as good where that fails."""
    trouble = named(unfinished, path) if report.failure is None else None
    if trouble is not None:
        report = report._replace(path=unfinished)
    try:
        sync_directory(path.parent)
    except TargetError as error:
        trouble = trouble or error
    return report._replace(name_failure=None if trouble is None else str(trouble))


def unfinished_dump(vmcore: Vmcore, path: Path, options: DumpOptions) -> bool:
    """Whether ``path`` is a dump of this crash, as far as it got, that can be gone on with (``resume``)."""
    from capture.dumpfile import resume  # with the reader, which a new dump does not need

    plan = _plan(vmcore, options, codecs.codec(options.compression))
    return resume.can_resume(path, plan)


def _plan(vmcore: Vmcore, options: DumpOptions, codec: codecs.Codec) -> DumpPlan:
    memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
    return DumpPlan(
        page_size=vmcore.image.page_size,
        max_mapnr=vmcore.image.max_pfn,
        level=options.levels[0],
        compression=codec.flag,
        utsname=read_utsname(memory, vmcore.info, vmcore.core.machine).raw,
        crash_time=vmcore.info.crash_time or 0,
        phys_base=vmcore.info.number("phys_base") or vmcore.info.number("PHYS_OFFSET") or 0,
        cpus=len(vmcore.notes.prstatus()),
        notes=vmcore.notes,
        excluded_vmemmap=options.exclude_vmemmap,
    )


def _begin(
    vmcore: Vmcore,
    place: _Place,
    writer: AnyWriter,
    codec: codecs.Codec,
    options: DumpOptions,
    passes: Passes,
    say: Callable[[str], object],
) -> Filtered:
    """Choose the pages of a new dump, and make it readable."""
    with _removed_on_failure(place):
        writer.map_memory(vmcore.image.runs())
        room = _room(place.scratch) if len(options.levels) > 1 and not place.streamed else None
        filtered = _select_or_all(vmcore, writer, codec, options, passes, room)
        for line in filtered.lines():
            say(line)
        writer.start(filtered.level | vmcore.level & ~1)
        if not isinstance(writer, KdumpWriter) and writer.gap_pages:
            say(f"too many runs of pages for an ELF file: {writer.gap_pages} pages between them read as zeros")
        if not isinstance(writer, KdumpWriter) and writer.maps_left_out:
            say(f"too many mappings for an ELF file: of {writer.maps_left_out} no page has its virtual address")
    if place.streamed:
        return filtered
    try:
        sync_directory(place.unfinished.parent)  # from here on a power cut leaves a dump under its name
    except TargetError as error:
        say(f"{error}; a power cut may cost what is saved until the end")
    return filtered


def _take_over(
    vmcore: Vmcore,
    unfinished: Path,
    writer: KdumpWriter,
    passes: Passes,
    plan: DumpPlan,
    options: DumpOptions,
    say: Callable[[str], object],
) -> Filtered:
    """Go on with a dump that was cut short: its level and its pages stay as they are."""
    from capture.dumpfile import resume

    found = resume.take_over(unfinished, writer, passes, plan, progress=options.progress, deadline=options.deadline)
    say(found.line(unfinished))
    if found.late:  # not one page more is copied (_until)
        return Filtered(asked=found.level, level=found.level)
    try:
        page_filter = PageFilter(vmcore)
        for _ in page_filter.kept(found.level, note=passes.note):  # what comes first of what is left
            pass
    except Exception as error:  # (a bug in it must cost the order only)
        passes.give_up(f"internal error: {type(error).__name__}: {error}")
        return Filtered(asked=found.level, level=found.level)
    return _filtered(page_filter, found.level, found.level)


def _filtered(page_filter: PageFilter, asked: int, level: int) -> Filtered:
    """Return what the scan that the filter has just made counted."""
    census = page_filter.census
    return Filtered(
        asked=asked,
        level=level,
        classes=census.by_name(),
        rescued=census.rescued(level),
        protects=page_filter.protects,
        free_found=census.free_found,
        free_counted=census.free_counted,
    )


def _select_or_all(
    vmcore: Vmcore,
    writer: AnyWriter,
    codec: codecs.Codec,
    options: DumpOptions,
    passes: Passes,
    room: int | None,
) -> Filtered:
    """Select pages; all of them when the filter itself fails: a bug in it must not cost the dump."""
    try:
        return _select(vmcore, writer, codec, options, passes, room)
    except CaptureError:
        raise
    except Exception as error:
        writer.select_all()
        passes.give_up("the page filter failed")
        level, reason = options.levels[0], f"internal error: {type(error).__name__}: {error}"
        return Filtered(asked=level, level=level & 1, doubts=(reason,))


def _select(
    vmcore: Vmcore,
    writer: AnyWriter,
    codec: codecs.Codec,
    options: DumpOptions,
    passes: Passes,
    room: int | None,
) -> Filtered:
    """Choose the level, and select its pages."""
    page_filter = PageFilter(vmcore)
    asked, predicted = options.levels[0], {}
    if len(options.levels) > 1:
        survey = take_survey(vmcore.image, page_filter, codec.largest, len(vmcore.notes.blob))
        for level in options.levels:
            made = level if options.trust_filter else page_filter.verdict(level).level
            predicted[level] = survey.size(made)
        asked = next(
            (level for level in options.levels if room is None or predicted[level] <= room), options.levels[-1]
        )
    writer.select(page_filter.kept(asked, note=passes.note))
    verdict = page_filter.verdict(asked)
    level = asked if options.trust_filter and page_filter.unusable is None else verdict.level
    poison = verdict.poison or options.trust_filter
    if level | 1 != asked | 1 or not poison:
        writer.select(page_filter.kept(level, poison=poison, note=passes.note))
    vmemmap_pages = 0
    if options.exclude_vmemmap and page_filter.mem_map is not None:
        vmemmap_pages = exclude_vmemmap(writer, page_filter.mem_map, vmcore.image.page_size)
    return replace(
        _filtered(page_filter, asked, level),
        doubts=verdict.reasons,
        overridden=options.trust_filter,
        vmemmap_pages=vmemmap_pages,
        predicted=predicted,
        room=room,
    )


def _room(directory: Path) -> int | None:
    """Return the bytes that a dump may take on the target, None where that is not known."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return max(0, found.f_bavail * found.f_frsize - MANIFEST_ROOM)


def _copy(
    copier: Copier,
    writer: AnyWriter,
    passes: Passes,
    vmcore: Vmcore,
    progress: Progress,
    taken: Footprint,
    deadline: float | None,
) -> str | None:
    """Copy all pages, pass by pass; return why it ended early, if it did."""
    size = _chunk_pages()
    chunks = chain.from_iterable(vmcore.image.chunks(runs, size) for runs in passes.runs(writer))
    try:
        copier.run(_until(deadline, _sampled(chunks, taken)), writer, progress)
    except CaptureError as error:
        return str(error)
    except KeyboardInterrupt:
        return "interrupted"
    except MemoryError:
        return "out of memory; try --threads 1"
    except Exception as error:  # (a codec or a bug; what was copied so far is worth its descriptors)
        return f"internal error: {type(error).__name__}: {error}"
    return None


def _chunk_pages() -> int | None:
    """Return how many pages a chunk may have: less where memory is short."""
    available = footprint.memory("MemAvailable")
    return SMALL_CHUNK_PAGES if available is not None and available < SCARCE_MEMORY else None


def _until(deadline: float | None, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Pass chunks on as long as there is time.

    Raises:
        IncompleteError: there is none left.
    """
    for chunk in chunks:
        if deadline is not None and time.monotonic() >= deadline:
            raise IncompleteError("the time that it may take is over (deadline)")
        yield chunk


def _sampled(chunks: Iterable[Chunk], taken: Footprint) -> Iterator[Chunk]:
    """Pass chunks on, and look at the memory that is left every now and then."""
    for number, chunk in enumerate(chunks):
        if number % _SAMPLE_CHUNKS == 0:
            taken.sample()
        yield chunk


def _finish(writer: AnyWriter, output: Output, copier: Copier, vmcore: Vmcore, failure: str | None) -> str | None:
    """Write what is held back, and take the mark off when nothing is missing; return why the dump ended early."""
    try:
        writer.checkpoint()
        if failure is None and writer.pages_written < writer.pages:  # whatever the reason, it must not look whole
            failure = f"{writer.pages - writer.pages_written} pages that were selected were not saved"
        whole = failure is None and not copier.statistics.unreadable.count and not vmcore.core.missing_bytes
        writer.finish(complete=whole)
        output.end()
    except TargetError as error:
        return failure or str(error)
    except KeyboardInterrupt:
        return failure or "interrupted at the very end; the dump may be whole: vmcapture verify tells"
    return failure
