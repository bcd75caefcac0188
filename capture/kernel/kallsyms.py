"""kallsyms: addresses of a few symbols of the dead kernel that VMCOREINFO does not name.

VMCOREINFO says where the table is (since 6.0): compressed names in the order of addresses, 256 tokens, and offsets from
a base (kernel/kallsyms.c, scripts/kallsyms.c). All of the names are not decompressed: their lengths and their first
and last letters come from array work, and only names that could be wanted are put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np

from capture.kernel.address import KernelMemory
from capture.memory.image import UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

MAX_SYMBOLS = 1 << 20
_TOKENS = 256
_READ = 1 << 16
_LONG = 0x80
"""A length with this bit has a second byte (ULEB128, since 6.1)."""


def find_symbols(memory: KernelMemory, info: VmcoreInfo, wanted: Iterable[str]) -> dict[str, int]:
    """Return the virtual addresses of those symbols that are found; empty when there is no table that can be read.

    Never raises. A table that does not agree with SYMBOL(_stext) is not believed.
    """
    try:
        return _find(memory, info, {name.encode() for name in wanted})
    except (UnreadableMemory, ValueError, LookupError, OverflowError):
        return {}


def _find(memory: KernelMemory, info: VmcoreInfo, wanted: set[bytes]) -> dict[str, int]:
    keys = ("names", "num_syms", "token_table", "token_index", "offsets")
    places = [info.symbol(f"kallsyms_{key}") for key in keys]
    stext = info.symbol("_stext")
    if None in places or stext is None:
        return {}
    names_at, count_at, table_at, index_at, offsets_at = (place for place in places if place is not None)
    count = memory.read_unsigned(count_at, 4)
    if not 0 < count <= MAX_SYMBOLS:
        return {}
    tokens = _tokens(memory, table_at, index_at)
    found: dict[bytes, int] = {}
    for first, begins, names in _windows(memory, names_at, count):
        for name, index in _matching(names, begins, tokens, wanted | {b"_stext"}).items():
            found.setdefault(name, first + index)
    offsets = {name: _signed(memory.read_unsigned(offsets_at + 4 * index, 4)) for name, index in found.items()}
    base_at = info.symbol("kallsyms_relative_base")
    # Without one (6.19 on), offsets are relative to the image's start, _text, which is _stext but for alignment.
    base = stext - offsets[b"_stext"] % (1 << 32) if base_at is None else memory.read_unsigned(base_at, 8)
    for absolute_percpu in (True, False):
        addresses = {name: _address(offset, base, absolute_percpu) for name, offset in offsets.items()}
        if addresses.get(b"_stext") == stext:
            return {name.decode(): address for name, address in addresses.items() if name in wanted}
    return {}


def _signed(value: int) -> int:
    """Return 32 bits as a signed number."""
    return value - (value >> 31 << 32)


def _address(offset: int, base: int, absolute_percpu: bool) -> int:
    """CONFIG_KALLSYMS_ABSOLUTE_PERCPU (x86_64 until 6.14): offsets from 0 on are absolute, the others count back."""
    if absolute_percpu:
        return offset if offset >= 0 else (base - 1 - offset) % (1 << 64)
    return (base + offset % (1 << 32)) % (1 << 64)


def _tokens(memory: KernelMemory, table_at: int, index_at: int) -> list[bytes]:
    index = np.frombuffer(memory.read(index_at, 2 * _TOKENS), dtype="<u2")
    table = memory.read(table_at, int(index.max()) + 64)
    return [table[start : table.index(b"\0", start)] for start in index.tolist()]


def _windows(memory: KernelMemory, address: int, count: int) -> Iterator[tuple[int, list[int], bytes]]:
    """Yield compressed names, some thousand at a time: the number of the first, where each begins, and all of them.

    A name is its length in tokens, one byte or two, and one byte for each token. All names at once would be megabytes.
    """
    first, data = 0, b""
    while first < count:
        data += memory.read(address, _READ)
        address += _READ
        begins = _begins(data)
        position = begins.pop()
        if len(begins) > count - first:
            position = begins[count - first]
            del begins[count - first :]
        yield first, begins, data[:position]
        first += len(begins)
        data = data[position:]


def _begins(data: bytes) -> list[int]:
    """Return where each name that is there as a whole begins, and at last where they end.

    The one loop over all symbols of a kernel: nothing that can be done once is done in it.
    """
    begins: list[int] = []
    position, end = 0, len(data)
    with contextlib.suppress(IndexError):  # a length itself is cut off
        while position < end:
            begins.append(position)
            length = data[position]
            position += length + 1 if length < _LONG else (length & ~_LONG | data[position + 1] << 7) + 2
    if position == end:
        begins.append(end)  # else the last one is not there as a whole
    return begins


def _matching(names: bytes, begins: list[int], tokens: list[bytes], wanted: set[bytes]) -> dict[bytes, int]:
    """Return wanted names with their index. The first letter of each decompressed name is the type of the symbol."""
    codes = np.frombuffer(names, dtype=np.uint8)
    starts = np.array(begins, dtype=np.int64)
    lengths = codes[starts].astype(np.int64)
    starts += 1
    long = np.flatnonzero(lengths & _LONG)
    lengths[long] += (codes[starts[long]].astype(np.int64) << 7) - _LONG
    starts[long] += 1
    sizes = np.array([len(token) for token in tokens], dtype=np.int64)
    total = np.zeros(len(codes) + 1, dtype=np.int64)
    np.cumsum(sizes[codes], out=total[1:])
    decoded = total[starts + lengths] - total[starts]
    # A length byte between two names is counted as a token by the sum, but lies outside of each of them.
    last = np.array([token[-1] if token else 0 for token in tokens], dtype=np.uint8)
    endings = last[codes[np.maximum(starts + lengths - 1, 0)]]
    likely = np.isin(decoded << 8 | endings, [(len(name) + 1) << 8 | name[-1] for name in wanted])
    found: dict[bytes, int] = {}
    for index in np.flatnonzero(likely).tolist():
        code = names[int(starts[index]) : int(starts[index] + lengths[index])]
        name = b"".join(tokens[token] for token in code)[1:]
        if name in wanted:
            found.setdefault(name, index)
    return found
