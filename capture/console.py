"""What we say while we work: lines on the console, kept for capture-log.txt as well."""

from __future__ import annotations

import contextlib
import io
import os
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
            print_line(PREFIX + line, self._file)


def print_line(line: str, file: TextIO | None = None) -> None:
    """Print to a console (standard error when left out) that may be gone: that is no reason to stop saving."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=file or sys.stderr, flush=True)


def open_standard_streams() -> bool:
    """Make sure that descriptors 0 to 2 are open and that text of any kind can be printed.

    Returns whether somebody gave us a standard output.

    Without a console (/dev/console cannot be opened) a process starts without them; a dump must not become number 1.
    """
    given = sys.stdout is not None
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
        sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return given


def printable(text: str) -> str:
    """Return ``text`` on one line with nothing in it that a terminal would act on: it may come from a dead kernel."""
    return "".join(letter if letter.isprintable() else f"\\x{_number(letter):02x}" for letter in text)


def _number(letter: str) -> int:
    """Return what a letter is spelt out as: a byte of a file's name that is not UTF-8 as that byte (PEP 383)."""
    number = ord(letter)
    return number - 0xDC00 if 0xDC80 <= number <= 0xDCFF else number
