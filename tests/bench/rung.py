"""One try of the reservation benchmark: what it took, a row of the table, and what a console says of a failure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20
SHOWN_REASON = 200
PANIC = "Kernel panic - not syncing: sysrq triggered crash"
HEADING = (
    f"{'kernel':7}{'memory':>7}{'crashkernel':>12}{'who':>6}{'saved':>7}{'total':>7}{'least':>7}{'RSS':>6}"
    f"{'init s':>8}{'start s':>9}{'1st byte':>9}{'end s':>7}{'dump s':>8}{'pages':>7}{'dump MiB':>9}"
)
LEGEND = (
    "total, least: MiB that the capture kernel has, and that were available at the least; RSS: peak of the process",
    "that dumps, MiB.",
    "Seconds since the capture kernel's start: its init runs; the job begins, target mounted; the log is on the disk;",
    "all is on the disk. Dump: how long that took alone, until it was on the disk.",
)
_TELLING = re.compile(
    r"Kernel panic - not syncing: (?!sysrq).*|Out of memory: Killed process \d+ \([^)]*\)"
    r"|Initramfs unpacking failed: .*|Run /init as init process"
    r"|(?:vmcapture|peer): .*(?:not unpack|not mount|not saved|failed|was killed|ended with).*"
    r"|makedumpfile Failed\.|.*Cannot allocate memory.*|No space left on device"
)
"""What is worth quoting of a capture kernel that failed. That its init ran says how far it came."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a save took: bytes, and seconds since the capture kernel's start (``dump_seconds``: of the dump alone)."""

    complete: bool
    memory_total: int
    memory_least: int
    peak_rss: int
    start: float
    first_byte: float
    end: float
    dump_seconds: float
    dump_pages: int
    dump_size: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rung:
    """What came of one try. ``figures`` is None where nothing was saved, ``reason`` says why."""

    kernel: str
    memory: str
    reserved: int  # MiB
    who: str
    figures: Figures | None
    init: float | None = None  # seconds from the capture kernel's start to that of its init
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether all was saved."""
        return self.figures is not None and self.figures.complete

    def row(self) -> str:
        """Return the row of the table."""
        head = f"{self.kernel:7}{self.memory:>7}{self.reserved:>11}M{self.who:>6}"
        if self.figures is None:
            return f"{head}{'no':>7}  {_cut(self.reason)}"
        found = self.figures
        sizes = "".join(
            f"{size / MIB:{width}.0f}"
            for size, width in ((found.memory_total, 7), (found.memory_least, 7), (found.peak_rss, 6))
        )
        init = f"{self.init:8.1f}" if self.init is not None else f"{'?':>8}"
        row = (
            f"{head}{'yes' if found.complete else 'part':>7}{sizes}{init}{found.start:9.1f}{found.first_byte:9.1f}"
            f"{found.end:7.1f}{found.dump_seconds:8.1f}{found.dump_pages:7}"
            f"{found.dump_size / MIB:9.1f}"
        )
        return f"{row}  {_cut(self.reason)}".rstrip()


def of_manifest(manifest: Any) -> Figures:
    """Return what one of our saves took."""
    machine, seconds, dump = manifest["capture_machine"], manifest["seconds"], manifest["dump"]
    start = machine["uptime_at_start"]
    return Figures(
        complete=manifest["complete"],
        memory_total=machine["memory_total"] or 0,
        memory_least=machine["memory_available_least"] or 0,
        peak_rss=machine["peak_rss"] or 0,
        start=start,
        first_byte=start + seconds["vmcore-dmesg.txt"],
        end=start + sum(seconds.values()),
        dump_seconds=seconds["vmcore"],
        dump_pages=dump["pages_written"] if dump else 0,
        dump_size=manifest["files"][dump["file"]]["size"] if dump else 0,
        reason="; ".join(manifest["failures"]),
    )


def init_time(console: str) -> float | None:
    """Return when the capture kernel started its init, in seconds by its own clock; None where it did not say so."""
    found = re.search(r"^\[ *(\d+\.\d+)\] Run /init as init process", _since_the_crash(console), re.MULTILINE)
    return float(found[1]) if found else None


def why(failure: str, console: str) -> str:
    """Return why a save failed, in one line: what was waited for in vain, then what the capture kernel said of it."""
    noticed = failure.partition("\n")[0].partition(" (console: ")[0]
    said = (match.group().strip() for match in _TELLING.finditer(_since_the_crash(console)))
    return "; ".join(filter(None, dict.fromkeys((noticed, *said))))


def _since_the_crash(console: str) -> str:
    return console.partition(PANIC)[2]


def _cut(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= SHOWN_REASON else f"{line[: SHOWN_REASON - 1]}…"
