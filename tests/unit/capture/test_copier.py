"""The copier: whatever memory looks like, the dump is the memory; in fixed memory, and past what cannot be read."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture.copier import Copier, CopyStatistics, find_zero_pages
from capture.dumpfile import writer as writer_module
from capture.dumpfile.codec import Codec, codec
from capture.dumpfile.output import OutputFile
from capture.dumpfile.writer import DumpPlan, KdumpWriter
from capture.memory import elfcore
from capture.memory import image as image_module
from capture.memory.image import MemoryImage, PageBlock
from capture.memory.source import Source
from capture.notes.elfnote import Notes
from capture.progress import Progress
from capture.selftest import elf_core
from tests.builders import PAGE, filled, image_of, load_table, numbered, vmcoreinfo_note
from tests.dumps import stored_checksum
from tests.faults import memory_with_holes
from tests.readers import HandRead, by_hand, model

WriteFile = Callable[..., str]


def copied(
    image: MemoryImage, path: Path, chosen: Codec, *, threads: int = 2, level: int = 1
) -> tuple[HandRead, CopyStatistics]:
    """Copy all of ``image`` to ``path``; return what is there, read by hand, and the statistics."""
    path.unlink(missing_ok=True)
    plan = DumpPlan(
        page_size=image.page_size, max_mapnr=image.max_pfn, level=level,
        compression=chosen.flag, utsname=bytes(390), crash_time=0, phys_base=0, cpus=0, notes=Notes(b"", (), ()),
    )  # fmt: skip
    with closing(OutputFile(path)) as output, closing(KdumpWriter(output, plan)) as writer:
        writer.begin(image.runs())
        copier = Copier(image, chosen, share_zero_pages=bool(level & 1), threads=threads)
        copier.run(image.chunks(), writer, Progress("copying", 0, enabled=False))
        writer.finish(complete=True)
    return by_hand(path), copier.statistics


# --- any memory


@dataclass(frozen=True)
class Piece:
    """Pages of one kind behind a hole; ``cut`` bytes are missing at the end."""

    hole: int
    pages: int
    kind: str
    cut: int


pieces = st.builds(
    Piece, st.sampled_from([0, 0, 1, 5, 40]), st.integers(1, 6),
    st.sampled_from(["zero", "even", "random", "almost zero"]), st.sampled_from([0, 0, 0, 1, 100, PAGE - 1]),
)  # fmt: skip


def loads_of(layout: Sequence[Piece]) -> list[tuple[int, bytes]]:
    loads, pfn = [], 3
    for piece in layout:
        pfn += piece.hole
        size = piece.pages * PAGE
        if piece.kind == "zero":
            data = bytes(size)
        elif piece.kind == "even":
            data = numbered(pfn, piece.pages)
        elif piece.kind == "random":
            data = random.Random(pfn).randbytes(size)
        else:  # one byte in the last word, where a look at a few words does not see it
            data = b"".join(bytes(PAGE - 1) + bytes([pfn % 255 + 1]) for _ in range(piece.pages))
        loads.append((pfn * PAGE, data[: size - piece.cut]))
        pfn += piece.pages
    return loads


@settings(deadline=None, max_examples=60)
@given(
    st.lists(pieces, min_size=1, max_size=12), st.sampled_from(["zstd", "zstd:-20", "zlib", "none"]),
    st.integers(0, 1), st.integers(1, 3), st.integers(1, 9), st.integers(1, 8), st.integers(0, 9),
)  # fmt: skip
def test_the_dump_of_any_memory_is_that_memory(
    tmp_path_factory: pytest.TempPathFactory,
    layout: list[Piece],
    compression: str,
    level: int,
    threads: int,
    chunk_pages: int,
    sync_pages: int,
    skew: int,
) -> None:
    """Holes, partial pages, zero, compressible and random pages; small chunks, so that threads overtake each other."""
    loads = loads_of(layout)
    expect = model(loads)
    chosen = codec(compression)
    with pytest.MonkeyPatch.context() as patch, image_of(loads, skew=skew) as image:
        patch.setattr(image_module, "CHUNK_PAGES", chunk_pages)
        patch.setattr(writer_module, "SYNC_PAGES", sync_pages)
        path = tmp_path_factory.getbasetemp() / "any-memory"
        dump, statistics = copied(image, path, chosen, threads=threads, level=level)
    assert dump.pages == expect
    zero = [pfn for pfn, page in expect.items() if not any(page)] if level & 1 else []
    raw = [pfn for pfn in expect if pfn not in zero and dump.descriptors[pfn][2] == 0]
    assert statistics.pages == len(expect)
    assert statistics.zero_pages == len(zero)
    assert statistics.raw_pages == len(raw)
    assert statistics.data_bytes == sum(dump.descriptors[pfn][1] for pfn in expect if pfn not in zero)
    assert statistics.unreadable.count == 0
    for pfn in zero:
        assert dump.descriptors[pfn] == (dump.data_start, PAGE, 0, stored_checksum(bytes(PAGE)))


@pytest.mark.parametrize("page_size", [16384, 65536])
@pytest.mark.parametrize("compression", ["zstd", "zlib", "none"])
def test_pages_of_other_sizes_are_copied(page_size: int, compression: str, tmp_path: Path) -> None:
    data = numbered(0, 40) + bytes(2 * page_size) + random.Random(4).randbytes(2 * page_size) + filled("p")
    loads = [(3 * page_size, data)]
    with image_of(loads, page_size=page_size) as image:
        dump, statistics = copied(image, tmp_path / "dump", codec(compression))
    expect = model(loads, page_size)
    assert dump.pages == expect
    assert statistics.zero_pages == sum(not any(page) for page in expect.values())


def test_pages_that_do_not_shrink_are_stored_as_they_are(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(5 * PAGE) + filled("a", "b")
    with image_of([(PAGE, data)]) as image:
        for compression in ("zstd", "zlib"):
            dump, statistics = copied(image, tmp_path / "dump", codec(compression))
            assert [dump.descriptors[pfn][1:3] for pfn in range(1, 6)] == [(PAGE, 0)] * 5
            assert all(dump.descriptors[pfn][1] < PAGE and dump.descriptors[pfn][2] for pfn in (6, 7))
            assert statistics.raw_pages == 5


@pytest.mark.parametrize(("packed_size", "raw"), [(PAGE - 1, False), (PAGE, True), (PAGE + 1, True)])
def test_a_page_is_raw_unless_its_packed_form_is_shorter(packed_size: int, raw: bool, tmp_path: Path) -> None:
    """Readers tell a raw page by flags 0; one of page size with a flag, some of them would not decompress."""

    def pack(_buffer: memoryview, offsets: NDArray[np.uint64], _size: int) -> tuple[bytes, NDArray[np.int64]]:
        return b"p" * packed_size * len(offsets), np.full(len(offsets), packed_size, dtype=np.int64)

    (tmp_path / "dump").unlink(missing_ok=True)
    with image_of([(PAGE, filled("a"))]) as image:
        plan = DumpPlan(PAGE, 2, 1, 0x20, bytes(390), 0, 0, 0, Notes(b"", (), ()))
        output = OutputFile(tmp_path / "dump")
        writer = KdumpWriter(output, plan)
        writer.begin(image.runs())
        copier = Copier(image, Codec("test", 0x20, pack), share_zero_pages=True, threads=1)
        copier.run(image.chunks(), writer, Progress("copying", 0, enabled=False))
        writer.finish(complete=True)
        output.close()
    content = (tmp_path / "dump").read_bytes()
    offset, size, flags = struct.unpack_from("<qII", content, writer.layout.descriptor_table)
    assert (size, flags) == ((PAGE, 0) if raw else (packed_size, 0x20))
    assert content[offset : offset + size] == (filled("a") if raw else b"p" * packed_size)
    assert copier.statistics.raw_pages == int(raw)


@given(st.integers(0, PAGE - 1), st.integers(1, 255), st.integers(0, 9))
def test_a_page_with_a_single_byte_is_no_zero_page(at: int, value: int, skew: int) -> None:
    data = bytearray(skew + 3 * PAGE)
    data[skew + PAGE + at] = value
    offsets = np.array([skew, skew + PAGE, skew + 2 * PAGE], dtype=np.uint64)
    block = PageBlock(np.arange(3, dtype=np.int64), memoryview(data), offsets)
    assert find_zero_pages(block, PAGE).tolist() == [True, False, True]


TOUCHED = """
import ctypes, mmap
import numpy as np
from capture.copier import find_zero_pages
from capture.memory.image import PageBlock

