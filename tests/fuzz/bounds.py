"""What must hold for every input, and how that is looked at.

A dead kernel may hand us anything. Whatever it is, a parser succeeds or raises a CaptureError; what it says is one
line without control characters; memory and time are bounded; no file stays open.

Each input has a limit on processor time, on address space (RLIMIT_AS: what asks for more gets a MemoryError, which is a
finding), and its open files are counted. What Python and NumPy allocate is measured exactly (tracemalloc) where
``measured`` says so: that takes four times as long, so a long run measures every input that reaches a new branch and a
share of the others.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from capture.errors import CaptureError
from tests.fuzz.mutation import Seed

MAX_SECONDS = 3.0
"""Processor time for one input; three times as much while the memory of every allocation is traced."""
MAX_BYTES = 256 << 20
"""Peak of what Python and NumPy allocate for one input."""
MAX_ADDRESS_SPACE = 512 << 20
"""What an input may add to the address space of the process; a thread with its part of the heap reserves 72 MiB."""


class FindingError(Exception):
    """An input that breaks what must hold; the message says how, ``where`` is what findings of one cause share."""

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.where = where or re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", message)[:80]


class Overdue(BaseException):  # not an Exception: nothing that is fuzzed may catch it
    """An input takes too long."""


@dataclass(frozen=True, slots=True)
class Target:
    """``run`` takes a file with the input and returns the lines that a person would read.

    ``seconds`` is what one input may take.
    """

    name: str
    run: Callable[[Path], Sequence[str]]
    seeds: Callable[[], Sequence[Seed]]
    seconds: float = MAX_SECONDS


def check(target: Target, data: bytes, path: Path, *, measured: bool = True) -> None:
    """Run one input, written to ``path``.

    Raises:
        FindingError: it breaks what must hold.
    """
    path.unlink(missing_ok=True)  # a new file: ext4 writes one that is replaced in place to the disk at once
    path.write_bytes(data)
    files = _open_files()
    with _memory_limit() if measured else contextlib.nullcontext():
        lines = _run(target, path, 3 * target.seconds if measured else target.seconds)
    if _open_files() > files:
        raise FindingError("a file stays open")
    for line in lines:
        if not line.isprintable():
            raise FindingError(f"not one printable line: {line!r}")


@contextlib.contextmanager
def limit_address_space() -> Iterator[Callable[[], None]]:
    """Let nothing add more than MAX_ADDRESS_SPACE to what this process has when what is yielded was called last."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def renew() -> None:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_ADDRESS_SPACE, before[1]))

    try:
        yield renew
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def scratch_folder() -> Path | None:
    """Return where inputs are written: memory, where there is such a file system. None: wherever is usual."""
    memory = Path("/proc/self/root/dev/shm")  # (a SOURCE below /dev is old memory, and this kernel's log is saved too)
    return memory if os.access(memory, os.W_OK) else None


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (the quickest way)


def _run(target: Target, path: Path, seconds: float) -> Sequence[str]:
    try:
        with _time_limit(seconds):
            return target.run(path)
    except CaptureError as error:
        return [str(error)]
    except FindingError:
        raise
    except Overdue as error:
        where = _raised_at(error.__traceback__)
        raise FindingError(f"more than {seconds} seconds ({where})", f"time: {where}") from None
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise FindingError(f"{kind}: {error}", f"{kind}: {_raised_at(error.__traceback__)}") from error


def _raised_at(trace: TracebackType | None) -> str:
    """Return the innermost place of the program (else of anything) that a traceback goes through."""
    frames = traceback.extract_tb(trace)
    ours = [frame for frame in frames if "/capture/" in frame.filename] or frames[-1:]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "nowhere"


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced:
            tracemalloc.stop()
    if peak > MAX_BYTES:
        raise FindingError(f"{peak >> 20} MiB of memory")


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def overdue(_signal: int, _frame: FrameType | None) -> None:
        raise Overdue

    previous = signal.signal(signal.SIGPROF, overdue)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    started = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    if time.process_time() - started > 2 * seconds:  # in one call into C, which no signal interrupts
        raise FindingError(f"more than {2 * seconds} seconds")
