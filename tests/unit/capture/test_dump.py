"""One dump, from the command line down: opened by readers that are not ours, at any instant, on any disk."""

from __future__ import annotations

import errno
import json
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drgn
import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from capture import dump as module
from capture.dump import DumpReport, write_dump
from capture.dumpfile import codec as codec_module
from capture.dumpfile import output as output_module
from capture.dumpfile import writer as writer_module
from capture.dumpfile.output import OutputFile
from capture.dumpfile.passes import Passes
from capture.dumpfile.reader import NOT_WRITTEN, KdumpFile
from capture.dumpfile.writer import KdumpWriter
from capture.kernel.pages import FIRST, KERNEL, LAST, SLAB, TABLES, TYPED
from capture.memory import image as image_module
from capture.options import DumpOptions
from capture.pagefilter import PageFilter
from capture.selftest import elf_core
from capture.vmcore import open_vmcore
from tests.builders import (
    DIRECT_MAP,
    P_FILESZ,
    PAGE,
    filled,
    numbered,
    patched,
    program_header,
    prstatus_note,
    simple_core,
    vmcoreinfo_note,
)
from tests.dumps import DESCRIPTOR_BYTES, ZLIB, ZSTD, stored_checksum
from tests.faults import PowerCut, failing, failing_codec, file_size_limit, interrupted_after, raising, tmpfs, umask
from tests.kernels import MEM_MAP_PAGES, MEM_MAP_PFN, SmallKernel, busy_kernel
from tests.kernels import PAGES as PAGES_OF_KERNEL
from tests.outcome import Run, dump_options, read_back, sha256_blocks
from tests.readers import (
    ElfPages,
    by_hand,
    drgn_reader,
    makedumpfile,
    makedumpfile_rearrange,
    mapped,
    model,
    read_by_drgn,
)

WriteFile = Callable[..., str]

MIXED = [
    (0x10_0000, filled(".", "a") + random.Random(1).randbytes(3 * PAGE) + numbered(0, 6) + filled(".", ".")),
    (0x40_0000, numbered(100, 9)),
    (0x60_0000, filled("p") + b"partial"),
]
"""Zero, even and random pages in three segments with holes between them, the last page partial."""
PAGES = model(MIXED)


def core(loads: Sequence[tuple[int, bytes]] = MIXED) -> bytes:
    notes = prstatus_note(7, 1000) + prstatus_note(0, 2000) + vmcoreinfo_note()
    return elf_core([notes], [(DIRECT_MAP + physical, physical, data) for physical, data in loads])