PAGE, PAGES = 4096, 12
memory = mmap.mmap(-1, PAGES * PAGE)
zero, left_out = (0, 2, 3, 7, 8, 11), (1, 4, 6, 9)
for page in (5, 10):
    memory[page * PAGE + 2000] = 1
view = memoryview(memory)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for page in left_out:
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
pfns = np.array([page for page in range(PAGES) if page not in left_out])
found = find_zero_pages(PageBlock(pfns, view, (pfns * PAGE).astype(np.uint64)), PAGE)
assert pfns[found].tolist() == list(zero), pfns[found]
"""


def test_pages_between_those_of_a_block_are_never_read() -> None:
    """They were left out, and may be poisoned: reading them would end the capture kernel."""
    done = subprocess.run([sys.executable, "-c", TOUCHED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- order and threads


def test_pages_are_in_pfn_order_though_later_chunks_are_ready_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "CHUNK_PAGES", 4)
    plain = codec("zlib")
    turn = iter(range(100))
    busy, most = [0], [0]
    lock = threading.Lock()

    def slow_first(buffer: memoryview, offsets: NDArray[np.uint64], size: int) -> tuple[bytes, NDArray[np.int64]]:
        with lock:
            mine = next(turn)
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.02 if mine % 3 == 0 else 0)
        assert plain.pack is not None
        try:
            return plain.pack(buffer, offsets, size)
        finally:
            with lock:
                busy[0] -= 1

    loads = [(0x100 * PAGE, numbered(0, 60))]
    with image_of(loads) as image:
        dump, _ = copied(image, tmp_path / "dump", Codec("slow", plain.flag, slow_first), threads=3)
    assert dump.pages == model(loads)
    offsets = [dump.descriptors[pfn][0] for pfn in sorted(dump.descriptors)]
    assert offsets == sorted(offsets)
    assert 2 <= most[0] <= 3


def test_an_error_in_a_thread_ends_the_copy_and_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "CHUNK_PAGES", 4)
    plain = codec("zlib")
    turn = iter(range(100))

    def fail(buffer: memoryview, offsets: NDArray[np.uint64], size: int) -> tuple[bytes, NDArray[np.int64]]:
        if next(turn) == 3:
            raise MemoryError
        assert plain.pack is not None
        return plain.pack(buffer, offsets, size)

    before = threading.active_count()
    with image_of([(0x100 * PAGE, numbered(0, 60))]) as image, pytest.raises(MemoryError):
        copied(image, tmp_path / "dump", Codec("failing", plain.flag, fail), threads=1)
    assert threading.active_count() == before


# --- what cannot be read


@pytest.mark.parametrize("level", [0, 1])
def test_pages_that_fail_with_eio_are_zeros_counted_and_listed(level: int, tmp_path: Path) -> None:
    data = filled("a", "b", "c", "d", "e", "f")
    with memory_with_holes(data, (1, 3, 4)) as address, Source("/proc/self/mem", size=1 << 47) as source:
        image = MemoryImage(source, load_table((0x100 * PAGE, address, 6 * PAGE)), PAGE)
        dump, statistics = copied(image, tmp_path / "dump", codec("zstd"), level=level)
    assert [dump.pages[pfn] for pfn in range(0x100, 0x106)] == [
        filled("a"), bytes(PAGE), filled("c"), bytes(PAGE), bytes(PAGE), filled("f"),
    ]  # fmt: skip
    assert statistics.pages == 6
    assert statistics.unreadable.count == 3
    assert statistics.unreadable.ranges == [[0x101, 0x101], [0x103, 0x104]]


def test_pages_that_went_while_we_copied_are_zeros_counted_and_listed(vmcore_file: WriteFile, tmp_path: Path) -> None:
    """The file is cut after it was opened."""
    name = vmcore_file(elf_core([vmcoreinfo_note()], [(0, 0x1000, numbered(1, 40))]))
    size = Path(name).stat().st_size
    with Source(name) as source:
        image = MemoryImage(source, elfcore.parse(source).loads, PAGE)
        os.truncate(name, size - 7 * PAGE - 10)
        dump, statistics = copied(image, tmp_path / "dump", codec("zstd"))
    assert dump.pages == {pfn: numbered(pfn, 1) if pfn <= 32 else bytes(PAGE) for pfn in range(1, 41)}
    assert statistics.unreadable.ranges == [[33, 40]]


def test_many_unreadable_pages_far_apart_take_nothing_that_the_image_lacks(
    vmcore_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy loads numpy.ma when np.unique is called, and np.isin calls that; the capture image does not have it."""
    monkeypatch.setitem(sys.modules, "numpy.ma", None)
    monkeypatch.delitem(vars(np), "ma", raising=False)
    loads = [(0, number * 1000 * PAGE, numbered(number, 1)) for number in range(1, 81)]
    name = vmcore_file(elf_core([vmcoreinfo_note()], loads))
    with Source(name) as source:
        image = MemoryImage(source, elfcore.parse(source).loads, PAGE)
        os.truncate(name, Path(name).stat().st_size - 40 * PAGE)
        _, statistics = copied(image, tmp_path / "dump", codec("zstd"))
    assert statistics.unreadable.count == 40


