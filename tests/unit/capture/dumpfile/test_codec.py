"""Codecs: spellings, and pages that come back through decompressors that are not ours."""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture.dumpfile import codec as codec_module
from capture.dumpfile.codec import Codec, codec
from capture.errors import UsageError
from tests.builders import PAGE, filled, numbered
from tests.dumps import ZLIB, ZSTD
from tests.readers import DECOMPRESS

SPELLINGS = ["zstd", "zstd:3", "zstd:22", "zstd:-5", "zstd:-100", "zlib", "zlib:1", "zlib:9"]


def packed_by(found: Codec, buffer: bytes, offsets: list[int], page_size: int = PAGE) -> list[bytes]:
    """Pack the pages at ``offsets`` of ``buffer``; return what became of each."""
    assert found.pack is not None
    data, sizes = found.pack(memoryview(buffer), np.array(offsets, dtype=np.uint64), page_size)
    assert len(sizes) == len(offsets)
    ends: NDArray[np.int64] = np.cumsum(sizes)
    assert int(ends[-1]) == len(data)
    return [data[int(end - size) : int(end)] for end, size in zip(ends, sizes, strict=True)]


pages = st.one_of(
    st.binary(min_size=1, max_size=1).map(lambda letter: letter * PAGE),
    st.integers(0, 1 << 30).map(lambda seed: random.Random(seed).randbytes(PAGE)),
    st.binary(min_size=1, max_size=64).map(lambda text: (text * PAGE)[:PAGE]),
    st.binary(max_size=200).map(lambda text: text.ljust(PAGE, b"\0")),
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(deadline=None, max_examples=15)
@given(st.lists(pages, min_size=1, max_size=12), st.integers(0, 9), st.randoms(use_true_random=False))
def test_every_page_comes_back_whatever_it_holds_and_wherever_it_lies(
    spelling: str, wanted: list[bytes], skip: int, shuffle: random.Random
) -> None:
    """Pages need not be neighbours, nor aligned, nor in the order of the buffer."""
    order = list(range(len(wanted)))
    shuffle.shuffle(order)
    buffer = b"x" * skip + b"y".join(wanted)
    found = codec(spelling)
    frames = packed_by(found, buffer, [skip + number * (PAGE + 1) for number in order])
    assert [DECOMPRESS[found.flag](frame) for frame in frames] == [wanted[number] for number in order]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("page_size", [16384, 65536])
def test_larger_pages_come_back_too(spelling: str, page_size: int) -> None:
    buffer = numbered(0, 2 * page_size // PAGE) + random.Random(1).randbytes(page_size)
    found = codec(spelling)
    frames = packed_by(found, buffer, [0, page_size, 2 * page_size], page_size)
    assert b"".join(map(DECOMPRESS[found.flag], frames)) == buffer


def test_flags_are_those_of_the_format() -> None:
    assert codec("zstd").flag == codec("zstd:19").flag == ZSTD
    assert codec("zlib").flag == codec("zlib:6").flag == ZLIB
    assert codec("none").flag == 0
    assert codec("none").pack is None


def test_names_tell_the_level_that_is_used() -> None:
    assert [codec(spelling).name for spelling in ("zstd", "zstd:3", "zstd:-5", "zlib", "zlib:9", "none")] == [
        "zstd:1", "zstd:3", "zstd:-5", "zlib:1", "zlib:9", "none",
    ]  # fmt: skip


def test_zlib_pages_are_those_of_zlib_itself() -> None:
    buffer = numbered(7, 3)
    assert packed_by(codec("zlib:6"), buffer, [0, PAGE, 2 * PAGE]) == [
        zlib.compress(buffer[at : at + PAGE], 6) for at in (0, PAGE, 2 * PAGE)
    ]


def test_a_better_level_takes_less_room() -> None:
    text = " ".join(str(number * number) for number in range(4 * PAGE)).encode()[: 8 * PAGE]
    offsets = list(range(0, 8 * PAGE, PAGE))

    def room(spelling: str) -> int:
        return sum(map(len, packed_by(codec(spelling), text, offsets)))

    assert room("zstd:19") < room("zstd:1") < room("zstd:-50")
    assert room("zlib:9") < room("zlib:1")


def test_each_zstd_page_is_a_frame_with_a_checksum_and_without_a_content_size() -> None:
    """libkdumpfile and crash know the page size; the content size would be 2 bytes a page for nothing."""
    for frame in packed_by(codec("zstd"), numbered(0, 2) + filled("a"), [0, PAGE, 2 * PAGE]):
        parameters = zstandard.get_frame_parameters(frame)
        assert parameters.has_checksum
        assert parameters.content_size == zstandard.CONTENTSIZE_UNKNOWN
        assert parameters.dict_id == 0


def test_no_flipped_bit_of_a_zstd_page_goes_unnoticed() -> None:
    page = random.Random(3).randbytes(600) + filled("a")[: PAGE - 600]
    (frame,) = packed_by(codec("zstd"), page, [0])
    for position in range(len(frame)):
        for bit in range(8):
            damaged = bytearray(frame)
            damaged[position] ^= 1 << bit
            try:
                assert DECOMPRESS[ZSTD](bytes(damaged)) == page  # a bit that does not matter
            except (zstandard.ZstdError, AssertionError):
                continue


@pytest.mark.parametrize("spelling", ["zstd", "zstd:-5", "zstd:3"])
def test_without_a_batched_call_the_frames_are_the_same(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's python3-zstandard has none: it is built on the system's libzstd."""
    buffer = filled("a", ".") + numbered(3, 20) + random.Random(4).randbytes(PAGE)
    offsets = [number * PAGE for number in range(23)]
    batched = packed_by(codec(spelling), buffer, offsets)
    monkeypatch.setattr(codec_module, "ZSTD_BATCHED", False)
    assert packed_by(codec(spelling), buffer, offsets) == batched


@pytest.mark.parametrize("spelling", ["zstd", "zlib"])
def test_one_codec_serves_several_threads_at_once(spelling: str) -> None:
    found = codec(spelling)
    buffers = [numbered(seed, 60) + random.Random(seed).randbytes(4 * PAGE) for seed in range(24)]
    offsets = list(range(0, 64 * PAGE, PAGE))
    with ThreadPoolExecutor(4) as pool:
        for buffer, frames in zip(buffers, pool.map(lambda b: packed_by(found, b, offsets), buffers), strict=True):
            assert b"".join(map(DECOMPRESS[found.flag], frames)) == buffer


@pytest.mark.parametrize(
    "spelling",
    ["", "lzo", "snappy", "ZSTD", "zstd:", "zstd:+1", "zstd: 3", " zstd", "zstd ", "zstd\n", "zstd:3:4", "zstd:x",
     "zstd=3", "zstd:1.5", "zstd:0", "zstd:23", "zstd:-101", "zstd:9999", "zlib:0", "zlib:10", "zlib:-1", "none:0",
     "none:1", "zstd,zlib", "-c zstd"],
)  # fmt: skip
def test_another_spelling_is_refused_with_a_line_that_names_the_choices(spelling: str) -> None:
    with pytest.raises(UsageError) as refused:
        codec(spelling)
    assert refused.value.exit_status == 2
    assert spelling in str(refused.value)
    assert "levels are" in str(refused.value) or "zstd[:LEVEL], zlib[:LEVEL] or none" in str(refused.value)
