"""What goes wrong around the program, on purpose: full disks, power cuts, poisoned memory, calls that fail."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

from capture.dumpfile.codec import Codec, codec
from capture.dumpfile.output import OutputFile
from capture.memory import elfcore
from capture.memory.image import MemoryImage
from capture.memory.source import Source
from capture.notes import vmcoreinfo
from capture.notes.elfnote import read_notes
from capture.vmcore import Vmcore
from tests.builders import PAGE


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises ``error`` whatever it is given."""

    def raise_it(*_arguments: Any, **_options: Any) -> NoReturn:
        raise error

    return raise_it


# --- limits of the process ------------------------------------------------------------------------------------------


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process grows beyond ``limit`` bytes: a write is cut there, the next one fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def address_space_limit(size: int) -> Callable[[], None]:
    """``preexec_fn`` of a process that gets ``size`` bytes of address space."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


def refused_to_others(action: Callable[[], object], error: type[Exception], words: str) -> None:
    """Hold that ``action`` raises ``error`` with ``words`` for who is not root; of root, a child steps down."""
    if os.geteuid() != 0:
        with pytest.raises(error, match=words):
            action()
        return
    child = os.fork()
    if not child:
        os.setuid(65534)
        try:
            action()
        except error as refused:
            os._exit(0 if words in str(refused) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- disks ----------------------------------------------------------------------------------------------------------


@contextmanager
def tmpfs(folder: Path, options: str, *, lazy: bool = True) -> Iterator[Path]:
    """A small file system at ``folder``; skips where we may not mount.

    Unless ``lazy``, a file that is still open at the end is an error (a failed test may hold one, too).
    """
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", *(["-l"] if lazy else []), str(folder)], check=True)


@contextmanager
def loop_device(image: Path, size: int) -> Iterator[Path]:
    """A block device of ``size`` bytes, which are those of a file; skips where there can be none."""
    with image.open("ab") as file:
        file.truncate(size)
    try:
        made = subprocess.run(["losetup", "-f", "--show", image], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


# --- writes that fail -----------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """The process is gone: nothing after this may count on anything."""


@functools.cache
def failing(kind: type[BaseException], after: int, torn: bool) -> type[OutputFile]:
    """An output that raises ``kind`` after its ``after``-th write, or in the midst of it (``torn``): a write that is
    killed ends at a page of the page cache, or has not begun."""

    class Failing(OutputFile):
        left = after

        def write(self, pieces: Sequence[bytes | memoryview], offset: int) -> int:
            self.left -= 1
            if self.left:
                return super().write(pieces, offset)
            self.left = -1
            data = b"".join(pieces)
            to_boundary = -offset % PAGE
            super().write([data[: to_boundary if to_boundary < len(data) else 0] if torn else data], offset)
            raise kind

    return Failing


@functools.cache
def interrupted_after(writes: int) -> type[OutputFile]:
    """An output whose ``writes``-th write is followed by Ctrl-C, which only ever reaches the main thread."""

    class Interrupted(OutputFile):
        done = 0

        def write(self, pieces: Sequence[bytes | memoryview], offset: int) -> int:
            written = super().write(pieces, offset)
            self.done += 1
            if self.done >= writes and threading.current_thread() is threading.main_thread():
                self.done = -sys.maxsize
                raise KeyboardInterrupt
            return written

    return Interrupted


def failing_codec(error: Exception) -> Callable[[str], Codec]:
    """A codec that works twice."""
    plain = codec("zstd")
    turns = iter(range(1000))

    def pack(buffer: memoryview, offsets: NDArray[np.uint64], size: int) -> tuple[bytes, NDArray[np.int64]]:
        if next(turns) >= 2:
            raise error
        assert plain.pack is not None
        return plain.pack(buffer, offsets, size)

    return lambda _spelling: Codec("failing", plain.flag, pack)


# --- power cuts, from a record of what was asked of the disk --------------------------------------------------------


@dataclass(frozen=True)
class Step:
    what: str
    offset: int = 0
    data: bytes = b""


class Recorded(OutputFile):
    """An output that remembers what was asked of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.steps: list[Step] = []

    def write(self, pieces: Sequence[bytes | memoryview], offset: int) -> int:
        self.steps.append(Step("write", offset, b"".join(pieces)))
        return super().write(pieces, offset)

    def reserve(self, offset: int, length: int) -> None:
        self.steps.append(Step("write", offset, bytes(length)))
        super().reserve(offset, length)

    def sync(self) -> None:
        self.steps.append(Step("sync"))
        super().sync()


