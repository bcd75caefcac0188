"""How much memory and time a dump takes on machines from one gigabyte to a terabyte: ``python -m tests.bench.memory``.

Makes a sparse vmcore of each size (``tests.bench.sparse``), holds the page filter's census against what was made, then
dumps it in a process of its own. Peak memory is to stay what it is, time is to follow the size. A line at the end says
what a machine with 16 TiB would take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from capture.dumpfile.reader import KdumpFile
from capture.memory.source import memparse
from capture.pagefilter import WINDOW_PAGES
from tests.bench import common
from tests.bench.dumpers import SPAWN
from tests.bench.sparse import SparseKernel
from tests.builders import PAGE
from tests.guest import host
from tests.guest.host import HostError

SIZES = "1G,16G,256G,1T"
LEVEL = 31
COMPRESSION = "zstd:1"
FAR = 16 << 40
"""Bytes of the machine that the last line is about."""
FILLED = 4 * WINDOW_PAGES
"""Pages from which on a machine has several windows of the page filter, and so fills every buffer."""
INTERVAL = 0.05
"""Seconds between two looks at what memory a process has."""
SAMPLED = ("RssAnon", "RssFile")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process took, in seconds and KiB. ``peak`` is ru_maxrss; ``sampled`` the highest values of SAMPLED."""

    wall: float
    user: float
    system: float
    peak: int
    sampled: dict[str, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One size: the machine, its vmcore's room on the disk, the dump and what it took."""

    kernel: SparseKernel
    blocks: int
    kept: int
    size: int
    usage: Usage


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.memory", description="Benchmark a dump's memory and time against the size of RAM."
    )
    add = parser.add_argument
    add("--sizes", type=_sizes, default=SIZES, metavar="SIZE,...", help=f"of the machines (default: {SIZES})")
    add("--keep", type=Path, metavar="FOLDER", help="leave the vmcores here, as SIZE.elf")
    add("--level", type=int, default=LEVEL, metavar="LEVEL", help=f"dump level (default: {LEVEL})")
    add("--threads", type=int, default=2, metavar="N", help="compressing threads (default: 2)")
    add(
        "--repeat", type=int, default=1, metavar="N", help="runs: the time of the fastest, the most memory (default: 1)"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.repeat, arguments.threads) < 1:
        parser.error("--repeat, --threads: at least 1")

    def benchmark() -> None:
        rows: list[Row] = []
        with common.scratch() as name:
            folder = arguments.keep or Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            _print_head(arguments)
            for kernel in arguments.sizes:
                vmcore = folder / f"{_size(kernel)}.elf"
                rows.append(measure(kernel, vmcore, Path(name) / "dump", arguments))
                if arguments.keep is None:
                    vmcore.unlink()
                _print_row(rows[-1], rows[0])
        _print_fit(rows)

    return common.run(benchmark)


def measure(kernel: SparseKernel, vmcore: Path, dump: Path, arguments: argparse.Namespace) -> Row:
    """Make one vmcore, check it, dump it.

    Raises:
        HostError: a program failed, or what it found is not what was made.
    """
    try:
        kernel.write(vmcore)
    except OSError as error:
        raise HostError(f"{vmcore}: {error.strerror}; a file system with sparse files that large is needed") from None
    _check_filter(kernel, vmcore)  # also brings what is read into the page cache
    runs = []
    for _ in range(arguments.repeat):
        options = ("-d", str(arguments.level), "-c", COMPRESSION, "--threads", str(arguments.threads))
        runs.append(run(_capture("dump", *options, "--no-progress", "-q", "--force", str(vmcore), str(dump))))
        with KdumpFile(dump) as made:
            level, kept, size = made.level, made.page_count(), made.size
        if (level, kept) != (arguments.level, kernel.kept(arguments.level)):
            raise HostError(f"{vmcore}: a dump of level {level} with {kept} pages, {kernel.kept(arguments.level)} made")
    return Row(kernel, vmcore.stat().st_blocks * 512, kept, size, _of_all(runs))


def _of_all(runs: Sequence[Usage]) -> Usage:
    """Return the times of the fastest run, which was disturbed least, and the most memory of any."""
    fastest = min(runs, key=lambda usage: usage.wall)
    highest = {name: max(usage.sampled[name] for usage in runs) for name in SAMPLED}
    return replace(fastest, peak=max(usage.peak for usage in runs), sampled=highest)


