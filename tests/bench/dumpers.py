"""What the dump benchmark runs: us, makedumpfile, plain copies, and libzstd alone as the floor."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from capture.dumpfile.reader import KdumpFile
from capture.errors import SourceError
from tests.guest import host
from tests.guest.host import HostError

SPAWN = Path(__file__).with_name("spawn.py")
USAGE_ERROR = 2
"""Our exit status for a codec that this version does not know."""

SAMPLE_BYTES = 256 << 20
FLOOR_SECONDS = 3

Command = Callable[[Path, int, Path], Sequence[str | Path]]
"""(vmcore, dump level, output) → the command that dumps it."""


class NotAvailableError(HostError):
    """The program does not know how to do this."""


class PeerFailedError(HostError):
    """Somebody else's program failed: makedumpfile's threads do, now and then. The others can still be measured."""


@dataclass(frozen=True, slots=True)
class Dumper:
    """One row of the table. ``whole_file``: it copies all of the source, and makes no dump. ``ours``: it is us."""

    name: str
    codec: str
    threads: str
    command: Command
    whole_file: bool = False
    ours: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.codec}), {self.threads} {'thread' if self.threads == '1' else 'threads'}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One dump: seconds, bytes, and the pages that it says it has (None where it is no dump)."""

    wall: float
    cpu: float
    peak_memory: int
    size: int
    pages: int | None


def _ours(codec: str, threads: int) -> Dumper:
    def command(vmcore: Path, level: int, out: Path) -> Sequence[str | Path]:
        options = ("-d", str(level), "-c", codec, "--threads", str(threads), "--no-progress", "-q")
        return (sys.executable, "-m", "capture", "dump", *options, vmcore, out)

    return Dumper("vmcapture", codec, str(threads), command, ours=True)


def _makedumpfile(option: str, codec: str, threads: int) -> Dumper:
    def command(vmcore: Path, level: int, out: Path) -> Sequence[str | Path]:
        threaded = ("--num-threads", str(threads)) if threads > 1 else ()
        quiet = ("--message-level", "4")  # errors
        return (host.find("makedumpfile"), option, "-d", str(level), *quiet, *threaded, vmcore, out)

    return Dumper(f"makedumpfile {option}", codec, str(threads), command)


def _cp(vmcore: Path, _level: int, out: Path) -> Sequence[str | Path]:
    return (host.find("cp"), "--reflink=never", "--sparse=never", vmcore, out)


def _dd_zstd(vmcore: Path, _level: int, out: Path) -> Sequence[str | Path]:
    pipe = 'dd if="$0" bs=4M status=none | zstd -q -T0 -1 > "$1"'
    return (host.find("bash"), "-o", "pipefail", "-c", pipe, vmcore, out)


OURS_1, OURS_2 = (_ours("zstd:1", threads) for threads in (1, 2))
OURS_AUTO_1, OURS_AUTO_2 = (_ours("zstd:auto", threads) for threads in (1, 2))
PEER_ZLIB_1, PEER_ZLIB_2 = (_makedumpfile("-c", "zlib", threads) for threads in (1, 2))
PEER_LZO_1, PEER_LZO_2 = (_makedumpfile("-l", "lzo", threads) for threads in (1, 2))
DUMPERS = (
    OURS_1,
    OURS_2,
    OURS_AUTO_1,
    OURS_AUTO_2,
    _ours("zlib:1", 1),
    PEER_ZLIB_1,
    PEER_ZLIB_2,
    PEER_LZO_1,
    PEER_LZO_2,
)
COPIES = (
    Dumper("cp", "none", "1", _cp, whole_file=True),
    Dumper("dd bs=4M | zstd -T0 -1", "zstd:1", "all", _dd_zstd, whole_file=True),
)
ALL_PAGES_LEVEL = 1
"""The level that plain copies are set beside: it leaves out nothing but zeros."""


def dumpers(level: int) -> Sequence[Dumper]:
    """Who takes part at a dump level."""
    return (*DUMPERS, *COPIES) if level == ALL_PAGES_LEVEL else DUMPERS


