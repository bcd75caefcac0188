"""PT_NOTE segments → notes, and the one merged blob that a dump carries.

A raw core header has one PT_NOTE for each possible CPU, padded with zeros to a fixed size, and one for VMCOREINFO;
``/proc/vmcore`` has merged them into one. Both come out the same here: what each segment holds up to its first empty
note, byte for byte, in order. Notes that we do not know are kept like any other.

But for large ones, where memory is short: a driver of the capture kernel may add what it found in its device
(NT_VMCOREDD; 32 MiB for a card of cxgb4), and ``/proc/vmcore`` has that before all else. It is not worth the dump.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture import footprint
from capture.memory.source import ByteSource

NOTE_HEADER = struct.Struct("<III")
"""Elf64_Nhdr: n_namesz, n_descsz, n_type (include/uapi/linux/elf.h)."""
NOTE_ALIGNMENT = 4

NT_PRSTATUS = 1
VMCOREINFO_NAME = b"VMCOREINFO"

MAX_NOTE_BYTES = 64 << 20
"""All notes together. 8192 CPUs need 3 MiB; only device dumps (NT_VMCOREDD) could be larger."""
LARGE_NOTE = 1 << 20
"""Bytes of a note that is kept only where there is memory for it."""
_LARGE_BYTES, _LARGE_SHARE = 48 << 20, 32
"""All large notes together, and the part of all memory that they may have: each is in it four times, for a while."""
MAX_NOTES = 1 << 17
MAX_PROBLEMS = 20
"""Problems that are named; of the rest the number. They are printed on a console that may do 115200 baud."""


class Note(NamedTuple):
    """One note. ``offset`` is where its descriptor starts in ``Notes.blob``, ``segment`` the number of its PT_NOTE."""

    name: bytes
    type: int
    descriptor: bytes
    offset: int
    segment: int


class Notes(NamedTuple):
    """All notes, their bytes as one blob, and what could not be had."""

    blob: bytes
    notes: tuple[Note, ...]
    problems: tuple[str, ...]

    def prstatus(self) -> tuple[Note, ...]:
        """Return the NT_PRSTATUS notes of CPUs, in order."""
        return tuple(note for note in self.notes if note.type == NT_PRSTATUS and note.name == b"CORE")

    def vmcoreinfo(self) -> Note | None:
        """Return the VMCOREINFO note, the largest if there are several."""
        found = [note for note in self.notes if note.name == VMCOREINFO_NAME]
        return max(found, key=lambda note: len(note.descriptor), default=None)


def read_notes(source: ByteSource, segments: NDArray[np.void]) -> Notes:
    """Read and merge PT_NOTE ``segments`` (an array of PROGRAM_HEADER).

    Never raises for what the segments hold: a part that cannot be read or parsed is named in ``problems``.
    """
    blob = bytearray()
    notes: list[Note] = []
    problems = _Problems()
    refused: dict[str, list[int]] = {}
    room = MAX_NOTE_BYTES  # counted down by what is read, not by what is kept: many segments may name the same padding
    large = _LargeNotes(source)
    for number, segment in enumerate(segments):
        offset, size = int(segment["p_offset"]), int(segment["p_filesz"])
        try:
            left_out = large.left_out(offset, size)
            kept = size - sum(end - start for start, end in left_out)
            wanted = min(kept, room)
            data = _read_around(source, offset, size, left_out, wanted)
        except (OSError, OverflowError, ValueError) as error:
            refused.setdefault(getattr(error, "strerror", None) or str(error), []).append(number)
            continue
        room -= len(data)
        for start, end in left_out:
            problems.append(
                f"PT_NOTE {number}: the note at +{start:#x} is left out: {(end - start) >> 20} MiB, a driver's dump of "
                "its device, are too much for this machine's memory"
            )
        if wanted < kept:
            problems.append(f"PT_NOTE {number} at {offset:#x}: {kept} bytes, only {wanted} are read")
        if len(data) < wanted:
            problems.append(f"PT_NOTE {number} at {offset:#x}: truncated, {len(data)} of {wanted} bytes are there")
        used = _parse_segment(data, number, len(blob), notes, problems)
        blob += data[:used]
        blob += bytes(-len(blob) % NOTE_ALIGNMENT)
        if len(notes) >= MAX_NOTES:
            problems.append(f"more than {MAX_NOTES} notes: the rest is left out")
            break
    for reason, numbers in refused.items():
        what = f"PT_NOTE {numbers[0]}" + (f" and {len(numbers) - 1} more" if numbers[1:] else "")
        remedy = f"; {source.remedy}" if source.remedy and reason == os.strerror(errno.EPERM) else ""
        problems.append(f"{source.name}: {what} cannot be read: {reason}{remedy}")
    return Notes(bytes(blob), tuple(notes), problems.lines())


class _LargeNotes:
    """Tells which large notes there is no memory for."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        total = footprint.memory("MemTotal")  # (the same as long as this kernel runs: a save that is gone on with)
        self._room = _LARGE_BYTES if total is None else min(_LARGE_BYTES, total // _LARGE_SHARE)
        self._walked = 0

    def left_out(self, offset: int, size: int) -> list[tuple[int, int]]:
        """Return where in a segment, [start, end) in bytes, they lie; raises as ``source.read`` does."""
        found: list[tuple[int, int]] = []
        position = 0
        while size >= LARGE_NOTE and position + NOTE_HEADER.size <= size and self._walked < MAX_NOTES:
            head = self._source.read(offset + position, NOTE_HEADER.size)
            if len(head) < NOTE_HEADER.size:
                break
            name_size, descriptor_size, _ = NOTE_HEADER.unpack(head)
            end = position + NOTE_HEADER.size + _aligned(name_size) + _aligned(descriptor_size)
            if not name_size or end > size:
                break
            if end - position > self._room and end - position >= LARGE_NOTE:
                found.append((position, end))
            elif end - position >= LARGE_NOTE:
                self._room -= end - position
            position = end
            self._walked += 1
        return found


def _read_around(source: ByteSource, offset: int, size: int, left_out: list[tuple[int, int]], wanted: int) -> bytes:
    """Return ``wanted`` bytes of a segment, fewer only at the end of the source, without what is left out."""
    pieces: list[bytes] = []
    begin = 0
    for start, end in (*left_out, (size, size)):
        length = min(start - begin, wanted)
        piece = source.read(offset + begin, length) if length else b""
        pieces.append(piece)
        if len(piece) < length:
            break
        begin, wanted = end, wanted - length
    return b"".join(pieces)


class _Problems:
    """The first MAX_PROBLEMS lines, and how many there were."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0

    def append(self, line: str) -> None:
        self._count += 1
        if self._count <= MAX_PROBLEMS:
            self._lines.append(line)

    def lines(self) -> tuple[str, ...]:
        more = self._count - len(self._lines)
        return (*self._lines, f"{more} more problems with the notes") if more else tuple(self._lines)


def _parse_segment(data: bytes, number: int, base: int, notes: list[Note], problems: _Problems) -> int:
    """Append the notes of one segment to ``notes``; return how many bytes they take (4-byte aligned)."""
    position = 0
    while position + NOTE_HEADER.size <= len(data) and len(notes) < MAX_NOTES:
        name_size, descriptor_size, note_type = NOTE_HEADER.unpack_from(data, position)
        if not name_size:  # the final, empty note: what follows is padding
            break
        name_start = position + NOTE_HEADER.size
        start = name_start + _aligned(name_size)
        if start + descriptor_size > len(data):
            problems.append(
                f"PT_NOTE {number}: the note at +{position:#x} claims {name_size}+{descriptor_size} bytes, beyond its "
                "segment: it and what follows is left out"
            )
            break
        name = data[name_start : name_start + name_size].rstrip(b"\0")
        notes.append(Note(name, note_type, data[start : start + descriptor_size], base + start, number))
        end = start + _aligned(descriptor_size)
        position = min(end, len(data))  # the padding of the last descriptor may be cut off
    return position


def _aligned(size: int) -> int:
    return -(-size // NOTE_ALIGNMENT) * NOTE_ALIGNMENT
