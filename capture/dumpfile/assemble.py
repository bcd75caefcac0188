"""Puts a flattened dump together: bytes in a row become a file that can be read anywhere.

The stream may be cut short or damaged: what came before that is kept, and the dump is marked incomplete.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capture.dumpfile import kdump
from capture.dumpfile.flattened import END, HEADER, HEADER_BYTES, RECORD, SIGNATURE, STANDARD_INPUT, TYPE, VERSION
from capture.dumpfile.output import OutputFile, TargetFullError, named, sync_directory, unfinished_path
from capture.dumpfile.reader import KdumpFile
from capture.errors import SourceError, TargetError
from capture.memory.elfcore import ELF_HEADER, INCOMPLETE, MAGIC, parse
from capture.memory.source import open_source
from capture.progress import Progress

_PIECE = 1 << 20
"""A record up to that size is written whole or not at all: half a table of descriptors would be taken for damage."""
_MAX_OFFSET = 1 << 62


class Assembled(NamedTuple):
    """What was put together; ``path`` is the finished file, or the incomplete one.

    ``failure`` says why the stream ends early; ``incomplete`` is the mark in the dump.
    """

    path: Path
    size: int
    records: int
    incomplete: bool
    failure: str | None


def assemble(source: str, path: Path, *, replace: bool = False, progress: bool = True) -> Assembled:
    """Put the flattened dump ``source`` (STANDARD_INPUT, a pipe, a file) together as ``path``.

    It has that name when all of the stream was there, else ``path`` + ".incomplete".

    Raises:
        SourceError: it is no flattened dump, or nothing of it can be read.
        TargetError: the file cannot be written; where only room was lacking, that is in what is returned.
    """
    unfinished = unfinished_path(path, replace=replace, resume=False)
    try:
        fd = os.dup(0) if source == STANDARD_INPUT else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{source}: cannot be opened: {error.strerror}; check the path") from None
    try:
        with contextlib.closing(OutputFile(unfinished, hashed=False)) as output:
            try:
                name = "standard input" if source == STANDARD_INPUT else source
                found = _assemble(fd, name, output, progress=progress)
                output.sync()
            except BaseException:
                with contextlib.suppress(OSError):  # nothing of it can be read, or it is in the way of the next one
                    unfinished.unlink()
                raise
    finally:
        os.close(fd)
    if found.failure is None:
        if (trouble := named(unfinished, path)) is not None:
            raise trouble
        sync_directory(path.parent)
        found = found._replace(path=path)
    return found


def _assemble(fd: int, name: str, output: OutputFile, *, progress: bool) -> Assembled:
    """Write all records of a stream to ``output``."""
    stream = _Reader(fd, name)
    head = stream.read(HEADER_BYTES)
    if not head.startswith(SIGNATURE):
        why = "not a flattened dump; pipe one in, or name a file" if head else "nothing came from it"
        raise SourceError(f"{name}: {kdump.wrapped(head) or why}")
    if len(head) < HEADER_BYTES or HEADER.unpack_from(head)[1:] != (TYPE, VERSION):
        raise SourceError(f"{name}: a flattened dump of another kind, or cut short in its first {HEADER_BYTES} bytes")
    records = 0
    failure: str | None = None
    size = os.fstat(fd).st_size  # 0 of a pipe: nobody knows how much will come
    with Progress("putting together", size, enabled=progress and size > 0) as meter:
        meter.advance(stream.position)
        try:
            while failure is None:
                before = stream.position
                failure = _record(stream, output)
                records += failure is None
                meter.advance(stream.position - before)
        except TargetFullError as error:
            failure = str(error)
        except TargetError as error:
            if not isinstance(error.__context__, OSError) or error.__context__.errno != errno.EFBIG:
                raise
            failure = f"{name}: damaged before byte {stream.position}: a record that lies beyond what a file can have"
    incomplete = _mark(name, output, failure)
    return Assembled(output.path, output.size, records, incomplete, failure or None)


def _record(stream: _Reader, output: OutputFile) -> str | None:
    """Write one record; return an empty text after the last one, and why the stream ends where there is none."""
    start = stream.position
    head = stream.read(RECORD.size)
    if head == END:
        return ""
    cut = f"{stream.name}: ends after {start} bytes, without its last record"
    if len(head) < RECORD.size:
        return cut
    offset, size = RECORD.unpack(head)
    if not (0 <= offset <= _MAX_OFFSET and 0 <= size <= _MAX_OFFSET):
        return f"{stream.name}: damaged at byte {start}: a record of {size} bytes at {offset}"
    while size:
        piece = stream.read(min(size, _PIECE))
        if len(piece) < min(size, _PIECE):
            return cut
        output.write([piece], offset)
        offset, size = offset + len(piece), size - len(piece)
    return None


def _mark(name: str, output: OutputFile, failure: str | None) -> bool:
    """Return whether the dump is marked incomplete; it is when the stream ended early.

    Raises:
        SourceError: there is no header.
    """
    raw = output.read_back(0, kdump.DISK_DUMP_HEADER.itemsize)
    if not raw.startswith(kdump.SIGNATURE):
        if raw.startswith(MAGIC):
            return _mark_elf(output, failure)
        raise SourceError(f"{failure or f'{name}: what is in it is no dump'}: nothing of it can be read")
    header = np.frombuffer(raw, kdump.DISK_DUMP_HEADER).copy()
    incomplete = bool(header["status"][0] & kdump.INCOMPLETE)
    if not failure:
        return incomplete
    with KdumpFile(output.path):  # says what else is missing
        pass
    header["status"] |= kdump.INCOMPLETE
    output.write([header.tobytes()], 0)
    return True


def _mark_elf(output: OutputFile, failure: str | None) -> bool:
    """As ``_mark``, of an ELF core: where what comes first of it is not there, nothing of it can be read."""
    header = np.frombuffer(output.read_back(0, ELF_HEADER.itemsize), ELF_HEADER).copy()
    if failure:
        try:
            with open_source(str(output.path)) as source:
                parse(source)
        except SourceError as error:
            raise SourceError(f"{failure}: nothing of it can be read") from error
        header["e_flags"] |= INCOMPLETE
        output.write([header.tobytes()], 0)
    return bool(header["e_flags"][0] & INCOMPLETE)


class _Reader:
    """A descriptor that is read in a row."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self.position = 0

    def read(self, length: int) -> bytes:
        """Return ``length`` bytes, less at the end.

        Raises:
            SourceError: it cannot be read.
        """
        pieces = []
        while length:
            try:
                piece = os.read(self._fd, length)
            except OSError as error:
                raise SourceError(f"{self.name}: cannot be read at byte {self.position}: {error.strerror}") from None
            if not piece:
                break
            pieces.append(piece)
            self.position += len(piece)
            length -= len(piece)
        return b"".join(pieces)
