"""Waits for what may come yet: a disk, a card, a server. One line says so, and the watch over the job hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from capture import pulse
from capture.console import Console

_POLL = 0.5


def attempts(deadline: float, console: Console, line: Callable[[], str], poll: float = _POLL) -> Iterator[None]:
    """Yield for every attempt: once at least, and again until ``deadline`` (time.monotonic).

    After the first one ``line`` is asked what is waited for; that is said. ``poll`` seconds are between two attempts.
    """
    yield
    announced = False
    while time.monotonic() < deadline:
        if not announced:
            console.say(line())
            announced = True
        pulse.beat()  # to wait is what was asked for
        time.sleep(poll)
        yield
