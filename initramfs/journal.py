"""One structured line to the system's journal, by its native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from capture.console import PREFIX, print_line, printable

SOCKET = Path("/run/systemd/journal/socket")
CRITICAL, WARNING, NOTICE = 2, 4, 5
"""Priorities of syslog(3)."""
IDENTIFIER = "vmcapture"


def log(message: str, priority: int, fields: Mapping[str, str | int | None], *, quiet: bool = False) -> None:
    """Write one line, with fields beside it.

    It is printed on standard error as well, unless ``quiet``, or that is the journal already.
    """
    taken = _send(message, priority, fields)
    if not quiet and not (taken and "JOURNAL_STREAM" in os.environ):
        print_line(PREFIX + printable(message))


def _send(message: str, priority: int, fields: Mapping[str, str | int | None]) -> bool:
    values = {"MESSAGE": message, "PRIORITY": priority, "SYSLOG_IDENTIFIER": IDENTIFIER, **fields}
    # NAME=value and a newline: what is printable has none.
    lines = [f"{name}={printable(str(value))}\n" for name, value in values.items() if value is not None]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as journal:
            journal.sendto("".join(lines).encode("utf-8", "replace"), str(SOCKET))
    except OSError:  # no systemd here
        return False
    return True
