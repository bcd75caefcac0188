"""How long the page filter takes, held against makedumpfile's and against reading memory at all: ``python -m
tests.bench.filter``.

Makes a vmcore of a large guest (or takes ``--vmcore``), and measures on one CPU, with the file in the page cache:
ours, makedumpfile's own figures, and the floor, which is what it takes to map the struct pages and to touch one cache
line of each. The rounds take turns, so that what disturbs one disturbs all.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from capture.kernel.pages import CLASS_NAMES
from capture.pagefilter import PageFilter
from capture.vmcore import Vmcore, open_vmcore
from tests.bench import common
from tests.guest import host
from tests.guest.host import HostError

LEVEL = 31
WINDOW_BYTES = 4 << 20

SCAN = "ours: classify every page"
SET_UP = "ours: set-up, once a vmcore"
PEER = "makedumpfile: excluding unnecessary pages"
PEER_HOLES = "makedumpfile: checking for memory holes"
FLOOR = "floor: map, touch one line of each struct page"
MAP = "  of it: map (mmap, MADV_POPULATE_READ)"
TOUCH = "  of it: touch one line"
SUM = "all bytes of mem_map summed, mapped before"
ROWS = (SCAN, PEER, FLOOR, MAP, TOUCH, SUM, PEER_HOLES, SET_UP)

# makedumpfile's names; it prints a step once for each part of memory that it works in.
STEPS = {PEER: ("Excluding unnecessary pages", "Excluding free pages"), PEER_HOLES: ("Checking for memory holes",)}
PEER_CLASSES = {
    "free": "Free pages",
    "cache": "Non-private cache pages",
    "cache_private": "Private cache pages",
    "user": "User process data pages",
    "hwpoison": "Hwpoison pages",
    "offline": "Offline pages",
}

Times = defaultdict[str, list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.filter", description="Benchmark the page filter.")
    add = parser.add_argument
    add("--memory", default="4G", metavar="SIZE", help="of the guest that the vmcore is made of (default: 4G)")
    common.add_repeat(parser)
    add("--keep", type=Path, metavar="FOLDER", help="leave the vmcore here, as filter.elf")
    add("--vmcore", type=Path, metavar="FILE", help="measure this one, an ELF file")
    arguments = parser.parse_args(argv)

    def benchmark() -> None:
        with common.scratch() as scratch:
            vmcore = arguments.vmcore or common.make((arguments.keep or Path(scratch)) / "filter.elf", arguments.memory)
            report(vmcore, arguments.repeat)

    return common.run(benchmark)


def report(path: Path, repeat: int) -> None:
    """Measure one vmcore and print what came out.

    Raises:
        HostError: makedumpfile is missing, or does not take this vmcore.
        CaptureError: we do not.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    times: Times = defaultdict(list)
    with open_vmcore(str(path)) as vmcore:
        for number in range(repeat + 1):
            measured: Times = defaultdict(list)
            page_filter = _ours(vmcore, measured)
            said = _makedumpfile(path, measured)
            _floor(vmcore, page_filter, measured)
            if number:  # the first round brings the file into the page cache
                for what, seconds in measured.items():
                    times[what].append(sum(seconds))
        _print_times(times, vmcore.image.page_count)
        _print_classes(page_filter, said)


def _ours(vmcore: Vmcore, times: Times) -> PageFilter:
    with _timed(times, SET_UP):
        page_filter = PageFilter(vmcore)
    if page_filter.unusable is not None:
        raise HostError(f"{vmcore.source.name} cannot be filtered: {page_filter.unusable}")
    with _timed(times, SCAN):
        for _ in page_filter.windows():
            pass
    return page_filter


def _makedumpfile(path: Path, times: Times) -> str:
    """Let makedumpfile do everything but write, note the time of its steps, return what it says."""
    with tempfile.TemporaryDirectory(dir=host.SCRATCH) as scratch:
        done = host.run(
            "makedumpfile", "--dry-run", "-d", str(LEVEL), "--message-level", "31", path, Path(scratch) / "dump"
        )
    for what, steps in STEPS.items():
        for step in steps:
            found = re.findall(rf"STEP \[{step} *\] : ([0-9.]+) seconds", done.output)
            times[what] += map(float, found)
        if not times[what]:
            raise HostError(f"makedumpfile does not say how long it took: {steps[0]}")
    return done.output


def _floor(vmcore: Vmcore, page_filter: PageFilter, times: Times) -> None:
    """Map the struct pages part by part as the filter does, touch them, then sum all of their bytes."""
    mem_map = page_filter.mem_map
    assert mem_map is not None
    size = mem_map.struct_size
    for physical, length in _parts(mem_map.physical_ranges()):
        with _timed(times, FLOOR):
            with _timed(times, MAP):
                view = vmcore.image.view(physical, length)
            with _timed(times, TOUCH):
                line = np.ndarray((length // size,), "<u8", buffer=view, strides=(size,))
                np.bitwise_or.reduce(line)
        with _timed(times, SUM):
            np.frombuffer(view, dtype="<u8", count=length // 8).sum()


def _parts(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join what lies together, cut it into windows: (physical address, bytes)."""
    joined: list[list[int]] = []
    for physical, length in ranges:
        if joined and sum(joined[-1]) == physical:
            joined[-1][1] += length
        else:
            joined.append([physical, length])
    for physical, length in joined:
        for start in range(0, length, WINDOW_BYTES):
            yield physical + start, min(WINDOW_BYTES, length - start)


@contextmanager
def _timed(times: Times, what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    times[what].append(time.perf_counter() - began)


def _print_times(times: Times, pages: int) -> None:
    print(f"\n{pages} pages ({pages >> 18} GiB in pages of 4 KiB), one CPU, medians of {len(times[SCAN])} rounds")
    print(f"{'':48}{'ms':>8}{'ns/page':>9}{'/ makedumpfile':>16}{'/ floor':>9}")
    for what in ROWS:
        middle = median(times[what])
        ratios = f"{middle / median(times[PEER]):16.2f}{middle / median(times[FLOOR]):9.2f}" if what != SET_UP else ""
        print(f"{what:48}{middle * 1e3:8.1f}{middle / pages * 1e9:9.1f}{ratios}")
    print(common.ONLY_RATIOS)


def _print_classes(page_filter: PageFilter, said: str) -> None:
    """Compare the counts: what struct page says, before what no dump may lack is kept."""
    ours = page_filter.census.classes + page_filter.census.protected.sum(axis=0)
    print(f"\n{'pages that struct page says are':34}{'ours':>10}{'makedumpfile':>14}")
    unlike = []
    for name, label in PEER_CLASSES.items():
        found = re.search(rf"{label} *: (0x[0-9a-f]+)", said)
        theirs = int(found[1], 16) if found else 0
        count = int(ours[CLASS_NAMES.index(name)])
        print(f"{name:34}{count:10}{theirs:14}")
        unlike += [name] if count != theirs else []
    if unlike:
        print(f"NOT EQUAL: {', '.join(unlike)} (makedumpfile counts pages of overlapping segments twice, leaves pages")
        print("out that are there in part, and takes some pages of kernels from 6.10 on for slab)")
    else:
        print("equal")


if __name__ == "__main__":
    sys.exit(main())
