"""Crashes that were really saved: directories as a save leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capture.boot import job
from capture.console import Console
from capture.vmcore import open_vmcore
from tests.builders import PrintkRing, crashed_core
from tests.outcome import dump_options

FIRST = 1_700_000_000
"""When the kernels of ``builders`` crash, seconds since 1970."""


def name_of(when: int, host: str = "db7") -> str:
    """What the directory of such a crash is called."""
    return f"{host}-{datetime.fromtimestamp(when, UTC):%Y-%m-%d-%H:%M:%S}"


def save_crash(
    parent: Path,
    when: int = FIRST,
    *,
    host: bytes = b"db7",
    pages: bytes = b"",
    log: PrintkRing | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Save the crash of a machine that crashed ``when`` seconds after 1970; return its directory."""
    source = parent.parent / f"{when}.elf"
    source.write_bytes(crashed_core(host, pages=pages, log=log, keys={"CRASHTIME": str(when)}))
    with open_vmcore(str(source)) as vmcore:
        saved = job.save(vmcore, parent, dump_options(**(options or {})), Console(quiet=True), usual_recipients=False)
    source.unlink()
    return saved.directory
