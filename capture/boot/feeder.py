"""Feeds the watchdog while the job moves: a thread that looks once a second at what the process has done."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capture.boot.watchdog import Watchdog

IO = Path("/proc/self/io")
INTERVAL = 1.0


@contextmanager
def fed_while_it_moves(dog: Watchdog) -> Iterator[None]:
    """Feed ``dog`` as long as the block writes bytes, or computes: a disk that hangs has it do neither."""
    if not dog.armed:
        yield
        return
    done = threading.Event()
    feeder = threading.Thread(target=_feed, args=(dog, done), name="watchdog", daemon=True)
    feeder.start()
    try:
        yield
    finally:
        done.set()
        feeder.join()


def _feed(dog: Watchdog, done: threading.Event) -> None:
    written, computed = _written(), _computed()
    while not done.wait(INTERVAL):
        if _written() > written or _computed() > computed + INTERVAL / 10:  # to look takes some CPU time, too
            dog.feed()
        written, computed = _written(), _computed()


def _written() -> int:
    """Return the bytes that this process has written, files and console."""
    found = re.search(r"^wchar: (\d+)", IO.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else 0


def _computed() -> float:
    """Return the seconds of CPU time that this process and its children have taken."""
    return sum(os.times()[:4])
