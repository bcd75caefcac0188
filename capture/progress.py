"""How far the job is: one progress bar on a terminal, a plain line every few seconds where there is none."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from capture import pulse
from capture.console import print_line

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_INTERVAL = 5.0
"""Seconds between two plain lines."""
DEFAULT_COLUMNS, DEFAULT_ROWS = 80, 24


class Progress:
    """Counts bytes of memory handled towards ``total``. Use as a context manager."""

    def __init__(self, label: str, total: int, *, enabled: bool = True, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._label = label
        self._total = total
        self._done = 0
        self._enabled = enabled
        self._started = self._printed = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if enabled and self._file.isatty():
            from tqdm import tqdm  # brings a seventh of all imports, for those who look

            tqdm.monitor_interval = 0  # no watcher thread: the bar is moved at every chunk anyway
            self._bar = tqdm(
                total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, file=self._file, mininterval=0.5,
                ncols=_columns(self._file), nrows=DEFAULT_ROWS, ascii=True,
            )  # fmt: skip

    def advance(self, count: int) -> None:
        """Count ``count`` more bytes."""
        pulse.beat()
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._printed >= LINE_INTERVAL:
            self._print_line()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def _print_line(self) -> None:
        from tqdm import tqdm

        self._printed = time.monotonic()
        text = tqdm.format_meter(
            self._done,
            self._total,
            self.seconds,
            ncols=DEFAULT_COLUMNS - 1,
            prefix=self._label,
            ascii=True,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            bar_format="{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left",
        )
        print_line(text, self._file)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _columns(terminal: TextIO) -> int:
    """Return the columns that a bar may take. A serial console has none by its own account, and tqdm believes it."""
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns
    except OSError:
        columns = 0
    return (columns or DEFAULT_COLUMNS) - 1
