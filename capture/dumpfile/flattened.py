"""The flattened format: a dump for what takes bytes only in a row, a pipe or an encrypting program.

What would be written at an offset becomes a record: where it belongs, how long it is, and its bytes; a later record is
written over earlier ones. Layout, all numbers big-endian: makedumpfile_header of makedumpfile.h (makedumpfile 1.5 and
later), in a block of 4 KiB; then struct makedumpfile_data_header and data, again and again; the last one is (-1, -1).
`makedumpfile -R`, crash and libkdumpfile read it, and capture.dumpfile.assemble puts it together.

A stream that is cut short anywhere is a dump that is cut short: descriptors follow the data that they describe.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from capture.dumpfile import kdump
from capture.dumpfile.output import Pieces, ScratchFile, TargetFullError, Written, cut_pieces, put_all, target_error

SIGNATURE = b"makedumpfile\0\0\0\0"
TYPE, VERSION = 1, 1
"""TYPE_FLAT_HEADER, VERSION_FLAT_HEADER."""
HEADER = struct.Struct(">16sqq")
HEADER_BYTES = 4096
"""MAX_SIZE_MDF_HEADER."""
RECORD = struct.Struct(">qq")
"""Offset and size."""
END = RECORD.pack(-1, -1)
STANDARD_INPUT = "-"
RECORD_BYTES = 1 << 18
"""Data of a record at most: what has to follow, once it was begun, when the disk is full."""
_ROWS = 1 << 12
"""Rows of a table that are put into records together."""
_WORD = 8


def is_stream(name: str) -> bool:
    """Whether SOURCE is to be put together: standard input, a pipe, or a file that begins like a flattened dump."""
    if name == STANDARD_INPUT:
        return True
    with contextlib.suppress(OSError):  # whatever is wrong with it, somebody else says
        if stat.S_ISFIFO(Path(name).stat().st_mode):
            return True
    return kdump.start_of(name).startswith(SIGNATURE)


class Stream(Written, Protocol):
    """Where the bytes of a flattened dump go, in a row."""

    def append(self, pieces: Pieces) -> int:
        """Write all ``pieces`` behind what was written; return how many bytes they are."""

    def forget(self) -> None:
        """Let the page cache drop what is on the disk."""


class FlattenedOutput:
    """An ``Output`` that writes records to ``stream``.

    Only bitmaps can be read back: they are kept in a file without a name in ``directory`` (one bit a page of memory
    each; nothing of what is in a page).

    Raises:
        TargetError: from every method.
    """

    sequential = True

    def __init__(self, stream: Stream, directory: Path) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        """Around the records of one write: two threads do."""
        self._feeder = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        """Writes to the stream: Ctrl-C comes to the main thread, and must not cut a record in two."""
        self._bitmaps = ScratchFile(directory)
        try:
            self._append([HEADER.pack(SIGNATURE, TYPE, VERSION).ljust(HEADER_BYTES, b"\0")])
        except BaseException:
            self._feeder.shutdown()
            self._bitmaps.close()
            raise

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self._stream.name

    @property
    def size(self) -> int:
        """Bytes so far, as they are stored."""
        return self._stream.size

    @property
    def full(self) -> bool:
        """Whether there is room for what makes the dump readable only: no page data, please."""
        return self._stream.full

    def write(self, pieces: Pieces, offset: int) -> int:
        """Write all ``pieces`` one after another at ``offset``; return how many bytes that were."""
        start = offset
        with self._lock:
            for record in cut_pieces(pieces, itertools.repeat(RECORD_BYTES)):
                if offset > start and self._stream.full:  # so much was page data
                    raise TargetFullError(f"{self.name}: no room left; make room or choose another target")
                length = sum(map(len, record))
                self._append([RECORD.pack(offset, length), *record])
                offset += length
        return offset - start

    def _append(self, pieces: Pieces) -> None:
        """Write to the stream, whole, behind all that came before; whoever waits for it may be interrupted."""
        self._feeder.submit(self._stream.append, pieces).result()

    def write_bitmap(self, bits: bytes, offset: int) -> None:
        """Write bytes that will be read back."""
        self._bitmaps.write_bitmap(bits, offset)
        self.write([bits], offset)

    def write_rows(self, numbers: NDArray[np.int64], rows: NDArray[np.void], at: int) -> Iterator[int]:
        """Write rows of a table to their places, a record for each run of them. No Python for each row.

        The rows are whole words of 8 bytes.
        """
        for start in range(0, len(numbers), _ROWS):
            records = _records(numbers[start : start + _ROWS], rows[start : start + _ROWS], at)
            with self._lock:
                self._append([records])
            yield len(rows[start : start + _ROWS])

    def read_back(self, offset: int, length: int) -> bytes:
        """Return bytes of a bitmap; what was never written reads as zeros."""
        return self._bitmaps.read_back(offset, length)

    def reserve(self, offset: int, length: int) -> None:
        """Have the dump reach to the end of ``length`` bytes at ``offset``, also when nothing follows."""
        if length:
            self.write([b"\0"], offset + length - 1)

    def truncate(self, length: int) -> None:
        """What is in the stream stays there, and nothing points at it."""

    def sync(self) -> None:
        """Bring what was written to the disk, as far as that can be done."""
        self._feeder.submit(_nothing).result()  # what somebody who was interrupted has left there
        self._stream.sync()

    def forget(self, _offset: int, _length: int) -> None:
        """Let the page cache drop bytes that are on the disk."""
        self._stream.forget()

    def end(self) -> None:
        """Write the last record, and bring all of it to the disk; nothing is written after that."""
        with self._lock:
            self._append([END])
        self._stream.end()
        self._stream.sync()

    def settle(self) -> None:
        """Wait until all that was written is there."""
        self._feeder.submit(self._stream.settle).result()

    def digests(self) -> list[str]:
        """Return the SHA-256 of each block of 64 MiB, hexadecimal; none where nobody asked for them."""
        return self._stream.digests()

    def close(self) -> None:
        """Close the stream, whatever it lacks."""
        self._feeder.shutdown()
        self._bitmaps.close()
        self._stream.close()


class PipeStream:
    """A descriptor that is there already, standard output or a pipe; it is not closed."""

    full = False

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self.size = 0

    def append(self, pieces: Pieces) -> int:
        """Write all ``pieces`` behind what was written; return how many bytes they are."""
        length = sum(map(len, pieces))
        try:
            put_all(lambda some: os.writev(self._fd, some), pieces)
        except OSError as error:
            raise target_error(self.name, f"writing at {self.size}", error) from None
        self.size += length
        return length

    def sync(self) -> None:
        """Nothing can be done: whoever reads has it."""

    def forget(self) -> None:
        """Nothing is kept."""

    def end(self) -> None:
        """Nothing is held back."""

    def settle(self) -> None:
        """Nothing is under way behind our back."""

    def digests(self) -> list[str]:
        """Return none."""
        return []

    def close(self) -> None:
        """Leave the descriptor to whom it belongs."""


def _nothing() -> None:
    pass


def _records(numbers: NDArray[np.int64], rows: NDArray[np.void], at: int) -> bytes:
    """Return rows of the table that begins at ``at`` as records: a head, offset and size, before each run of them."""
    words = rows.itemsize // _WORD
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    lengths = np.diff(starts, append=len(numbers))
    heads = starts * words + np.arange(len(starts)) * 2
    places = np.arange(len(numbers)) * words + np.repeat(np.arange(1, len(starts) + 1) * 2, lengths)
    made = np.empty(len(numbers) * words + len(starts) * 2, dtype="<u8")
    made[places[:, None] + np.arange(words)] = np.frombuffer(rows.tobytes(), "<u8").reshape(-1, words)
    made[heads] = (numbers[starts] * rows.itemsize + at).astype("<u8").byteswap()
    made[heads + 1] = (lengths * rows.itemsize).astype("<u8").byteswap()
    return made.tobytes()
