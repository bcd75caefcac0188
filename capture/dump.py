"""One dump of one vmcore: what `vmcapture dump` does, and the big step of `vmcapture save`."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from capture.copier import Copier, CopyStatistics
from capture.dumpfile import codec as codecs
from capture.dumpfile.output import OutputFile, sync_directory, target_error
from capture.dumpfile.writer import DumpPlan, KdumpWriter
from capture.errors import CaptureError, TargetError, UsageError
from capture.kernel.address import KernelMemory
from capture.kernel.utsname import read_utsname
from capture.progress import Progress
from capture.vmcore import Vmcore

SUPPORTED_LEVELS = (0, 1)
MAX_LEVEL = 31
INCOMPLETE_SUFFIX = ".incomplete"
THREAD_MEMORY = 16 << 20
"""What a thread takes at the worst: chunks that were read, not mapped, and do not shrink; measured with 4 and 16."""


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """How to dump. ``threads`` None means ``default_threads()``; ``replace`` an existing file."""

    level: int = 1
    compression: str = codecs.DEFAULT
    threads: int | None = None
    replace: bool = False
    progress: bool = True

    def check(self) -> None:
        """Refuse what cannot be made, before anything is opened.

        Raises:
            UsageError: level or compression are wrong.
        """
        check_level(self.level)
        codecs.codec(self.compression)


@dataclass(frozen=True, slots=True)
class DumpReport:
    """What was written. ``path`` is the finished file, or the incomplete one; ``failure`` says why it is not whole."""

    path: Path
    size: int
    digests: list[str]
    compression: str
    level: int
    statistics: CopyStatistics
    pages: int
    pages_written: int
    missing_bytes: int
    seconds: float
    failure: str | None

    @property
    def whole(self) -> bool:
        """Whether every page of the dead kernel's memory is in it."""
        return self.failure is None and not self.statistics.unreadable.count and not self.missing_bytes

    def shortfall(self) -> str | None:
        """Return one line that names what is missing, None when nothing is."""
        reasons = [self.failure] if self.failure else []
        if self.statistics.unreadable.count:
            unreadable = self.statistics.unreadable
            reasons.append(f"{unreadable.count} pages unreadable, zeros in the dump ({unreadable.text()})")
        if self.missing_bytes:
            reasons.append(f"{self.missing_bytes} bytes missing in the source")
        return "; ".join(reasons) or None


def check_level(level: int) -> None:
    """Refuse a dump level that does not exist or cannot be made yet.

    Raises:
        UsageError: with a line that says which levels can.
    """
    if not 0 <= level <= MAX_LEVEL:
        raise UsageError(f"-d {level}: dump levels are 0 to {MAX_LEVEL}")
    if level not in SUPPORTED_LEVELS:
        raise UsageError(
            f"-d {level}: this version keeps every page: only level 0 (all) and 1 (zero pages share one) can be made"
        )


def default_threads() -> int:
    """Return one thread for each CPU that this process may run on, as far as there is memory for them."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        cpus = min(cpus, available // THREAD_MEMORY)
    return max(1, cpus)


def write_dump(vmcore: Vmcore, path: Path, options: DumpOptions) -> DumpReport:
    """Write ``vmcore`` to ``path``, which gets its name only when everything is in it.

    Until then the file is ``path`` + ".incomplete": readable, and marked incomplete. It stays when the dump is cut
    short (no room, an error, Ctrl-C), with every page written so far.

    Raises:
        UsageError: level, compression or threads are wrong.
        TargetError: nothing readable could be written.
    """
    check_level(options.level)
    codec = codecs.codec(options.compression)
    threads = options.threads or default_threads()
    unfinished = _unfinished(path, replace=options.replace)
    image = vmcore.image
    memory = KernelMemory(image, vmcore.info, vmcore.core.machine)
    plan = DumpPlan(
        page_size=image.page_size,
        max_mapnr=image.max_pfn,
        pages=image.page_count,
        level=options.level,
        compression=codec.flag,
        utsname=read_utsname(memory, vmcore.info, vmcore.core.machine).raw,
        crash_time=vmcore.info.crash_time or 0,
        phys_base=vmcore.info.number("phys_base") or vmcore.info.number("PHYS_OFFSET") or 0,
        cpus=len(vmcore.notes.prstatus()),
        notes=vmcore.notes,
    )
    output = OutputFile(unfinished)
    try:
        writer = KdumpWriter(output, plan)
        copier = Copier(image, codec, share_zero_pages=bool(options.level & 1), threads=threads)
        try:
            writer.begin(image.runs())
            sync_directory(path.parent)  # from here on a power cut leaves a dump under its name
        except (TargetError, KeyboardInterrupt):
            with contextlib.suppress(OSError):  # not a page is in it, perhaps not even a header
                unfinished.unlink()
            raise
        with Progress("saving memory", image.page_count * image.page_size, enabled=options.progress) as progress:
            failure = _copy(copier, writer, vmcore, progress)
            seconds = progress.seconds
        failure = _finish(writer, copier, vmcore, failure)
        report = DumpReport(
            path=path if failure is None else unfinished,
            size=output.size,
            digests=output.digests(),
            compression=codec.name,
            level=options.level,
            statistics=copier.statistics,
            pages=plan.pages,
            pages_written=writer.pages_written,
            missing_bytes=vmcore.core.missing_bytes,
            seconds=seconds,
            failure=failure,
        )
    finally:
        output.close()
    if failure is None:
        try:
            unfinished.rename(path)
        except OSError as error:
            raise target_error(path, f"renaming {unfinished.name}", error) from None
    sync_directory(path.parent)
    return report


def _unfinished(path: Path, *, replace: bool) -> Path:
    """Return the name that the dump has until it is finished; make way for it when ``replace``."""
    try:
        if not path.name or path.is_dir():
            raise TargetError(f"{path}: is a directory; name the file to write")
        unfinished = path.with_name(path.name + INCOMPLETE_SUFFIX)
        if replace:
            unfinished.unlink(missing_ok=True)
        elif path.exists() or path.is_symlink():
            raise TargetError(f"{path}: exists already; remove it, or use --force")
    except OSError as error:
        raise target_error(path, "looking for it", error) from None
    return unfinished


def _copy(copier: Copier, writer: KdumpWriter, vmcore: Vmcore, progress: Progress) -> str | None:
    """Copy all pages; return why it ended early, if it did."""
    try:
        copier.run(vmcore.image.chunks(), writer, progress)
    except CaptureError as error:
        return str(error)
    except KeyboardInterrupt:
        return "interrupted"
    except MemoryError:
        return "out of memory; try --threads 1"
    except Exception as error:  # (a codec or a bug; what was copied so far is worth its descriptors)
        return f"internal error: {type(error).__name__}: {error}"
    return None


def _finish(writer: KdumpWriter, copier: Copier, vmcore: Vmcore, failure: str | None) -> str | None:
    """Write what is held back, and take the mark off when nothing is missing; return why the dump ended early."""
    try:
        writer.checkpoint()
        whole = failure is None and not copier.statistics.unreadable.count and not vmcore.core.missing_bytes
        writer.finish(complete=whole)
    except TargetError as error:
        return failure or str(error)
    except KeyboardInterrupt:
        return failure or "interrupted at the very end; the dump may be whole: vmcapture verify tells"
    return failure
