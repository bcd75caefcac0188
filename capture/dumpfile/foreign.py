"""LZO and snappy pages of makedumpfile's dumps, through the system's own libraries where they are installed.

Only for reading what others wrote (``makedumpfile -l`` and ``-p``): nothing here is loaded before such a page is met.
"""

from __future__ import annotations

import ctypes
from functools import cache

from capture.dumpfile import kdump

PACKAGES = {
    kdump.COMPRESSED_LZO: ("LZO", "lzo2", "liblzo2-2"),
    kdump.COMPRESSED_SNAPPY: ("snappy", "snappy", "libsnappy1v5"),
}
"""Flag of a page → name of its compression, of the library, of Debian's package."""


def missing_library(flags: int) -> str | None:
    """Return a line that says what to install to read pages of these compressions; None when nothing is missing."""
    for flag, (name, _, package) in PACKAGES.items():
        if flags & flag and _library(flag) is None:
            return f"its pages are compressed with {name}: install {package}"
    return None


def decompress(flag: int, content: bytes, size: int) -> bytes | str:
    """Return a page of ``size`` bytes, or why it cannot be had."""
    library = _library(flag)
    name, _, package = PACKAGES[flag]
    if library is None:
        return f"{name}: install {package}"
    page = ctypes.create_string_buffer(size)
    length = ctypes.c_size_t(size)
    if flag == kdump.COMPRESSED_LZO:
        status = library.lzo1x_decompress_safe(content, ctypes.c_size_t(len(content)), page, ctypes.byref(length), None)
    else:
        announced = ctypes.c_size_t()
        status = library.snappy_uncompressed_length(content, ctypes.c_size_t(len(content)), ctypes.byref(announced))
        if status == 0 and announced.value != size:
            return f"{name}: {announced.value} bytes instead of {size}"
        status = status or library.snappy_uncompress(content, ctypes.c_size_t(len(content)), page, ctypes.byref(length))
    if status != 0 or length.value != size:
        return f"{name}: damaged (error {status}, {length.value} of {size} bytes)"
    return page.raw


@cache
def _library(flag: int) -> ctypes.CDLL | None:
    import ctypes.util  # brings subprocess and more, for what hardly anybody needs

    found = ctypes.util.find_library(PACKAGES[flag][1])
    if found is None:
        return None
    try:
        return ctypes.CDLL(found)
    except OSError:
        return None
