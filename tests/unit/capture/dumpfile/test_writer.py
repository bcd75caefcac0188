"""The writer: every field, every bit, and what a power cut at any moment leaves."""

from __future__ import annotations

import errno
import os
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dumpfile import kdump, output, selection, writer
from capture.dumpfile.output import Output, OutputFile
from capture.dumpfile.reader import NOT_WRITTEN, KdumpFile
from capture.dumpfile.writer import DumpPlan, KdumpWriter, PackedPages
from capture.errors import TargetError
from capture.notes.elfnote import Note, Notes
from tests.builders import PAGE, filled, new_utsname, numbered, prstatus_note, vmcoreinfo_note, vmcoreinfo_text
from tests.dumps import DESCRIPTOR_BYTES, INCOMPLETE, MAX_MAPNR, STATUS, SUB_HDR_SIZE, ZLIB, stored_checksum
from tests.faults import Step, after_power_cut, raising, recorded
from tests.readers import by_hand

CPU, INFO, TEXT = prstatus_note(7, 1000), vmcoreinfo_note(), vmcoreinfo_text()
TEXT_AT = len(CPU) + 12 + 12  # behind struct elf_note and "VMCOREINFO\0", padded to 4
NOTES = Notes(
    CPU + INFO,
    (Note(b"CORE", 1, CPU[20:], 20, 0), Note(b"VMCOREINFO", 0, TEXT, TEXT_AT, 0)),
    (),
)
UTSNAME = new_utsname("Linux", "host", "6.1.0", "#1 SMP", "x86_64", "(none)")
PLAN = DumpPlan(
    page_size=PAGE, max_mapnr=0x200, level=1, compression=ZLIB, utsname=UTSNAME, crash_time=1_700_000_000,
    phys_base=0x1_2345_6000, cpus=1, notes=NOTES,
)  # fmt: skip


def packed(pages: Mapping[int, bytes], *, share_zero_pages: bool = True) -> PackedPages:
    """Pack pages naively: zero pages share, the others are zlib, or raw where that is shorter."""
    sizes, flags, pieces = [], [], []
    for page in pages.values():
        small = zlib.compress(page)
        if share_zero_pages and not any(page):
            sizes.append(0)
            flags.append(0)
            continue
        raw = len(small) >= len(page)
        pieces.append(page if raw else small)
        sizes.append(len(pieces[-1]))
        flags.append(0 if raw else ZLIB)
    pfns = np.array(list(pages), dtype=np.int64)
    none = np.zeros(len(pfns), dtype=np.uint64)
    return PackedPages(pfns, np.array(sizes, dtype=np.int64), np.array(flags, dtype=np.uint32), none, pieces)


def part(pages: Mapping[int, bytes], start: int, end: int) -> dict[int, bytes]:
    """The pages from the ``start``-th to before the ``end``-th, by PFN."""
    return {pfn: pages[pfn] for pfn in sorted(pages)[start:end]}