@pytest.fixture
def source(vmcore_file: WriteFile) -> str:
    return vmcore_file(core())


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and many rounds of descriptors in a small vmcore."""
    monkeypatch.setattr(image_module, "CHUNK_PAGES", 2)
    monkeypatch.setattr(writer_module, "SYNC_PAGES", 5)


def written_pages(path: Path) -> dict[int, bytes]:
    """The pages of an unfinished dump that have data; the others must say that they were not written."""
    good, bad = read_back(path)
    assert set(bad.values()) <= {NOT_WRITTEN}
    return good


def dumped(source: str, target: Path, **options: Any) -> DumpReport:
    with open_vmcore(source) as vmcore:
        return write_dump(vmcore, target, dump_options(**options))


# --- options


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("compression", ["zstd", "zstd:3", "zstd:-5", "zlib", "zlib:9", "none"])
def test_every_level_and_codec_is_read_by_hand_and_by_drgn(
    level: int, compression: str, source: str, tmp_path: Path, run: Run
) -> None:
    ran = run("dump", "-d", str(level), "-c", compression, source, tmp_path / "dump")
    assert (ran.status, ran.out) == (0, "")
    dump = by_hand(tmp_path / "dump")
    assert dump.pages == PAGES
    assert read_by_drgn(tmp_path / "dump", PAGES) == PAGES
    assert (dump.level, dump.incomplete) == (level, False)
    flag = {"zs": ZSTD, "zl": ZLIB, "no": 0}[compression[:2]]
    assert dump.status == flag
    assert {flags for _, _, flags, _ in dump.descriptors.values()} <= {0, flag}


def test_zstd_and_level_1_are_what_you_get_when_you_do_not_ask(source: str, tmp_path: Path, run: Run) -> None:
    assert run("dump", source, tmp_path / "dump").status == 0
    dump = by_hand(tmp_path / "dump")
    assert (dump.status, dump.level) == (ZSTD, 1)


def test_at_level_1_zero_pages_share_one_and_at_level_0_none_do(source: str, tmp_path: Path) -> None:
    zero = [pfn for pfn, page in PAGES.items() if not any(page)]
    dumped(source, tmp_path / "one", level=1)
    dumped(source, tmp_path / "zero", level=0)
    one, none = by_hand(tmp_path / "one"), by_hand(tmp_path / "zero")
    assert {one.descriptors[pfn] for pfn in zero} == {(one.data_start, PAGE, 0, stored_checksum(bytes(PAGE)))}
    assert len({none.descriptors[pfn][0] for pfn in zero}) == len(zero)
    assert all(none.descriptors[pfn][2] == ZSTD for pfn in zero)


def test_pages_that_do_not_shrink_are_raw(source: str, tmp_path: Path) -> None:
    report = dumped(source, tmp_path / "dump")
    dump = by_hand(tmp_path / "dump")
    assert [dump.descriptors[pfn][1:3] for pfn in (0x102, 0x103, 0x104)] == [(PAGE, 0)] * 3
    assert report.statistics.raw_pages == 3


@pytest.mark.parametrize("level", ["32", "4294967296"])
def test_a_level_that_cannot_be_made_is_refused_in_a_line(level: str, source: str, tmp_path: Path, run: Run) -> None:
    ran = run("dump", "-d", level, source, tmp_path / "dump")
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    assert f"{level}: a dump level is a number from 0 to 31" in ran.err
    assert list(tmp_path.iterdir()) == [Path(source)]


@pytest.mark.parametrize(
    "arguments",
    [("-d", "-1"), ("-d", "x"), ("-d", "1,32"), ("-d", ""), ("-c", "lzo"), ("-c", "zstd:0"), ("-c", "zlib:10"),
     ("--threads", "0"), ("--threads", "-1"), ("--threads", "many"), ("--nonsense",)],
)  # fmt: skip
def test_a_wrong_option_is_refused_in_a_line_and_nothing_is_written(
    arguments: tuple[str, ...], source: str, tmp_path: Path, run: Run
) -> None:
    ran = run("dump", *arguments, source, tmp_path / "dump")
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [Path(source)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_dump_is_the_same_on_any_number_of_threads(threads: int, source: str, tmp_path: Path) -> None:
    dumped(source, tmp_path / "one", threads=1)
    dumped(source, tmp_path / "dump", threads=threads)
    assert (tmp_path / "dump").read_bytes() == (tmp_path / "one").read_bytes()


# --- the report


def test_the_report_and_the_line_say_what_is_in_the_file(source: str, tmp_path: Path, run: Run) -> None:
    report = dumped(source, tmp_path / "dump")
    content = (tmp_path / "dump").read_bytes()
    assert report.path == tmp_path / "dump"
    assert report.size == len(content)
    assert report.digests == sha256_blocks(content, 64 << 20)
    assert report.pages == report.statistics.pages == len(PAGES)
    assert report.statistics.zero_pages == sum(not any(page) for page in PAGES.values())
    assert (report.compression, report.level, report.missing_bytes, report.failure) == ("zstd:1", 1, 0, None)
    assert report.whole
    assert report.shortfall() is None
    ran = run("dump", source, tmp_path / "again")
    assert ran.err.endswith(f"again: level 1, {len(PAGES)} of {len(PAGES)} pages, {len(content)} bytes\n")


def test_a_dump_is_for_its_owner_only(source: str, tmp_path: Path) -> None:
    """It holds keys and passwords of everyone who was on the machine."""
    with umask(0):
        dumped(source, tmp_path / "dump")
    assert (tmp_path / "dump").stat().st_mode & 0o7777 == 0o600


@pytest.mark.usefixtures("small_steps")
def test_digests_are_those_of_the_file_block_by_block(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "HASH_BLOCK", 5000)
    report = dumped(source, tmp_path / "dump")
    assert report.digests == sha256_blocks((tmp_path / "dump").read_bytes(), 5000)


# --- where it goes


@pytest.mark.parametrize("what", ["file", "dangling link", "directory", "unfinished dump"])
def test_what_exists_is_refused_and_stays_as_it_was(what: str, source: str, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "out" / "dump"
    target.parent.mkdir()
    if what == "file":
        target.write_bytes(b"precious")
    elif what == "dangling link":
        target.symlink_to(tmp_path / "elsewhere")
    elif what == "directory":
        target.mkdir()
    else:
        Path(f"{target}.incomplete").write_bytes(b"precious")

    def there() -> dict[str, tuple[int, int, int, int]]:
        """What is there; that somebody looked at it is no change."""
        found = {path.name: path.lstat() for path in target.parent.iterdir()}
        return {name: (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    before = there()
    ran = run("dump", source, target)
    assert ran.status == 5
    assert ran.err.count("\n") == 1
    if what == "directory":
        assert "directory" in ran.err  # not even --force replaces it
    else:
        assert "exists" in ran.err
        assert "--force" in ran.err
    assert there() == before
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("what", ["file", "link", "unfinished dump"])
def test_force_replaces_what_is_there(what: str, source: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    if what == "file":
        (tmp_path / "dump").write_bytes(b"old")
    elif what == "link":
        (tmp_path / "dump").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "dump.incomplete").write_bytes(b"old")
    assert run("dump", "--force", source, tmp_path / "dump").status == 0
    assert by_hand(tmp_path / "dump").pages == PAGES
    assert not (tmp_path / "dump").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
    assert not (tmp_path / "dump.incomplete").exists()


@pytest.mark.usefixtures("small_steps")
def test_force_keeps_the_old_dump_until_the_new_one_is_whole(
    source: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dump").write_bytes(b"old")
    monkeypatch.setattr(module, "OutputFile", interrupted_after(10))
    assert run("dump", "--force", source, tmp_path / "dump").status == 3
    assert (tmp_path / "dump").read_bytes() == b"old"


def test_a_directory_is_not_replaced_and_is_refused_before_the_work(source: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "dump").mkdir()
    ran = run("dump", "--force", source, tmp_path / "dump")
    assert ran.status == 5
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "dump.incomplete").exists()


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_a_target_without_a_name_is_refused_in_a_line(target: str, source: str, run: Run) -> None:
    ran = run("dump", source, target)
    assert ran.status in (2, 5)
    assert ran.err.count("\n") == 1
    assert "internal error" not in ran.err


@pytest.mark.parametrize("target", ["missing/dump", "vmcore.elf/dump"])
def test_a_place_that_is_not_there_is_refused_in_a_line(target: str, source: str, tmp_path: Path, run: Run) -> None:
    ran = run("dump", source, tmp_path / target)
    assert ran.status == 5
    assert ran.err.count("\n") == 1
    assert str(tmp_path / target) in ran.err


def test_a_read_only_disk_is_refused_in_a_line(source: str, tmp_path: Path, run: Run) -> None:
    with tmpfs(tmp_path / "disk", "ro,size=64k") as disk:
        ran = run("dump", source, disk / "dump")
    assert ran.status == 5
    assert "mount it read-write" in ran.err
    assert ran.err.count("\n") == 1


def test_to_standard_output_goes_the_dump_flattened_and_nothing_else(source: str, tmp_path: Path) -> None:
    """Also at a level that has to be found first: messages go to standard error."""
    command = [sys.executable, "-m", "capture", "dump", "-d", "1,31", source, "-"]
    ran = subprocess.run(command, capture_output=True, check=True)
    makedumpfile_rearrange(ran.stdout, tmp_path / "dump")
    assert by_hand(tmp_path / "dump").pages == PAGES
    last = ran.stderr.decode().splitlines()[-1]
    assert re.fullmatch(rf"vmcapture: standard output: level 1, 24 of 24 pages, {len(ran.stdout)} bytes", last)


def test_a_reader_of_standard_output_that_goes_away_costs_one_line(source: str) -> None:
    command = f"{sys.executable} -m capture dump {source} - | head -c 5000 > /dev/null; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ran.returncode in (3, 5)
    assert ran.stderr.count("\n") == 1
    assert "Broken pipe" in ran.stderr


def test_a_dump_is_not_written_to_a_terminal(source: str) -> None:
    controller, terminal = pty.openpty()
    ran = subprocess.run(
        [sys.executable, "-m", "capture", "dump", source, "-"],
        stdout=terminal, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(terminal)
    os.close(controller)
    assert ran.returncode == 2
    assert "standard output is a terminal" in ran.stderr


def test_a_source_that_is_no_vmcore_leaves_no_file(vmcore_file: WriteFile, tmp_path: Path, run: Run) -> None:
    ran = run("dump", vmcore_file(b"not a vmcore"), tmp_path / "dump")
    assert ran.status == 4
    assert ran.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vmcore.elf"]


# --- cut short


class Counting(OutputFile):
    """An output that counts the writes of a dump, and those before its header is on the disk."""

    writes = before_sync = 0
    has_header = False

    def write(self, pieces: Sequence[bytes | memoryview], offset: int) -> int:
        Counting.writes += 1
        Counting.has_header |= offset == 0
        return super().write(pieces, offset)

    def sync(self) -> None:
        if Counting.has_header and not Counting.before_sync:
            Counting.before_sync = Counting.writes
        super().sync()


@pytest.fixture
def writes(source: str, tmp_path: Path, small_steps: None) -> tuple[int, int]:  # noqa: ARG001
    """How many writes a dump of ``source`` takes: until its header is on the disk, and in all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OutputFile", Counting)
        Counting.writes = Counting.before_sync = 0
        Counting.has_header = False
        dumped(source, tmp_path / "counted")
    (tmp_path / "counted").unlink()
    assert 0 < Counting.before_sync < 9 < 20 < Counting.writes
    return Counting.before_sync, Counting.writes


