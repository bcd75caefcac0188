"""A BLAS without a body: NumPy is linked to one, loads it at once, and nothing of ours ever calls it.

It is a third of the image (25 MB of kernels for every CPU there ever was, and the Fortran runtime), and all of that
stays in a capture kernel's memory. What stands for it here has the same name and the symbols that are asked for. Behind
them is an instruction that no CPU has (the job would end with SIGILL, which stage one tells), but for ``cblas_sdot``:
NumPy multiplies two vectors when it is imported, to see that its BLAS is none of the broken ones (_sanity_check,
numpy/__init__.py).

Whether Python and all of our packages run on it is tried before it is believed: ``initramfs.runtime``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from initramfs.strip import ELF_MAGIC

_NAMES = re.compile(r"lib(scipy_openblas|openblas|cblas|blas|lapack)(64_?)?[po]?[-.].*")
"""NumPy's own wheels; Debian, Fedora."""
_MACHINE = "EM_X86_64"
_DOT = b"cblas_sdot"

# float cblas_sdot(n, x, stride of x, y, stride of y), System V calling convention. Numbers are 32 or 64 bits, by the
# library; the lower half of each is taken.
_DOT_CODE = bytes.fromhex(
    "4863ff"  # movsxd rdi, edi
    "4863d2"  # movsxd rdx, edx
    "4d63c0"  # movsxd r8, r8d
    "0f57c0"  # xorps xmm0, xmm0
    "4885ff"  # test rdi, rdi
    "7e19"  # jle to the ret
    "f30f100e"  # movss xmm1, [rsi]
    "f30f5909"  # mulss xmm1, [rcx]
    "f30f58c1"  # addss xmm0, xmm1
    "488d3496"  # lea rsi, [rsi + 4 * rdx]
    "4a8d0c81"  # lea rcx, [rcx + 4 * r8]
    "48ffcf"  # dec rdi
    "75e7"  # jnz back to the first movss
    "c3"  # ret
)
_TRAP_CODE = bytes.fromhex("0f0b")  # ud2

_PAGE = 4096
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_DYNAMIC = struct.Struct("<QQ")  # Elf64_Dyn
_ET_DYN, _EM_X86_64 = 3, 62
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_R, _RW, _RX = 4, 6, 5
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 4, 5, 6, 10, 11, 14
_FUNCTION = 2  # STT_FUNC
_GLOBAL_FUNCTION = 1 << 4 | _FUNCTION
_SOME_SECTION = 1
"""There are no section headers; the loader only asks whether a symbol is defined (0 is undefined)."""


def is_blas(path: Path) -> bool:
    """Whether a shared object is a BLAS or LAPACK, by its name."""
    return _NAMES.fullmatch(path.name) is not None


def hollow(library: Path, users: Iterable[Path]) -> bytes | None:
    """Return what can stand for ``library`` with those that are linked to it; None where nothing can.

    Raises:
        OSError: one of the files cannot be read.
    """
    try:
        with library.open("rb") as file:
            elf = ELFFile(file)
            soname = _soname(elf)
            symbols = elf.get_section_by_name(".dynsym")
            versioned = elf.get_section_by_name(".gnu.version_d") is not None
            if elf["e_machine"] != _MACHINE or versioned or soname is None:
                return None
            if not isinstance(symbols, SymbolTableSection):
                return None
            wanted = {name for user in users for name in _undefined(user)}
            there = {name: kind for name, kind, defined in _symbols(symbols) if defined and name in wanted}
    except (ELFError, ValueError, struct.error):
        return None
    if not there or set(there.values()) != {_FUNCTION}:
        return None
    return _shared_object(soname, sorted(there))


def _soname(elf: ELFFile) -> str | None:
    for segment in elf.iter_segments():
        if isinstance(segment, DynamicSegment):
            for tag in segment.iter_tags("DT_SONAME"):
                name: str = getattr(tag, "soname")  # noqa: B009  (an attribute that its type does not know)
                return name
    return None


def _undefined(path: Path) -> set[bytes]:
    """Return the names that a shared object wants others to define."""
    with path.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym")
        if not isinstance(symbols, SymbolTableSection):
            return set()
        return {name for name, _, defined in _symbols(symbols) if name and not defined}


def _symbols(table: SymbolTableSection) -> Iterator[tuple[bytes, int, bool]]:
    """Yield name and type of each symbol, and whether it is defined there.

    Eighty objects have 40,000 symbols, of which pyelftools would make an object each.
    """
    strings: bytes = table.stringtable.data()
    for name, info, _, section, _, _ in _SYMBOL.iter_unpack(table.data()):
        yield strings[name : strings.index(b"\0", name)], info & 0xF, section != 0


def _shared_object(soname: str, functions: list[bytes]) -> bytes:
    """Put a shared object together: one segment of code and tables, one with the table that the loader writes to."""
    strings = b"\0"
    name_at = []
    for name in (soname.encode(), *functions):
        name_at.append(len(strings))
        strings += name + b"\0"
    count = len(functions) + 1  # symbol 0 is none
    hash_at = _HEADER.size + 4 * _SEGMENT.size
    # One bucket, in which every symbol leads to the next: the loader asks for each of them once.
    table = struct.pack(f"<{3 + count}I", 1, count, 1, *(0, *range(2, count), 0))
    symbols_at = _aligned(hash_at + len(table), 8)
    strings_at = symbols_at + count * _SYMBOL.size
    code_at = _aligned(strings_at + len(strings), 16)
    trap_at = code_at + len(_DOT_CODE)
    end = trap_at + len(_TRAP_CODE)
    symbols = _SYMBOL.pack(0, 0, 0, 0, 0, 0) + b"".join(
        _SYMBOL.pack(at, _GLOBAL_FUNCTION, 0, _SOME_SECTION, code_at if _DOT in name else trap_at, 0)
        for at, name in zip(name_at[1:], functions, strict=True)
    )
    dynamic = b"".join(
        _DYNAMIC.pack(tag, value)
        for tag, value in (
            (_DT_SONAME, name_at[0]), (_DT_HASH, hash_at), (_DT_STRTAB, strings_at), (_DT_SYMTAB, symbols_at),
            (_DT_STRSZ, len(strings)), (_DT_SYMENT, _SYMBOL.size), (0, 0),
        )
    )  # fmt: skip
    dynamic_at = _aligned(end, _PAGE)
    segments = (
        (_PT_LOAD, _RX, 0, end, _PAGE),
        (_PT_LOAD, _RW, dynamic_at, len(dynamic), _PAGE),
        (_PT_DYNAMIC, _RW, dynamic_at, len(dynamic), 8),
        (_PT_GNU_STACK, _RW, 0, 0, 16),  # without it, the loader would make every stack executable
    )
    identity = ELF_MAGIC + bytes((2, 1, 1))  # 64 bits, little endian, version 1
    header = _HEADER.pack(
        identity.ljust(16, b"\0"), _ET_DYN, _EM_X86_64, 1, 0, _HEADER.size, 0, 0,
        _HEADER.size, _SEGMENT.size, len(segments), 0, 0, 0,
    )  # fmt: skip
    program_headers = b"".join(
        _SEGMENT.pack(kind, flags, at, at, at, size, size, align) for kind, flags, at, size, align in segments
    )
    whole = bytearray(dynamic_at + len(dynamic))
    for at, part in (
        (0, header + program_headers), (hash_at, table), (symbols_at, symbols), (strings_at, strings),
        (code_at, _DOT_CODE + _TRAP_CODE), (dynamic_at, dynamic),
    ):  # fmt: skip
        whole[at : at + len(part)] = part
    return bytes(whole)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
