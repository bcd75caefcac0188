"""What is fuzzed: every parser that reads dead memory, a dump, or a command line, and what each must keep to.

What holds for every input is in tests/fuzz/bounds.py. A target adds what only it can know: that nothing was lost, that
two ways to the same answer agree, that what was written can be read back.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import signal
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from capture import cli, report
from capture.boot import config, job
from capture.console import Console, printable
from capture.dump import unfinished_dump, write_dump
from capture.dumpfile.assemble import assemble
from capture.dumpfile.codec import codec
from capture.dumpfile.output import INCOMPLETE_SUFFIX, MANIFEST
from capture.dumpfile.reader import KdumpFile
from capture.dumpfile.source import DumpImage, KdumpSource
from capture.errors import SourceError
from capture.kernel.address import KernelMemory
from capture.kernel.arch import aarch64, x86_64
from capture.kernel.pagerules import RulesMissing, page_rules
from capture.kernel.panic import panicked_cpu
from capture.kernel.printk import format_record
from capture.kernel.utsname import FIELDS, read_utsname
from capture.memory import elfcore
from capture.memory.image import MemoryImage, PfnRanges, UnreadableMemory
from capture.memory.source import Source, elfcorehdr
from capture.notes import vmcoreinfo
from capture.notes.elfnote import read_notes
from capture.notes.vmcoreinfo import PAGE_SIZES
from capture.options import DumpOptions
from capture.pagefilter import PageFilter
from capture.selftest import elf_core, note
from capture.survey import take_survey
from capture.verify import VerifyReport, verify
from capture.vmcore import Vmcore, open_vmcore
from tests.builders import DIRECT_MAP, PAGE, PrintkRing, as_file
from tests.fuzz.bounds import FindingError, Target
from tests.fuzz.mutation import Seed
from tests.fuzz.seeds import (
    RESUMED,
    command_line_seeds,
    core_seeds,
    elf_seeds,
    filter_seeds,
    flattened_seeds,
    kdump_seeds,
    kernel_seeds,
    note_seeds,
    old_memory_seeds,
    printk_seeds,
    resume_seeds,
    table_seeds,
    text_seeds,
    verify_seeds,
)

_MAPPINGS = 300
"""Mappings of one set of page tables that are looked at: tables that point at themselves have millions."""


FLATTENED = Seed(b"makedumpfile\0\0\0\0" + bytes(8) + b"\0" * 7 + b"\1" + bytes(PAGE))
_MOST_PFNS = 1 << 28
_MOST_PAGES = 1 << 13
"""Pages of a dump that are read one by one: 50 microseconds each, and a few bytes of a bitmap stand for thousands."""
_CHUNKS = 40


def _every_page(image: MemoryImage) -> None:
    for chunk in image.chunks():
        block = image.fetch(chunk)
        for offset in map(int, block.offsets):
            if len(block.buffer[offset : offset + image.page_size]) != image.page_size:
                raise FindingError(f"a page of {len(block.buffer)} bytes is cut short at {offset:#x}")


def run_elf(path: Path) -> list[str]:
    with Source(str(path)) as source:
        core = elfcore.parse(source)
        for page_size in PAGE_SIZES:
            _every_page(MemoryImage(source, core.loads, page_size))
    return list(core.problems)


def run_notes(path: Path) -> list[str]:
    with Source(str(path)) as source:
        found = read_notes(source, elfcore.parse(source).notes)
    for entry in found.notes:
        if found.blob[entry.offset : entry.offset + len(entry.descriptor)] != entry.descriptor:
            raise FindingError(f"a descriptor is not at its offset {entry.offset:#x}")
    with open_vmcore(str(path)) as vmcore:
        panic = report.find_panic(vmcore)
        json.dumps(report.registers_json(vmcore, panic))
        return [*found.problems, *vmcore.problems, *report.registers_text(vmcore, panic).splitlines()]


class _OldMemory(Source):
    """A file in the place of /dev/oldmem: no end to speak of, the header somewhere in it."""

    def __init__(self, path: Path) -> None:
        header = int.from_bytes(path.read_bytes()[:8], "little")
        super().__init__(str(path), header_offset=header, can_map=False, remedy="use /proc/vmcore")
        self.size = None


def run_old_memory(path: Path) -> list[str]:
    with _OldMemory(path) as source:
        core = elfcore.parse(source)
        notes = read_notes(source, core.notes)
        unreadable = PfnRanges()
        image = MemoryImage(source, core.loads, PAGE_SIZES[0])
        for chunk in itertools.islice(image.chunks(), _CHUNKS):  # (there may be 2^40 pages, says the header)
            for pfn in image.fetch(chunk).unreadable:
                unreadable.add(pfn)
        if unreadable.listed > unreadable.count:
            raise FindingError(f"{unreadable.listed} of {unreadable.count} pages are listed")
        return [*core.problems, *notes.problems, unreadable.text()]


def run_vmcoreinfo(path: Path) -> list[str]:
    info = vmcoreinfo.parse(path.read_bytes())
    names = {key.partition("(")[2].rstrip(")") for key in info.keys}
    for name in names:
        for value in (info.symbol(name), info.offset(name), info.size(name), info.length(name), info.number(name)):
            if value is not None and not -(1 << 63) <= value < 1 << 64:
                raise FindingError(f"{name} has {value}")
    if info.page_size not in PAGE_SIZES:
        raise FindingError(f"page size {info.page_size}")
    for architecture in (x86_64, aarch64):
        geometry = architecture.geometry(info)
        if geometry is not None and not (0 <= geometry.root < 1 << 64 and geometry.first <= geometry.last):
            raise FindingError(f"page tables at {geometry.root:#x} for {geometry.first:#x} on")
    with contextlib.suppress(RulesMissing):
        page_rules(info)
    # The same text in a note of a whole vmcore: everything that steers by it.
    memory = PrintkRing().add(b"x").memory(0x20_0000)
    note_of_it = note(b"VMCOREINFO", 0, path.read_bytes())
    with as_file(elf_core([note_of_it], [(DIRECT_MAP + 0x20_0000, 0x20_0000, memory)])) as name:
        return run_printk(Path(name))


def run_printk(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
        names = read_utsname(memory, vmcore.info, vmcore.core.machine)
        if len(names.raw) != 390:
            raise FindingError(f"names of {len(names.raw)} bytes")
        for name in FIELDS:
            names.text(name)
        panic = report.find_panic(vmcore)
        cpus, _ = report.registers(vmcore)
        panicked_cpu(panic, cpus)
        lines = [panic.line, *vmcore.problems]
        for record in report.open_log(vmcore).records():
            text = format_record(record, caller=True)
            json.dumps(report.record_json(record))
            lines += [line.replace("\t", " ") for line in text.decode("ascii").split("\n")]
    return lines


def run_tables(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
        tables = memory.tables
        if tables is None:
            return vmcore.problems
        geometry = tables.geometry
        for leaf in itertools.islice(tables.mappings(geometry.first, geometry.last, most_tables=256), _MAPPINGS):
            if tables.lookup(leaf.virtual + leaf.size - 1) != leaf or not geometry.first <= leaf.virtual:
                raise FindingError(f"two walks differ: {leaf}", "two walks differ")
            memory.physical(leaf.virtual)
            with contextlib.suppress(UnreadableMemory):
                if len(memory.read(leaf.virtual + leaf.size - 8, 16)) != 16:
                    raise FindingError(f"a read is cut short at {leaf.virtual:#x}", "a read is cut short")
        for address in (0, geometry.first - 1, geometry.first, geometry.last, DIRECT_MAP):
            memory.mapping(address)
            memory.image_physical(address, address + 100)
        return vmcore.problems


def run_kdump(path: Path) -> list[str]:
    lines: list[str] = []
    with KdumpFile(path) as dump:
        pages = 0
        for batch in dump.pages():
            if batch.data.shape != (len(batch.pfns), dump.page_size):
                raise FindingError(f"{len(batch.pfns)} pages have data of shape {batch.data.shape}")
            pages += len(batch.pfns)
            lines += batch.bad.values()
        if pages != dump.page_count() or pages != sum(count for _, count in dump.runs()):
            raise FindingError(f"{dump.page_count()} pages, of which {pages} are read")
        dump.notes()
        for beyond in (-1, dump.max_mapnr):
            with contextlib.suppress(OSError):
                raise FindingError(f"a page beyond the dump: {len(b''.join(dump.read_run(beyond, 1)))} bytes")
        for first, count in itertools.islice(dump.runs(dump.bitmap1, dump.bitmap2), 20):
            dump.bits(dump.bitmap1, first // 8 * 8, min(count, 1 << 20))
            with contextlib.suppress(OSError):
                if sum(map(len, dump.read_run(first, min(count, 64)))) != min(count, 64) * dump.page_size:
                    raise FindingError("a run of pages is cut short")
    return lines


def run_filter(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        page_filter = PageFilter(vmcore)
        pages = sum(int(window.there.sum()) for window in page_filter.windows())
        if pages != int(page_filter.census.classes.sum()):
            raise FindingError(f"{pages} pages, of which {page_filter.census.classes.sum()} have a class")
        if vmcore.level == 0 and pages != vmcore.image.page_count:
            raise FindingError(f"{pages} of {vmcore.image.page_count} pages have a class")
        if page_filter.mem_map is not None:
            for physical, _first, count in itertools.islice(page_filter.mem_map.described_by(), 1000):
                if physical < 0 or count < 0:
                    raise FindingError(f"{count} struct pages at {physical:#x}")
        reasons = [reason for level in (0, 1, 2, 4, 8, 16, 31) for reason in page_filter.verdict(level).reasons]
        return [*reasons, *([page_filter.unusable] if page_filter.unusable else [])]


def run_survey(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        page_filter = PageFilter(vmcore)
        used = codec(("zstd:1", "zlib:1", "none")[vmcore.image.page_count % 3])
        survey = take_survey(vmcore.image, page_filter, used, len(vmcore.notes.blob))
        values = report.survey_values(survey, page_filter, used.name)
        json.dumps(values | report.describe(vmcore, report.find_panic(vmcore)))
        return report.survey_text(values).splitlines()


def run_flattened(path: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        made = assemble(str(path), Path(folder) / "dump", progress=False)
        if (made.path.name == "dump") != (made.failure is None):
            raise FindingError(f"{made.failure}: but it is called {made.path.name}")
        if made.failure is None:
            return []
        with KdumpFile(made.path) as dump:
            if not dump.incomplete:
                raise FindingError(f"{made.failure}: but it is not marked incomplete")
        return [made.failure.replace(str(path), "")]


def run_dump_as_source(path: Path) -> list[str]:
    with open_vmcore(str(path)) as vmcore:
        if vmcore.image.page_count > _MOST_PAGES:
            return vmcore.problems
        _every_page(vmcore.image)
        return [*vmcore.problems, *run_filter(path)]


def run_save(path: Path) -> list[str]:
    """The whole job, as on a crash boot; what it saved is read back and held against the vmcore."""
    console = Console(file=io.StringIO())
    options = DumpOptions(levels=(17, 31), compression="zstd:1", threads=1, progress=False, exclude_vmemmap=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, open_vmcore(str(path)) as vmcore:
        saved = job.save(vmcore, Path(folder), options, console)
        lines = [*console.lines, *saved.failures]
        if saved.dump is None:
            raise FindingError(f"no dump: {saved.failures}")
        lines += _read_back(saved.dump.path, vmcore, status=job.exit_status(saved))
        if not (saved.dump.path.parent / MANIFEST).exists():
            raise FindingError("no manifest")
    return _without_bugs(lines)


def run_resume(path: Path) -> list[str]:
    """``path`` is an unfinished dump of ``RESUMED``."""
    core = _resumed(path)
    options = DumpOptions(levels=(1,), compression="zstd:1", threads=1, progress=False, resume=True, hashed=False)
    lines: list[str] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, open_vmcore(str(core)) as vmcore:
        target = Path(folder) / "vmcore"
        path.rename(target.with_name(f"vmcore{INCOMPLETE_SUFFIX}"))
        unfinished_dump(vmcore, target.with_name(target.name + INCOMPLETE_SUFFIX), options)
        result = write_dump(vmcore, target, options, lines.append)
        # (What an uncompressed page of a dump holds is believed where it has no checksum: it may differ.)
        lines += _read_back(result.path, vmcore, status=3 if result.shortfall() else 0, same=False)
        lines += filter(None, [result.shortfall(), result.name_failure])
    return _without_bugs(lines)


def _resumed(path: Path) -> Path:
    core = path.with_name("resumed")
    if not core.exists():
        core.write_bytes(RESUMED)
    return core


def _read_back(path: Path, vmcore: Vmcore, *, status: int, same: bool = True) -> list[str]:
    with KdumpFile(path) as dump:
        if dump.max_mapnr > _MOST_PFNS:  # its bitmaps are holes for the most part, which are read all the same
            return []
        found = verify(dump, vmcore.image, progress=False)
    wrong = found.damaged + found.changed + (found.different + found.extra if same else 0)
    if wrong or (status == 0 and found.incomplete):
        raise FindingError(f"what was written is not what there was: {found.text()!r}", "not what there was")
    return found.text().split("\n")


def _without_bugs(lines: list[str]) -> list[str]:
    for line in lines:
        if "internal error" in line or "out of memory" in line:
            raise FindingError(line)
    return lines


def run_verify(path: Path) -> list[str]:
    """``path`` has a manifest, a byte of zero, and the dump beside it."""
    manifest, _, data = path.read_bytes().partition(b"\0")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        dump_path = Path(folder) / "vmcore"
        dump_path.write_bytes(data)
        (dump_path.parent / MANIFEST).write_bytes(manifest)
        with KdumpFile(dump_path) as dump:
            if dump.page_count() > _MOST_PAGES:
                return []
            reports: list[VerifyReport] = [verify(dump, None, progress=False)]
            lines: list[str] = []
            with contextlib.suppress(SourceError), open_vmcore(str(_resumed(path))) as vmcore:
                found = verify(dump, vmcore.image, progress=False)
                lines = found.text().split("\n")
            with contextlib.suppress(SourceError), KdumpSource(str(dump_path)) as source:
                reports.append(verify(dump, DumpImage(source, source.core().loads), progress=False))
    if any(found.different for found in reports):
        raise FindingError("a dump differs from itself")
    lines += [line for found in reports for line in (json.dumps(found.values()), *found.text().split("\n"))]
    return lines


def run_command_line(path: Path) -> list[str]:
    text = path.read_bytes().decode(errors="replace")
    boot = config.parse(text)
    header = elfcorehdr(text)
    if not boot.path.startswith("/") or ".." in boot.path.split("/"):
        raise FindingError(f"the path {boot.path!r}")
    if {boot.final, boot.failure} - set(config.ACTIONS) or not 0 <= (boot.wait or 0) <= config.MAX_WAIT:
        raise FindingError(f"{boot}")
    if header is not None and header < 0:
        raise FindingError(f"the header at {header}")
    DumpOptions(levels=boot.levels, compression=boot.compression).check()
    return [printable(problem) for problem in boot.problems]


_COMMANDS = (
    ("info",), ("info", "--json"), ("dmesg",), ("dmesg", "--json", "--caller"), ("registers",), ("registers", "--json"),
    ("verify", "--no-progress"), ("verify", "--json"),
)  # fmt: skip


def run_cli(path: Path) -> list[str]:
    """Two commands: which, the input itself tells."""
    lines: list[str] = []
    number = zlib.crc32(path.read_bytes())
    for command in (_COMMANDS[number % len(_COMMANDS)], _COMMANDS[number // 8 % len(_COMMANDS)]):
        status, out, err = _command([*command, str(path)])
        if status not in (0, 3, SourceError.exit_status) and (command[0] != "verify" or status != 1):
            raise FindingError(f"{command}: exit status {status}: {err[-500:]!r}")
        if status == SourceError.exit_status and len(err.splitlines()) != 1:
            raise FindingError(f"{command}: a failure of {len(err.splitlines())} lines: {err[-500:]!r}")
        lines += err.splitlines()
        lines += [line.replace("\t", " ") for line in out.splitlines()]
    return _without_bugs(lines)


def _command(arguments: Sequence[str]) -> tuple[int, str, str]:
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    out.flush()
    return status, out.buffer.getvalue().decode(), err.getvalue()


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("elf", run_elf, elf_seeds),
        Target("notes", run_notes, note_seeds, seconds=8),
        Target("old memory", run_old_memory, old_memory_seeds),
        Target("vmcoreinfo", run_vmcoreinfo, text_seeds),
        Target("printk", run_printk, printk_seeds),
        Target("tables", run_tables, table_seeds),
        Target("filter", run_filter, filter_seeds, seconds=8),
        Target("survey", run_survey, kernel_seeds),
        Target("save", run_save, lambda: [*core_seeds(), *kdump_seeds()]),
        Target("kdump", run_kdump, kdump_seeds),
        Target("flattened", run_flattened, flattened_seeds),
        Target("dump as source", run_dump_as_source, kdump_seeds),
        Target("resume", run_resume, resume_seeds),
        Target("verify", run_verify, verify_seeds),
        Target("command line", run_command_line, command_line_seeds),
        Target("cli", run_cli, lambda: [*core_seeds(), *kdump_seeds(), FLATTENED], seconds=8),
    )
}
