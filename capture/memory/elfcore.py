"""ELF core header → PT_LOAD and PT_NOTE segments; refuses nonsense with a clear line.

Read: ELF64, little endian, ET_CORE, x86_64 and aarch64, as `/proc/vmcore`, `kexec` and `makedumpfile -E` write it.
The program header table is one NumPy array, because a machine (or a hostile file) may have a hundred thousand of them.
So are the other two structures that are read: importing pyelftools for them took a sixteenth of all imports before the
first byte was saved. The set-up side reads programs with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.errors import SourceError
from capture.memory.source import ByteSource

PROGRAM_HEADER = np.dtype(
    [
        ("p_type", "<u4"),
        ("p_flags", "<u4"),
        ("p_offset", "<u8"),
        ("p_vaddr", "<u8"),
        ("p_paddr", "<u8"),
        ("p_filesz", "<u8"),
        ("p_memsz", "<u8"),
        ("p_align", "<u8"),
    ]
)
"""Elf64_Phdr, include/uapi/linux/elf.h."""

ELF_HEADER = np.dtype(
    [
        ("e_ident", "V16"),
        ("e_type", "<u2"),
        ("e_machine", "<u2"),
        ("e_version", "<u4"),
        ("e_entry", "<u8"),
        ("e_phoff", "<u8"),
        ("e_shoff", "<u8"),
        ("e_flags", "<u4"),
        ("e_ehsize", "<u2"),
        ("e_phentsize", "<u2"),
        ("e_phnum", "<u2"),
        ("e_shentsize", "<u2"),
        ("e_shnum", "<u2"),
        ("e_shstrndx", "<u2"),
    ]
)
"""Elf64_Ehdr."""
SH_INFO = np.dtype({"names": ["sh_info"], "formats": ["<u4"], "offsets": [44], "itemsize": 64})
"""What is read of an Elf64_Shdr."""

ET_CORE = 4
PT_LOAD = 1
PT_NOTE = 4
PN_XNUM = 0xFFFF
"""e_phnum when the real number is in sh_info of section 0 (elf(5))."""

ELF_HEADER_SIZE = ELF_HEADER.itemsize
MAGIC = b"\x7fELF"
IDENTITY = (MAGIC + b"\x02\x01\x01").ljust(16, b"\0")
"""ELF64, little endian, version 1 (elf(5))."""
MAX_SEGMENTS = 1 << 18
"""More than any kernel writes (CONFIG_CRASH_MAX_MEMORY_RANGES is 8192); keeps the table under 15 MB."""
MAX_PHYSICAL_BITS = 52
"""The widest physical address of x86_64 and of aarch64 with LPA/LPA2."""

INCOMPLETE = 0x1
"""In e_flags: pages are missing, and read as zeros (DUMP_ELF_INCOMPLETE in makedumpfile's elf_info.h)."""
GAPS = 0x2
"""In e_flags of what vmcapture writes: pages that it left out read as zeros (capture.dumpfile.elf)."""

NO_PHYSICAL = np.uint64((1 << 64) - 1)
"""p_paddr in /proc/kcore of what is no memory of its own: vmalloc, vmemmap (fs/proc/kcore.c)."""

MACHINES = {62: "x86_64", 183: "aarch64"}
"""e_machine, include/uapi/linux/elf-em.h."""


class ElfCore(NamedTuple):
    """What the header says. ``loads`` and ``notes`` are arrays of PROGRAM_HEADER, in file order.

    ``p_filesz`` is cut to what the source really has; ``missing_bytes`` counts what was cut off. ``problems`` names, a
    line each, what of the header was left out.
    """

    machine: str
    loads: NDArray[np.void]
    notes: NDArray[np.void]
    missing_bytes: int
    problems: tuple[str, ...] = ()
    flags: int = 0
    """e_flags: INCOMPLETE, GAPS."""


def parse(source: ByteSource) -> ElfCore:
    """Parse the ELF core header of ``source``.

    Raises:
        SourceError: it is not an ELF core that we read; the message says what was found, where, and what to do.
    """
    header = _elf_header(source)
    machine = MACHINES.get(int(header["e_machine"]))
    if machine is None:
        raise SourceError(f"{source.name}: machine {header['e_machine']}: only x86_64 and aarch64 are read")
    count = _segment_count(source, header)
    table = _program_headers(source, int(header["e_phoff"]), count)
    loads = table[table["p_type"] == PT_LOAD].copy()
    loads = loads[(loads["p_filesz"] > 0) & (loads["p_paddr"] != NO_PHYSICAL)]
    loads, problem = _possible(source, loads, MAX_PHYSICAL_BITS)
    missing = _cut_to_source(source, loads)
    loads = loads[loads["p_filesz"] > 0]
    if not len(loads):
        if problem:
            raise SourceError(f"{source.name}: {problem}: no memory is left to save; copy the vmcore again")
        what = f"truncated: all {missing} bytes of memory are missing" if missing else "no memory in it (no PT_LOAD)"
        raise SourceError(f"{source.name}: {what}; copy it again")
    flags = int(header["e_flags"])
    problems = [f"{source.name}: {problem}: left out"] if problem else []
    if flags & INCOMPLETE:
        problems.append(f"{source.name} is marked incomplete: pages that were not written are zeros")
    return ElfCore(machine, loads, table[table["p_type"] == PT_NOTE].copy(), missing, tuple(problems), flags)


def narrowed(source: ByteSource, core: ElfCore, bits: int) -> ElfCore:
    """Return ``core`` without the segments beyond ``bits`` address bits, what the dead kernel says it can have.

    One stray segment makes bitmaps of many GiB, which crash and others do not read. Where most of memory lies there,
    the number is wrong: nothing is left out.
    """
    loads, problem = _possible(source, core.loads, bits)
    if problem is None or 2 * sum(map(int, loads["p_filesz"])) < sum(map(int, core.loads["p_filesz"])):
        return core
    return core._replace(loads=loads, problems=(*core.problems, f"{source.name}: {problem}: left out"))


def _read(source: ByteSource, offset: int, length: int, what: str) -> bytes:
    """Read a part of the header whole, or say what is missing."""
    where = source.header_offset + offset
    try:
        data = source.read(where, length)
    except (OSError, OverflowError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "offset out of range"
        remedy = f"; {source.remedy}" if source.remedy else ""
        raise SourceError(f"{source.name}: {what} at {where:#x} cannot be read: {reason}{remedy}") from None
    if len(data) < length:
        raise SourceError(f"{source.name}: truncated: {what} needs {length} bytes at {where:#x}, {len(data)} are there")
    return data


def _elf_header(source: ByteSource) -> np.void:
    if source.size == 0:
        raise SourceError(f"{source.name}: empty file, not a vmcore")
    magic = _read(source, 0, 8, "the first bytes")
    if not magic.startswith(MAGIC):
        raise SourceError(f"{source.name}: {_what_else(magic)}")
    if magic[4] != 2:
        raise SourceError(f"{source.name}: ELF class {magic[4]}: only 64-bit vmcores are read")
    if magic[5] != 1:
        raise SourceError(f"{source.name}: ELF data encoding {magic[5]}: only little-endian vmcores are read")
    header: np.void = np.frombuffer(_read(source, 0, ELF_HEADER_SIZE, "the ELF header"), dtype=ELF_HEADER)[0]
    if header["e_type"] != ET_CORE:
        raise SourceError(f"{source.name}: ELF type {header['e_type']}: not a core file; name the vmcore")
    if header["e_phentsize"] != PROGRAM_HEADER.itemsize:
        raise SourceError(
            f"{source.name}: program headers of {header['e_phentsize']} bytes instead of {PROGRAM_HEADER.itemsize}: "
            "the header is damaged"
        )
    return header


def _what_else(magic: bytes) -> str:
    if magic.startswith(b"makedump"):
        return "a flattened makedumpfile stream: not supported yet; rearrange it with `makedumpfile -R` first"
    return f"not an ELF file (it begins with {magic.hex(' ')})"


def _segment_count(source: ByteSource, header: np.void) -> int:
    count = int(header["e_phnum"])
    if count == PN_XNUM:
        where = int(header["e_shoff"])
        if not where:
            raise SourceError(
                f"{source.name}: more than 65,534 program headers announced, but no section 0 to count them"
            )
        raw = _read(source, where, SH_INFO.itemsize, "section header 0 (the number of program headers)")
        count = int(np.frombuffer(raw, dtype=SH_INFO)[0]["sh_info"])
    if not count:
        raise SourceError(f"{source.name}: no program headers: not a vmcore")
    if count > MAX_SEGMENTS:
        raise SourceError(
            f"{source.name}: {count} program headers: over the limit of {MAX_SEGMENTS}, the header is damaged"
        )
    return count


def _program_headers(source: ByteSource, offset: int, count: int) -> NDArray[np.void]:
    raw = _read(source, offset, count * PROGRAM_HEADER.itemsize, f"the table of {count} program headers")
    return np.frombuffer(raw, dtype=PROGRAM_HEADER)


def _possible(source: ByteSource, loads: NDArray[np.void], bits: int) -> tuple[NDArray[np.void], str | None]:
    """Return the segments that lie where memory can be, and a line about those that do not.

    One damaged row must not cost the good ones: what is left of a machine is worth saving without it.
    """
    limit = np.uint64(1 << bits)
    start, size, offset = loads["p_paddr"], loads["p_filesz"], loads["p_offset"]
    bad = (start >= limit) | (size > limit) | (start + size > limit)
    # Physical memory has no size to hold an offset against; nothing that exists lies beyond the address width.
    if source.size is None:
        bad |= (offset >= limit) | (offset + size > limit)
    if not bad.any():
        return loads, None
    first = loads[int(np.flatnonzero(bad)[0])]
    more = f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
    return loads[~bad], (
        f"PT_LOAD at physical {int(first['p_paddr']):#x}, {int(first['p_filesz']):#x} bytes{more} lies beyond "
        f"{bits} address bits, its header is damaged"
    )


def _cut_to_source(source: ByteSource, loads: NDArray[np.void]) -> int:
    """Shorten segments that run past the end of the source, in place; return the bytes that are missing."""
    if source.size is None:
        return 0
    offset = loads["p_offset"]
    room = np.where(offset < source.size, np.uint64(source.size) - np.minimum(offset, np.uint64(source.size)), 0)
    there = np.minimum(loads["p_filesz"], room.astype(np.uint64))
    missing = sum(map(int, loads["p_filesz"] - there))  # as Python integers: a hostile header would overflow
    loads["p_filesz"] = there
    return missing