def runs_of(pfns: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of ascending PFNs."""
    runs: list[tuple[int, int]] = []
    for pfn in pfns:
        if runs and sum(runs[-1]) == pfn:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((pfn, 1))
    return runs


def created(path: Path) -> closing[OutputFile]:
    path.unlink(missing_ok=True)
    return closing(OutputFile(path))


def write_pages(file: Output, pages: dict[int, bytes], plan: DumpPlan = PLAN, *, at_once: int = 3) -> KdumpWriter:
    """Write ``pages`` (by PFN) whole, ``at_once`` in a call."""
    plan = plan._replace(max_mapnr=max([*pages, plan.max_mapnr - 1]) + 1)
    made = KdumpWriter(file, plan)
    made.begin(runs_of(sorted(pages)))
    for first in range(0, len(pages), at_once):
        made.append(packed(part(pages, first, first + at_once), share_zero_pages=bool(plan.level & 1)))
    made.finish(complete=True)
    return made


PAGES = {
    1: filled("a"), 2: filled("."), 3: random.Random(3).randbytes(PAGE), 9: numbered(9, 1), 10: filled("."),
    0x1FF: filled("z"),
}  # fmt: skip


# --- fields


def test_the_header_says_what_the_plan_says(tmp_path: Path) -> None:
    with created(tmp_path / "dump") as file:
        write_pages(file, PAGES, PLAN._replace(cpus=3))
    raw = (tmp_path / "dump").read_bytes()
    assert raw[:12] == b"KDUMP   \x06\0\0\0"
    assert raw[12:402] == UTSNAME
    assert raw[402:408] == bytes(6)
    assert struct.unpack_from("<qq", raw, 408) == (1_700_000_000, 0)
    # status, block_size, sub_hdr_size, bitmap_blocks, max_mapnr, four that makedumpfile leaves 0, nr_cpus
    assert struct.unpack_from("<IiiIIIIIIi", raw, STATUS) == (ZLIB, PAGE, 1, 2, 0x200, 0, 0, 0, 0, 3)
    assert raw[464:PAGE] == bytes(PAGE - 464)


def test_the_sub_header_says_where_the_notes_are(tmp_path: Path) -> None:
    with created(tmp_path / "dump") as file:
        write_pages(file, PAGES)
    raw = (tmp_path / "dump").read_bytes()
    base, level, split, start, end, info_at, info_size, notes_at, notes_size, erase_at, erase_size = struct.unpack_from(
        "<QiiQQQQQQQQ", raw, PAGE
    )
    assert (base, level, split, start, end) == (0x1_2345_6000, 1, 0, 0, 0x200)
    assert raw[info_at : info_at + info_size] == TEXT
    assert raw[notes_at : notes_at + notes_size] == CPU + INFO
    assert (notes_at, erase_at, erase_size) == (PAGE + 104, 0, 0)
    assert struct.unpack_from("<QQQ", raw, PAGE + 80) == (0, 0x200, 0x200)


def test_a_negative_phys_base_is_its_64_bits(tmp_path: Path) -> None:
    """KASLR may load the kernel below its link address: NUMBER(phys_base) is then negative."""
    with created(tmp_path / "dump") as file:
        write_pages(file, PAGES, PLAN._replace(phys_base=-0x1E60_0000))
    assert struct.unpack_from("<q", (tmp_path / "dump").read_bytes(), PAGE) == (-0x1E60_0000,)


def test_without_notes_their_places_are_zero(tmp_path: Path) -> None:
    with created(tmp_path / "dump") as file:
        write_pages(file, PAGES, PLAN._replace(notes=Notes(b"", (), ())))
    assert struct.unpack_from("<QQQQ", (tmp_path / "dump").read_bytes(), PAGE + 32) == (0, 0, 0, 0)
    assert by_hand(tmp_path / "dump").pages == PAGES


def test_notes_of_many_cpus_take_as_many_blocks_as_they_need(tmp_path: Path) -> None:
    blob = CPU * 40
    with created(tmp_path / "dump") as file:
        write_pages(file, PAGES, PLAN._replace(notes=Notes(blob, (), ())))
    raw = (tmp_path / "dump").read_bytes()
    assert struct.unpack_from("<i", raw, SUB_HDR_SIZE)[0] == -(-(104 + len(blob)) // PAGE) > 1
    assert raw[PAGE + 104 : PAGE + 104 + len(blob)] == blob
    assert by_hand(tmp_path / "dump").pages == PAGES


def test_a_pfn_beyond_32_bits_is_told_by_the_64_bit_field(tmp_path: Path) -> None:
    """16 TiB of address space and more: the old field holds the largest number it can."""
    pages = {0x1_0000_0002: filled("h")}
    with created(tmp_path / "dump") as file:
        write_pages(file, pages)
    with (tmp_path / "dump").open("rb") as dump:
        header = dump.read(2 * PAGE)
    assert struct.unpack_from("<I", header, MAX_MAPNR) == (0xFFFF_FFFF,)
    assert struct.unpack_from("<Q", header, PAGE + 96) == (0x1_0000_0003,)
    assert (tmp_path / "dump").stat().st_blocks * 512 < 2 << 20  # the bitmaps, 1 GiB, are holes


# --- pages


def test_pages_come_back_by_hand(tmp_path: Path) -> None:
    with created(tmp_path / "dump") as file:
        made = write_pages(file, PAGES)
    dump = by_hand(tmp_path / "dump")
    assert dump.pages == PAGES
    assert not dump.incomplete
    assert dump.max_mapnr == 0x200
    assert made.pages_written == len(PAGES)
    assert dump.data_start == made.layout.data


def test_zero_pages_share_the_page_that_the_data_begins_with(tmp_path: Path) -> None:
    with created(tmp_path / "dump") as file:
        write_pages(file, PAGES)
    dump = by_hand(tmp_path / "dump")
    checksum = stored_checksum(bytes(PAGE))
    assert dump.descriptors[2] == dump.descriptors[10] == (dump.data_start, PAGE, 0, checksum)
    assert (tmp_path / "dump").stat().st_size == dump.data_start + PAGE + sum(
        size for offset, size, _, _ in dump.descriptors.values() if offset != dump.data_start
    )


def test_at_level_0_zero_pages_have_data_of_their_own(tmp_path: Path) -> None:
    with created(tmp_path / "dump") as file:
        write_pages(file, PAGES, PLAN._replace(level=0))
    dump = by_hand(tmp_path / "dump")
    assert dump.level == 0
    assert dump.pages == PAGES
    assert len({offset for offset, *_ in dump.descriptors.values()}) == len(PAGES)


kinds = st.sampled_from(["zero", "even", "random"])


def page_of(kind: str, pfn: int) -> bytes:
    if kind == "random":
        return random.Random(pfn).randbytes(PAGE)
    return numbered(pfn, 1) if kind == "even" else bytes(PAGE)


memories = st.dictionaries(st.integers(0, 300), kinds, min_size=1, max_size=40).map(
    lambda found: {pfn: page_of(kind, pfn) for pfn, kind in found.items()}
)


@settings(deadline=None, max_examples=40)
@given(memories, st.integers(1, 9), st.integers(1, 12), st.integers(1, 20_000), st.sampled_from([8, 64, 1 << 19]))
def test_any_pages_come_back_whatever_the_steps(
    tmp_path_factory: pytest.TempPathFactory,
    pages: dict[int, bytes],
    at_once: int,
    sync_pages: int,
    sync_bytes: int,
    window: int,
) -> None:
    """Small windows of the bitmaps and small steps between syncs, so that every seam is crossed."""
    path = tmp_path_factory.getbasetemp() / "any-pages"
    with pytest.MonkeyPatch.context() as patch, created(path) as file:
        patch.setattr(writer, "SYNC_PAGES", sync_pages)
        patch.setattr(writer, "SYNC_BYTES", sync_bytes)
        patch.setattr(selection, "_BITMAP_WINDOW", window)
        write_pages(file, pages, at_once=at_once)
        file_digests = file.digests()
    assert by_hand(path).pages == pages
    assert len(file_digests) == 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=30), st.integers(1, 16))
def test_bitmaps_have_a_bit_for_each_page_of_the_runs(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[tuple[int, int]], window_bytes: int
) -> None:
    runs, expect, pfn = [], bytearray(PAGE), 0
    for gap, length in gaps:
        pfn += gap
        runs.append((pfn, length))
        for page in range(pfn, pfn + length):
            expect[page // 8] |= 1 << page % 8
        pfn += length
    path = tmp_path_factory.getbasetemp() / "bitmaps"
    with pytest.MonkeyPatch.context() as patch, created(path) as file:
        patch.setattr(selection, "_BITMAP_WINDOW", 8 * window_bytes)
        KdumpWriter(file, PLAN._replace(max_mapnr=pfn)).begin(runs)
    raw = path.read_bytes()
    assert raw[2 * PAGE : 3 * PAGE] == raw[3 * PAGE : 4 * PAGE] == expect


# --- the order of things


def recorded_steps(path: Path, pages: dict[int, bytes], *, sync_pages: int = 4) -> tuple[list[Step], kdump.Layout]:
    with pytest.MonkeyPatch.context() as patch, recorded(path) as file:
        patch.setattr(writer, "SYNC_PAGES", sync_pages)
        made = write_pages(file, pages)
        return file.steps, made.layout


MANY = {pfn: page_of(("zero", "even", "random", "even")[pfn % 4], pfn) for pfn in range(0x20, 0x40)}


def test_descriptors_are_written_only_when_their_data_is_on_the_disk(tmp_path: Path) -> None:
    steps, layout = recorded_steps(tmp_path / "dump", MANY)
    synced_to = written_to = seen = 0
    for step in steps:
        if step.what == "sync":
            synced_to = written_to
        elif step.offset >= layout.data:
            written_to = max(written_to, step.offset + len(step.data))
        elif layout.descriptor_table <= step.offset and any(step.data):
            for offset, size, _, _ in struct.iter_unpack("<qIIQ", step.data):
                assert offset + size <= synced_to
                seen += 1
    assert seen == len(MANY)


def test_what_is_appended_first_has_its_descriptors_on_the_disk_before_all_others(tmp_path: Path) -> None:
    """It is page tables: without them a reader finds no other page."""
    steps, layout = recorded_steps(tmp_path / "dump", MANY, sync_pages=24)
    described = [
        number for number, step in enumerate(steps)
        if step.what == "write" and layout.descriptor_table <= step.offset < layout.data and any(step.data)
    ]  # fmt: skip
    first, second = described[:2]
    assert len(steps[first].data) == 3 * 24
    assert "sync" in {step.what for step in steps[first:second]}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_pages_whose_sync_failed_never_get_a_descriptor(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells of a failed write once: the sync after that succeeds, and the bytes are lost all the same."""
    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN)
        made.begin(runs_of(sorted(MANY)))
        made.append(packed(part(MANY, 0, 4)))
        made.finish(complete=False)
        monkeypatch.setattr(writer, "SYNC_BYTES", 1)
        with monkeypatch.context() as once:
            once.setattr(os, "fdatasync", raising(OSError(number, os.strerror(number))))
            made.append(packed(part(MANY, 4, 6)))
            with pytest.raises(TargetError):
                made.append(packed(part(MANY, 6, 8)))  # waits for the step before
        made.finish(complete=False)
        assert made.pages_written == 4
    dump = by_hand(tmp_path / "dump")
    assert dump.incomplete
    assert dump.pages == {pfn: MANY[pfn] for pfn in sorted(MANY)[:4]}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_where_descriptors_find_no_room_those_that_did_keep_their_data(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that never writes in place may have no room for a table that was reserved."""
    monkeypatch.setattr(output, "_TABLE_BLOCK", 2)
    real = os.pwritev
    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN)
        made.begin(runs_of(sorted(MANY)))
        refused = made.layout.descriptor_table + 4 * DESCRIPTOR_BYTES

        def full(fd: int, pieces: list[bytes], offset: int) -> int:
            if offset == refused:
                raise OSError(number, os.strerror(number))
            return real(fd, pieces, offset)

        monkeypatch.setattr(os, "pwritev", full)
        made.append(packed(part(MANY, 0, 6)))
        with pytest.raises(TargetError):
            made.checkpoint()
        made.append(packed(part(MANY, 6, 8)))
        made.finish(complete=False)
        assert made.pages_written == 6
    dump = by_hand(tmp_path / "dump")
    assert dump.incomplete
    assert dump.pages == {pfn: MANY[pfn] for pfn in [*sorted(MANY)[:4], *sorted(MANY)[6:8]]}


def test_descriptors_that_were_written_in_part_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write on a full disk ends where the room ends: at a sector."""
    real = os.pwritev
    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN)
        made.begin(runs_of(sorted(MANY)))

        def cut(fd: int, pieces: list[bytes], offset: int) -> int:
            if offset >= made.layout.data:
                return real(fd, pieces, offset)
            if offset > made.layout.descriptor_table:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, [b"".join(pieces)[:80]], offset)

        with monkeypatch.context() as full:
            full.setattr(os, "pwritev", cut)
            made.append(packed(part(MANY, 0, 6)))
            with pytest.raises(TargetError):
                made.checkpoint()
        made.finish(complete=False)
        assert made.pages_written == 3
    reader = KdumpFile(tmp_path / "dump")
    bad = [why for batch in reader.pages() for why in batch.bad.values()]
    reader.close()
    assert bad == [NOT_WRITTEN] * (len(MANY) - 3)