def run(command: Sequence[str]) -> Usage:
    """Run a command, and watch its memory.

    Raises:
        HostError: its exit status is not 0.
    """
    starter = (sys.executable, "-I", "-S", str(SPAWN), *command)
    with subprocess.Popen(starter, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        sampler = _Sampler(int(process.stdout.readline()))
        said, errors = process.communicate()
        sampled = sampler.finish()
    status, wall, user, system, peak = said.split()
    if int(status):
        raise HostError(f"{' '.join(command)}: exit status {status}: {errors.strip()}")
    return Usage(float(wall), float(user), float(system), int(peak), sampled)


class _Sampler(threading.Thread):
    """Looks at /proc/PID/status time and again, and remembers the highest values."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._highest = dict.fromkeys(SAMPLED, 0)
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(INTERVAL):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            for name, _, value in (line.partition(":") for line in lines):
                if name in self._highest:
                    self._highest[name] = max(self._highest[name], int(value.split()[0]))

    def finish(self) -> dict[str, int]:
        """Stop, and return what was seen, in KiB."""
        self._done.set()
        self.join()
        return self._highest


def _capture(*words: str) -> list[str]:
    return [sys.executable, "-m", "capture", *words]


def _check_filter(kernel: SparseKernel, vmcore: Path) -> None:
    """Hold what the page filter finds against what was made: pages of each class, free pages, the level."""
    found = json.loads(host.run(*_capture("info", "--json", str(vmcore))).output)
    wrong: dict[str, Any] = {
        name: (found["classes"][name], pages)
        for name, pages in kernel.classes.items()
        if found["classes"][name] != pages
    }
    counted, free = found["free_pages_counted_by_the_kernel"], kernel.classes["free"]
    if counted != free:
        wrong["free pages in the kernel's own count"] = (counted, free)
    for prediction in found["predicted"]:
        if prediction["reasons"] or prediction["asked"] != prediction["level"]:
            wrong[f"level {prediction['asked']}"] = (prediction["level"], prediction["reasons"])
    if wrong or found["filter_unusable"]:
        raise HostError(f"{vmcore}: {found['filter_unusable'] or 'found, made'}: {wrong}")


def _sizes(text: str) -> list[SparseKernel]:
    try:
        kernels = [SparseKernel((memparse(word) or 0) // PAGE) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return sorted(kernels, key=lambda kernel: kernel.pages)


def _size(kernel: SparseKernel) -> str:
    """Return the size of a machine as the command line has it."""
    size, suffixes = kernel.pages * PAGE >> 20, "MGT"
    while size % 1024 == 0 and suffixes[1:]:
        size, suffixes = size >> 10, suffixes[1:]
    return f"{size}{suffixes[0]}"


def _print_head(arguments: argparse.Namespace) -> None:
    print(f"level {arguments.level}, {COMPRESSION}, {arguments.threads} threads; sizes in MiB, peaks of memory in MiB:")
    print("rss (ru_maxrss), its ratio to the first, and what of it is anonymous and mapped, each at its own peak\n")
    print(
        f"{'memory':>8}{'on disk':>9}{'pages':>13}{'kept':>11}{'dump':>8}"
        f"{'rss':>8}{'ratio':>7}{'anon':>7}{'mapped':>8}"
        f"{'wall s':>9}{'ns/page':>9}{'user s':>8}{'ns/page':>9}{'sys s':>8}",
        flush=True,
    )


def _print_row(row: Row, smallest: Row) -> None:
    usage, pages = row.usage, row.kernel.pages
    ratio = usage.peak / smallest.usage.peak
    anonymous, mapped = (usage.sampled[name] / 1024 for name in ("RssAnon", "RssFile"))
    print(
        f"{_size(row.kernel):>8}{row.blocks / (1 << 20):9.1f}{pages:13,}{row.kept:11,}{row.size / (1 << 20):8.1f}"
        f"{usage.peak / 1024:8.1f}{ratio:7.2f}{anonymous:7.1f}{mapped:8.1f}"
        f"{usage.wall:9.2f}{usage.wall / pages * 1e9:9.1f}"
        f"{usage.user:8.2f}{usage.user / pages * 1e9:9.1f}{usage.system:8.2f}",
        flush=True,
    )


def _print_fit(rows: Sequence[Row]) -> None:
    """Say what a line through what was measured comes to. Machines that do not fill the buffers would tilt it."""
    rows = [row for row in rows if row.kernel.pages >= FILLED]
    if len(rows) < 2:
        print(f"\nno line: it takes two sizes from {FILLED * PAGE >> 30}G on")
        return
    pages, usages = [row.kernel.pages for row in rows], [row.usage for row in rows]
    peak = np.polyfit(pages, [usage.peak / 1024 for usage in usages], 1)
    wall = np.polyfit(pages, [usage.wall for usage in usages], 1)
    user = np.polyfit(pages, [usage.user for usage in usages], 1)
    far, tebibyte = FAR // PAGE, (1 << 40) // PAGE
    print(
        f"\n{FAR >> 40} TiB, by a straight line through those from {FILLED * PAGE >> 30}G on: "
        f"{np.polyval(peak, far):.0f} MiB ({peak[0] * tebibyte:+.2f} MiB a TiB), {np.polyval(wall, far):.0f} s "
        f"({wall[0] * 1e9:.1f} ns a page), {np.polyval(user, far):.0f} s of it ours ({user[0] * 1e9:.1f} ns a page)"
    )
    print("The system's time is most of all the page cache's: it makes pages for the holes of the file.")


if __name__ == "__main__":
    sys.exit(main())
