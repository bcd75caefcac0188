"""What we say while we work: lines on the console, kept for capture-log.txt as well."""

from __future__ import annotations

import sys
from typing import TextIO

PREFIX = "vmcapture: "
MAX_KEPT = 2000


class Console:
    """Prints lines to ``file`` (standard error when left out) and keeps the last MAX_KEPT of them."""

    def __init__(self, *, quiet: bool = False, file: TextIO | None = None) -> None:
        self._quiet = quiet
        self._file = file
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Print and keep one line."""
        line = printable(line)
        self.lines.append(line)
        del self.lines[:-MAX_KEPT]
        if not self._quiet:
            print(PREFIX + line, file=self._file or sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return ``text`` on one line with nothing in it that a terminal would act on: it may come from a dead kernel."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
