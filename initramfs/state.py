"""Small files that outlive a crash: written whole or not at all, and brought to the disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capture.dumpfile.output import fsync_directory, not_replaced
from initramfs.errors import StateError

DIRECTORY = Path("/var/lib/vmcapture")


@contextmanager
def alone(lock: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Wait until no other process is in here with this file; ``waiting`` is called where there is one.

    Raises:
        OSError: the file cannot be made.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file in one piece: whoever reads it meanwhile sees the old one or the new one.

    The directory may be somebody else's (the exporter's), who must not lead us to another file by a link.

    Raises:
        StateError: it cannot be written.
    """
    draft = None
    try:
        refusal = not_replaced(path)
        if refusal is not None:
            raise StateError(f"{path}: {refusal}")
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
        draft = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        raise StateError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            if draft is not None:
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
