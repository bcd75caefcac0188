"""The flattened format: what is in the stream, and that every reader makes the same dump of it."""

from __future__ import annotations

import os
import random
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dumpfile import flattened, writer
from capture.dumpfile.flattened import FlattenedOutput, PipeStream, is_stream
from capture.dumpfile.output import OutputFile
from capture.dumpfile.writer import KdumpWriter
from capture.errors import TargetError
from tests.builders import PAGE, filled, numbered
from tests.readers import by_hand, makedumpfile_rearrange
from tests.unit.capture.dumpfile.test_writer import PAGES, PLAN, packed, part, runs_of, write_pages


def records(stream: bytes) -> list[tuple[int, bytes]]:
    """The records of a flattened stream by makedumpfile.h, to its last whole one; the terminator is (-1, b"")."""
    assert stream[:32] == struct.pack(">16sqq", b"makedumpfile", 1, 1)
    assert stream[32:4096].strip(b"\0") == b""
    found: list[tuple[int, bytes]] = []
    at = 4096
    while at + 16 <= len(stream):
        offset, size = struct.unpack_from(">qq", stream, at)
        if (offset, size) == (-1, -1):
            assert at + 16 == len(stream)
            return [*found, (-1, b"")]
        if at + 16 + size > len(stream):
            break
        found.append((offset, stream[at + 16 : at + 16 + size]))
        at += 16 + size
    return found


def laid_out(stream: bytes) -> bytes:
    """The file that a stream describes, naively."""
    file = bytearray()
    for offset, data in records(stream):
        if offset >= 0:
            file.extend(bytes(max(0, offset + len(data) - len(file))))
            file[offset : offset + len(data)] = data
    return bytes(file)


def written(pages: dict[int, bytes], *, at_once: int = 3) -> bytes:
    """The stream of a dump of ``pages``."""
    with tempfile.TemporaryDirectory() as name, (Path(name) / "stream").open("w+b") as file:
        with closing(FlattenedOutput(PipeStream(file.fileno(), "test"), Path(name))) as output:
            write_pages(output, pages, at_once=at_once)
            output.end()
            assert output.size == file.seek(0, os.SEEK_END)
        file.seek(0)
        return file.read()


@pytest.fixture
def output(tmp_path: Path) -> Iterator[FlattenedOutput]:
    with (tmp_path / "stream").open("wb") as file:
        made = FlattenedOutput(PipeStream(file.fileno(), "test"), tmp_path)
        with closing(made):
            yield made


def test_whoever_interrupts_cuts_no_record_in_two(tmp_path: Path) -> None:
    """Ctrl-C comes while a slow reader is waited for: what was begun goes out whole, and what follows behind it."""
    reading, writing = os.pipe()
    said = bytearray()

    def read_slowly() -> None:
        while piece := os.read(reading, 1 << 14):
            said.extend(piece)
            time.sleep(0.005)

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    reader = threading.Thread(target=read_slowly)
    reader.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with closing(FlattenedOutput(PipeStream(writing, "test"), tmp_path)) as output:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                output.write([b"a" * (1 << 20)], 0)
            output.write([b"behind"], 1 << 20)
            output.end()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(writing)
        reader.join()
        os.close(reading)
    *begun, behind, last = records(bytes(said))
    assert begun[0][0] == 0
    assert {data for _, data in begun} == {b"a" * flattened.RECORD_BYTES}
    assert behind == (1 << 20, b"behind")
    assert last == (-1, b"")


def test_the_stream_describes_the_file_that_is_written_otherwise(tmp_path: Path) -> None:
    with closing(OutputFile(tmp_path / "dump")) as file:
        write_pages(file, PAGES)
    assert laid_out(written(PAGES)) == (tmp_path / "dump").read_bytes()


def test_makedumpfile_puts_it_together(tmp_path: Path) -> None:
    makedumpfile_rearrange(written(PAGES), tmp_path / "dump")
    assert by_hand(tmp_path / "dump").pages == PAGES


def test_the_last_record_says_that_it_is_the_last() -> None:
    assert records(written(PAGES))[-1] == (-1, b"")


