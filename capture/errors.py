"""What can go wrong, and the exit status that each failure ends with.

Every message is one line for the person at the console: what, where (offset, PFN, path), what to do.
Low layers raise; only ``capture.cli`` prints.
"""

from __future__ import annotations

from typing import ClassVar


class CaptureError(Exception):
    """The command failed. ``exit_status`` is what the process ends with."""

    exit_status: ClassVar[int] = 1

    @property
    def lines(self) -> tuple[str, ...]:
        """What to print: one line, unless several things are wrong at once (a configuration file)."""
        return (str(self),)


class UsageError(CaptureError):
    """The request itself is wrong: an option, a combination, a level that does not exist."""

    exit_status = 2


class IncompleteError(CaptureError):
    """Something was saved and is readable, but it is not whole (and is marked so)."""

    exit_status = 3


class SourceError(CaptureError):
    """The source is not a usable vmcore."""

    exit_status = 4


class TargetError(CaptureError):
    """The target cannot be written."""

    exit_status = 5