def test_the_mark_is_taken_off_last_when_all_is_on_the_disk(tmp_path: Path) -> None:
    steps, _ = recorded_steps(tmp_path / "dump", MANY)
    headers = [index for index, step in enumerate(steps) if step.what == "write" and step.offset == 0]
    status = [struct.unpack_from("<I", steps[index].data, STATUS)[0] for index in headers]
    assert status == [ZLIB | INCOMPLETE, ZLIB]
    assert [step.what for step in steps[headers[-1] - 1 :]] == ["sync", "write", "sync"]


def test_a_last_write_that_fails_in_its_midst_leaves_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, turns = os.pwritev, iter(range(1000))

    def cut(fd: int, pieces: list[bytes], offset: int) -> int:
        turn = next(turns) if offset <= 512 else 2
        if turn == 0:
            return real(fd, [b"".join(pieces)[:512]], offset)
        if turn == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, pieces, offset)

    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN)
        made.begin(runs_of(sorted(MANY)))
        made.append(packed(MANY))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", cut)
            with pytest.raises(TargetError):
                made.finish(complete=True)
    dump = by_hand(tmp_path / "dump")
    assert dump.incomplete
    assert dump.pages == MANY


def test_bitmaps_and_room_for_descriptors_are_on_the_disk_before_the_first_page(tmp_path: Path) -> None:
    with recorded(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN)
        made.begin(runs_of(sorted(MANY)))
        assert file.steps[-1].what == "sync"
        assert file.size >= made.layout.data
    dump = by_hand(tmp_path / "dump")
    assert dump.incomplete
    assert list(dump.descriptors) == sorted(MANY)
    assert dump.pages == {}


