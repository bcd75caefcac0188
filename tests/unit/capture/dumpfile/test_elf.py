"""ELF cores: every page where it belongs by physical and by virtual address, opened by readers that are not ours."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drgn
import numpy as np
import pytest

from capture.dump import write_dump
from capture.dumpfile import elf
from capture.dumpfile.output import OutputFile
from capture.errors import TargetError
from capture.kernel.address import THREAD_SIZE, KernelMemory
from capture.memory.elfcore import GAPS, INCOMPLETE
from capture.memory.image import LinearMap
from capture.notes import prstatus
from capture.notes.prstatus import PID_LIMIT
from capture.selftest import elf_core
from capture.vmcore import open_vmcore
from tests.builders import DIRECT_MAP, PAGE, PT_LOAD, filled, numbered, prstatus_note, vmcoreinfo_note
from tests.faults import file_size_limit, raising
from tests.outcome import Run, dump_options
from tests.readers import ElfPages, drgn_reader, mapped, model, note_segment, program_headers, prstatus_descriptors

WriteFile = Callable[..., str]
E_FLAGS, E_SHOFF, E_PHNUM, SH_INFO = 48, 40, 56, 44

TEXT = 0xFFFF_FFFF_8100_0000
NOTES = prstatus_note(0, 1000) + prstatus_note(77, 2000) + prstatus_note(0, 3000) + vmcoreinfo_note()
LOADS = [
    (TEXT, 0x20_1000, numbered(10, 3)),
    (DIRECT_MAP + 0x10_0000, 0x10_0000, filled(".", "a") + random.Random(1).randbytes(2 * PAGE) + filled(".", "b")),
    (DIRECT_MAP + 0x20_0000, 0x20_0000, numbered(9, 5)),
    (0, 0x60_0000, filled("p") + b"partial"),
]
"""The kernel image lies over the direct map; at the end, memory that has no virtual address."""
PAGES = model([(physical, data) for _, physical, data in LOADS])


@pytest.fixture
def source(vmcore_file: WriteFile) -> str:
    return vmcore_file(elf_core([NOTES], LOADS))


def made(source: str | Path, target: Path, **options: Any) -> Path:
    with open_vmcore(str(source)) as vmcore:
        report = write_dump(vmcore, target, dump_options(elf=True, **options))
    assert report.path == target
    return target


def flags(path: Path) -> int:
    found: int = struct.unpack_from("<I", path.read_bytes(), E_FLAGS)[0]
    return found


def virtual_pages(core: bytes) -> Iterator[tuple[int, bytes]]:
    """Every page that has a virtual address, read as a debugger does."""
    for load in program_headers(core):
        if load.type == PT_LOAD and load.vaddr:
            for at in range(0, load.filesz, PAGE):
                yield load.vaddr + at, core[load.offset + at : load.offset + at + PAGE]


@pytest.mark.parametrize("level", [0, 1])
def test_every_page_is_there_by_physical_address(level: int, source: str, tmp_path: Path) -> None:
    core = made(source, tmp_path / "core", levels=(level,))
    assert ElfPages(core.read_bytes()).pages() == PAGES
    read = drgn_reader(core)
    assert {pfn: read(pfn * PAGE, PAGE) for pfn in PAGES} == PAGES
    with pytest.raises(drgn.FaultError):
        read(0x50_0000, 8)
    assert flags(core) == 0


def test_every_page_is_there_by_virtual_address_as_in_the_source(source: str, tmp_path: Path) -> None:
    core = made(source, tmp_path / "core").read_bytes()
    expected = {
        virtual + at: PAGES[(physical + at) // PAGE]
        for virtual, physical, data in LOADS
        if virtual
        for at in range(0, len(data), PAGE)
    }
    found = list(virtual_pages(core))
    assert len(found) == len(expected)
    assert dict(found) == expected


def test_the_kernel_image_is_not_in_the_file_twice_and_zero_pages_take_no_room(source: str, tmp_path: Path) -> None:
    core = made(source, tmp_path / "core", levels=(1,))
    assert core.stat().st_size == (1 + len(PAGES)) * PAGE  # the headers and notes in front of them fit in a page
    zero = sum(not any(page) for page in PAGES.values())
    assert core.stat().st_blocks * 512 <= (1 + len(PAGES) - zero) * PAGE


def test_notes_are_those_of_the_source_with_a_pid_for_each_cpu(source: str, tmp_path: Path, run: Run) -> None:
    core = made(source, tmp_path / "core")
    pids = [struct.unpack_from("<i", status, 32)[0] for status in prstatus_descriptors(core.read_bytes())]
    assert pids == [PID_LIMIT, 77, PID_LIMIT + 2]
    for ours, theirs in zip(
        prstatus_descriptors(core.read_bytes()), prstatus_descriptors(Path(source).read_bytes()), strict=True
    ):
        assert ours[:32] + ours[36:] == theirs[:32] + theirs[36:]
    assert note_segment(core.read_bytes()).endswith(vmcoreinfo_note())
    assert run("registers", core).out == run("registers", source).out


def test_gdb_shows_the_registers_of_each_cpu(source: str, tmp_path: Path) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed (Debian package gdb)")
    core = made(source, tmp_path / "core")
    commands = ["thread apply all -s info registers r15", f"x/gx {DIRECT_MAP + 0x10_1000:#x}", f"x/gx {TEXT:#x}"]
    said = subprocess.run(
        ["gdb", "-q", "-nx", "-batch", *(word for command in commands for word in ("-ex", command)), "-core", core],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert sorted(re.findall(r"^r15 +\S+ +(\d+)", said, re.MULTILINE)) == ["1000", "2000", "3000"]
    words = [int(word, 16) for word in re.findall(r"^0xffff\S+:\t(\S+)", said, re.MULTILINE)]
    assert words == [int.from_bytes(b"a" * 8), int.from_bytes(numbered(10, 1)[:8], "little")]


def test_a_kdump_compressed_source_gets_its_addresses_from_page_tables(tmp_path: Path, corpus_vmcore: Path) -> None:
    from capture.cli import main

    dump, ours, direct = tmp_path / "dump", tmp_path / "ours", tmp_path / "direct"
    assert main(["dump", "-q", "-d31", str(corpus_vmcore), str(dump)]) == 0
    assert main(["dump", "-q", "-d31", "--format", "elf", str(dump), str(ours)]) == 0
    assert main(["dump", "-q", "-d31", "--format", "elf", str(corpus_vmcore), str(direct)]) == 0
    theirs = dict(virtual_pages(direct.read_bytes()))
    found = dict(virtual_pages(ours.read_bytes()))
    assert theirs.items() <= found.items()  # page tables are rounder than what the kernel says of its image


def test_the_stacks_that_cpus_were_on_are_at_their_addresses(tmp_path: Path, corpus_vmcore: Path) -> None:
    """Most of them lie in vmalloc, which no PT_LOAD of a vmcore has."""
    found = dict(virtual_pages(made(corpus_vmcore, tmp_path / "core").read_bytes()))
    loads = [load for load in program_headers(mapped(corpus_vmcore)) if load.type == PT_LOAD]
    beyond = 0
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
        for cpu in prstatus.parse(vmcore.notes.prstatus(), vmcore.core.machine)[0]:
            page = cpu.registers["rsp"] // PAGE * PAGE
            beyond += not any(load.vaddr <= page < load.vaddr + load.filesz for load in loads)
            end = (page | THREAD_SIZE - 1) + 1
            while page < end and memory.physical(page) is not None:  # a stack for interrupts may end before
                assert found[page] == memory.read(page, PAGE)
                page += PAGE
    assert beyond


def test_every_page_of_a_real_vmcore_is_read_by_drgn(tmp_path: Path, corpus_vmcore: Path, run: Run) -> None:
    core = made(corpus_vmcore, tmp_path / "core", levels=(31,))
    ours, theirs = drgn_reader(core), ElfPages(mapped(corpus_vmcore))
    pfns = ElfPages(mapped(core)).pfns()
    assert 10_000 < len(pfns) < 30_000
    for pfn in pfns:
        assert ours(pfn * PAGE, PAGE) == theirs.page(pfn), hex(pfn)
    against = run("verify", "--no-progress", core, "--against", corpus_vmcore)
    assert against.status == 0
    assert re.search(rf": {len(pfns)} pages equal the source; \d+ left out$", against.out.strip())


def test_verify_finds_what_is_wrong(source: str, tmp_path: Path, run: Run) -> None:
    core = made(source, tmp_path / "core")
    assert run("verify", core).out == f"{core}: {len(PAGES)} pages read back well\n"
    assert run("verify", core, "--against", source).out == f"{core}: {len(PAGES)} pages equal the source\n"
    good = core.read_bytes()
    (load,) = [load for load in program_headers(good) if load.paddr == 0x10_0000]
    core.write_bytes(good[: load.offset + PAGE] + b"X" + good[load.offset + PAGE + 1 :])
    ran = run("verify", core, "--against", source)
    assert (ran.status, "PFN 0x101: differs from" in ran.out) == (1, True)
    core.write_bytes(good[: -2 * PAGE])
    ran = run("verify", core)
    assert (ran.status, "marked incomplete" in ran.out) == (3, True)
    core.write_bytes(good[:20])
    assert run("verify", core).status == 4


@pytest.mark.parametrize("most", [1, 2, 4, 40])
def test_with_too_many_runs_the_smallest_gaps_are_zeros(
    most: int, vmcore_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(elf, "MAX_RUNS", most)
    pfns = [1, 2, 4, 7, 8, 12, 40, 300, 301, 9000]
    loads = [(DIRECT_MAP + pfn * PAGE, pfn * PAGE, numbered(pfn + 1, 1)) for pfn in pfns]
    source = vmcore_file(elf_core([NOTES], loads))
    ran = run("dump", "--format", "elf", source, tmp_path / "core")
    assert ran.status == 0
    core = ElfPages((tmp_path / "core").read_bytes())
    assert {pfn: core.page(pfn) for pfn in pfns} == {pfn: numbered(pfn + 1, 1) for pfn in pfns}
    assert all(core.page(pfn) == bytes(PAGE) for pfn in set(core.pfns()) - set(pfns))
    loads_there = [load for load in program_headers((tmp_path / "core").read_bytes()) if load.type == PT_LOAD]
    assert len(loads_there) <= most
    gaps = len(core.pfns()) - len(pfns)
    assert flags(tmp_path / "core") == (GAPS if gaps else 0)
    assert (f"{gaps} pages between them read as zeros" in ran.err) == bool(gaps)
    assert run("verify", tmp_path / "core", "--against", source).status == (0 if gaps == 0 else 1)  # not in the source


def test_gaps_that_the_source_has_something_in_are_counted_as_left_out(
    vmcore_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(elf, "MAX_RUNS", 1)
    kept = [(DIRECT_MAP + pfn * PAGE, pfn * PAGE, numbered(pfn, 1)) for pfn in (1, 3)]
    made(vmcore_file(elf_core([NOTES], kept)), tmp_path / "core")
    whole = vmcore_file(elf_core([NOTES], [(DIRECT_MAP + PAGE, PAGE, numbered(1, 3))]), "whole")
    ran = run("verify", tmp_path / "core", "--against", whole)
    assert (ran.status, ran.out) == (0, f"{tmp_path / 'core'}: 2 pages equal the source; 1 left out\n")


def test_more_segments_than_the_header_counts_are_in_section_0(
    vmcore_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elf, "PN_XNUM", 4)
    source = vmcore_file(elf_core([NOTES], [(0, pfn * PAGE, numbered(pfn, 1)) for pfn in range(1, 20, 2)]))
    core = made(source, tmp_path / "core").read_bytes()
    (section,), (count,) = struct.unpack_from("<Q", core, E_SHOFF), struct.unpack_from("<H", core, E_PHNUM)
    assert (count, struct.unpack_from("<I", core, section + SH_INFO)) == (4, (11,))


def test_there_are_never_more_segments_than_a_reader_takes(
    vmcore_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """A damaged header may map all of memory again and again: runs times mappings."""
    pfns = range(1, 20, 2)
    direct = [(DIRECT_MAP + pfn * PAGE, pfn * PAGE, numbered(pfn, 1)) for pfn in pfns]
    loads = [(virtual + (copy << 40), physical, data) for copy in range(4) for virtual, physical, data in direct]
    source = vmcore_file(elf_core([NOTES], loads))
    monkeypatch.setattr(elf, "MAX_SEGMENTS", 40)
    ran = run("dump", "--format", "elf", source, tmp_path / "core")
    assert (ran.status, "of 2 no page has its virtual address" in ran.err) == (0, True)
    core = (tmp_path / "core").read_bytes()
    assert len(program_headers(core)) <= 40
    assert dict(virtual_pages(core)) == {
        virtual: data for virtual, _, data in loads if virtual < DIRECT_MAP + (2 << 40)
    }, "the first ones, which are the kernel's own"
    assert ElfPages(core).pages() == {pfn: numbered(pfn, 1) for pfn in pfns}


def test_memory_does_not_grow_with_fragmentation(vmcore_file: WriteFile, tmp_path: Path) -> None:
    """300,000 runs: a table of all of them would be 20 MB."""
    writer_pages = 600_000
    core = elf_core([NOTES], [(DIRECT_MAP, 0, b"\1" * PAGE)])
    source = vmcore_file(core)
    script = f"""