@contextmanager
def dumped(dumper: Dumper, vmcore: Path, level: int, folder: Path) -> Iterator[tuple[Sample, Path]]:
    """Let one dump into ``folder``: what it took, and the dump, which is there until the context ends.

    Raises:
        NotAvailableError: this version of us does not have that codec.
        PeerFailedError: it is not ours, and failed.
        HostError: ours failed.
    """
    with tempfile.TemporaryDirectory(prefix="dump-", dir=folder) as name:
        out = Path(name) / "dump"
        done = _spawn(dumper.command(vmcore, level, out))
        if dumper.ours and done.status == USAGE_ERROR:
            raise NotAvailableError(done.said)
        if done.status:
            kind = HostError if dumper.ours else PeerFailedError
            raise kind(f"{dumper} failed with status {done.status} on {vmcore}, level {level}: {done.said}")
        pages = None if dumper.whole_file else _pages(out)
        yield Sample(done.wall, done.cpu, done.peak_memory, out.stat().st_size, pages), out


@dataclass(frozen=True, slots=True)
class _Done:
    """A program that has ended: its exit status, seconds, bytes, and the last of what it said."""

    status: int
    wall: float
    cpu: float
    peak_memory: int
    said: str


def _spawn(command: Sequence[str | Path]) -> _Done:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SPAWN), *map(str, command)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    said = " | ".join(done.stderr.strip().splitlines()[-3:])
    if done.returncode:
        raise HostError(f"{command[0]} could not be started: {said}")
    _, status, wall, user, system, peak = done.stdout.split()
    return _Done(int(status), float(wall), float(user) + float(system), int(peak) << 10, said)


def _pages(path: Path) -> int:
    """How many pages a dump has: dumpers that leave out different pages cannot be compared."""
    with KdumpFile(path) as dump:
        return dump.page_count()


@dataclass(frozen=True, slots=True)
class Content:
    """What a dump of one level holds. ``sample`` is a file of some of its pages that are not zero."""

    level: int
    page_size: int
    pages: int
    zero_pages: int
    sample: Path

    @property
    def compressed_bytes(self) -> int:
        """Bytes that a dumper has to compress: zero pages are stored once."""
        return (self.pages - self.zero_pages) * self.page_size


def survey(vmcore: Path, level: int, folder: Path, sample: Path) -> Content:
    """Dump once into ``folder``, unmeasured, to know what a level holds; write the file ``sample`` of it.

    Raises:
        HostError: no dump of that level can be made.
        SourceError: the dump cannot be read back.
    """
    with dumped(OURS_2, vmcore, level, folder) as (_, out), KdumpFile(out) as dump:
        if dump.level != level:
            raise HostError(f"{vmcore} cannot be dumped at level {level}: what is made is level {dump.level}")
        zero_pages = _write_sample(dump, sample)
        return Content(level, dump.page_size, dump.page_count(), zero_pages, sample)


def _write_sample(dump: KdumpFile, path: Path) -> int:
    """Write up to SAMPLE_BYTES of pages that are not zero, evenly spread; return how many are zero."""
    step = max(1, -(-dump.page_count() * dump.page_size // SAMPLE_BYTES))
    zero_pages, number = 0, 0
    with path.open("wb") as file:
        for batch in dump.pages():
            if batch.bad:
                raise SourceError(
                    f"{dump.path}: {len(batch.bad)} pages cannot be read: {next(iter(batch.bad.values()))}"
                )
            filled = batch.data[batch.data.any(axis=1)]
            zero_pages += len(batch.data) - len(filled)
            file.write(filled[-number % step :: step].tobytes())
            number += len(filled)
    return zero_pages


def floor_once(content: Content) -> Sample:
    """What libzstd's level 1 alone needs for the pages of a level, one by one, in memory: its CPU time.

    ``zstd -b`` tells the wall time of its fastest pass; of that, the share that it had of a CPU is taken. It has the
    host's libzstd, which may not be ours.

    Raises:
        HostError: zstd is missing, or does not say how fast it was.
    """
    benchmark = ("-q", "-b1", f"-B{content.page_size}", f"-i{FLOOR_SECONDS}", "-T1")
    done = _spawn((host.find("zstd"), *benchmark, content.sample))
    found = re.search(r"\(([0-9.]+)\) +([0-9.]+) MB/s", done.said)
    if done.status or found is None:
        raise HostError(f"zstd -b does not say how fast it was: {done.said}")
    ratio, speed = map(float, found.groups())
    seconds = content.compressed_bytes / (speed * 1e6)
    return Sample(seconds, seconds * min(1.0, done.cpu / done.wall), 0, int(content.compressed_bytes / ratio), None)
