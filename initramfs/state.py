"""Small files that outlive a crash: written whole or not at all, and brought to the disk."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from capture.dumpfile.output import fsync_directory, not_replaced
from initramfs.errors import StateError

DIRECTORY = Path("/var/lib/vmcapture")


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file in one piece: whoever reads it meanwhile sees the old one or the new one.

    Raises:
        StateError: it cannot be written.
    """
    draft = path.parent / f".{path.name}.{os.getpid()}.new"
    try:
        refusal = not_replaced(path)
        if refusal is not None:
            raise StateError(f"{path}: {refusal}")
        with draft.open("w", encoding="utf-8", errors="surrogateescape") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise StateError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def make_directory(path: Path) -> None:
    """Make a directory and those above it, where they are missing.

    Raises:
        StateError: that cannot be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"{path}: cannot be made: {error.strerror}") from None


def write(path: Path, values: dict[str, Any], mode: int = 0o600) -> None:
    """Write values as JSON.

    Raises:
        StateError: it cannot be written.
    """
    make_directory(path.parent)
    write_text(path, json.dumps(values, indent=1) + "\n", mode)


def read(path: Path) -> dict[str, Any] | None:
    """Return what ``write`` wrote; None where there is nothing, or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
