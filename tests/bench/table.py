"""The dump benchmark's tables: aligned text, or Markdown for the README."""

from __future__ import annotations

import os
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import zstandard

from tests.bench import common
from tests.bench.dumpers import (
    OURS_1,
    OURS_2,
    OURS_AUTO_2,
    PEER_LZO_1,
    PEER_LZO_2,
    PEER_ZLIB_1,
    PEER_ZLIB_2,
    Content,
    Dumper,
    Sample,
    dumpers,
)
from tests.guest import host

COLUMNS = (
    "level", "dumper", "codec", "threads", "wall s", "CPU s", "wall / makedumpfile -c", "output MiB", "in / out",
    "peak MiB",
)  # fmt: skip
TEXT_COLUMNS = 4
"""These are aligned to the left, the others, which are numbers, to the right."""
NOTES = (
    "Wall: the whole process, interpreter start included, the vmcore in the page cache.",
    "vmcapture ends when its dump is on the disk (fdatasync); the others do not wait for that.",
    "In / out: bytes of pages that are not zero (of copies: bytes of the file) to bytes of output.",
    "Floor: zstd -b1 -B4096 on a sample of the pages that are not zero, its best round.",
    "Peak: resident memory, mapped parts of the vmcore included.",
    common.ONLY_RATIOS,
)
PAGES_SLACK = 0.01
"""Dumpers may disagree about a few pages: makedumpfile leaves out those that are there in part or have no struct
page."""

Row = tuple[str, ...]


