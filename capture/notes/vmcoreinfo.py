"""VMCOREINFO → typed symbols, offsets, sizes, lengths, numbers; every key optional.

The text is advice from a dying kernel (kernel/vmcore_info.c; kernel/crash_core.c before 6.9): lines ``KEY=value`` and
``KIND(name)=value``. Addresses are hexadecimal without 0x, other values decimal, some with 0x. A key that is missing,
or whose value is not a number, is None, which no value can be mistaken for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

_MAX_DIGITS = 24
"""A 64-bit value has at most 20 decimal digits; longer ones are damage (and slow to convert)."""

PAGE_SIZES = (4096, 16384, 65536)


class VmcoreInfo(NamedTuple):
    """The keys of one VMCOREINFO text; ``ignored`` counts lines that are neither ``KEY=value`` nor empty."""

    keys: dict[str, str]
    ignored: int = 0

    def text(self, key: str) -> str | None:
        """Return the value of a plain key such as OSRELEASE."""
        return self.keys.get(key)

    def symbol(self, name: str) -> int | None:
        """Return the virtual address of a kernel symbol."""
        return _number(self.keys.get(f"SYMBOL({name})"), 16)

    def offset(self, name: str) -> int | None:
        """Return the offset in bytes of ``structure.member``."""
        return _size(self.keys.get(f"OFFSET({name})"))

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a structure."""
        return _size(self.keys.get(f"SIZE({name})"))

    def length(self, name: str) -> int | None:
        """Return the number of elements of an array."""
        return _size(self.keys.get(f"LENGTH({name})"))

    def number(self, name: str) -> int | None:
        """Return a number, which may be negative."""
        return _number(self.keys.get(f"NUMBER({name})"), 10)

    @property
    def page_size(self) -> int:
        """PAGESIZE in bytes; 4096 where it is missing or no page size that exists."""
        value = _number(self.keys.get("PAGESIZE"), 10)
        return value if value in PAGE_SIZES else PAGE_SIZES[0]

    @property
    def crash_time(self) -> int | None:
        """CRASHTIME in seconds since 1970; None where it is missing or before 1970 or after 9999."""
        value = _number(self.keys.get("CRASHTIME"), 10)
        return value if value is not None and 0 < value < 253402300800 else None

    @property
    def release(self) -> str:
        """The kernel release (OSRELEASE), "" where it is missing."""
        return self.keys.get("OSRELEASE", "")


def parse(text: bytes) -> VmcoreInfo:
    """Parse the descriptor of a VMCOREINFO note. Never raises. A key that stands twice has its last value."""
    keys: dict[str, str] = {}
    ignored = 0
    for line in text.split(b"\0", 1)[0].split(b"\n"):
        key, separator, value = line.partition(b"=")
        if separator and key:
            keys[key.decode("ascii", "replace").strip()] = value.decode("ascii", "replace").strip()
        elif line:
            ignored += 1
    return VmcoreInfo(keys, ignored)


@lru_cache(maxsize=1024)
def _number(value: str | None, base: int) -> int | None:
    if value is None or len(value) > _MAX_DIGITS:
        return None
    if value.lower().startswith(("0x", "-0x")):
        base = 16
    try:
        number = int(value, base)
    except ValueError:
        return None
    return number if -(1 << 63) <= number < 1 << 64 else None


def _size(value: str | None) -> int | None:
    number = _number(value, 10)
    return number if number is not None and number >= 0 else None
