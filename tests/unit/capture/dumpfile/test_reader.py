"""The reader: real pages back, damage named, and nothing a hostile file can do with memory or time."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dumpfile import reader
from capture.dumpfile.reader import BATCH_PAGES, NOT_WRITTEN, KdumpFile
from capture.errors import SourceError
from tests.builders import PAGE, filled, numbered, patched
from tests.dumps import BITMAP_BLOCKS, BLOCK_SIZE, INCOMPLETE, SUB_HDR_SIZE, ZLIB, ZSTD, dump_of
from tests.outcome import read_back

WriteFile = Callable[..., str]
OFFSET_NOTE = 48
"""In struct kdump_sub_header."""


def zstd(page: bytes, *, checksum: bool = True, size: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=size).compress(page)


RANDOM = random.Random(5).randbytes(PAGE)
PAGES = {0: filled("."), 5: filled("a"), 6: RANDOM, 7: numbered(7, 1), 299: filled("z")}
STORED = {
    0: (0, PAGES[0]),
    5: (ZSTD, zstd(PAGES[5])),
    6: (0, RANDOM),
    7: (ZLIB, zlib.compress(PAGES[7])),
    299: (ZSTD, zstd(PAGES[299], checksum=False, size=True)),
}
TABLE, DATA = 4 * PAGE, 4 * PAGE + 24 * len(STORED)


def test_pages_of_all_codecs_come_back(vmcore_file: WriteFile) -> None:
    assert read_back(vmcore_file(dump_of(STORED))) == (PAGES, {})
    assert read_back(vmcore_file(dump_of(STORED, gap=b"erase info, or whatever"))) == (PAGES, {})


def test_pages_come_back_where_zstd_has_no_batched_call(
    vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "ZSTD_BATCHED", False)
    assert read_back(vmcore_file(dump_of(STORED))) == (PAGES, {})


@pytest.mark.parametrize("block", [16384, 65536])
def test_pages_of_other_sizes_come_back(block: int, vmcore_file: WriteFile) -> None:
    pages = {1: filled("q") * (block // PAGE), 2: random.Random(1).randbytes(block)}
    stored = {1: (ZSTD, zstd(pages[1])), 2: (0, pages[2])}
    assert read_back(vmcore_file(dump_of(stored, block=block))) == (pages, {})


def test_data_may_lie_in_any_order_and_be_shared(vmcore_file: WriteFile) -> None:
    raw = dump_of(STORED)
    descriptors = [raw[TABLE + 24 * index : TABLE + 24 * index + 24] for index in range(5)]
    order = [4, 1, 3, 1, 0]
    raw = raw[:TABLE] + b"".join(descriptors[index] for index in order) + raw[DATA:]
    contents = list(PAGES.values())
    assert read_back(vmcore_file(raw)) == ({pfn: contents[index] for pfn, index in zip(PAGES, order, strict=True)}, {})


def test_many_pages_come_in_batches_and_in_order(vmcore_file: WriteFile) -> None:
    count = 2 * BATCH_PAGES + 7
    stored = {3 * number: (ZSTD, zstd(numbered(number, 1))) for number in range(count)}
    good, bad = read_back(vmcore_file(dump_of(stored, max_mapnr=3 * count)))
    assert bad == {}
    assert good == {3 * number: numbered(number, 1) for number in range(count)}
    assert list(good) == sorted(good)


def test_the_header_tells_level_mark_and_highest_pfn(vmcore_file: WriteFile) -> None:
    whole = KdumpFile(Path(vmcore_file(dump_of(STORED))))
    assert (whole.incomplete, whole.level, whole.max_mapnr, whole.page_size) == (False, 1, 300, PAGE)
    marked = KdumpFile(Path(vmcore_file(dump_of(STORED, status=ZSTD | INCOMPLETE))))
    assert marked.incomplete
    assert marked.max_mapnr == 300


# --- damage


def test_no_flipped_byte_of_a_zstd_or_zlib_page_gives_another_page(vmcore_file: WriteFile) -> None:
    pages = {1: numbered(1, 1), 2: random.Random(2).randbytes(200) + filled("b")[200:], 3: filled("c")}
    stored = {1: (ZSTD, zstd(pages[1])), 2: (ZSTD, zstd(pages[2])), 3: (ZLIB, zlib.compress(pages[3]))}
    raw = dump_of(stored)
    start, noticed = 4 * PAGE + 24 * len(stored), 0
    for at in range(start, len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 0xFF
        good, bad = read_back(vmcore_file(bytes(damaged)))
        assert good.items() <= pages.items()
        assert len(bad) <= 1
        noticed += len(bad)
    assert noticed == len(raw) - start


def test_one_damaged_page_costs_only_itself_and_is_told_why(vmcore_file: WriteFile) -> None:
    raw = bytearray(dump_of({pfn: (ZSTD, zstd(numbered(pfn, 1))) for pfn in range(200)}))
    offset, size = struct.unpack_from("<qI", raw, TABLE + 24 * 77)
    raw[offset + size - 1] ^= 1  # its checksum
    good, bad = read_back(vmcore_file(bytes(raw)))
    assert list(bad) == [77]
    assert bad[77].startswith("zstd")
    assert good == {pfn: numbered(pfn, 1) for pfn in range(200) if pfn != 77}


@pytest.mark.parametrize(
    ("descriptor", "reason"),
    [
        ((0, 0, 0, 0), NOT_WRITTEN),
        ((1 << 40, 100, ZSTD, 0), "outside the file"),
        ((-1, 100, ZSTD, 0), "outside the file"),
        ((-(1 << 63), 100, ZSTD, 0), "outside the file"),
        (((1 << 63) - 1, 100, ZSTD, 0), "outside the file"),
        ((DATA, 0xFFFF_FFFF, ZSTD, 0), "outside the file"),
        ((DATA, 2 * PAGE + 1, ZSTD, 0), "outside the file"),
        ((DATA, PAGE - 1, 0, 0), "no codec"),
        ((DATA, PAGE + 1, 0, 0), "no codec"),
        ((DATA, 100, 2, 0), "LZO"),
        ((DATA, 100, 4, 0), "snappy"),
        ((DATA, 100, ZSTD | ZLIB, 0), "no codec"),
        ((DATA, 100, ZSTD, 0), "zstd"),
        ((DATA, 100, ZLIB, 0), "zlib"),
    ],
)
def test_a_descriptor_that_makes_no_sense_costs_only_its_page(
    descriptor: tuple[int, int, int, int], reason: str, vmcore_file: WriteFile
) -> None:
    raw = bytearray(dump_of(STORED))
    struct.pack_into("<qIIQ", raw, TABLE + 24 * 3, *descriptor)
    good, bad = read_back(vmcore_file(bytes(raw)))
    assert list(bad) == [7]
    assert reason in bad[7]
    assert good == {pfn: page for pfn, page in PAGES.items() if pfn != 7}


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE])
@pytest.mark.parametrize("flag", [ZLIB, ZSTD])
def test_a_page_that_decompresses_to_another_size_is_bad(flag: int, length: int, vmcore_file: WriteFile) -> None:
    content = (zlib.compress if flag == ZLIB else zstd)(b"x" * length)
    good, bad = read_back(vmcore_file(dump_of({**STORED, 8: (flag, content)})))
    assert list(bad) == [8]
    assert good == PAGES


def test_a_dump_that_was_cut_off_gives_what_is_left(vmcore_file: WriteFile) -> None:
    raw = dump_of({pfn: (ZSTD, zstd(numbered(pfn, 1))) for pfn in range(100)})
    for length in (*range(0, 4 * PAGE, 1000), 4 * PAGE - 1, *range(4 * PAGE, len(raw), 97)):
        name = vmcore_file(raw[:length])
        if length < 4 * PAGE:
            with pytest.raises(SourceError, match="truncated"):
                KdumpFile(Path(name))
            continue
        good, bad = read_back(name)
        assert good.keys() | bad.keys() == set(range(100))
        assert all(page == numbered(pfn, 1) for pfn, page in good.items())


# --- refused


@pytest.mark.parametrize("content", [b"", b"K", b"\x7fELF".ljust(PAGE, b"\0"), b"makedumpfile".ljust(PAGE, b"\0")])
def test_another_file_is_refused_with_its_name(content: bytes, vmcore_file: WriteFile) -> None:
    name = vmcore_file(content)
    with pytest.raises(SourceError) as refused:
        KdumpFile(Path(name))
    assert name in str(refused.value)
    assert refused.value.exit_status == 4


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="check the path"):
        KdumpFile(tmp_path / "missing")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="directory"):
        KdumpFile(tmp_path)


@pytest.mark.parametrize("version", [-1, 0, 1, 5])
def test_an_older_version_is_refused(version: int, vmcore_file: WriteFile) -> None:
    with pytest.raises(SourceError, match="version"):
        KdumpFile(Path(vmcore_file(patched(dump_of(STORED), 8, "i", version))))


@pytest.mark.parametrize("block", [0, 1, 512, 4095, 8192, 1 << 17, 0x7FFF_FFFF, -4096])
def test_a_page_size_that_no_kernel_has_is_refused(block: int, vmcore_file: WriteFile) -> None:
    with pytest.raises(SourceError, match="page size"):
        KdumpFile(Path(vmcore_file(patched(dump_of(STORED), BLOCK_SIZE, "i", block))))


@pytest.mark.parametrize("blocks", [-1, -2, -3, -1000, -(1 << 31), 0, 1 << 20, (1 << 31) - 1])
def test_a_sub_header_that_ends_nowhere_is_refused(blocks: int, vmcore_file: WriteFile) -> None:
    with pytest.raises(SourceError):
        read_back(vmcore_file(patched(dump_of(STORED), SUB_HDR_SIZE, "i", blocks)))


@pytest.mark.parametrize("blocks", [0, 1, 1 << 20, (1 << 32) - 1])
def test_bitmaps_that_cannot_hold_the_pfns_or_the_file_are_refused(blocks: int, vmcore_file: WriteFile) -> None:
    """A verify that reads no page at all must not come out as good."""
    with pytest.raises(SourceError):
        read_back(vmcore_file(patched(dump_of(STORED), BITMAP_BLOCKS, "I", blocks)))


# --- hostile


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("flag", [ZLIB, ZSTD])
def test_a_page_that_would_fill_all_memory_does_not(flag: int, vmcore_file: WriteFile, peak: Callable[[], int]) -> None:
    bomb = bytes(64 << 20)
    content = zlib.compress(bomb, 9)[: 2 * PAGE] if flag == ZLIB else zstd(bomb, size=True)
    del bomb
    name = vmcore_file(dump_of({**STORED, 8: (flag, content)}))
    tracemalloc.reset_peak()
    before = peak()
    good, bad = read_back(name)
    assert list(bad) == [8]
    assert good == PAGES
    assert peak() - before < 32 << 20


@pytest.mark.parametrize("claimed", [0, PAGE - 1, PAGE + 1, 1 << 33, 1 << 40, (1 << 64) - 3])
def test_a_zstd_page_that_claims_another_size_is_bad(
    claimed: int, vmcore_file: WriteFile, peak: Callable[[], int]
) -> None:
    """RFC 8878: magic, a descriptor that announces eight bytes of content size, then one block of a repeated byte."""
    frame = struct.pack("<IBQ", 0xFD2F_B528, 0xE0, claimed) + struct.pack("<I", 4096 << 3 | 1 << 1 | 1)[:3] + b"x"
    good, bad = read_back(vmcore_file(dump_of({**STORED, 8: (ZSTD, frame)})))
    assert list(bad) == [8]
    assert good == PAGES
    assert peak() < 32 << 20


def test_a_large_sparse_bitmap_takes_little_memory_and_time(vmcore_file: WriteFile, peak: Callable[[], int]) -> None:
    """256 GiB of PFNs, four pages: the bitmaps are mostly holes."""
    blocks = 2 * 2048
    raw = patched(patched(dump_of({}), BITMAP_BLOCKS, "I", blocks), PAGE + 96, "Q", blocks // 2 * PAGE * 8)
    path = Path(vmcore_file(raw[: 2 * PAGE]))
    bitmap2, table = (2 + blocks // 2) * PAGE, (2 + blocks) * PAGE
    with path.open("r+b") as file:
        file.seek(table - 1)
        file.write(b"\x0f")
        file.seek(table)
        file.write(b"".join(struct.pack("<qIIQ", table + 96, PAGE, 0, 0) for _ in range(4)) + filled("s"))
    started = time.monotonic()
    good, bad = read_back(path)
    last = (table - bitmap2) * 8
    assert (good, bad) == ({pfn: filled("s") for pfn in range(last - 8, last - 4)}, {})
    assert time.monotonic() - started < 5
    assert peak() < 32 << 20


BIG = dump_of(
    {pfn: (ZSTD, zstd(numbered(pfn, 1))) for pfn in range(20)} | {20: (0, RANDOM), 21: (ZLIB, zlib.compress(RANDOM))}
)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 480), st.integers(PAGE, PAGE + 104), st.integers(2 * PAGE, len(BIG) - 1)),
            st.sampled_from([b"\0", b"\xff", b"\x01", b"\x80", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(8)]),
        ),
        min_size=1, max_size=4,
    ),
    st.integers(0, len(BIG)),
)  # fmt: skip
def test_no_damage_is_anything_but_a_bad_page_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, bytes]], length: int
) -> None:
    raw = bytearray(BIG)
    for at, value in damage:
        raw[at : at + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(raw[: max(length, 2 * PAGE)])
    try:
        good, bad = read_back(path)
    except SourceError as error:
        said = [str(error)]
    else:
        said = list(bad.values())
        assert all(len(page) == PAGE for page in good.values())
    assert all("\n" not in line for line in said)


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 1, 1 << 62])
def test_notes_at_an_offset_that_no_file_has_are_a_refusal(offset: int, vmcore_file: WriteFile) -> None:
    data = patched(dump_of({16: (0, filled("a"))}), PAGE + OFFSET_NOTE, "QQ", offset, 100)
    with KdumpFile(Path(vmcore_file(data))) as dump, pytest.raises(SourceError, match=f"the notes at {offset:#x}"):
        dump.notes()
