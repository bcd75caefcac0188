"""Between the job and the kernel: operations below one directory are counted, and the one that is meant is disturbed.

The functions of ``os`` that change a disk are wrapped in the job's own process. That needs no C, no root and no mount,
and runs wherever the tests do; what the job asks of the kernel is asked of these functions alone. Threads are counted
under one lock, which is let go while an operation runs: a sync and a write may overlap, as they do without us.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.builders import PAGE
from tests.lab.faults import Fault

SECTOR = 512
"""A write that finds no more room ends at a sector; one that is killed, at a page of the page cache."""

UNNAMED = "(unnamed)"
NEVER_MADE = 1000
"""A file's number is its inode's times this, and how many files have had that inode under our eyes."""
BY_DESCRIPTOR = ("pwritev", "pwrite", "fdatasync", "fsync", "posix_fallocate", "ftruncate", "fchmod")
BY_PATH = ("mkdir", "chmod", "rename", "replace", "unlink", "rmdir")


class Operation(NamedTuple):
    """One thing that was asked of the disk: the ``number``-th (from 1 on), of ``path`` below the tapped directory."""

    number: int
    kind: str
    path: str
    offset: int = 0
    size: int = 0

    @property
    def file(self) -> str:
        """The name alone; of the file without a name, that."""
        name = Path(self.path).name
        return UNNAMED if name.startswith("#") else name

    def describe(self) -> str:
        where = f" {self.size} bytes at {self.offset}" if self.kind in ("pwritev", "pwrite", "posix_fallocate") else ""
        return f"{self.kind} {self.file}{where}"


class Event(NamedTuple):
    """An operation begins or, with ``ended``, has ended; ``data`` of writes, ``target`` of renames, ``inode``."""

    ended: bool
    operation: Operation
    inode: int = 0
    data: bytes = b""
    target: str = ""


Attempt = Callable[[Fault], int]
"""Has a copy of the job die of a fault that kills, at the operation that is to come; returns its exit status."""
Visit = Callable[[Operation, Attempt], Iterable[Any]]


class Tap:
    """Watches operations below ``root``; with ``fault``, disturbs the ``at``-th of those that it is about.

    ``hit`` is told of the operation just before it is disturbed. ``events`` records all when ``record``. ``visit`` is
    told of each operation before it is done, while the job stands still; what it returns is added to ``visited``.
    """

    def __init__(
        self,
        root: Path,
        fault: Fault | None = None,
        at: int = 0,
        *,
        hit: Callable[[Operation], object] = lambda _operation: None,
        record: bool = False,
        visit: Visit | None = None,
    ) -> None:
        self._root = str(root.resolve())
        self._fault = fault
        self._at = at
        self._hit = hit
        self._record = record
        self._visit = visit
        self._lock = threading.Lock()
        self._matched = 0
        self._cut = ""
        """The file of which a write was cut short: the next one fails."""
        self._made: dict[int, int] = {}
        self.operations: list[Operation] = []
        self.events: list[Event] = []
        self.visited: list[Any] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[Tap]:
        """Wrap the functions of ``os`` while inside."""
        real = {name: getattr(os, name) for name in ("open", *BY_DESCRIPTOR, *BY_PATH)}
        try:
            for name, function in real.items():
                setattr(os, name, self._tapped(name, function))
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    def _tapped(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def tapped(*arguments: Any, **options: Any) -> Any:
            path = self._path(kind, arguments)
            if path is None:
                return function(*arguments, **options)
            return self._operate(kind, path, function, arguments, options)

        return tapped

    def _path(self, kind: str, arguments: tuple[Any, ...]) -> str | None:
        """The path of an operation that is ours to count, else None."""
        if kind in BY_DESCRIPTOR:
            path = str(Path(f"/proc/self/fd/{arguments[0]}").readlink())
        elif kind == "open" and arguments[1] & os.O_TMPFILE == os.O_TMPFILE:
            path = str(Path(os.fsdecode(arguments[0])).absolute() / "#new")
        elif kind == "open" and not arguments[1] & os.O_CREAT:
            return None
        else:
            path = str(Path(os.fsdecode(arguments[0])).absolute())
        return path if path == self._root or path.startswith(self._root + "/") else None

    def _operate(
        self, kind: str, path: str, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        offset, data = 0, b""
        if kind in ("pwritev", "pwrite"):
            data = b"".join(arguments[1]) if kind == "pwritev" else bytes(arguments[1])
            offset = arguments[2]
        elif kind == "posix_fallocate":
            offset, data = arguments[1], bytes(arguments[2])
        elif kind == "ftruncate":
            offset = arguments[1]
        with self._lock:
            operation = Operation(len(self.operations) + 1, kind, path, offset, len(data))
            self.operations.append(operation)
            disturbed = self._disturbed(operation)
            if disturbed:
                self._hit(operation)
                short = self._disturb(operation, function, arguments, data)
                if short is not None:
                    return short
            if self._visit is not None:
                attempt = partial(_killed_copy, operation, function, arguments, options, data)
                self.visited += self._visit(operation, attempt)
            target = str(Path(arguments[1]).absolute()) if kind in ("rename", "replace") else ""
            inode = self._inode(arguments[0]) if kind in BY_DESCRIPTOR else 0
            self._note(Event(False, operation, inode, data, target))
        result = function(*arguments, **options)
        with self._lock:
            if disturbed and self._fault is not None and self._fault.action == "kill after":
                _kill()
            if kind == "open":
                number = os.fstat(result).st_ino
                self._made[number] = self._made.get(number, 0) + 1
                inode = self._inode(result)
            self._note(Event(True, operation, inode, data, target))
        return result

    def _inode(self, fd: int) -> int:
        """A number for a file, which no other has: those of files that are gone are given again."""
        number = os.fstat(fd).st_ino
        return number * NEVER_MADE + self._made.get(number, 0)

    def _note(self, event: Event) -> None:
        if self._record:
            self.events.append(event)

    def _disturbed(self, operation: Operation) -> bool:
        fault = self._fault
        if fault is None or not (operation.kind in fault.operations and fault.concerns(operation.file)):
            return False
        self._matched += 1
        return self._matched == self._at or (fault.lasting and self._matched > self._at) or self._cut == operation.path

    def _disturb(
        self, operation: Operation, function: Callable[..., Any], arguments: tuple[Any, ...], data: bytes
    ) -> int | None:
        """Kill, fail, or write a part and return its size; None where the operation goes on."""
        assert self._fault is not None
        action, number = self._fault.action, getattr(errno, self._fault.action, None)
        if action == "kill before":
            _kill()
        if action == "kill within":
            part = boundary_within(operation)
            if part:
                os_write(operation.kind, function, arguments, data[:part])
            _kill()
        if number is not None and not (self._fault.partly and self._cut != operation.path and len(data) > SECTOR):
            self._cut = ""
            raise OSError(number, os.strerror(number), operation.path)
        if self._fault.partly and operation.kind in ("pwritev", "pwrite") and len(data) > SECTOR:
            if number is not None:
                self._cut = operation.path
            end = (operation.offset + len(data) // 2) // SECTOR * SECTOR
            part = end - operation.offset if end > operation.offset else SECTOR
            os_write(operation.kind, function, arguments, data[:part])
            return part
        return None


def _killed_copy(
    operation: Operation,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    data: bytes,
    fault: Fault,
) -> int:
    """Fork; the child does as much of the operation as it had done when the signal came, and dies of it."""
    child = os.fork()
    if not child:
        try:
            if fault.action == "kill within":
                os_write(operation.kind, function, arguments, data[: boundary_within(operation)])
            if fault.action == "kill after":
                function(*arguments, **options)
            _kill()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def boundary_within(operation: Operation) -> int:
    """How much of a write there is when it is killed in its midst: it ends at a page of the page cache; 0 where none.

    The kernel looks for signals between two pages (``generic_perform_write``), never within one.
    """
    if operation.kind not in ("pwritev", "pwrite"):
        return 0
    first = -operation.offset % PAGE
    if first >= operation.size:
        return 0
    pages = (operation.size - first - 1) // PAGE
    return first + pages // 2 * PAGE or (PAGE if operation.size > PAGE else 0)


def os_write(kind: str, function: Callable[..., Any], arguments: tuple[Any, ...], data: bytes) -> None:
    written = function(arguments[0], [data] if kind == "pwritev" else data, arguments[2])
    if written != len(data):  # (no assert: in an image's interpreter there are none)
        raise OSError(f"{kind} wrote {written} of {len(data)} bytes")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
