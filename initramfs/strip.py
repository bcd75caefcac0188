"""Leaves out of a program what nobody needs to run it: what no segment holds, symbols and debug data above all.

The loader and the kernel go by the program header table (elf(5)) and map what its segments name; section headers,
symbol tables for debuggers and DWARF lie outside of them. Here the bytes of every segment stay, at the offsets where
they were, and all others become zeros, or are cut off at the end. So it works on the shared objects of wheels, which
patchelf has rearranged and which strip(1) breaks, and it needs no tool on the host.
"""

from __future__ import annotations

import struct

ELF_MAGIC = b"\x7fELF"
_CLASS_64, _LITTLE = 2, 1
_ET_EXEC, _ET_DYN = 2, 3
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr


def strip(program: bytes) -> bytes:
    """Return the program or shared object without what no segment holds; anything else comes back as it is."""
    if len(program) < _HEADER.size or not program.startswith(ELF_MAGIC):
        return program
    fields = list(_HEADER.unpack_from(program))
    identity, kind, table = fields[0], fields[1], fields[5]
    header_size, entry_size, entries = fields[8:11]
    if identity[4:6] != bytes((_CLASS_64, _LITTLE)) or kind not in (_ET_EXEC, _ET_DYN):
        return program
    if entry_size != _SEGMENT.size or not entries or table + entries * entry_size > len(program):
        return program
    kept = [(0, header_size), (table, table + entries * entry_size)]
    for at in range(table, table + entries * entry_size, entry_size):
        _, _, offset, _, _, size, _, _ = _SEGMENT.unpack_from(program, at)
        if offset + size > len(program):
            return program
        kept.append((offset, offset + size))
    left = bytearray(max(end for _, end in kept))
    for start, end in kept:
        left[start:end] = program[start:end]
    fields[6] = fields[11] = fields[12] = fields[13] = 0  # e_shoff, e_shentsize, e_shnum, e_shstrndx
    _HEADER.pack_into(left, 0, *fields)
    return bytes(left)
