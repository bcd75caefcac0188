"""A directory of the virtual machine's host (virtiofs), by its tag."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from capture import pulse
from capture.boot import mounting
from capture.boot.targets import place_of
from capture.console import Console
from capture.errors import TargetError

_POLL = 0.5


@contextmanager
def mounted(target: str, wait: int, console: Console, _device: str | None = None) -> Iterator[Path]:
    """Mount ``target``, trying for up to ``wait`` seconds: its device may be found late.

    Raises:
        TargetError: it cannot be mounted.
    """
    command = ["mount", "-t", "virtiofs", "-o", "rw", place_of(target)]
    deadline = time.monotonic() + wait
    announced = False
    with ExitStack() as stack:
        while True:
            try:
                point = stack.enter_context(mounting.mounted(command, target, target, console))
            except TargetError:
                if time.monotonic() >= deadline:
                    raise
            else:
                break
            if not announced:
                console.say(f"waiting up to {wait} s for {target}")
                announced = True
            pulse.beat()  # to wait is what was asked for
            time.sleep(_POLL)
        yield point