@dataclass(slots=True)
class LevelResults:
    """What was measured at one dump level."""

    content: Content
    samples: defaultdict[Dumper, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    refused: set[Dumper] = field(default_factory=set)
    failures: defaultdict[Dumper, list[str]] = field(default_factory=lambda: defaultdict(list))
    floor: list[Sample] = field(default_factory=list)

    def of(self, dumper: Dumper) -> Sample | None:
        """Return the medians of a dumper, None where there is nothing."""
        return middle(self.samples[dumper]) if self.samples[dumper] else None

    def floor_of(self) -> Sample:
        """Return the fastest of the floor's: nothing but noise makes it slower."""
        return min(self.floor, key=lambda sample: sample.cpu)


def middle(samples: Sequence[Sample]) -> Sample:
    """Return the median of each figure."""

    def of(figure: Callable[[Sample], float]) -> float:
        return median(map(figure, samples))

    return Sample(
        wall=of(lambda sample: sample.wall),
        cpu=of(lambda sample: sample.cpu),
        peak_memory=int(of(lambda sample: sample.peak_memory)),
        size=int(of(lambda sample: sample.size)),
        pages=samples[0].pages,
    )


def heading(rounds: int) -> str:
    """Name the machine and the programs."""
    cpus = len(os.sched_getaffinity(0))
    makedumpfile = re.search(r"version ([0-9.]+)", host.run("makedumpfile", "-v").output)
    zstd = re.search(r"v([0-9.]+)", host.run("zstd", "--version").output)
    programs = [
        f"makedumpfile {makedumpfile[1] if makedumpfile else '?'}",
        f"zstd {zstd[1] if zstd else '?'}",
        f"vmcapture with libzstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}",
    ]
    machine = f"{_cpu_model()}, {cpus} {'CPU' if cpus == 1 else 'CPUs'}, Linux {platform.release()}"
    return f"{machine}; {', '.join(programs)}; medians of {rounds} {'round' if rounds == 1 else 'rounds'}"


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def report(vmcore: Path, results: Sequence[LevelResults], *, markdown: bool) -> str:
    """Return what came out for one vmcore: its table, and what follows from it."""
    size = vmcore.stat().st_size
    lines = [f"{vmcore.name}, {size / (1 << 30):.1f} GiB"]
    lines += [_described(level.content) for level in results]
    rows = [row for level in results for row in _rows(level, size)]
    derived = [f"level {level.content.level}: {line}" for level in results for line in _derived(level)]
    if markdown:
        bold, *others = lines
        return "\n".join([f"**{bold}**", "", *_listed(others), "", *_markdown(rows), "", *_listed(derived)])
    return "\n".join([*lines, *_text(rows), *derived])


def notes(*, markdown: bool) -> str:
    """Return what one has to know to read the tables."""
    return "\n".join(_listed(NOTES) if markdown else NOTES)


def _listed(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _described(content: Content) -> str:
    return f"level {content.level}: {content.pages} pages, {content.zero_pages} of them zero"


def _rows(results: LevelResults, file_size: int) -> Iterator[Row]:
    level = str(results.content.level)
    peer = results.of(PEER_ZLIB_1)
    for dumper in dumpers(results.content.level):
        head = (level, dumper.name, dumper.codec, dumper.threads)
        sample = results.of(dumper)
        if sample is None:
            yield (
                *head,
                "not available" if dumper in results.refused else "failed",
                *[""] * (len(COLUMNS) - len(head) - 1),
            )
            continue
        yield (
            *head,
            f"{sample.wall:.2f}",
            f"{sample.cpu:.2f}",
            f"{sample.wall / peer.wall:.2f}" if peer else "",
            _mebibytes(sample.size),
            f"{(file_size if dumper.whole_file else results.content.compressed_bytes) / sample.size:.2f}",
            _mebibytes(sample.peak_memory),
        )
    floor = results.floor_of()
    ratio = f"{results.content.compressed_bytes / floor.size:.2f}"
    yield (level, "floor: libzstd alone", "zstd:1", "1", "", f"{floor.cpu:.2f}", "", _mebibytes(floor.size), ratio, "")


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.0f}"


def _derived(results: LevelResults) -> Iterator[str]:
    """Say what the table is for."""
    yield _faster(results, OURS_1, PEER_ZLIB_1)
    yield _faster(results, OURS_2, PEER_ZLIB_2)
    yield _faster(results, OURS_2, PEER_ZLIB_1)  # whose threads may cost more than they bring
    for peer in (PEER_LZO_1, PEER_LZO_2):
        yield _time_and_size(results, OURS_AUTO_2, peer)
    ours = results.of(OURS_1)
    if ours is not None:
        ratio = ours.cpu / results.floor_of().cpu
        yield f"CPU time of {OURS_1}: {ratio:.2f} times that of libzstd alone"
    yield from _unlike(results)
    for dumper, reasons in results.failures.items():
        yield f"FAILED: {len(reasons)} of {len(reasons) + len(results.samples[dumper])} times: {reasons[0]}"


def _faster(results: LevelResults, ours: Dumper, peer: Dumper) -> str:
    mine, theirs = results.of(ours), results.of(peer)
    if mine is None or theirs is None:
        return f"{ours} against {peer}: not measured"
    return f"{ours}: {theirs.wall / mine.wall:.2f} times as fast as {peer}"


def _time_and_size(results: LevelResults, ours: Dumper, peer: Dumper) -> str:
    mine, theirs = results.of(ours), results.of(peer)
    if mine is None or theirs is None:
        return f"{ours} against {peer}: not measured"
    return f"{_faster(results, ours, peer)}, {mine.size / theirs.size:.2f} times its size"


def _unlike(results: LevelResults) -> Iterator[str]:
    """Name dumps that do not have our pages: their times are for something else."""
    ours = results.content.pages
    for dumper in dumpers(results.content.level):
        sample = results.of(dumper)
        if sample is not None and sample.pages is not None and abs(sample.pages - ours) > PAGES_SLACK * ours:
            yield f"NOT ALIKE: {dumper} dumps {sample.pages} pages, not {ours}"


def _text(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *rows):
        left = [cell.ljust(width) for cell, width in zip(row[:TEXT_COLUMNS], widths[:TEXT_COLUMNS], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[TEXT_COLUMNS:], widths[TEXT_COLUMNS:], strict=True)]
        yield "  ".join([*left, *right]).rstrip()


def _markdown(rows: Sequence[Row]) -> Iterator[str]:
    alignment = ["---"] * TEXT_COLUMNS + ["---:"] * (len(COLUMNS) - TEXT_COLUMNS)
    for row in (COLUMNS, alignment, *rows):
        # A cell may hold a pipe, as a shell's pipeline does.
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
