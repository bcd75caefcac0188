"""Page codecs: a block of pages in, the bytes of the dump and one size a page out.

zstd goes through one batched call over the mapping itself, one frame a page, without the GIL; each frame carries its
checksum (4 bytes), which readers verify, and no content size, which they know. A python-zstandard that was built on
the system's libzstd, as Debian's is, has no such call: there, and for zlib, which is there for readers without zstd,
each page costs one Python step.

``zstd:auto`` changes its level while it works (capture.dumpfile.pace).
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from capture.dumpfile import kdump
from capture.dumpfile.pace import LEVELS, SAMPLE_PAGES, Cost, Pace
from capture.errors import UsageError

Packer = Callable[[memoryview, NDArray[np.uint64], int], tuple[bytes, NDArray[np.int64]]]
"""(buffer, offsets of pages in it, page size) → (compressed pages joined, size of each). Safe to call from threads."""

ZSTD_BATCHED = {"multi_compress_to_buffer", "multi_decompress_to_buffer"} <= zstandard.backend_features
"""Whether pages can be given to zstd together."""
ZSTD_DEFAULT_LEVEL = 1
ZLIB_DEFAULT_LEVEL = 1

ZSTD_AUTO = "zstd:auto"

_BATCH_PAGES = 128
"""Pages compressed in one call: what comes of them stays in the CPU's cache."""

_SPELLING = re.compile(r"(zstd|zlib|none)(?::(-?[0-9]{1,3}))?")


class Codec(NamedTuple):
    """``flag`` marks pages so compressed in their descriptors; ``pack`` is None where pages are stored as they are.

    ``pace`` is what chooses the level, where it is not fixed.
    """

    name: str
    flag: int
    pack: Packer | None
    pace: Pace | None = None

    @property
    def checked(self) -> bool:
        """Whether what it packs carries a checksum that readers verify: zstd's frames do. (zlib's is a weak one.)"""
        return self.flag == kdump.COMPRESSED_ZSTD

    @property
    def largest(self) -> Codec:
        """The codec that makes a dump as large as this one may: what a size is predicted with."""
        return self if self.pace is None else Codec(*_zstd(LEVELS[0]))


def codec(spelling: str) -> Codec:
    """Return the codec for ``zstd[:LEVEL]``, ``zstd:auto``, ``zlib[:LEVEL]`` or ``none``.

    Raises:
        UsageError: there is no such codec or level.
    """
    if spelling == ZSTD_AUTO:
        return _zstd_auto()
    match = _SPELLING.fullmatch(spelling)
    if match is None or (match[1] == "none" and match[2]):
        raise UsageError(f"-c {spelling}: no such compression; use zstd:auto, zstd[:LEVEL], zlib[:LEVEL] or none")
    name, level = match[1], int(match[2]) if match[2] else None
    if name == "none":
        return Codec("none", kdump.RAW, None)
    if name == "zlib":
        return Codec(*_zlib(ZLIB_DEFAULT_LEVEL if level is None else level))
    return Codec(*_zstd(ZSTD_DEFAULT_LEVEL if level is None else level))


def _zstd(level: int) -> tuple[str, int, Packer]:
    if not -100 <= level <= zstandard.MAX_COMPRESSION_LEVEL or level == 0:
        raise UsageError(f"-c zstd:{level}: levels are 1 to {zstandard.MAX_COMPRESSION_LEVEL}, or -100 to -1 (faster)")
    compressors = _Compressors()

    def pack(buffer: memoryview, offsets: NDArray[np.uint64], page_size: int) -> tuple[bytes, NDArray[np.int64]]:
        return _pack_zstd(compressors.get(level, page_size), buffer, offsets, page_size)

    return f"zstd:{level}", kdump.COMPRESSED_ZSTD, pack


def _zstd_auto() -> Codec:
    pace = Pace()
    compressors = _Compressors()

    def cost(level: int, buffer: memoryview, offsets: NDArray[np.uint64], page_size: int) -> Cost:
        compressor = compressors.get(level, page_size)
        _pack_zstd(compressor, buffer, offsets[:1], page_size)  # the first page pays for the compressor's tables
        started = time.thread_time()
        sizes = _pack_zstd(compressor, buffer, offsets, page_size)[1]
        seconds = time.thread_time() - started
        return Cost(seconds / len(offsets), float(np.minimum(sizes, page_size).mean()))

    def pack(buffer: memoryview, offsets: NDArray[np.uint64], page_size: int) -> tuple[bytes, NDArray[np.int64]]:
        level, sample = pace.begin(len(offsets))
        if sample:
            some = offsets[:: -(-len(offsets) // SAMPLE_PAGES)]
            pace.sampled({other: cost(other, buffer, some, page_size) for other in LEVELS})
        return _pack_zstd(compressors.get(level, page_size), buffer, offsets, page_size)

    return Codec(ZSTD_AUTO, kdump.COMPRESSED_ZSTD, pack, pace)


class _Compressors(threading.local):
    """The compressors of one thread, by level."""

    def __init__(self) -> None:
        self._made: dict[int, zstandard.ZstdCompressor] = {}

    def get(self, level: int, page_size: int) -> zstandard.ZstdCompressor:
        """Return the thread's compressor for a level, made when it is first asked for."""
        found = self._made.get(level)
        if found is None:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                level, source_size=page_size, write_content_size=False, write_checksum=True
            )
            found = self._made[level] = zstandard.ZstdCompressor(compression_params=parameters)
        return found


def _pack_zstd(
    compressor: zstandard.ZstdCompressor, buffer: memoryview, offsets: NDArray[np.uint64], page_size: int
) -> tuple[bytes, NDArray[np.int64]]:
    if not ZSTD_BATCHED:
        return _joined([compressor.compress(buffer[offset : offset + page_size]) for offset in offsets.tolist()])
    segments = np.empty((len(offsets), 2), dtype="<u8")
    segments[:, 0], segments[:, 1] = offsets, page_size
    pieces: list[bytes] = []
    sizes = np.empty(len(offsets), dtype=np.int64)
    for first in range(0, len(offsets), _BATCH_PAGES):
        batch = zstandard.BufferWithSegments(buffer, segments[first : first + _BATCH_PAGES].tobytes())
        # The collection yields buffers by the sequence protocol, which its type stub does not say: an object a page.
        compressed: Any = compressor.multi_compress_to_buffer(batch)
        frames = list(compressed)
        pieces.append(b"".join(frames))
        sizes[first : first + len(frames)] = np.fromiter(map(len, frames), dtype=np.int64, count=len(frames))
    return b"".join(pieces), sizes


def _joined(pages: list[bytes]) -> tuple[bytes, NDArray[np.int64]]:
    return b"".join(pages), np.fromiter(map(len, pages), dtype=np.int64, count=len(pages))


def _zlib(level: int) -> tuple[str, int, Packer]:
    if not 1 <= level <= 9:
        raise UsageError(f"-c zlib:{level}: levels are 1 to 9")

    def pack(buffer: memoryview, offsets: NDArray[np.uint64], page_size: int) -> tuple[bytes, NDArray[np.int64]]:
        return _joined([zlib.compress(buffer[offset : offset + page_size], level) for offset in offsets.tolist()])

    return f"zlib:{level}", kdump.COMPRESSED_ZLIB, pack