def killed(source: str, target: Path, after: int, torn: bool) -> Path:
    """Make a dump and kill it at its ``after``-th write; return what is left."""
    left = Path(f"{target}.incomplete")
    left.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OutputFile", failing(PowerCut, after, torn))
        with pytest.raises(PowerCut):
            dumped(source, target)
    assert not target.exists()
    return left


@pytest.mark.parametrize("torn", [False, True], ids=["after a write", "within a write"])
def test_at_any_instant_once_its_header_is_synced_it_opens_and_no_page_is_wrong(
    torn: bool, source: str, tmp_path: Path, writes: tuple[int, int]
) -> None:
    begun, total = writes
    seen: set[int] = set()
    for after in range(begun + 1, total + 1):
        left = killed(source, tmp_path / "dump", after, torn)
        pages = written_pages(left)
        assert pages.items() <= PAGES.items()
        assert read_by_drgn(left, pages) == pages
        assert KdumpFile(left).incomplete or pages == PAGES
        seen.add(len(pages))
    assert len(seen) > 4
    assert len(PAGES) in seen


@pytest.mark.parametrize("torn", [False, True], ids=["after a write", "within a write"])
def test_before_its_header_is_synced_it_has_none_or_it_opens(
    torn: bool, source: str, tmp_path: Path, writes: tuple[int, int]
) -> None:
    begun, _ = writes
    for after in range(1, begun + 1):
        left = killed(source, tmp_path / "dump", after, torn)
        if left.read_bytes()[:5] == b"KDUMP":
            assert KdumpFile(left).incomplete
            assert written_pages(left) == {}
            drgn_reader(left)


def test_until_it_is_whole_it_is_marked_incomplete(source: str, tmp_path: Path, writes: tuple[int, int]) -> None:
    begun, total = writes
    marked = [
        KdumpFile(killed(source, tmp_path / "dump", after, False)).incomplete for after in range(begun, total + 1)
    ]
    assert marked == [True] * (total - begun) + [False]


def test_ctrl_c_at_any_write_leaves_a_readable_dump_with_status_3(
    source: str, tmp_path: Path, run: Run, writes: tuple[int, int]
) -> None:
    begun, total = writes
    most = 0
    for after in range(begun + 1, total - 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "OutputFile", interrupted_after(after))
            ran = run("dump", "--force", source, tmp_path / "dump")
        assert ran.status == 3
        assert ran.err.count("\n") == 1
        assert "interrupted" in ran.err
        assert "marked incomplete" in ran.err
        left = tmp_path / "dump.incomplete"
        assert str(left) in ran.err
        assert not (tmp_path / "dump").exists()
        dump = by_hand(left)
        assert dump.incomplete
        assert dump.pages.items() <= PAGES.items()
        assert run("verify", left, "--against", source).status == 3
        most = max(most, len(dump.pages))
    assert most > len(PAGES) // 2


