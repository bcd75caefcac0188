"""Signs of life of a save, in memory that the process which watches over it shares (capture.boot.supervisor).

A save that hangs cannot say so: a disk that stopped answering keeps the thread that wrote to it in the kernel, where
not even SIGKILL reaches it. So whatever moves bytes beats here, and where nobody shares the memory that costs a
function call.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_BEATS, _WAITING, _LOG = range(3)
"""Where in the shared memory, in 64-bit words: beats so far; calls that wait for the target; whether it has the log."""


class Pulse:
    """What a process and those that it forks from now on can see of one another's work."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._lock = threading.Lock()

    @property
    def beats(self) -> int:
        """A number that changes while bytes move."""
        return self._words[_BEATS]

    @property
    def waits_for_target(self) -> bool:
        """Whether a call to the target has begun that has not come back."""
        return self._words[_WAITING] > 0

    @property
    def log_saved(self) -> bool:
        """Whether the dead kernel's log is on the target."""
        return self._words[_LOG] > 0

    def reset(self) -> None:
        """Forget what a process that is gone left behind."""
        self._words[_WAITING] = self._words[_LOG] = 0

    def beat(self) -> None:
        """Bytes have moved."""
        self._words[_BEATS] += 1

    def note_log(self) -> None:
        """The dead kernel's log is on the target."""
        self._words[_LOG] = 1

    def waiting(self, calls: int) -> None:
        """Count calls to the target that have begun (1) or come back (-1)."""
        with self._lock:
            self._words[_WAITING] += calls


_shared: Pulse | None = None


def share(pulse: Pulse | None) -> None:
    """Let the signs of this process, and of those that it forks, go to ``pulse``; None: nowhere."""
    global _shared  # one for a process: everything in it works for one save
    _shared = pulse


def beat() -> None:
    """Bytes have moved: read from the source, written to the target, or read back."""
    if _shared is not None:
        _shared.beat()


def note_log() -> None:
    """The dead kernel's log is on the target."""
    if _shared is not None:
        _shared.note_log()


@contextmanager
def at_target() -> Iterator[None]:
    """Around a call that waits for the target's disk; that it has come back is a sign of life."""
    pulse = _shared
    if pulse is None:
        yield
        return
    pulse.waiting(1)
    try:
        yield
    finally:
        pulse.waiting(-1)
        pulse.beat()
