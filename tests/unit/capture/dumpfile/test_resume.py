"""Going on with a dump that was cut short: what comes out is the dump that was never cut."""

from __future__ import annotations

import random
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.dump import DumpReport, write_dump
from capture.dumpfile import kdump
from capture.dumpfile import output as output_module
from capture.dumpfile import reader as reader_module
from capture.dumpfile import resume as resume_module
from capture.dumpfile import writer as writer_module
from capture.dumpfile.passes import Passes
from capture.dumpfile.reader import NOT_WRITTEN, KdumpFile
from capture.dumpfile.writer import KdumpWriter
from capture.errors import TargetError
from capture.memory import image as image_module
from capture.options import DumpOptions
from capture.selftest import elf_core
from capture.vmcore import open_vmcore
from tests.builders import DIRECT_MAP, PAGE, READABLE_BY_DRGN, filled, patched, prstatus_note, vmcoreinfo_note
from tests.dumps import DESCRIPTOR_BYTES, INCOMPLETE, STATUS, SUB_HDR_SIZE
from tests.faults import file_size_limit
from tests.outcome import Run, sha256_blocks
from tests.readers import HandRead, bitmaps, by_hand, model, read_by_drgn

WriteFile = Callable[..., str]

LOADS = [
    (0x10_0000, filled(".", "a", "b", "c") + random.Random(1).randbytes(39 * PAGE)),
    (0x80_0000, filled(*"abcdefgh") * 5),
]
PAGES = model(LOADS)