def test_the_pages_that_are_counted_after_ctrl_c_are_those_in_the_dump(
    source: str, tmp_path: Path, run: Run, writes: tuple[int, int]
) -> None:
    begun, total = writes
    for after in range(begun + 1, total - 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "OutputFile", interrupted_after(after))
            ran = run("dump", "--force", source, tmp_path / "dump")
        said = re.search(r": level 1, (\d+) of (\d+) pages, (\d+) bytes", ran.err)
        assert said is not None
        left = tmp_path / "dump.incomplete"
        assert tuple(map(int, said.groups())) == (len(by_hand(left).pages), len(PAGES), left.stat().st_size)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_real_signal_leaves_a_readable_dump_with_status_3(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "vmcore.elf", tmp_path / "dump"
    source.write_bytes(elf_core([vmcoreinfo_note()], [(0, 0x10_0000, numbered(0, 6000))]))
    options = ["--no-progress", "-c", "zstd:22", "--threads", "1"]
    command = [sys.executable, "-m", "capture", "dump", *options, str(source), str(target)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    left = Path(f"{target}.incomplete")
    deadline = time.monotonic() + 20
    empty = 4 * PAGE + 24 * 6000
    # Six chunks of 30 kB each: with the second one there, the first will surely be described.
    while not (left.exists() and left.stat().st_size > empty + 45_000) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3, err
    assert "interrupted" in err
    assert err.count("\n") == 1
    expect = ElfPages(mapped(source))
    dump = by_hand(left)
    assert dump.incomplete
    assert 0 < len(dump.pages) < len(dump.descriptors) == 6000
    assert all(expect.page(pfn) == page for pfn, page in dump.pages.items())


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(
    ("error", "statuses"),
    [
        pytest.param(MemoryError(), {3}, id="MemoryError"),
        pytest.param(zstandard.ZstdError("cannot compress: Allocation error : not enough memory"), {3}, id="ZstdError"),
        pytest.param(RuntimeError("a bug"), {1, 3}, id="RuntimeError"),
    ],
)
def test_an_error_in_the_midst_leaves_every_page_written_so_far(
    error: Exception, statuses: set[int], source: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzstd says that memory ran out with an error of its own."""
    monkeypatch.setattr(codec_module, "codec", failing_codec(error))
    ran = run("dump", "--threads", "1", source, tmp_path / "dump")
    dump = by_hand(tmp_path / "dump.incomplete")
    assert dump.incomplete
    assert dump.pages == {pfn: PAGES[pfn] for pfn in list(PAGES)[:4]}
    assert ran.status in statuses
    assert ran.err.count("\n") == 1


# --- the order of pages


def test_an_order_that_cannot_be_read_back_once_loses_no_page_unseen(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that its own pass does not see is none of the last pass either."""
    reads = 0
    real = Passes._bits

    def once(passes: Passes, number: int, first_pfn: int, pages: int) -> NDArray[np.bool_]:
        nonlocal reads
        reads += 1
        with monkeypatch.context() as patch:
            if reads == 1:
                patch.setattr(os, "pread", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
            return real(passes, number, first_pfn, pages)

    monkeypatch.setattr(Passes, "_bits", once)
    report = dumped(source, tmp_path / "dump")
    assert report.failure is not None
    assert "reading the order of pages back failed: Input/output error" in report.failure
    assert KdumpFile(tmp_path / "dump.incomplete").incomplete
    assert dumped(source, tmp_path / "dump", resume=True).failure is None
    assert by_hand(tmp_path / "dump").pages == PAGES


def test_a_dump_that_lacks_a_page_for_whatever_reason_does_not_look_whole(
    source: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Passes.runs

    def all_but_the_first(passes: Passes, writer: KdumpWriter) -> Iterator[Iterator[tuple[int, int]]]:
        runs = [list(some) for some in real(passes, writer)]
        next(filter(None, runs)).pop(0)
        yield from map(iter, runs)

    monkeypatch.setattr(Passes, "runs", all_but_the_first)
    ran = run("dump", source, tmp_path / "dump")
    assert ran.status == 3
    assert re.search(r"not whole: \d+ pages that were selected were not saved", ran.err)
    assert KdumpFile(tmp_path / "dump.incomplete").incomplete


# --- a deadline


@pytest.mark.usefixtures("small_steps")
def test_when_its_time_is_over_a_dump_ends_with_what_it_has(
    tmp_path: Path, vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = random.Random(1).randbytes(60 * PAGE)
    name = vmcore_file(core([(0x10_0000, pages)]))
    ticks = iter(range(1000))
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    report = dumped(name, tmp_path / "dump", deadline=15)  # a tick a chunk, a chunk two pages
    assert report.failure == "the time that it may take is over (deadline)"
    written = written_pages(tmp_path / "dump.incomplete")
    assert 0 < len(written) <= 30
    assert written.items() <= model([(0x10_0000, pages)]).items()
    assert dumped(name, tmp_path / "dump", resume=True).failure is None
    assert by_hand(tmp_path / "dump").pages == model([(0x10_0000, pages)])


def test_a_deadline_ends_the_command_with_status_3_in_one_line(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "sparse.elf"
    source.write_bytes(core([(0x10_0000, b"x" * PAGE)]))
    raw = patched(source.read_bytes(), program_header(1, P_FILESZ), "Q", 64 << 30)
    source.write_bytes(raw)
    os.truncate(source, len(raw) + (64 << 30) - PAGE)
    started = time.monotonic()
    ran = run("dump", "-q", "-d", "0", "-c", "zlib", "--deadline", "1", source, tmp_path / "dump")
    assert time.monotonic() - started < 30
    assert (ran.status, ran.err.count("\n")) == (3, 1)
    assert "not whole: the time that it may take is over (deadline)" in ran.err


# --- full disks


@pytest.mark.usefixtures("small_steps")
def test_a_full_disk_leaves_a_readable_dump_with_status_3(tmp_path: Path, run: Run, vmcore_file: WriteFile) -> None:
    """Every size of disk, from one that does not hold the headers to one that holds all."""
    loads = [(0x10_0000, random.Random(1).randbytes(30 * PAGE) + filled(".", "."))]
    name, pages = vmcore_file(core(loads)), model(loads)
    results = []
    for kilobytes in range(16, 168, 16):
        with tmpfs(tmp_path / "disk", f"size={kilobytes}k") as disk:
            ran = run("dump", name, disk / "dump")
            results.append(ran.status)
            assert ran.err.count("\n") == 1
            if ran.status == 0:
                assert by_hand(disk / "dump").pages == pages
                continue
            assert "no room left" in ran.err
            if ran.status == 5:
                assert list(disk.iterdir()) == []
                continue
            left = disk / "dump.incomplete"
            assert written_pages(left).items() <= pages.items()
            assert KdumpFile(left).incomplete
            assert read_by_drgn(left, written_pages(left)) == written_pages(left)
            assert run("verify", left, "--against", name).status == 3
    assert results == sorted(results, key=[5, 3, 0].index)
    assert set(results) == {0, 3, 5}


def full_disk_report(tmp_path: Path, name: str, kilobytes: int) -> Iterator[tuple[DumpReport, Path]]:
    with tmpfs(tmp_path / "disk", f"size={kilobytes}k") as disk:
        report = dumped(name, disk / "dump")
        yield report, disk / "dump.incomplete"


@pytest.mark.usefixtures("small_steps")
def test_a_full_disk_is_reported_as_it_is(
    tmp_path: Path, vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest's size and SHA-256 are of what is on the disk."""
    monkeypatch.setattr(output_module, "HASH_BLOCK", 5000)
    name = vmcore_file(core([(0x10_0000, random.Random(1).randbytes(30 * PAGE) + filled(".", "."))]))
    for kilobytes in (60, 80, 100, 120):
        for report, left in full_disk_report(tmp_path, name, kilobytes):
            assert report.failure is not None
            assert report.path == left
            assert report.size == left.stat().st_size
            assert report.digests == sha256_blocks(left.read_bytes(), 5000)


@pytest.mark.usefixtures("small_steps")
def test_the_pages_that_are_counted_on_a_full_disk_are_those_in_the_dump(
    tmp_path: Path, vmcore_file: WriteFile
) -> None:
    name = vmcore_file(core([(0x10_0000, random.Random(1).randbytes(30 * PAGE) + filled(".", "."))]))
    for kilobytes in (60, 80, 100, 120):
        for report, left in full_disk_report(tmp_path, name, kilobytes):
            assert report.statistics.pages == len(written_pages(left))


@pytest.mark.usefixtures("small_steps")
def test_a_full_disk_keeps_some_room_for_the_manifest(tmp_path: Path, vmcore_file: WriteFile, run: Run) -> None:
    name = vmcore_file(core([(0x10_0000, random.Random(1).randbytes(30 * PAGE))]))
    with tmpfs(tmp_path / "disk", "size=100k") as disk:
        assert run("dump", name, disk / "dump").status == 3
        (disk / "manifest.json").write_bytes(b"m" * PAGE)


def test_a_dump_that_is_cut_short_has_what_a_crash_is_explained_with(tmp_path: Path, corpus_vmcore: Path) -> None:
    """Kernel image, mem_map, page tables, log, stacks, slab of a real machine, where there is room for no more."""
    level31 = DumpOptions(levels=(31,), progress=False)
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        whole = write_dump(vmcore, tmp_path / "whole", level31)
        turns: list[set[int]] = [set() for _ in range(LAST)]
        for window in PageFilter(vmcore).windows():
            for turn, pfns in enumerate(turns):
                there = window.there & (window.kinds == KERNEL) & (window.turns == turn)
                pfns |= set((window.first_pfn + np.flatnonzero(there)).tolist())
        precious = turns[TABLES] | turns[FIRST] | turns[TYPED] | turns[SLAB]
        last = max(
            offset + size for pfn, (offset, size, *_) in by_hand(whole.path).descriptors.items() if pfn in precious
        )
        with file_size_limit(last + PAGE):
            part = write_dump(vmcore, tmp_path / "part", level31)
        linear_maps = vmcore.image.linear_maps
    assert part.failure is not None
    written = written_pages(part.path)
    assert min(map(len, turns[FIRST:])) > 1000
    assert 10 < len(turns[TABLES]) < 1000
    assert precious <= set(written)
    assert len(written) < whole.pages
    assert len(precious) + 500 > len(written)
    # To read them where the kernel had them, drgn goes through the page tables of the direct map.
    reader = drgn.Program()
    reader.set_core_dump(str(part.path))
    for linear in linear_maps:
        for pfn in sorted(precious & {*range(linear.physical // PAGE, (linear.physical + linear.size) // PAGE)}):
            virtual = linear.virtual + pfn * PAGE - linear.physical
            assert reader.read(virtual, PAGE) == written[pfn], hex(virtual)


def test_drgn_reads_what_there_is_when_a_dump_is_killed_while_it_describes_its_first_pages(
    tmp_path: Path, corpus_vmcore: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page tables are described before all else, wherever in the table they lie."""
    offsets: list[int] = []

    class Noted(OutputFile):
        def write(self, pieces: Sequence[bytes | memoryview], offset: int) -> int:
            offsets.append(offset)
            return super().write(pieces, offset)

    with monkeypatch.context() as patch:
        patch.setattr(module, "OutputFile", Noted)
        whole = by_hand(dumped(str(corpus_vmcore), tmp_path / "whole").path)
    table = range(whole.data_start - DESCRIPTOR_BYTES * len(whole.descriptors), whole.data_start)
    described = [number for number, offset in enumerate(offsets, 1) if offset in table]
    seen = set()
    for after in described[1:12]:
        left = killed(str(corpus_vmcore), tmp_path / "dump", after, torn=False)
        pages = written_pages(left)
        seen.add(len(pages))
        if len(pages) > 500:  # others than page tables
            some = [*pages][:: len(pages) // 50]
            assert read_by_drgn(left, some) == {pfn: pages[pfn] for pfn in some}, after
    assert len(seen) > 4
    assert max(seen) > 500


@pytest.mark.parametrize("room", [1 << 18, 1 << 20, 4 << 20])
def test_drgn_reads_a_dump_that_was_cut_short_early(room: int, tmp_path: Path, corpus_vmcore: Path) -> None:
    """It looks for kernel text in the page tables before its first read: these are saved before all else."""
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        level31 = DumpOptions(levels=(31,), progress=False)
        start = by_hand(write_dump(vmcore, tmp_path / "whole", level31).path).data_start
        with file_size_limit(start + room):
            part = write_dump(vmcore, tmp_path / "part", level31)
    pages = written_pages(part.path)
    assert 50 < len(pages) < 2500
    some = [min(pages), max(pages)]
    assert read_by_drgn(part.path, some) == {pfn: pages[pfn] for pfn in some}


@pytest.mark.usefixtures("small_steps")
def test_a_file_that_may_not_grow_further_is_reported_as_it_is(
    tmp_path: Path, vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EFBIG, as from a file system that ends at 4 GiB a file."""
    monkeypatch.setattr(output_module, "HASH_BLOCK", 5000)
    name = vmcore_file(core([(0x10_0000, random.Random(1).randbytes(30 * PAGE))]))
    with file_size_limit(90_000):
        report = dumped(name, tmp_path / "dump")
    left = tmp_path / "dump.incomplete"
    assert report.failure is not None
    assert report.failure.endswith(
        "File too large; this file system takes no larger file (vfat: 4 GiB): choose another target"
    )
    assert KdumpFile(left).incomplete
    assert 10 < len(written_pages(left)) < 30
    assert report.statistics.pages == len(written_pages(left))
    assert report.size == left.stat().st_size
    assert report.digests == sha256_blocks(left.read_bytes(), 5000)


# --- sources that are not whole


def test_a_truncated_vmcore_is_saved_marked_and_has_status_3(vmcore_file: WriteFile, tmp_path: Path, run: Run) -> None:
    name = vmcore_file(core()[: -2 * PAGE - 100])
    ran = run("dump", name, tmp_path / "dump")
    assert ran.status == 3
    assert "bytes missing in the source" in ran.err
    dump = by_hand(tmp_path / "dump")
    assert dump.incomplete
    source = ElfPages(mapped(Path(name)))
    assert dump.pages.keys() <= set(source.pfns())
    whole = {pfn: page for pfn, page in PAGES.items() if pfn < 0x407}
    assert dump.pages.items() >= whole.items()


def test_pages_that_cannot_be_read_are_zeros_and_the_dump_is_marked(source: str, tmp_path: Path) -> None:
    """The vmcore is cut after it was opened: pages fail one by one, as poisoned memory does."""
    with open_vmcore(source) as vmcore:
        os.truncate(source, Path(source).stat().st_size - 3 * PAGE)
        report = write_dump(vmcore, tmp_path / "dump", dump_options())
    assert not report.whole
    assert report.statistics.unreadable.count == 4  # two of the second segment, and both pages of the third
    assert "4 pages unreadable" in (report.shortfall() or "")
    dump = by_hand(report.path)
    assert dump.incomplete
    lost = {0x407, 0x408, 0x600, 0x601}
    assert dump.pages == {pfn: bytes(PAGE) if pfn in lost else page for pfn, page in PAGES.items()}


def test_a_vmcore_without_notes_is_saved_all_the_same(vmcore_file: WriteFile, tmp_path: Path, run: Run) -> None:
    name = vmcore_file(elf_core([], [(0, 0x10_0000, filled("a", "."))]))
    ran = run("dump", name, tmp_path / "dump")
    assert ran.status == 0
    assert "VMCOREINFO" in ran.err
    assert by_hand(tmp_path / "dump").pages == {0x100: filled("a"), 0x101: filled(".")}


def test_a_dump_opens_though_the_names_of_the_kernel_could_not_be_read(vmcore_file: WriteFile, tmp_path: Path) -> None:
    """libkdumpfile learns the architecture from utsname, which it believes only with a release, a version and a machine
    (uts_looks_sane): the fields that we cannot know must not be empty."""
    name = vmcore_file(simple_core("a", "b"))
    dumped(name, tmp_path / "dump")
    raw = (tmp_path / "dump").read_bytes()
    fields = [raw[12 + 65 * number : 12 + 65 * (number + 1)].split(b"\0")[0] for number in range(6)]
    assert (fields[0], fields[2], fields[4]) == (b"Linux", b"6.1.0-test", b"x86_64")
    assert fields[3]
    assert read_by_drgn(tmp_path / "dump", [0x100]) == {0x100: filled("a")}


def test_what_the_header_says_comes_from_the_notes(vmcore_file: WriteFile, tmp_path: Path) -> None:
    dumped(vmcore_file(simple_core("a", "b")), tmp_path / "dump")
    raw = (tmp_path / "dump").read_bytes()
    assert raw[12:17] == b"Linux"
    assert raw[12 + 130 : 12 + 140] == b"6.1.0-test"
    assert struct.unpack_from("<q", raw, 408) == (1_700_000_000,)
    assert struct.unpack_from("<i", raw, 460) == (2,)


# --- real vmcores


@dataclass(frozen=True)
class Real:
    vmcore: Path
    dump: Path
    pages: ElfPages


@pytest.fixture(scope="module")
def real(corpus_vmcore: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """A real vmcore and its dump as it is made by default."""
    target = tmp_path_factory.mktemp("real") / "dump"
    assert dumped(str(corpus_vmcore), target).whole
    yield Real(corpus_vmcore, target, ElfPages(mapped(corpus_vmcore)))
    target.unlink()


def test_every_page_of_a_real_vmcore_is_read_by_drgn(real: Real) -> None:
    read = drgn_reader(real.dump)
    assert all(read(pfn * PAGE, PAGE) == real.pages.page(pfn) for pfn in real.pages.pfns())


def test_drgn_finds_no_page_that_the_vmcore_does_not_have(real: Real) -> None:
    read, there = drgn_reader(real.dump), set(real.pages.pfns())
    absent = [pfn for pfn in range(max(there) + 2) if pfn not in there]
    assert absent
    for pfn in absent[:: max(1, len(absent) // 200)]:
        with pytest.raises(drgn.FaultError):
            read(pfn * PAGE, 1)


def test_verify_finds_a_real_dump_equal_to_its_source(real: Real, run: Run) -> None:
    ran = run("verify", real.dump, "--against", real.vmcore, "-q", "--json")
    assert ran.status == 0
    found = json.loads(ran.out)
    assert (found["pages"], found["good"], found["compared"]) == (len(real.pages.pfns()), True, True)


@pytest.mark.parametrize(("name", "compression", "level"), [("linux-6.1-la57", "zstd", 0), ("linux-6.12", "zlib", 0)])
def test_other_levels_and_codecs_are_read_by_drgn(
    name: str, compression: str, level: int, corpus_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every 61st page; zlib at level 1 is below, beside makedumpfile's."""
    vmcore = corpus_file(name)
    report = dumped(str(vmcore), tmp_path / "dump", compression=compression, level=level)
    assert report.whole
    read, pages = drgn_reader(tmp_path / "dump"), ElfPages(mapped(vmcore))
    pfns = pages.pfns()
    assert report.pages == len(pfns)
    assert all(read(pfn * PAGE, PAGE) == pages.page(pfn) for pfn in [*pfns[::61], pfns[-1]])


@pytest.fixture(scope="module")
def twins(corpus_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A vmcore, our zlib dump of it and makedumpfile's."""
    vmcore, folder = corpus_file("linux-6.1-la57"), tmp_path_factory.mktemp("twins")
    makedumpfile("-c", "-d", "1", vmcore, folder / "theirs")
    dumped(str(vmcore), folder / "ours", compression="zlib")
    return vmcore, folder / "ours", folder / "theirs"


def test_the_header_and_the_notes_are_those_that_makedumpfile_writes(twins: tuple[Path, Path, Path]) -> None:
    _, ours, theirs = (path.open("rb").read(4 * PAGE) if path.stat().st_size else b"" for path in twins)
    assert ours[:PAGE] == theirs[:PAGE]
    sub = slice(PAGE, PAGE + 104)
    (notes_at, notes_size) = struct.unpack_from("<QQ", theirs, PAGE + 48)
    assert ours[notes_at : notes_at + notes_size] == theirs[notes_at : notes_at + notes_size]
    mine, other = bytearray(ours[sub]), bytearray(theirs[sub])
    for end_pfn in (24, 88):  # only of meaning in split dumps; makedumpfile leaves 0
        mine[end_pfn : end_pfn + 8] = other[end_pfn : end_pfn + 8] = bytes(8)
    assert mine == other


def test_the_bitmaps_are_those_that_makedumpfile_writes_but_for_the_partial_page(
    twins: tuple[Path, Path, Path],
) -> None:
    """The first 640 KiB end within PFN 0x9f: we keep what there is of it."""
    _, ours, theirs = (np.fromfile(path, dtype=np.uint8, count=11 * PAGE)[3 * PAGE :] for path in twins)
    differ = np.flatnonzero(np.unpackbits(ours ^ theirs, bitorder="little"))
    assert differ.tolist() == [0x9F, 4 * PAGE * 8 + 0x9F]


def test_makedumpfile_filters_our_zlib_dump_again(twins: tuple[Path, Path, Path], tmp_path: Path) -> None:
    vmcore, ours, _ = twins
    makedumpfile("-c", "-d", "1", ours, tmp_path / "again")
    pages = ElfPages(mapped(vmcore))
    for dump in (ours, tmp_path / "again"):
        read = drgn_reader(dump)
        assert all(read(pfn * PAGE, PAGE) == pages.page(pfn) for pfn in pages.pfns()[::61])


def test_makedumpfile_takes_the_log_from_our_zlib_dump(twins: tuple[Path, Path, Path], tmp_path: Path) -> None:
    vmcore, ours, _ = twins
    for name, source in (("ours", ours), ("theirs", vmcore)):
        makedumpfile("--dump-dmesg", source, tmp_path / name)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert b"Linux version 6.1" in (tmp_path / "ours").read_bytes()


# --- the page filter and the dump


def test_a_filter_that_fails_costs_the_level_and_not_the_dump(
    vmcore_file: WriteFile, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'numpy.ma'")

    monkeypatch.setattr(PageFilter, "verdict", fail)
    ran = run("dump", "-d", "31", vmcore_file(busy_kernel().core()), tmp_path / "dump")
    assert ran.status == 0
    assert "filter check failed: internal error: ModuleNotFoundError" in ran.err
    assert "making level 1 instead of 31" in ran.err
    assert by_hand(tmp_path / "dump").pages.keys() == set(range(PAGES_OF_KERNEL))


@pytest.fixture
def distrusted(vmcore_file: WriteFile) -> str:
    """A kernel whose free pages are not those that it counts."""
    return vmcore_file(busy_kernel().core(free={10: 6}))


def test_a_level_that_is_not_trusted_is_lowered_and_said(distrusted: str, tmp_path: Path, run: Run) -> None:
    ran = run("dump", "-d", "31", distrusted, tmp_path / "dump")
    assert ran.status == 0
    lines = [line.removeprefix("vmcapture: ") for line in ran.err.splitlines()]
    assert lines[:2] == [
        "filter check failed: 2056 free pages found, the kernel counts 6144",
        "making level 15 instead of 31: saving more rather than less",
    ]
    dump = by_hand(tmp_path / "dump")
    assert dump.level == 15
    assert set(range(2048, 4096)) <= dump.pages.keys()


def test_trust_filter_makes_the_level_all_the_same(distrusted: str, tmp_path: Path, run: Run) -> None:
    ran = run("dump", "-d", "31", "--trust-filter", distrusted, tmp_path / "dump")
    assert ran.status == 0
    assert "making level 31 all the same (--trust-filter)" in ran.err
    dump = by_hand(tmp_path / "dump")
    assert dump.level == 31
    assert not set(range(2048, 4096)) & dump.pages.keys()


def test_the_manifest_says_what_the_filter_did(distrusted: str, tmp_path: Path, run: Run) -> None:
    assert run("save", "-q", "-d", "31", "--source", distrusted, tmp_path).status == 3  # it has no log
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    found = json.loads((folder / "manifest.json").read_text())["dump"]
    assert found["level"] == 15
    assert found["filter"]["level_asked"] == 31
    assert found["filter"]["checks_failed"] == ["2056 free pages found, the kernel counts 6144"]
    assert found["filter"]["classes"]["free"] == 2056
    assert sum(found["filter"]["classes"].values()) == PAGES_OF_KERNEL


@pytest.mark.parametrize(("room", "taken"), [(1 << 40, 0), (220_000, 27), (1000, 31)])
def test_of_several_levels_the_first_that_fits_is_made(
    room: int, taken: int, vmcore_file: WriteFile, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump of this kernel has 250 KB at level 0; the last level is made whatever the room is."""
    monkeypatch.setattr(module, "_room", lambda _directory: room)
    kernel = vmcore_file(busy_kernel().core())
    ran = run("dump", "-d", "0,27,31", "-c", "zstd", kernel, tmp_path / "dump")
    assert ran.status == 0
    assert f"taking level {taken}" in ran.err
    assert by_hand(tmp_path / "dump").level == taken


def test_the_size_that_is_predicted_is_about_the_size_that_is_made(
    corpus_vmcore: Path, tmp_path: Path, run: Run
) -> None:
    predicted = {entry["asked"]: entry for entry in json.loads(run("info", "--json", corpus_vmcore).out)["predicted"]}
    for level in (1, 17, 31):
        report = dumped(str(corpus_vmcore), tmp_path / str(level), level=level)
        assert predicted[level]["pages"] == report.pages
        assert 0.9 < predicted[level]["bytes"] / report.size < 1.1


def test_mem_map_of_pages_that_are_left_out_can_be_left_out(vmcore_file: WriteFile, tmp_path: Path, run: Run) -> None:
    """A page of mem_map describes 64 pages: it stays when the dump has one of them."""
    kernel = vmcore_file(busy_kernel().core())
    assert run("dump", "-q", "-d", "31", kernel, tmp_path / "with").status == 0
    assert run("dump", "-q", "-d", "31", "--exclude-vmemmap", kernel, tmp_path / "without").status == 0
    kept, fewer = (set(by_hand(tmp_path / name).pages) for name in ("with", "without"))
    assert fewer < kept
    table = range(MEM_MAP_PFN, MEM_MAP_PFN + MEM_MAP_PAGES)
    gone = kept - fewer
    assert gone
    assert gone <= set(table)
    for page, pfn in enumerate(table):
        described = set(range(page * 64, page * 64 + 64))
        assert (pfn in fewer) == bool(described & fewer), page
    assert by_hand(tmp_path / "without").status & 0x10  # DUMP_DH_EXCLUDED_VMEMMAP
    assert not by_hand(tmp_path / "with").status & 0x10


def test_memory_does_not_grow_with_fragmentation_of_what_is_kept(vmcore_file: WriteFile, tmp_path: Path) -> None:
    """Every second page is kept: as many runs as there can be."""
    kernel = SmallKernel()
    for pfn in range(2048, 4096, 2):
        kernel.array.free(pfn, 0)
    report = dumped(vmcore_file(kernel.core()), tmp_path / "dump", level=31)
    assert report.whole
    assert report.pages == 4096 - 1024
    assert len(by_hand(tmp_path / "dump").pages) == report.pages


@pytest.mark.parametrize("level", [1, 31])
def test_one_stray_page_far_above_all_others_costs_no_time_and_no_memory(
    level: int, vmcore_file: WriteFile, tmp_path: Path
) -> None:
    """A damaged program header: 2^38 PFNs, of which four are there; bitmaps of 32 GiB, all of them holes."""
    core = elf_core([vmcoreinfo_note()], [(0, 0x10_0000, filled("a", "b", "c")), (0, 1 << 50, filled("d"))])
    started = time.process_time()
    report = dumped(vmcore_file(core), tmp_path / "out", level=level)
    assert report.whole
    assert report.pages_written == 4
    assert time.process_time() - started < 10
    table = struct.unpack_from("<I", (tmp_path / "out").open("rb").read(444), 440)
    assert table == (0xFFFF_FFFF,)
    assert (tmp_path / "out").stat().st_blocks * 512 < 1 << 20
