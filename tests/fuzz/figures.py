"""How much of each parser the seeds and the kept corpus reach, by coverage.py: lines and branches.

Not while fuzzing: a tracer makes everything several times slower. What a run has kept reaches what the run has reached.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import coverage

REPOSITORY = Path(__file__).resolve().parents[2]
PARSERS = (
    "capture/memory/*.py", "capture/notes/*.py", "capture/kernel/*.py", "capture/kernel/arch/*.py", "capture/vmcore.py",
    "capture/pagefilter.py", "capture/vmemmap.py", "capture/report.py", "capture/survey.py", "capture/verify.py",
    "capture/dumpfile/reader.py", "capture/dumpfile/source.py", "capture/dumpfile/resume.py",
    "capture/dumpfile/foreign.py", "capture/dumpfile/kdump.py", "capture/boot/config.py", "capture/levels.py",
)  # fmt: skip
"""What reads dead memory, dumps, or a command line."""


OUT_OF_REACH = {
    "capture/memory/source.py": "devices, pipes, /proc and the hand-over of a crash boot; what a kernel refuses to map",
    "capture/memory/image.py": "a mapping that the kernel refuses; more than 10,000 ranges of unreadable pages",
    "capture/vmcore.py": "a source that cannot be mapped, opened or read at all",
    "capture/dumpfile/foreign.py": "a host without liblzo2 or libsnappy",
    "capture/dumpfile/source.py": "such a host; bitmaps of more than a MiB: 2^22 runs of pages",
    "capture/dumpfile/reader.py": "a path that cannot be opened, or is no file",
    "capture/kernel/pagetable.py": "no answer at the last level, which always has one; more than 32,768 tables",
    "capture/kernel/kallsyms.py": "a name that ends exactly where a read of 64 KiB does",
    "capture/pagefilter.py": "struct pages above all memory, in another window of 2^18 pages",
    "capture/survey.py": "more than 512 pages of a class; a class that no sample was taken of",
}
"""What no input of a MiB, or no input at all, leads to; unit tests do. Printed beside what is not reached."""


class Figure(NamedTuple):
    """One module: statements and branches, how many of each are reached, and what is not: lines, and (from, to)."""

    module: str
    lines: int
    lines_reached: int
    branches: int
    branches_reached: int
    missing_lines: tuple[int, ...]
    missing_branches: tuple[tuple[int, int], ...]


@contextlib.contextmanager
def traced() -> Iterator[list[Figure]]:
    """Trace what runs inside; ``capture`` must not be imported yet. The list is filled at the end."""
    tracer = coverage.Coverage(
        branch=True, include=[str(REPOSITORY / pattern) for pattern in PARSERS], data_file=None, config_file=False
    )
    # What is for the type checker, and protocols, never run.
    tracer.exclude("if TYPE_CHECKING:")
    tracer.exclude("class .*Protocol")
    figures: list[Figure] = []
    tracer.start()
    try:
        yield figures
    finally:
        tracer.stop()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report"
        tracer.json_report(outfile=str(file))
        files: dict[str, Any] = json.loads(file.read_text())["files"]
    figures += [_figure(name, entry) for name, entry in sorted(files.items())]


def _figure(name: str, entry: dict[str, Any]) -> Figure:
    summary = entry["summary"]
    path = Path(name)
    return Figure(
        str(path.relative_to(REPOSITORY) if path.is_absolute() else path),
        summary["num_statements"],
        summary["covered_lines"],
        summary["num_branches"],
        summary["covered_branches"],
        tuple(entry["missing_lines"]),
        tuple((first, last) for first, last in entry["missing_branches"]),
    )


def table(figures: list[Figure], *, missing: bool = False) -> str:
    """Return the figures for a person: a line a module with lines and branches reached, and all together."""
    rows = [figure for figure in figures if figure.lines]
    lines = [f"{'module':<36}{'lines':>6}{'':>8}{'branches':>10}"]
    for figure in (*rows, _total(rows)):
        lines.append(
            f"{figure.module:<36}{figure.lines:>6}{_share(figure.lines_reached, figure.lines)}"
            f"{figure.branches:>10}{_share(figure.branches_reached, figure.branches)}"
        )
        if missing and figure.missing_branches + figure.missing_lines:
            ways = ", ".join(f"{first}->{last if last > 0 else 'end'}" for first, last in figure.missing_branches)
            lines.append(f"    not reached: lines {list(figure.missing_lines)}; branches {ways or 'all'}")
            if figure.module in OUT_OF_REACH:
                lines.append(f"    out of reach: {OUT_OF_REACH[figure.module]}")
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:>7.1f}%" if whole else f"{'-':>8}"


def _total(rows: list[Figure]) -> Figure:
    return Figure(
        "all",
        sum(row.lines for row in rows),
        sum(row.lines_reached for row in rows),
        sum(row.branches for row in rows),
        sum(row.branches_reached for row in rows),
        (),
        (),
    )