def test_a_record_is_small_whatever_is_written_at_once(tmp_path: Path, output: FlattenedOutput) -> None:
    data = random.Random(1).randbytes(3 * flattened.RECORD_BYTES + 5)
    pieces: list[bytes | memoryview] = [data[:7], memoryview(data)[7:-3], b"", data[-3:]]
    assert output.write(pieces, 1000) == len(data)
    found = records((tmp_path / "stream").read_bytes())
    assert [(offset, len(record)) for offset, record in found] == [
        (1000 + number * flattened.RECORD_BYTES, flattened.RECORD_BYTES if number < 3 else 5) for number in range(4)
    ]
    assert b"".join(record for _, record in found) == data


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(0, 1 << 40))
def test_rows_of_a_table_get_to_their_places_a_record_for_each_run(numbers: set[int], at: int) -> None:
    rows = np.zeros(len(numbers), dtype=[("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("more", "<u8")])
    rows["offset"], rows["size"], rows["more"] = sorted(numbers), 7, 1 << 63
    with tempfile.TemporaryDirectory() as name, (Path(name) / "stream").open("w+b") as file:
        with closing(FlattenedOutput(PipeStream(file.fileno(), "test"), Path(name))) as output:
            assert list(output.write_rows(np.array(sorted(numbers)), rows, at)) == [len(numbers)]
        file.seek(0)
        found = records(file.read())
    assert [(offset - at, len(data)) for offset, data in found] == [
        (24 * first, 24 * count) for first, count in runs_of(sorted(numbers))
    ]
    assert b"".join(data for _, data in found) == rows.tobytes()


def test_many_rows_are_written_a_part_at_a_time(
    tmp_path: Path, output: FlattenedOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flattened, "_ROWS", 4)
    rows = np.arange(10, dtype="<u8").view([("number", "<u8")])
    assert list(output.write_rows(np.arange(10), rows, 0)) == [4, 4, 2]
    found = records((tmp_path / "stream").read_bytes())
    assert [(offset, len(data)) for offset, data in found] == [(0, 32), (32, 32), (64, 16)]
    assert b"".join(data for _, data in found) == rows.tobytes()


def test_no_rows_are_no_record(tmp_path: Path, output: FlattenedOutput) -> None:
    assert list(output.write_rows(np.zeros(0, np.int64), np.zeros(0, [("a", "<u8")]), 0)) == []
    assert records((tmp_path / "stream").read_bytes()) == []


def test_bitmaps_are_read_back_and_nothing_of_a_page_is_kept(output: FlattenedOutput, tmp_path: Path) -> None:
    output.write_bitmap(b"\x0f" * 100, 8192)
    output.write([b"page"], 1 << 20)
    assert output.read_back(8190, 104) == b"\0\0" + b"\x0f" * 100 + b"\0\0"
    assert output.read_back(1 << 20, 4) == bytes(4)
    assert [path.name for path in tmp_path.iterdir()] == ["stream"], "the file has no name"


def test_what_is_reserved_is_there_when_nothing_follows(output: FlattenedOutput, tmp_path: Path) -> None:
    output.reserve(5000, 100)
    output.reserve(9000, 0)
    assert len(laid_out((tmp_path / "stream").read_bytes())) == 5100


def test_without_room_for_bitmaps_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="making a file for the bitmaps of a dump failed: No such file or directory"):
        FlattenedOutput(PipeStream(1, "test"), tmp_path / "gone")


def test_a_reader_that_has_gone_is_said() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(TargetError, match=r"^standard output: writing at 0 failed: Broken pipe$"):
        PipeStream(writing, "standard output").append([b"x"])
    os.close(writing)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 300), st.sampled_from(["zero", "even", "random"]), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(),
)
def test_wherever_it_is_cut_each_page_that_is_described_is_right(
    kinds: dict[int, str], at_once: int, seed: int
) -> None:
    """At every record, and in places within them; pages in any order, in steps of a few pages."""
    chance = random.Random(seed)
    pages = {
        pfn: {"zero": filled("."), "even": numbered(pfn, 1), "random": chance.randbytes(PAGE)}[kind]
        for pfn, kind in sorted(kinds.items())
    }
    order = sorted(pages)
    chance.shuffle(order)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SYNC_PAGES", 4)
        with (Path(name) / "stream").open("w+b") as file:
            with (
                closing(FlattenedOutput(PipeStream(file.fileno(), "test"), Path(name))) as output,
                closing(KdumpWriter(output, PLAN)) as made,
            ):
                made.begin(runs_of(sorted(pages)))
                for first in range(0, len(order), at_once):
                    chosen = sorted(order[first : first + at_once])
                    made.append(packed({pfn: pages[pfn] for pfn in chosen}))
                made.finish(complete=True)
                output.end()
            file.seek(0)
            stream = file.read()
        dump = Path(name) / "dump"
        ends = [4096]
        for _, data in records(stream)[:-1]:
            ends.append(ends[-1] + 16 + len(data))
        readable = False
        counts = []
        for cut in sorted({*ends, *(chance.randrange(4096, len(stream)) for _ in range(20)), len(stream)}):
            data = laid_out(stream[:cut])
            if not data.startswith(b"KDUMP   "):
                assert not readable, "once it can be read, it can"
                continue
            readable = True
            dump.write_bytes(data)
            found = by_hand(dump)
            assert {pfn: pages[pfn] for pfn in found.pages} == found.pages
            assert found.incomplete or found.pages == pages
            counts.append(len(found.pages))
        assert counts == sorted(counts)
        assert counts[-1] == len(pages)
        assert not found.incomplete


def test_a_step_is_described_before_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream needs no sync between data and descriptors: what is behind the data is there with it."""
    monkeypatch.setattr(writer, "SYNC_PAGES", 2)
    with (
        (tmp_path / "stream").open("wb") as file,
        closing(FlattenedOutput(PipeStream(file.fileno(), "test"), tmp_path)) as output,
        closing(KdumpWriter(output, PLAN)) as made,
    ):
        made.begin(runs_of(sorted(PAGES)))
        made.append(packed(part(PAGES, 0, 3)))
        made.checkpoint()
        data = laid_out((tmp_path / "stream").read_bytes())
    (tmp_path / "dump").write_bytes(data)
    assert by_hand(tmp_path / "dump").pages == part(PAGES, 0, 3)


def test_a_stream_is_told_by_how_it_begins_or_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(written(PAGES))
    (tmp_path / "elf").write_bytes(b"\x7fELF")
    os.mkfifo(tmp_path / "pipe")
    assert [is_stream(str(tmp_path / name)) for name in ("flat", "elf", "pipe", "gone")] == [True, False, True, False]
    assert is_stream("-")