def recorded(path: Path) -> closing[Recorded]:
    path.unlink(missing_ok=True)
    return closing(Recorded(path))


def after_power_cut(steps: Sequence[Step], chance: random.Random) -> bytes:
    """What the disk has: everything before the last sync, and of the blocks since then any that it pleases."""
    last = max((index for index, step in enumerate(steps) if step.what == "sync"), default=-1)
    kept = list(_blocks(steps[: last + 1])) + [block for block in _blocks(steps[last + 1 :]) if chance.random() < 0.5]
    disk = bytearray()
    for block in kept:
        end = block.offset + len(block.data)
        disk.extend(bytes(max(0, end - len(disk))))
        disk[block.offset : end] = block.data
    return bytes(disk)


def _blocks(steps: Sequence[Step]) -> Iterator[Step]:
    """The writes as the page cache has them: a block of 4 KiB at a time."""
    for step in steps:
        at = 0
        while at < len(step.data):
            take = min(len(step.data) - at, PAGE - (step.offset + at) % PAGE)
            yield Step("write", step.offset + at, step.data[at : at + take])
            at += take


# --- memory that cannot be read -------------------------------------------------------------------------------------


class _Poisoned(Source):
    """A source that gives EIO for one range of bytes, as poisoned memory does, after ``delay`` seconds."""

    bad = range(0)
    delay = 0.0

    def map(self, offset: int, length: int) -> memoryview | None:
        self._fail_within(offset, length)
        return super().map(offset, length)

    def read(self, offset: int, length: int) -> bytes:
        self._fail_within(offset, length)
        return super().read(offset, length)

    def _fail_within(self, offset: int, length: int) -> None:
        if offset < self.bad.stop and self.bad.start < offset + length:
            time.sleep(self.delay)
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def open_poisoned(name: str, bad: range, delay: float = 0.0) -> Vmcore:
    """Open a vmcore of which the bytes ``bad`` cannot be read, other than its headers and notes.

    That they cannot shows after ``delay`` seconds each time.
    """
    source = _Poisoned(name)
    source.delay = delay
    core = elfcore.parse(source)
    notes = read_notes(source, core.notes)
    note = notes.vmcoreinfo()
    info = vmcoreinfo.parse(note.descriptor if note else b"")
    source.bad = bad
    return Vmcore(source, core, notes, info, MemoryImage(source, core.loads, info.page_size))


@contextmanager
def memory_with_holes(data: bytes, gone: Collection[int]) -> Iterator[int]:
    """Our own memory, to be read through /proc/self/mem: the address of ``data``, its pages ``gone`` taken away.

    A page that is not mapped there fails with EIO, as a poisoned one does.
    """
    window = mmap.mmap(-1, len(data))
    window[:] = data
    address = ctypes.addressof(ctypes.c_char.from_buffer(window))
    libc = ctypes.CDLL(None, use_errno=True)
    # Pages of PROT_NONE would still be read (FOLL_FORCE): take them away.
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    for number in gone:
        assert libc.munmap(address + number * PAGE, PAGE) == 0
    try:
        yield address
    finally:
        map_fixed, map_private, map_anonymous = 0x10, 2, 0x20
        for number in gone:  # put pages back before the mapping is taken down
            libc.mmap(address + number * PAGE, PAGE, 3, map_fixed | map_private | map_anonymous, -1, 0)
