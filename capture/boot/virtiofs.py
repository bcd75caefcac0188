"""A directory of the virtual machine's host (virtiofs), by its tag."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from capture.boot import mounting
from capture.boot.targets import place_of
from capture.boot.waiting import attempts
from capture.console import Console
from capture.errors import TargetError


@contextmanager
def mounted(target: str, wait: int, console: Console, _device: str | None = None) -> Iterator[Path]:
    """Mount ``target``, trying for up to ``wait`` seconds: its device may be found late.

    Raises:
        TargetError: it cannot be mounted.
    """
    command = ["mount", "-t", "virtiofs", "-o", "rw", place_of(target)]
    failure = TargetError(target)
    with ExitStack() as stack:
        for _ in attempts(time.monotonic() + wait, console, lambda: f"waiting up to {wait} s for {target}"):
            try:
                point = stack.enter_context(mounting.mounted(command, target, target, console))
            except TargetError as error:
                failure = error
            else:
                break
        else:
            raise failure
        yield point
