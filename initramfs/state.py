"""Small files that outlive a crash: written whole or not at all, and brought to the disk."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from initramfs.errors import StateError

DIRECTORY = Path("/var/lib/vmcapture")


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file in one piece: whoever reads it meanwhile sees the old one or the new one.

    Raises:
        StateError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise StateError(f"{path}: cannot be written: {error.strerror}") from None


def write(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON.

    Raises:
        StateError: it cannot be written.
    """
    write_text(path, json.dumps(values, indent=1) + "\n")


def read(path: Path) -> dict[str, Any] | None:
    """Return what ``write`` wrote; None where there is nothing, or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