def core(crash_time: int = 1_700_000_000, pid: int = 7) -> bytes:
    notes = prstatus_note(pid, 1) + vmcoreinfo_note({**READABLE_BY_DRGN, "CRASHTIME": crash_time})
    return elf_core([notes], [(DIRECT_MAP + physical, physical, data) for physical, data in LOADS])


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and many rounds of descriptors in a small vmcore."""
    monkeypatch.setattr(image_module, "CHUNK_PAGES", 2)
    monkeypatch.setattr(writer_module, "SYNC_PAGES", 5)
    monkeypatch.setattr(output_module, "_TABLE_BLOCK", 8)


@pytest.fixture
def name(vmcore_file: WriteFile) -> str:
    return vmcore_file(core())


def dumped(
    source: str, target: Path, *, said: list[str] | None = None, level: int = 1, resume: bool = True
) -> DumpReport:
    options = DumpOptions(levels=(level,), progress=False, resume=resume)
    with open_vmcore(source) as vmcore:
        return write_dump(vmcore, target, options, (said if said is not None else []).append)


def cut(source: str, target: Path, size: int) -> Path:
    """A dump that had room for ``size`` bytes only."""
    with file_size_limit(size):
        report = dumped(source, target, resume=False)
    assert report.failure is not None
    return report.path


def same(found: HandRead, expected: HandRead) -> bool:
    """Whether two dumps say the same, wherever their data lies."""
    return (found.pages, found.status, found.level, list(found.descriptors)) == (
        expected.pages, expected.status, expected.level, list(expected.descriptors),
    )  # fmt: skip


def test_wherever_it_was_cut_it_ends_as_the_dump_that_was_not(name: str, tmp_path: Path) -> None:
    whole = dumped(name, tmp_path / "whole")
    expected = by_hand(whole.path)
    assert expected.pages == PAGES
    there = []
    for size in range(8 * PAGE, whole.size, 3 * PAGE + 100):
        target = tmp_path / f"cut-{size}"
        unfinished = cut(name, target, size)
        before = len(by_hand(unfinished).pages)
        said: list[str] = []
        report = dumped(name, target, said=said)
        assert (report.failure, report.path, report.pages_written) == (None, target, len(PAGES))
        assert said == [f"{unfinished}: {before} of {len(PAGES)} pages (level 1) are there already; going on"]
        assert report.statistics.pages == len(PAGES) - before
        assert same(by_hand(target), expected)
        assert not unfinished.exists()
        there.append(before)
    assert there == sorted(there)
    assert there[0] < 10 < 30 < there[-1] < len(PAGES)


def test_it_may_be_cut_again_and_again(name: str, tmp_path: Path) -> None:
    whole = dumped(name, tmp_path / "whole")
    target = tmp_path / "dump"
    cut(name, target, whole.size // 4)
    counts = []
    for part in (2, 3):
        with file_size_limit(whole.size * part // 4):
            counts.append(dumped(name, target).pages_written)
    assert dumped(name, target).failure is None
    assert counts == sorted(counts)
    assert same(by_hand(target), by_hand(whole.path))


def test_pages_that_were_damaged_meanwhile_are_saved_again(name: str, tmp_path: Path) -> None:
    target = tmp_path / "dump"
    unfinished = cut(name, target, dumped(name, tmp_path / "whole").size // 2)
    before = by_hand(unfinished)
    raw = bytearray(unfinished.read_bytes())
    compressed = [pfn for pfn, (_, size, flags, _) in before.descriptors.items() if flags == kdump.COMPRESSED_ZSTD]
    for pfn in compressed:
        offset, size, _, _ = before.descriptors[pfn]
        raw[offset + size - 1] ^= 0xFF
    unfinished.write_bytes(raw)
    said: list[str] = []
    assert dumped(name, target, said=said).failure is None
    right = len(before.pages) - len(compressed)
    assert said[0].endswith(f"{right} of {len(PAGES)} pages (level 1) are there already; "
                            f"{len(compressed)} are damaged and saved again; going on")  # fmt: skip
    assert by_hand(target).pages == PAGES


def test_hashes_are_those_of_the_finished_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "HASH_BLOCK", 5000)
    cut(name, tmp_path / "dump", 100_000)
    report = dumped(name, tmp_path / "dump")
    assert report.digests == sha256_blocks(report.path.read_bytes(), 5000)
    assert report.size == report.path.stat().st_size


def test_level_and_pages_stay_those_of_the_dump(name: str, tmp_path: Path) -> None:
    unfinished = cut(name, tmp_path / "dump", 100_000)
    expected = bitmaps(unfinished)
    report = dumped(name, tmp_path / "dump", level=0)
    assert report.level == 1
    assert all((one == other).all() for one, other in zip(bitmaps(report.path), expected, strict=True))


@pytest.mark.parametrize("first", ["zlib", "zstd", "none"])
def test_pages_may_be_compressed_another_way_from_there_on(first: str, name: str, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "dump"
    with file_size_limit(100_000):
        assert run("dump", "-q", "-c", first, name, target).status == 3
    assert run("dump", "-q", "-c", "zstd", "--resume", name, target).status == 0
    dump = by_hand(target)
    assert dump.pages == PAGES
    used = {flags for _, _, flags, _ in dump.descriptors.values()}
    assert all(flags & dump.status == flags for flags in used)
    assert not dump.incomplete
    assert read_by_drgn(target, PAGES) == PAGES


def test_where_nothing_was_begun_it_begins(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    report = dumped(name, tmp_path / "dump", said=said)
    assert by_hand(report.path).pages == PAGES
    assert not any("going on" in line for line in said)


@pytest.mark.parametrize("change", ["time", "registers"])
def test_another_crash_is_not_gone_on_with(change: str, name: str, vmcore_file: WriteFile, tmp_path: Path) -> None:
    unfinished = cut(name, tmp_path / "dump", 100_000)
    before = unfinished.read_bytes()
    other = vmcore_file(core(1_700_000_001) if change == "time" else core(pid=8))
    with pytest.raises(TargetError, match="cannot go on with it: it is of another crash"):
        dumped(other, tmp_path / "dump")
    assert unfinished.read_bytes() == before


@pytest.mark.parametrize("left", [b"", b"KDUMP", b"text" * 5000], ids=["empty", "cut", "text"])
def test_what_is_no_unfinished_dump_is_left_alone(left: bytes, name: str, tmp_path: Path, run: Run) -> None:
    unfinished = tmp_path / "dump.incomplete"
    unfinished.write_bytes(left)
    before = unfinished.read_bytes()
    ran = run("dump", "--resume", name, tmp_path / "dump")
    assert ran.status == 5
    assert ran.err.count("\n") == 1
    assert "cannot go on with it" in ran.err
    assert "use --force" in ran.err
    assert unfinished.read_bytes() == before
    assert not (tmp_path / "dump").exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_dump_that_lacks_its_name_only_gets_it(damaged: bool, name: str, tmp_path: Path) -> None:
    """The power went between the last write and the name; what is damaged since then is saved again, behind a mark."""
    whole = dumped(name, tmp_path / "whole")
    expected = by_hand(whole.path)
    unfinished = tmp_path / "dump.incomplete"
    raw = bytearray(whole.path.read_bytes())
    if damaged:
        raw[-1] ^= 0xFF
    unfinished.write_bytes(raw)
    said: list[str] = []
    report = dumped(name, tmp_path / "dump", said=said)
    assert same(by_hand(report.path), expected)
    assert (report.failure, report.path) == (None, tmp_path / "dump")
    assert report.statistics.pages == damaged
    assert ("1 are damaged" in said[0]) == damaged
    assert not unfinished.exists()


def test_a_finished_dump_is_marked_again_before_anything_of_it_is_forgotten(name: str, tmp_path: Path) -> None:
    unfinished = tmp_path / "dump.incomplete"
    raw = bytearray(dumped(name, tmp_path / "whole").path.read_bytes())
    raw[-1] ^= 0xFF
    unfinished.write_bytes(raw)
    marked: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KdumpWriter, "forget", lambda *_arguments: marked.append(by_hand_incomplete(unfinished)))
        dumped(name, tmp_path / "dump")
    assert marked == [True]


def by_hand_incomplete(path: Path) -> bool:
    return bool(struct.unpack_from("<I", path.read_bytes(), STATUS)[0] & INCOMPLETE)


def test_a_finished_dump_is_not_written_over(name: str, tmp_path: Path, run: Run) -> None:
    dumped(name, tmp_path / "dump")
    ran = run("dump", "--resume", name, tmp_path / "dump")
    assert (ran.status, "exists already" in ran.err) == (5, True)
    assert run("dump", "--resume", "--force", name, tmp_path / "dump").status == 2


def test_without_room_for_what_is_saved_already_nothing_is_changed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = cut(name, tmp_path / "dump", 100_000)
    before = unfinished.read_bytes()

    def full(_passes: Passes, _pfns: object) -> None:
        raise TargetError("no room")

    monkeypatch.setattr(Passes, "note_done", full)
    with pytest.raises(TargetError, match="no room"):
        dumped(name, tmp_path / "dump")
    assert unfinished.read_bytes() == before


def test_a_filter_that_fails_costs_the_order_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(name, tmp_path / "dump", 100_000)
    monkeypatch.setattr("capture.dump.PageFilter", lambda _vmcore: 1 / 0)
    report = dumped(name, tmp_path / "dump")
    assert report.failure is None
    assert report.statistics.pages < len(PAGES)
    assert by_hand(report.path).pages == PAGES


def test_a_dump_that_was_killed_is_gone_on_with(tmp_path: Path, corpus_file: Callable[[str], Path]) -> None:
    """SIGKILL, in the middle of a real one; and the result is the dump that nobody killed, page for page."""
    source, target = corpus_file("linux-6.12"), tmp_path / "dump"
    whole = dumped(str(source), tmp_path / "whole")
    command = [sys.executable, "-m", "capture", "dump", "-q", "--no-progress", "-c", "zlib", str(source), str(target)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        unfinished = target.with_name("dump.incomplete")
        while not unfinished.exists() or unfinished.stat().st_size < whole.size // 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = len(by_hand(unfinished).pages)
    assert 0 < before < whole.pages
    report = dumped(str(source), target)
    assert report.statistics.pages == whole.pages - before
    assert by_hand(target).pages == by_hand(whole.path).pages


def test_the_deadline_holds_while_a_dump_is_read_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read back what was saved may take as long as to save it did. What is there stays, for the next time."""
    whole = dumped(name, tmp_path / "whole")
    unfinished = cut(name, tmp_path / "dump", whole.size * 3 // 4)
    before = unfinished.read_bytes()
    monkeypatch.setattr(reader_module, "BATCH_PAGES", 10)
    ticks = iter(range(1000))
    monkeypatch.setattr(resume_module, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    said: list[str] = []
    options = DumpOptions(progress=False, resume=True, deadline=3)  # a tick a batch; long ago on all other clocks
    with open_vmcore(name) as vmcore:
        report = write_dump(vmcore, tmp_path / "dump", options, said.append)
    assert report.failure == "the time that it may take is over (deadline)"
    assert said == [f"{unfinished}: the time was over after 30 of {len(PAGES)} pages were read back; it stays as it is"]
    assert unfinished.read_bytes() == before
    assert same(by_hand(dumped(name, tmp_path / "dump").path), by_hand(whole.path))


def test_what_lies_between_memory_far_apart_is_not_gone_through_again_and_again(
    tmp_path: Path, vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine may have a second socket's memory at 2^46; its bitmaps are gigabytes of holes. Reads are counted."""
    loads = [(0x10_0000, LOADS[0][1]), (1 << 38, LOADS[1][1])]
    notes = prstatus_note(7, 1) + vmcoreinfo_note(READABLE_BY_DRGN)
    source = vmcore_file(elf_core([notes], [(DIRECT_MAP + physical, physical, data) for physical, data in loads]))
    reads = []
    read_back = output_module.OutputFile.read_back

    def counted(self: output_module.OutputFile, offset: int, length: int) -> bytes:
        reads.append(offset)
        return read_back(self, offset, length)

    monkeypatch.setattr(output_module.OutputFile, "read_back", counted)
    assert dumped(source, tmp_path / "whole", resume=False).failure is None
    new, reads[:] = len(reads), []
    unfinished = cut(source, tmp_path / "dump", (tmp_path / "whole").stat().st_size - 20 * PAGE)
    before = len(by_hand(unfinished).pages)
    assert 0 < before < len(PAGES)
    reads.clear()
    report = dumped(source, tmp_path / "dump")
    assert (report.failure, report.pages_found) == (None, before)
    assert by_hand(report.path).pages == model(loads)
    assert len(reads) < 2 * new < 500  # there are 512 windows to be looked at, again and again


def test_a_dump_whose_header_points_elsewhere_is_left_alone(name: str, tmp_path: Path) -> None:
    """What is appended would lie where no reader of that header looks: a whole dump of nothing."""
    unfinished = cut(name, tmp_path / "out", 100_000)
    damaged = patched(unfinished.read_bytes(), SUB_HDR_SIZE, "i", 8)
    unfinished.write_bytes(damaged)
    with pytest.raises(TargetError, match="its header is damaged; remove it, or use --force"):
        dumped(name, tmp_path / "out")
    assert unfinished.read_bytes() == damaged


@pytest.mark.parametrize("torn", [False, True], ids=["", "cut off within a descriptor"])
def test_data_that_lies_among_the_descriptors_is_saved_again(torn: bool, name: str, tmp_path: Path) -> None:
    """Bits that the bitmaps had not make the table longer: over data of the first pages, which are written over."""
    unfinished = cut(name, tmp_path / "out", 100_000)
    data = bytearray(unfinished.read_bytes())
    with KdumpFile(unfinished) as dump:
        bitmaps_at, table = (dump.bitmap1, dump.bitmap2), dump.descriptor_table
    for start in bitmaps_at:
        data[start + 0x200 // 8 : start + 0x700 // 8] = b"\xff" * 0xA0
    if torn:  # that of a page that there is not
        data[table + 50 * DESCRIPTOR_BYTES :] = b"\xff" * 12
    unfinished.write_bytes(data)
    report = dumped(name, tmp_path / "out")
    assert report.failure is not None  # pages that there are not cannot be saved
    with KdumpFile(report.path) as dump:
        assert {reason for batch in dump.pages() for reason in batch.bad.values()} == {NOT_WRITTEN}
    found = by_hand(report.path)
    assert {pfn: found.pages[pfn] for pfn in PAGES} == PAGES