# --- fixed memory

MEASURE = """
import sys
from capture.cli import main
status = main(sys.argv[1:])
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(status, int(high.split()[1]) >> 10)
"""


def sparse_core(path: Path, mebibytes: int) -> None:
    """A vmcore of that much memory, which is a hole in the file but for eight pages in each MiB."""
    header = bytearray(elf_core([vmcoreinfo_note()], [(0, 1 << 30, b"")]))
    row = 64 + 56
    struct.pack_into("<Q", header, row + 8, 2 * PAGE)
    struct.pack_into("<QQ", header, row + 32, mebibytes << 20, mebibytes << 20)
    with path.open("wb") as file:
        file.write(header)
        for number in range(mebibytes):
            file.seek(2 * PAGE + (number << 20))
            file.write(random.Random(number).randbytes(2 * PAGE) + numbered(number, 6))
        file.truncate(2 * PAGE + (mebibytes << 20))


@pytest.mark.parametrize("level", [0, 1])
def test_peak_memory_does_not_grow_with_the_vmcore(level: int, tmp_path: Path) -> None:
    """Descriptors that are held back fill their few MiB from 256 MiB of memory on; beyond that, nothing grows."""
    peaks = []
    for mebibytes in (64, 512):
        source = tmp_path / f"{mebibytes}.elf"
        sparse_core(source, mebibytes)
        command = [
            sys.executable, "-c", MEASURE, "dump", "-q", "--threads", "2", "-d", str(level), str(source),
            str(tmp_path / f"{mebibytes}.dump"),
        ]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        status, peak = map(int, done.stdout.split())
        assert status == 0
        peaks.append(peak)
        source.unlink()
    assert peaks[1] - peaks[0] < 16, f"peak RSS {peaks[0]} MiB for 64 MiB, {peaks[1]} MiB for 512 MiB"
    assert peaks[1] < 160