import resource, sys
import numpy as np
from pathlib import Path
from contextlib import closing
from capture.dump import _plan
from capture.dumpfile import codec
from capture.dumpfile.elf import ElfWriter
from capture.dumpfile.output import OutputFile
from capture.memory.image import LinearMap
from capture.options import DumpOptions
from capture.vmcore import open_vmcore
pages = {writer_pages}
with open_vmcore({source!r}) as vmcore, closing(OutputFile(Path({str(tmp_path / "out")!r}), hashed=False)) as output:
    plan = _plan(vmcore, DumpOptions(), codec.codec("none"))._replace(max_mapnr=pages)
    maps = [LinearMap(1 << 63, 0, pages * 4096)]
    with closing(ElfWriter(output, plan, "x86_64", maps, [], Path({str(tmp_path)!r}))) as writer:
        writer.map_memory([(0, pages)])
        bits = np.zeros(1 << 19, dtype=np.bool_)
        bits[::2] = True
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        writer.select((first, bits[: pages - first]) for first in range(0, pages, 1 << 19))
        writer.start(1)
        print(writer.pages, writer.gap_pages, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    pages, gaps, grown = map(int, said.stdout.split())
    assert (pages, gaps) == (writer_pages // 2, writer_pages // 2 - 1)
    assert grown < 16 << 10  # KiB


def test_what_was_cut_short_is_marked_and_has_status_3(
    source: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(elf.ElfWriter, "append", raising(KeyboardInterrupt()))
        ran = run("dump", "--format", "elf", source, tmp_path / "core")
    assert ran.status == 3
    assert "interrupted" in ran.err
    left = tmp_path / "core.incomplete"
    assert flags(left) == INCOMPLETE
    assert run("verify", left).status == 3
    assert "marked incomplete: pages that were not written are zeros" in run("dump", left, tmp_path / "again").err


def test_a_file_that_may_not_grow_is_reported_in_a_line(source: str, tmp_path: Path, run: Run) -> None:
    with file_size_limit(2 * PAGE):
        ran = run("dump", "--format", "elf", source, tmp_path / "core")
    assert ran.status == 5
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.glob("core*"))


@pytest.mark.parametrize("number", [3, 4, 5])
def test_it_is_marked_until_all_of_it_is_on_the_disk(
    number: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """The first two syncs are those of a dump without a page."""
    calls = itertools.count(1)
    real = OutputFile.sync

    def sync(output: OutputFile) -> None:
        if next(calls) == number:
            raise TargetError("the disk does not take it")
        real(output)

    monkeypatch.setattr(OutputFile, "sync", sync)
    ran = run("dump", "--format", "elf", source, tmp_path / "core")
    assert (ran.status, "the disk does not take it" in ran.err) == (3, True)
    assert flags(tmp_path / "core.incomplete") == INCOMPLETE


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["-c", "zstd"], "an ELF file is not compressed: leave -c zstd out, or --format elf"),
        (["--resume"], "an ELF file cannot be gone on with"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(
    more: list[str], line: str, source: str, tmp_path: Path, run: Run
) -> None:
    ran = run("dump", "--format", "elf", *more, source, tmp_path / "core")
    assert (ran.status, ran.err.count("\n"), line in ran.err) == (2, 1, True)
    assert not list(tmp_path.glob("core*"))


def test_flattened_it_becomes_the_same_file(source: str, tmp_path: Path, run: Run) -> None:
    core = made(source, tmp_path / "core")
    program = [sys.executable, "-m", "initramfs", "dump", "-q"]
    stream = subprocess.run([*program, "--format", "elf", source, "-"], capture_output=True, check=True, timeout=60)
    (tmp_path / "stream").write_bytes(stream.stdout)
    assert run("dump", tmp_path / "stream", tmp_path / "again").status == 0
    assert (tmp_path / "again").read_bytes() == core.read_bytes()
    for length, good in ((len(stream.stdout) - 5000, True), (4096 + 16 + 10, False)):
        (tmp_path / "stream").write_bytes(stream.stdout[:length])
        ran = run("dump", "--force", tmp_path / "stream", tmp_path / "cut")
        assert ran.status == (3 if good else 4), ran.err
        if good:
            assert flags(tmp_path / "cut.incomplete") == INCOMPLETE


def test_mappings_of_one_shift_are_one_and_are_not_any_number() -> None:
    assert elf.merged([LinearMap(100, 0, 10), LinearMap(7, 50, 3), LinearMap(140, 40, 5)]) == [
        LinearMap(100, 0, 45),
        LinearMap(7, 50, 3),
    ]
    assert len(elf.merged([LinearMap(1 << 40, number, 1) for number in range(1000)])) == elf.MAX_MAPS


def test_of_a_mapping_within_another_nothing_is_left_between_them() -> None:
    """A run that reaches around both has no pages from the end of the outer one back to the inner one."""
    runs = np.array([0]), np.array([1000])
    assert len(elf._Span.of(*runs, 400, 200).runs) == 0
    span = elf._Span.of(*runs, 200, 400)
    assert (span.first.tolist(), span.end.tolist()) == ([200], [400])
    assert len(elf._Span.of(np.array([0, 50]), np.array([10, 60]), 10, 50).runs) == 0