def test_an_unfinished_dump_keeps_its_mark_and_every_page_that_was_appended(tmp_path: Path) -> None:
    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN)
        made.begin(runs_of(sorted(MANY)))
        made.append(packed(part(MANY, 0, 5)))
        made.append(packed(part(MANY, 5, 11)))
        made.finish(complete=False)
        assert made.pages_written == 11
    dump = by_hand(tmp_path / "dump")
    assert dump.incomplete
    assert dump.pages == {pfn: MANY[pfn] for pfn in sorted(MANY)[:11]}
    assert all(dump.descriptors[pfn] == (0, 0, 0, 0) for pfn in sorted(MANY)[11:])


@pytest.mark.parametrize("unit", ["pages", "bytes"])
def test_what_is_held_back_is_bounded(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 bytes a descriptor in memory, and data that may be lost with the power: neither grows with the dump."""
    monkeypatch.setattr(writer, "SYNC_PAGES" if unit == "pages" else "SYNC_BYTES", 100)
    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN._replace(max_mapnr=1000))
        made.begin([(0, 1000)])
        for first in range(0, 1000, 10):
            page = filled(".") if unit == "pages" else filled("a")
            made.append(packed(dict.fromkeys(range(first, first + 10), page)))
            assert first + 10 - made.pages_written < 2 * 100 + 10  # two steps are under way, no more


# --- power cuts


@pytest.mark.parametrize("watched", [True, False])
def test_only_the_first_step_is_a_small_one(watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether somebody looks at the steps or not: each costs a sync."""
    monkeypatch.setattr(writer, "FIRST_SYNC_BYTES", 2 * PAGE)
    monkeypatch.setattr(writer, "SYNC_BYTES", 8 * PAGE)
    syncs: list[int] = []
    looked_at: list[writer.Step] = []
    real = os.fdatasync
    noise = [random.Random(pfn).randbytes(PAGE) for pfn in range(34)]
    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN._replace(max_mapnr=34))
        made.begin([(0, 34)])
        if watched:
            made.on_step = looked_at.append

        def noted(fd: int) -> None:
            syncs.append(made.pages_written)
            real(fd)

        monkeypatch.setattr(os, "fdatasync", noted)
        for pfn, page in enumerate(noise):
            made.append(
                PackedPages(np.array([pfn]), np.array([PAGE]), np.zeros(1, np.uint32), np.zeros(1, np.uint64), [page])
            )
        made.checkpoint()
    assert syncs == [0, 1, 2, 10, 18, 26]  # (the second: descriptors of what was appended first, before others)
    assert [step.size // PAGE for step in looked_at] == [2, 8, 8, 8, 8] * watched


@pytest.mark.parametrize(("available", "size"), [(None, 16), (8 << 10, 16), (160, 10), (40, 2.5), (10, 2), (0, 2)])
def test_a_step_is_smaller_where_memory_is_short(available: int | None, size: float) -> None:
    """All in MiB."""
    assert writer._step_bytes(None if available is None else available << 20) == size * (1 << 20)


def begun_at(steps: Sequence[Step]) -> int:
    """The first sync that brings a header to the disk: from here on there is a dump."""
    header = next(index for index, step in enumerate(steps) if step.what == "write" and step.offset == 0)
    return next(index for index, step in enumerate(steps) if index > header and step.what == "sync")


CUT = {pfn: page_of(("zero", "even", "random", "even")[pfn * 7 % 11 % 4], pfn) for pfn in range(0x10, 0x1D0)}


@pytest.fixture(scope="module")
def cut_steps(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """What was asked of the file while ``CUT`` was written, in seven rounds of descriptors."""
    return recorded_steps(tmp_path_factory.mktemp("cut") / "dump", CUT, sync_pages=64)[0]


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_a_power_cut_leaves_a_dump_in_which_no_page_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, cut_steps: list[Step], seed: int, when: int
) -> None:
    begun = begun_at(cut_steps) + 1
    moment = begun + when % (len(cut_steps) - begun + 1)
    left = tmp_path_factory.getbasetemp() / "left"
    left.write_bytes(after_power_cut(cut_steps[:moment], random.Random(seed)))
    dump = KdumpFile(left)
    found = 0
    for batch in dump.pages():
        for index, pfn in enumerate(batch.pfns.tolist()):
            found += 1
            assert index in batch.bad or batch.data[index].tobytes() == CUT[pfn]
            assert dump.incomplete or index not in batch.bad
    dump.close()
    assert found == len(CUT)


def test_before_the_header_is_synced_a_power_cut_leaves_no_header_or_a_dump_that_opens(tmp_path: Path) -> None:
    """A header without bitmaps is refused by every reader: it has to come when the rest is on the disk."""
    steps, _ = recorded_steps(tmp_path / "dump", MANY)
    for moment in range(begun_at(steps) + 1):
        for seed in range(20):
            left = after_power_cut(steps[:moment], random.Random(seed))
            if left[:5] == b"KDUMP":
                (tmp_path / "left").write_bytes(left)
                assert sum(len(batch.pfns) for batch in KdumpFile(tmp_path / "left").pages()) == len(MANY)


def test_a_descriptor_that_a_power_cut_halved_counts_as_not_written(tmp_path: Path) -> None:
    """24 does not divide a block: of a descriptor over its edge, the disk may have the offset and not the size."""
    pages = {pfn: filled("a") for pfn in range(400)}
    with created(tmp_path / "dump") as file:
        made = KdumpWriter(file, PLAN._replace(max_mapnr=400))
        made.begin([(0, 400)])
        made.append(packed(pages))
        made.finish(complete=False)
        table = made.layout.descriptor_table
    edge = table + 2 * PAGE  # 8192 is 341 descriptors and 8 bytes
    raw = bytearray((tmp_path / "dump").read_bytes())
    raw[edge : edge + PAGE] = bytes(PAGE)
    (tmp_path / "dump").write_bytes(raw)
    bad = {
        int(batch.pfns[index]): why
        for batch in KdumpFile(tmp_path / "dump").pages()
        for index, why in batch.bad.items()
    }
    assert bad == dict.fromkeys(range(341, 400), NOT_WRITTEN)
