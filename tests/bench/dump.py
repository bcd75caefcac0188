"""How long a dump takes, held against makedumpfile's, plain copies, and libzstd alone: ``python -m tests.bench.dump``.

Makes vmcores of large guests (or takes ``--vmcore``) and dumps each with everyone in turn, round by round, so that
what disturbs one disturbs all. Every dumper is a process from its start to its end; the vmcore is in the page cache.
Progress goes to standard error, the tables to standard output.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from capture.errors import UsageError
from capture.levels import parse_levels
from tests.bench import common, dumpers, table
from tests.bench.dumpers import Dumper, NotAvailableError, PeerFailedError
from tests.bench.table import LevelResults
from tests.guest import host
from tests.guest.host import HostError

NEEDED = ("makedumpfile", "zstd")
"""Debian's packages have the names of the programs."""
READ_BYTES = 4 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each vmcore."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dump", description="Benchmark dumpers.")
    add = parser.add_argument
    add("--memory", type=_sizes, default=("2G", "8G"), metavar="SIZE[,SIZE...]", help="of the guests (default: 2G,8G)")
    add("--vmcore", type=Path, action="append", metavar="FILE", help="measure this one, an ELF file; may be repeated")
    add("--keep", type=Path, metavar="FOLDER", help="leave the vmcores here, as dump-SIZE.elf")
    common.add_repeat(parser)
    add("--levels", type=_levels, default=(31, 1), metavar="LEVEL[,LEVEL...]", help="dump levels (default: 31,1)")
    add("--output", type=Path, metavar="FOLDER", help="write the dumps here; they are removed (default: scratch space)")
    add("--markdown", action="store_true", help="print Markdown")
    arguments = parser.parse_args(argv)
    return common.run(lambda: _benchmark(arguments))


def _sizes(text: str) -> tuple[str, ...]:
    sizes = tuple(text.split(","))
    if not all(re.fullmatch(r"[1-9][0-9]*[MG]", size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}: sizes are needed, as in 512M or 2G,8G")
    return tuple(dict.fromkeys(sizes))


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(parse_levels(text)))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _benchmark(arguments: argparse.Namespace) -> None:
    _demand_programs()
    with common.scratch() as name:
        scratch = Path(name)
        output = arguments.output or scratch
        output.mkdir(parents=True, exist_ok=True)
        print(table.heading(arguments.repeat), flush=True)
        for vmcore in _vmcores(arguments, scratch):
            results = _prepare(vmcore, arguments.levels, output, scratch)
            for number in range(arguments.repeat):
                for level in results:
                    _measure(vmcore, level, output, f"round {number + 1} of {arguments.repeat}")
            print("\n" + table.report(vmcore, results, markdown=arguments.markdown), flush=True)
        print("\n" + table.notes(markdown=arguments.markdown))


def _demand_programs() -> None:
    """Say at once what is missing, not after half an hour."""
    absent = [program for program in NEEDED if shutil.which(program, path=host.SEARCH_PATH) is None]
    if absent:
        raise HostError(f"missing on this host: {', '.join(absent)}; as root: apt-get install {' '.join(absent)}")


def _vmcores(arguments: argparse.Namespace, scratch: Path) -> Iterator[Path]:
    """Yield those given, or those made, one at a time: they are large."""
    if arguments.vmcore:
        yield from arguments.vmcore
        return
    for memory in arguments.memory:
        vmcore = common.make((arguments.keep or scratch) / f"dump-{memory}.elf", memory, sys.stderr)
        yield vmcore
        if arguments.keep is None:
            vmcore.unlink()


def _prepare(vmcore: Path, levels: Sequence[int], output: Path, scratch: Path) -> list[LevelResults]:
    """Bring a vmcore into the page cache, and find out what its levels hold."""
    _say(f"{vmcore}: looking at what its dumps hold")
    with vmcore.open("rb", buffering=0) as file:
        buffer = bytearray(READ_BYTES)
        while file.readinto(buffer):
            pass
    return [LevelResults(dumpers.survey(vmcore, level, output, scratch / f"pages-{level}")) for level in levels]


def _measure(vmcore: Path, results: LevelResults, output: Path, what: str) -> None:
    """Let everyone dump one level once."""
    level = results.content.level
    for dumper in dumpers.dumpers(level):
        if number := _measure_one(vmcore, dumper, results, output):
            _say(f"{what}, level {level}: {dumper}: {number}")
    results.floor.append(dumpers.floor_once(results.content))
    _say(f"{what}, level {level}: libzstd alone: {results.floor[-1].cpu:.2f} s")


def _measure_one(vmcore: Path, dumper: Dumper, results: LevelResults, output: Path) -> str:
    """Let one dump; return what came out of it, nothing where it has refused before."""
    if dumper in results.refused:
        return ""
    try:
        with dumpers.dumped(dumper, vmcore, results.content.level, output) as (sample, _):
            results.samples[dumper].append(sample)
    except NotAvailableError as reason:
        results.refused.add(dumper)
        return f"not available: {reason}"
    except PeerFailedError as reason:
        results.failures[dumper].append(str(reason))
        return str(reason)
    return f"{sample.wall:.2f} s"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
