"""How large a dump of this machine would be at the most, from what /proc/meminfo says now.

Pages that a dump level leaves out are subtracted from all of memory; what is left is counted as it is in memory,
neither compressed (guests of 1 and 4 GiB came to between a third and a ninth, README.md) nor rid of pages of zeros.
``vmcapture info /proc/kcore`` looks at each page and compresses a sample, and takes seconds for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
IOMEM = Path("/proc/iomem")
CACHE, USER, FREE = 4, 8, 16
"""Bits of a dump level. Bit 2 alone leaves out an unknown part of the cache, bit 1 an unknown number of pages."""
METHOD = "by /proc/meminfo, not compressed"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes that a dump of ``level`` has at the most."""

    level: int
    most: int


def predict(level: int, reserved: int, meminfo: Path = MEMINFO, iomem: Path = IOMEM) -> Prediction:
    """Return what a dump of this level would come to, where ``reserved`` bytes are the capture kernel's.

    Raises:
        OSError: there is no /proc.
    """
    sizes = meminfo_bytes(meminfo)
    left_out = 0
    if level & FREE:
        left_out += sizes.get("MemFree", 0)
    if level & CACHE:
        left_out += sum(sizes.get(name, 0) for name in ("Cached", "Buffers", "SwapCached"))
    if level & USER:
        left_out += sizes.get("AnonPages", 0) + sizes.get("Hugetlb", 0)
    # MemTotal lacks what was taken before there was an allocator: the kernel's text, all of struct page.
    everything = max(memory(iomem) - reserved, sizes.get("MemTotal", 0))
    return Prediction(level, max(0, everything - left_out))


def meminfo_bytes(meminfo: Path = MEMINFO) -> dict[str, int]:
    """Return the lines of /proc/meminfo that are sizes, in bytes."""
    found = re.findall(r"^([\w()]+): +(\d+) kB$", meminfo.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(value) << 10 for name, value in found}


def memory(iomem: Path = IOMEM) -> int:
    """Return the bytes of memory that the firmware gave the kernel; 0 where only root may know."""
    return sum(end + 1 - start for start, end in memory_ranges(iomem) if end)


def memory_ranges(iomem: Path = IOMEM) -> list[tuple[int, int]]:
    """Return first and last address of each range of memory; zeros for who is not root."""
    try:
        text = iomem.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM", text, re.MULTILINE)
    return [(int(start, 16), int(end, 16)) for start, end in found]
